"""Speculative decoding: the tokens of autoregressive decoding, whatever drafts are worth, in fewer forwards."""

import collections
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_cases import MODEL, oracle_forward, random_params, random_prompts

from refusion_jax.errors import UserError
from refusion_jax.objective.autoregressive import Autoregressive
from refusion_jax.objective.refusion import Refusion
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.sampling import (
    AutoregressiveConfig,
    Engine,
    Prompt,
    Report,
    SpeculativeConfig,
    generate,
    stream,
)
from refusion_jax.sampling.programs import make_sampler, programs

pytestmark = pytest.mark.usefixtures("quick_compiles")

LENGTH, BATCH = 24, 8
PLAIN = AutoregressiveConfig(gen_length=LENGTH)
DRAFTS = {
    "model": SpeculativeConfig(gen_length=LENGTH, draft_length=4, cuts=3),
    "model, one cut": SpeculativeConfig(gen_length=LENGTH, draft_length=5, cuts=1),
    "lookup": SpeculativeConfig(gen_length=LENGTH, draft_length=4, draft="lookup"),
    "lookup_first": SpeculativeConfig(gen_length=LENGTH, draft_length=3, cuts=4, draft="lookup_first", ngram=3),
}
MODELS = 120


def decode(params, config, prompts, model=MODEL, **options):
    return generate(params, model, config, prompts, batch_size=BATCH, **options)


@pytest.fixture(scope="module")
def cases():
    """[(parameters, prompts, autoregressive answers)]: random models, from those that look at the text alone to very
    sure ones; ragged prompts, more of them than rows.
    """
    found = []
    for seed in range(MODELS):
        params = random_params(seed, scale=0.1 + 1.5 * (seed % 10) / 10)
        prompts = random_prompts(seed, BATCH + 3)
        found.append((params, prompts, decode(params, PLAIN, prompts)))
    return found


@pytest.mark.parametrize("name", DRAFTS)
def test_greedy_tokens_are_the_autoregressive_ones(cases, name):
    """EOS anywhere, the limit in the middle of a draft, rows refilled; one program for all models."""
    config, counts = DRAFTS[name], collections.Counter()
    loop = programs(make_sampler(MODEL, config, BATCH), None).run.jitted
    before = loop._cache_size()
    for params, prompts, wanted in cases:
        for answer, plain in zip(decode(params, config, prompts), wanted, strict=True):
            assert answer.tokens == answer.committed == plain.tokens
            assert answer.order == list(range(len(plain.tokens)))
            assert answer.forwards <= plain.forwards
            assert answer.forwards == len(set(answer.rounds))
            last_pass = answer.rounds.count(answer.rounds[-1])
            ended = answer.tokens[-1] == MODEL.eos_token_id
            counts["forwards"] += answer.forwards
            counts["tokens"] += len(answer.tokens)
            counts["ended in a draft"] += ended and last_pass > 1
            counts["limit in a draft"] += not ended and last_pass > 1
    print(name, dict(counts), f"{counts['tokens'] / counts['forwards']:.2f} tokens per forward")
    assert loop._cache_size() <= before + 1
    assert counts["forwards"] < 0.95 * counts["tokens"]
    assert counts["ended in a draft"] > 10 and counts["limit in a draft"] > 10


@pytest.mark.parametrize("draft", ["model", "lookup_first"])
def test_every_request_has_its_own_settings(draft):
    """Temperature, top-k, top-p, limit, stop ids and seed by row, sampled or greedy: the autoregressive tokens of that
    request, and a draft with a temperature is worth something too.
    """
    params, prompts = random_params(1, scale=1.2), random_prompts(2, 24)
    changes = [
        dict(temperature=0.0),
        dict(temperature=0.7),
        dict(temperature=1.3, top_k=3),
        dict(temperature=0.9, top_p=0.8),
    ]

    def answers(config):
        engine = Engine(params, MODEL, config, 4, max_prompt_length=16)
        waiting, found = list(range(len(prompts))), {}
        while waiting or engine.busy:
            while waiting:
                index = waiting[0]
                request = Prompt(
                    prompts[index],
                    dataclasses.replace(config, **changes[index % 4]),
                    index,
                    seed=5,
                    limit=LENGTH - index % 7,
                    stop_ids=(index % 12,) if index % 3 == 0 else (),
                )
                if engine.add(request) is None:
                    break
                waiting.pop(0)
            found |= {answer.index: answer for answer in engine.step(3)}
        return found

    wanted, found = answers(PLAIN), answers(DRAFTS[draft])
    assert {i: a.tokens for i, a in found.items()} == {i: a.tokens for i, a in wanted.items()}
    sampled = [i for i in found if i % 4]
    assert sum(found[i].forwards for i in sampled) < sum(wanted[i].forwards for i in sampled)


@pytest.mark.parametrize("restriction", [{}, {"top_k": 4}, {"top_p": 0.7}], ids=str)
def test_distribution_is_the_models(restriction):
    """Counts of the first two tokens over many seeds, the second one drafted, against the model's probabilities after
    temperature, top-k and top-p.
    """
    temperature, draws = 1.2, 1500
    params, prompt = random_params(4, scale=0.4), [5, 3, 8]
    config = dataclasses.replace(
        DRAFTS["model"], gen_length=3, draft_length=2, cuts=3, temperature=temperature, **restriction
    )
    answers = generate(params, MODEL, config, [prompt] * draws, batch_size=64)
    forward, eos = oracle_forward(params), MODEL.eos_token_id

    def distribution(tokens):
        """[vocab] float64 of the next token."""
        n = len(tokens)
        probs = forward(np.array(tokens), np.arange(n), np.tri(n, dtype=bool))[-1][: MODEL.logical_vocab_size].copy()
        probs[[MODEL.mask_token_id, MODEL.begin_token_id]] = 0
        probs = probs ** (1 / temperature)
        probs /= probs.sum()
        by_size = np.argsort(-probs)
        kept = len(probs)
        if "top_k" in restriction:
            kept = restriction["top_k"]
        if "top_p" in restriction:
            kept = int(np.argmax(np.cumsum(probs[by_size]) >= restriction["top_p"])) + 1
        probs[by_size[kept:]] = 0
        return probs / probs.sum()

    first = distribution(prompt)
    expected = {}
    for a in np.flatnonzero(first):
        if a == eos:
            expected[(eos,)] = first[a]
            continue
        second = distribution([*prompt, a])
        expected |= {(a, b): first[a] * second[b] for b in np.flatnonzero(second)}
    counts = collections.Counter(tuple(answer.tokens[:2]) for answer in answers)
    assert set(counts) <= set(expected)
    common = [pair for pair, p in expected.items() if p * draws >= 5]
    observed = np.array([counts[pair] for pair in common] + [draws - sum(counts[pair] for pair in common)])
    wanted = draws * np.array([expected[pair] for pair in common] + [1 - sum(expected[pair] for pair in common)])
    kept = wanted > 1
    statistic, freedom = ((observed - wanted)[kept] ** 2 / wanted[kept]).sum(), kept.sum() - 1
    assert freedom >= 5
    assert statistic < freedom + 4 * np.sqrt(2 * freedom)
    assert sum(answer.forwards for answer in answers) < sum(len(answer.tokens) for answer in answers)


# --- Drafts.


def repeats():
    """Parameters of a model that says its last token again, and what it says of a mask: every layer adds nothing."""
    params = random_params(0, scale=1.0)
    layers = params["layers"]
    layers["attention"]["output"] = jnp.zeros_like(layers["attention"]["output"])
    layers["mlp"]["down"] = jnp.zeros_like(layers["mlp"]["down"])
    table = np.array(np.random.default_rng(1).permutation(np.eye(16)))
    table[MODEL.mask_token_id] = 0.5 * table[5]
    params["embed"]["embedding"] = jnp.asarray(table, jnp.float32)
    return params


def test_right_drafts_are_accepted_whole():
    """A first forward without a draft, then a whole draft and a token more in each: of the model, which says 5 at masks
    and after 5; of look-up from the first one on, where the prompt repeats itself.
    """
    params = repeats()
    by_model = decode(params, SpeculativeConfig(gen_length=25, draft_length=5, cuts=1), [[3, 5]])[0]
    assert by_model.tokens == [5] * 25 and by_model.forwards == 1 + 4
    by_lookup = decode(params, SpeculativeConfig(gen_length=24, draft_length=5, draft="lookup"), [[3, 4, 4, 4]])[0]
    assert by_lookup.tokens == [4] * 24 and by_lookup.forwards == 4
    never = decode(params, SpeculativeConfig(gen_length=24, draft_length=5, draft="lookup", ngram=9), [[3, 4, 4, 4]])[0]
    assert never.tokens == [4] * 24 and never.forwards > 8


def test_more_cuts_are_fewer_forwards(cases):
    """With a run of masks behind every end of a draft each forward makes the next draft."""
    few, many = (SpeculativeConfig(gen_length=LENGTH, draft_length=4, cuts=cuts) for cuts in (1, 5))
    total = lambda config: sum(a.forwards for params, prompts, _ in cases[::6] for a in decode(params, config, prompts))
    assert total(many) < total(few)


def test_lookup_needs_no_mask_token():
    """Any model, and prompts longer than one pass over a prompt takes."""
    model = dataclasses.replace(MODEL, mask_token_id=None, begin_token_id=None)
    params = random_params(9, scale=1.4)
    prompts = [p * 3 for p in random_prompts(3, 10)] + random_prompts(4, 1, longest=60)
    config = dataclasses.replace(DRAFTS["lookup"], ngram=1)
    found, wanted = (decode(params, c, prompts, model) for c in (config, PLAIN))
    assert [a.tokens for a in found] == [a.tokens for a in wanted]
    assert sum(a.forwards for a in found) < sum(a.forwards for a in wanted)


# --- Batches, streams, meshes.


def test_streamed_from_left_to_right(cases):
    params, prompts, wanted = cases[3]
    seen = collections.defaultdict(list)
    for answer in stream(params, MODEL, DRAFTS["model"], prompts, batch_size=BATCH, every=2):
        before = seen[answer.index]
        assert answer.tokens[: len(before)] == before
        seen[answer.index] = answer.tokens
    assert [seen[i] for i in range(len(prompts))] == [answer.tokens for answer in wanted]


def test_rows_do_not_depend_on_their_neighbours(cases):
    params, prompts, _ = cases[7]
    together = decode(params, DRAFTS["model"], prompts)
    for index in (0, 4, 9):
        alone = generate(params, MODEL, DRAFTS["model"], [prompts[index]], batch_size=1)[0]
        assert (alone.tokens, alone.forwards) == (together[index].tokens, together[index].forwards)


def test_on_a_mesh(cases):
    params, prompts, wanted = cases[5]
    mesh, report = make_mesh(2, 1, 2, devices=jax.devices()[:4]), Report()
    found = decode(params, DRAFTS["lookup_first"], prompts, mesh=mesh, report=report)
    assert [a.tokens for a in found] == [a.tokens for a in wanted]
    assert report.batch == BATCH


# --- What suits a model, and what it cannot.


def test_suited_settings():
    """Drafts as long as the slots it was trained on; a warning where left-to-right order was no part of training."""
    given = dict(gen_length=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained = SpeculativeConfig.suited(MODEL, Refusion(slot_sizes=(4, 8), causal_share=0.3), given)
        plain = SpeculativeConfig.suited(MODEL, Autoregressive(), given)
    assert (trained["draft"], trained["draft_length"]) == ("model", 7)
    assert plain["draft"] == "lookup"
    for objective in (Refusion(), None):
        with pytest.warns(UserWarning, match="not trained to write from left to right"):
            assert SpeculativeConfig.suited(MODEL, objective, given)["draft"] == "model"


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(draft_length=0), "draft_length is 0; it must be at least 1"),
        (dict(draft_length=3, cuts=5), "cuts is 5; a draft of draft_length 3 has 4 ends"),
        (dict(ngram=0), "ngram is 0"),
        (dict(draft="oracle"), "draft is 'oracle'; choose one of model, lookup, lookup_first"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        SpeculativeConfig(**settings)


def test_a_model_without_masks_cannot_draft():
    model = dataclasses.replace(MODEL, mask_token_id=None)
    for draft in ("model", "lookup_first"):
        with pytest.raises(UserError, match="cannot draft. Set draft to lookup"):
            SpeculativeConfig(draft=draft).check(model)
    SpeculativeConfig(draft="lookup").check(model)
