"""Masked diffusion decoding: what authors' code recorded, caches' rules, batches, settings, and what is random."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_cases import MODEL, random_params, random_prompts

from refusion_jax.checkpoint import load
from refusion_jax.errors import UserError
from refusion_jax.model.attention import Packed
from refusion_jax.model.head import over_vocabulary
from refusion_jax.model.qwen3 import Qwen3
from refusion_jax.objective.autoregressive import Autoregressive
from refusion_jax.objective.masked import Masked
from refusion_jax.objective.sedd import Sedd
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.sampling import Engine, MaskedConfig, Prompt, generate, masked_caches, masked_select, stream
from refusion_jax.sampling.config import Settings
from refusion_jax.sampling.methods import METHODS, suited

pytestmark = pytest.mark.usefixtures("quick_compiles")
PARAMS = random_params(3, scale=1.2)
PROMPTS = random_prompts(5, 14) + random_prompts(6, 2, longest=40)
CONFIG = MaskedConfig(gen_length=16, block_length=8, steps=8, stop="length")
AGREEMENT = dataclasses.replace(CONFIG, steps=0, select="agreement", cache="free")  # with a cache of its own


def contents(answer):
    return answer.order, answer.committed, answer.rounds, answer.forwards, answer.tokens_forwarded


# --- The authors' decodings.


@pytest.mark.parametrize(
    "method",
    [
        "llada",
        "eb",
        "fast_dllm",
        "dream/maskgit_plus",
        "dream/entropy",
        "fastdllm_dream/none",
        "fastdllm_dream/prefix",
        "fastdllm_dream/dual",
        "diffullama/topk",
        "mdlm",
        "sedd",
        "dkv_llada/decode",
        "dkv_llada/greedy",
        "dkv_dream/decode",
        "dkv_dream/decode_un_right",
        "dkv_dream/prefill",
        "dkv_dream/pd",
        "dllm_cache_dream",
        "dllm_cache_llada",
        "dllm_cache_llada_cfg",
    ],
)
def test_recorded_decodings_are_repeated(method, repository, reference, monkeypatch):
    """Tokens, the forward that decided each, forwards and their tokens, of those that share a program; in batches whose
    rows are refilled.
    """
    monkeypatch.syspath_prepend(repository / "tools")
    import reference_decode

    folder = reference / "methods" / method.split("/")[0].removesuffix("_cfg")
    named = folder / "MODEL"
    source = folder / named.read_text().strip() if named.is_file() else folder / "model"
    model = dataclasses.replace(load.load_model_config(source), mask_token_id=95, dtype="float32", attention="xla")
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    params = load.load_params(source, model, mesh, sharding.DECODE_RULES, dtype="float32")
    params = jax.tree.map(jnp.array, jax.device_get(params))
    recorded = reference_decode.read(folder / "decode.jsonl", model.vocab_size)
    lines = map(json.loads, (folder / "decode.jsonl").read_text().splitlines())
    groups = {}
    for case, line in zip(recorded, lines, strict=True):
        if line["method"] == method:
            # Of Fast-dLLM those with a cache, of LLaDA those with guidance.
            interesting = line["params"].get("cfg_scale", 0) > 0 or line["params"].get("cache") == "dual"
            groups.setdefault(str(case.config.static), []).append((interesting, case))
    group = [case for _, case in max(groups.values(), key=lambda group: (group[0][0], len(group)))]
    answers = list(reference_decode.decode(params, model, group, batch=4))
    assert len(answers) == len(group) >= 3
    assert not [line for case, answer in answers for line in reference_decode.mismatches(case, answer, "decode")]


@pytest.mark.parametrize("folder", ["dkv_llada", "dkv_dream"])
def test_caches_forward_the_recorded_positions(folder, reference, repository, monkeypatch):
    """The rules alone, over every recorded decoding: which positions each forward computes again."""
    monkeypatch.syspath_prepend(repository / "tools")
    import reference_decode

    path = reference / "methods" / folder / "decode.jsonl"
    lines = list(map(json.loads, path.read_text().splitlines()))
    offset_of = jax.jit(lambda length: jnp.arange(64) - length)
    rules = {}
    checked = 0
    for case, line in zip(reference_decode.read(path, 96), lines, strict=True):
        sampler = case.config.sampler(MODEL, 1, "cpu")
        if sampler not in rules:
            rules[sampler] = jax.jit(lambda row, offset, sampler=sampler: rule(sampler, row, offset))
        order = np.pad(line["order"], (0, sampler.length - case.limit), constant_values=-1)
        own = case.config.traced(case.limit)
        before = near = np.ones(sampler.length, bool)
        plan = np.zeros(sampler.length, np.int32)
        if case.config.order:
            plan = np.argsort(np.reshape(case.config.order, (-1, sampler.block_length)) % sampler.block_length, axis=1)
        block = step = 0
        for number, wanted in enumerate(line["forwarded"]):
            open = order >= number
            row = dict(limit=case.limit, own=own, before=before, near=near, step=step, block=block, open=open)
            flags, near = rules[sampler](row | dict(plan=plan.reshape(-1)), offset_of(len(case.prompt)))
            everything = list(range(len(case.prompt) + case.limit))
            assert np.flatnonzero(flags).tolist() == (everything if wanted is None else wanted), (case.number, number)
            checked += 1
            start = block * sampler.block_length
            over = (order[start : start + sampler.block_length] <= number).all()
            before, block, step = open, block + over, 0 if over else step + 1
    assert checked > 500


def rule(sampler, row, offset):
    """(positions to forward, what the next forward of dkv_greedy takes) of a row as the recorded order leaves it."""
    settings = types.SimpleNamespace(limit=row["limit"], own=row["own"])
    row = types.SimpleNamespace(settings=settings, **{name: row[name] for name in row if name not in ("limit", "own")})
    return masked_caches.forwarded(sampler, row, offset), sampler.near(row, row.open)


# --- Counts and rules of selection.


def test_counts_of_schedules():
    for tokens in range(1, 40):
        for steps in range(1, 60):
            linear = masked_select.counts("linear_t", tokens, steps, 1e-3)
            assert linear.sum() == tokens and (linear >= 0).all() and len(linear) == steps
            if steps <= tokens:
                even = masked_select.counts("even", tokens, steps, 0)
                assert even.sum() == tokens and even.min() >= 1 and set(np.diff(even)) <= {0, -1}
            kept = masked_select.counts("keep_floor", tokens, steps, 0)
            assert kept[-1] == 0 and (np.diff(kept) <= 0).all()
    # With as many steps as tokens Dream's first decides nothing and its last two.
    assert masked_select.counts("linear_t", 8, 8, 1e-3).tolist() == [0, 1, 1, 1, 1, 1, 1, 2]


def test_selection_equals_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(50):
        m = int(rng.integers(2, 12))
        confidence, entropy = rng.random(m).astype(np.float32), rng.random(m).astype(np.float32)
        among = rng.random(m) < 0.7
        among[rng.integers(m)] = True
        known = dict(confidence=jnp.array(confidence), entropy=jnp.array(entropy), doubt=1 - jnp.array(confidence))
        seen = types.SimpleNamespace(**known)
        order, rank = masked_select.by_score(seen.confidence, jnp.array(among))
        ranked = sorted(np.flatnonzero(among), key=lambda i: -confidence[i])
        assert order[: len(ranked)].tolist() == ranked

        factor, gamma = rng.uniform(0.2, 3), rng.uniform(0, 2)
        n = 1
        while n < len(ranked) and confidence[ranked[n]] >= 1 - factor / (n + 2):
            n += 1
        found = masked_select.by_factor(seen, jnp.array(among), order, rank, factor)
        assert np.flatnonzero(found).tolist() == sorted(ranked[:n])

        fits = [n for n in range(1, len(ranked) + 1) if sum(h := entropy[ranked[:n]]) - max(h) <= gamma]
        found = masked_select.by_entropy(seen, jnp.array(among), order, rank, gamma)
        assert np.flatnonzero(found).tolist() == sorted(ranked[: max(fits)])


def test_independent_times_follow_their_probabilities():
    """Of those open at step i a share of 1 - t(i + 1) / t(i) is decided, t falling from 1 to eps; then the rest."""
    steps, eps, count = 6, 0.05, 200_000
    found = np.bincount(masked_select.times_of(jax.random.key(0), steps, eps, count), minlength=steps)
    t = np.linspace(1, eps, steps + 1)
    share = np.append(1 - t[1:-1] / t[:-2], 1)
    left = count
    for number, p in zip(found, share, strict=True):
        assert abs(number - left * p) <= 5 * np.sqrt(left * p * (1 - p)) + 1e-6
        left -= number
    assert left == 0


def test_true_scores_unmask_each_token_at_any_time():
    """SEDD's update with a mass of 1 is independent of the model; a larger mass unmasks earlier; behind the steps
    nothing stays.
    """
    steps, eps, count = 4, 0.1, 20_000
    left, before, keys = np.ones(count, bool), count, jax.random.split(jax.random.key(0), steps + 1)
    seen = types.SimpleNamespace(mass=jnp.ones(count))
    for step in range(steps):
        left &= ~np.asarray(masked_select.by_mass(keys[step], seen, step, steps, eps))
        t, s = 1 - step * 0.9 / 4, 1 - (step + 1) * 0.9 / 4
        assert abs(left.sum() - before * s / t) < 5 * np.sqrt(before * s / t * (1 - s / t))
        before = left.sum()
    assert before > 0 and masked_select.by_mass(keys[steps], seen, steps, steps, eps).all()
    seen.mass *= 2
    assert abs(np.mean(masked_select.by_mass(keys[0], seen, 0, steps, eps)) - 0.45) < 0.02


def test_scores_are_of_the_distribution_that_is_asked_for():
    logits = np.random.default_rng(1).normal(size=(64, MODEL.vocab_size)).astype(np.float32) * 2
    logits[:, MODEL.logical_vocab_size :] = -np.inf
    keys = jax.vmap(jax.random.key)(jnp.arange(64))

    def ask(suppress="no", **given):
        config = MaskedConfig(gen_length=64, **given)
        settings = jax.tree.map(jnp.asarray, Settings.of(config, MODEL.eos_token_id))
        question = masked_select.Question.of(keys, settings, suppress)
        return jax.tree.map(np.asarray, question.answer(MODEL, jnp.array(logits), given.get("temperature", 0) > 0))

    def softmax(logits):
        p = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return p / p.sum(axis=-1, keepdims=True)

    allowed = logits.copy()
    allowed[:, [MODEL.mask_token_id, MODEL.begin_token_id]] = -np.inf
    best, row = allowed.argmax(axis=-1), np.arange(64)
    plain, p = ask(), softmax(logits)
    np.testing.assert_array_equal(plain.draft, best)
    np.testing.assert_allclose(plain.confidence, p[row, best], rtol=1e-5)
    ordered = np.sort(p, axis=-1)
    np.testing.assert_allclose(plain.margin, ordered[:, -1] - ordered[:, -2], atol=1e-6)
    np.testing.assert_allclose(plain.entropy, -(p * np.log(np.maximum(p, 1e-30))).sum(axis=-1), rtol=1e-4)

    warm = ask(score_temperature=0.5)
    np.testing.assert_allclose(warm.confidence, softmax(logits / 0.5)[row, best], rtol=1e-5)
    # With the scores of what drafts are drawn from: of the fewest ids that reach top-p.
    kept = np.cumsum(-np.sort(-p, axis=-1), axis=-1)
    least = -np.sort(-p, axis=-1)[row, (kept < 0.7).sum(axis=-1)]
    inside = np.where(p >= least[:, None], p, 0)
    cut = ask(score_temperature=0.0, top_p=0.7)
    np.testing.assert_allclose(cut.confidence, inside[row, best] / inside.sum(axis=-1), rtol=1e-5)
    sampled = ask(temperature=1.5, top_p=0.6)
    assert set(sampled.draft) - {MODEL.mask_token_id, MODEL.begin_token_id} == set(sampled.draft)
    assert (sampled.draft != best).any()

    eos = MODEL.eos_token_id
    assert not (ask("logits").draft == eos).any()
    late = ask("confidence")
    np.testing.assert_array_equal(late.draft, best)
    assert (late.confidence[best == eos] == 0).all() and (best == eos).any()
    without = logits.copy()
    without[:, eos] = -np.inf
    np.testing.assert_allclose(late.confidence[best != eos], softmax(without)[row, best][best != eos], rtol=1e-5)


# --- FreeCache, and a causal pass that says what is decided.


@functools.partial(jax.jit, static_argnums=2)
def read(text, length, see):
    """[padded, vocab] logits of the first `length` tokens of a text, without any cache."""
    place = jnp.arange(len(text))
    context = Packed(jnp.where(place < length, 1, 0)[None], see=see, implementation="xla")
    hidden, _ = Qwen3(MODEL).apply({"params": PARAMS}, text[None], place[None], context)
    logits = over_vocabulary(MODEL, PARAMS, hidden, lambda logits: logits)[0]
    return logits.at[:, jnp.array([MODEL.mask_token_id, MODEL.begin_token_id])].set(-jnp.inf)


@pytest.mark.parametrize("alignment", ["same", "shift"])
def test_agreement_equals_a_loop_of_two_passes_over_the_whole_text(alignment):
    """Proposals of the block by a pass that sees all; decided is, from the left, what a causal pass says too."""
    config = MaskedConfig(gen_length=12, block_length=4, alignment=alignment, select="agreement", stop="length")
    shift, padded = alignment == "shift", 32
    for prompt, answer in zip(PROMPTS[:6], generate(PARAMS, MODEL, config, PROMPTS[:6], batch_size=4), strict=True):
        end = len(prompt) + 12
        text = np.array(prompt + [MODEL.mask_token_id] * (padded - len(prompt)))
        rounds, forwarded, forward = [], len(prompt), 0
        while len(rounds) < 12:
            at = len(prompt) + len(rounds)
            stop = len(prompt) + len(rounds) // 4 * 4 + 4
            best = np.array(read(text, end, "all")).argmax(axis=-1)
            guess = text.copy()
            guess[at:stop] = best[at - shift : stop - shift]
            agreed = 0
            while at + agreed < stop:
                cut = guess.copy()
                cut[at + agreed] = MODEL.mask_token_id
                own = np.array(read(cut, at + agreed + (not shift), "causal"))[at + agreed - shift].argmax()
                if own != guess[at + agreed]:
                    break
                agreed += 1
            text[at : at + max(agreed, 1)] = guess[at : at + max(agreed, 1)]
            rounds += [forward] * max(agreed, 1)
            forward += 1
            forwarded += end + (4 if shift else 8)
        assert answer.committed == text[len(prompt) : end].tolist() and answer.rounds == rounds
        assert (answer.forwards, answer.tokens_forwarded) == (forward, forwarded)
        assert answer.order == list(range(12))


def test_a_block_is_decided_at_once_where_all_proposals_agree():
    """A model that always says the same."""
    params = PARAMS | {"final_norm": {"scale": jnp.zeros(MODEL.hidden_size)}}
    config = MaskedConfig(gen_length=12, block_length=4, select="agreement", stop="length")
    for answer in generate(params, MODEL, config, PROMPTS[:6], batch_size=4):
        assert (answer.forwards, answer.rounds) == (3, [0] * 4 + [1] * 4 + [2] * 4)


@pytest.mark.parametrize("alignment", ["same", "shift"])
def test_free_is_exact_where_keys_depend_on_their_token_alone(alignment):
    """With one layer: what is frozen is the keys of decided tokens. Less and less is forwarded."""
    model = dataclasses.replace(MODEL, num_layers=1)
    params = random_params(3, 1.2, model)
    config = MaskedConfig(gen_length=24, block_length=8, steps=6, alignment=alignment, stop="length")
    decode = lambda cache: generate(
        params, model, dataclasses.replace(config, cache=cache), PROMPTS[:6], batch_size=4, max_prompt_length=12
    )
    shift = alignment == "shift"
    for prompt, exact, free in zip(PROMPTS, decode("none"), decode("free")):
        assert (free.order, free.committed, free.rounds) == (exact.order, exact.committed, exact.rounds)
        whole = len(prompt) + 24
        assert exact.tokens_forwarded == 6 * whole
        assert free.tokens_forwarded == whole + (24 + 24 + 16 + 16 + 8) + 5 * shift


# --- Batches.


@jax.jit
def logits_of(tokens):
    """[length, vocab] of a whole text, forwarded without any cache."""
    positions = jnp.arange(tokens.shape[1])[None]
    context = Packed(jnp.ones_like(tokens), see="all", implementation="xla")
    hidden, _ = Qwen3(MODEL).apply({"params": PARAMS}, tokens, positions, context)
    return over_vocabulary(MODEL, PARAMS, hidden, lambda logits: logits)[0]


def test_decoding_equals_a_loop_that_forwards_the_whole_text():
    """One token per forward, the surest first, blocks from left to right."""
    config = MaskedConfig(gen_length=8, block_length=4, stop="length")
    for prompt, answer in zip(PROMPTS[:4], generate(PARAMS, MODEL, config, PROMPTS[:4], batch_size=4), strict=True):
        text = np.array(prompt + [MODEL.mask_token_id] * 8)
        order = []
        for number in range(8):
            logits = np.array(logits_of(jnp.array(text)[None]))
            p = np.asarray(jax.nn.softmax(logits, axis=-1))  # before they change
            logits[:, [MODEL.mask_token_id, MODEL.begin_token_id]] = -np.inf
            start = len(prompt) + number // 4 * 4
            inside = [i for i in range(start, start + 4) if text[i] == MODEL.mask_token_id]
            chosen = max(inside, key=lambda i: p[i, logits[i].argmax()])
            text[chosen] = logits[chosen].argmax()
            order.append(chosen - len(prompt))
        assert answer.order == order
        assert answer.committed == text[len(prompt) + np.array(order)].tolist()


@pytest.mark.parametrize(
    "given",
    [
        dict(select="threshold", threshold=0.3, steps=0),
        dict(cache="dual", select="entropy_bound", steps=0, gamma=1.0),
        dict(cache="prefix", alignment="shift", schedule="linear_t"),
        dict(select="agreement", cache="free", steps=0),
        dict(cache="dkv_decode", cache_steps=3),
        dict(cache="dkv_greedy", score="random", cache_steps=3),
        dict(cache="dllm", gen_interval=3, prompt_interval=5),
        dict(select="independent", block_length=0, temperature=0.8, score="random"),
        dict(cfg_scale=0.7, score="margin"),
    ],
    ids=lambda given: given.get("cache", given.get("select", "guided")),
)
def test_a_row_depends_on_its_own_request_only(given):
    """Ragged prompts through a small batch whose rows are refilled, and each by itself."""
    config = dataclasses.replace(CONFIG, **given)
    together = generate(PARAMS, MODEL, config, PROMPTS, batch_size=4)
    assert [len(answer.order) for answer in together] == [16] * len(PROMPTS)
    engine = Engine(PARAMS, MODEL, config, 1, max_prompt_length=40)
    for index, prompt in enumerate(PROMPTS):
        engine.add(Prompt(prompt, config, index))
        (alone,) = engine.step(forwards=1000)
        assert contents(alone) == contents(together[index]), index
        assert not {MODEL.mask_token_id, MODEL.begin_token_id} & set(alone.committed)


def test_answers_that_end_early_are_the_same_up_to_their_end():
    whole = generate(PARAMS, MODEL, CONFIG, PROMPTS, batch_size=8)
    early = generate(PARAMS, MODEL, dataclasses.replace(CONFIG, stop="answer"), PROMPTS, batch_size=8)
    assert [answer.tokens for answer in early] == [answer.tokens for answer in whole]
    assert sum(answer.forwards for answer in early) < sum(answer.forwards for answer in whole)


def test_rows_have_their_own_settings():
    """Thresholds, steps and length of the answer differ within one batch; each row is as with these settings alone."""
    ours = [
        (dataclasses.replace(CONFIG, steps=steps, score_temperature=temperature), limit)
        for steps, temperature, limit in ((8, 1.0, 16), (4, 0.5, 16), (16, 1.0, 8), (2, 2.0, 12))
    ]
    engine = Engine(PARAMS, MODEL, CONFIG, 4, max_prompt_length=40)
    for index, (config, limit) in enumerate(ours):
        assert engine.add(Prompt(PROMPTS[index], config, index, limit=limit)) is not None
    found = {}
    while engine.busy:
        found |= {answer.index: answer for answer in engine.step(100)}
    for index, (config, limit) in enumerate(ours):
        if limit % 8 == 0:
            alone = dataclasses.replace(config, gen_length=limit, steps=config.steps * limit // 16)
            (answer,) = generate(PARAMS, MODEL, alone, [PROMPTS[index]], batch_size=1)
            assert contents(found[index]) == contents(answer)
        assert sorted(found[index].order) == list(range(limit))
    assert len({answer.forwards for answer in found.values()}) > 2


@pytest.mark.parametrize(
    "given",
    [
        dict(score="given", order=(3, 9, 0, 15, 7, 1, 2, 4, 5, 6, 8, 10, 11, 12, 13, 14)),
        dict(score="random", cache="dkv_greedy", cache_steps=3),
    ],
    ids=["given", "dkv_greedy"],
)
def test_an_order_that_is_known_in_advance_is_that_of_the_tokens_that_are_asked_for(given):
    """A limit below the block leaves out the others, and costs no forwards for them."""
    config = dataclasses.replace(CONFIG, block_length=0, steps=16, **given)
    engine = Engine(PARAMS, MODEL, config, 3, max_prompt_length=40)
    limits = (16, 10, 1)
    for index, limit in enumerate(limits):
        engine.add(Prompt(PROMPTS[index], config, index, limit=limit))
    found = sorted((a for _ in range(3) for a in engine.step(40)), key=lambda answer: answer.index)
    assert [sorted(answer.order) for answer in found] == [list(range(limit)) for limit in limits]
    assert [answer.forwards for answer in found] == list(limits)
    if "order" in given:
        assert found[1].order == [place for place in given["order"] if place < 10]


def test_where_nothing_but_suppressed_ends_is_left_decoding_goes_on():
    """The confidence of an end id is 0 then, and not a number that sorts behind all positions."""
    config = dataclasses.replace(
        CONFIG, suppress="confidence", score_temperature=0.0, top_p=0.5, select="factor", factor=0.5, steps=0
    )
    settings = jax.tree.map(jnp.asarray, Settings.of(config, MODEL.eos_token_id))
    question = masked_select.Question.of(jax.random.split(jax.random.key(0), 1), settings, "confidence")
    logits = jnp.zeros((1, MODEL.vocab_size)).at[0, MODEL.eos_token_id].set(20.0)
    seen = question.answer(MODEL, logits, False)
    assert float(seen.confidence[0]) == 0 and np.isfinite(seen.doubt).all()


def test_a_budget_of_steps_is_shared_by_the_tokens_that_are_asked_for():
    """Threshold decoding that is never sure reaches every limit, whether the steps divide it or are more."""
    config = dataclasses.replace(CONFIG, select="threshold", threshold=1.0, block_length=0, steps=8)
    engine = Engine(PARAMS, MODEL, config, 4, max_prompt_length=40)
    for index, limit in enumerate((16, 12, 5, 1)):
        engine.add(Prompt(PROMPTS[index], config, index, limit=limit))
    found = sorted((a for _ in range(4) for a in engine.step(40)), key=lambda answer: answer.index)
    assert [sorted(answer.order) for answer in found] == [list(range(limit)) for limit in (16, 12, 5, 1)]


def test_stream_shows_what_is_decided():
    seen = {}
    for answer in stream(PARAMS, MODEL, CONFIG, PROMPTS[:5], batch_size=4, every=1):
        before = seen.get(answer.index, [])
        assert answer.order[: len(before)] == before, "what is decided stays"
        assert answer.forwards > (len(before) > 0)
        seen[answer.index] = answer.order
    assert all(sorted(order) == list(range(16)) for order in seen.values())


@pytest.mark.parametrize("config", [dataclasses.replace(CONFIG, cache="dual"), AGREEMENT], ids=lambda c: c.cache)
def test_same_tokens_on_a_mesh(config):
    model = dataclasses.replace(MODEL, num_kv_heads=2)
    params = random_params(3, 1.2, model)
    one = generate(params, model, config, PROMPTS[:6], batch_size=4, max_prompt_length=40)
    mesh = make_mesh(2, 2, 2)
    spread = jax.device_put(params, sharding.param_shardings(model, mesh, sharding.DECODE_RULES))
    many = generate(spread, model, config, PROMPTS[:6], batch_size=4, max_prompt_length=40, mesh=mesh)
    assert list(map(contents, many)) == list(map(contents, one))


def test_a_longer_prompt_makes_the_cache_grow():
    prompts = [PROMPTS[0], random_prompts(9, 1, longest=2)[0] * 150]
    model = dataclasses.replace(MODEL, max_position_embeddings=512)
    engine = Engine(PARAMS, model, AGREEMENT, 2)
    assert engine.add(Prompt(prompts[0], AGREEMENT)) is not None
    engine.step(1)
    assert engine.add(Prompt(prompts[1], AGREEMENT, 1)) is not None
    found = {}
    while engine.busy:
        found |= {answer.index: answer for answer in engine.step(100)}
    for index, prompt in enumerate(prompts):
        (alone,) = generate(PARAMS, model, AGREEMENT, [prompt], batch_size=1)
        assert contents(found[index]) == contents(alone)


def test_bfloat16_decodes():
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    for answer in generate(params, model, dataclasses.replace(CONFIG, cfg_scale=1.0), PROMPTS[:4], batch_size=4):
        assert sorted(answer.order) == list(range(16))


# --- Which settings, and for which models.


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(block_length=5), "block_length 5 does not divide gen_length 16"),
        (dict(block_length=8, steps=5), "steps is 5, which 2 blocks cannot share equally"),
        (dict(steps=17), "steps is 17 for 16 tokens"),
        (dict(select="threshold", threshold=1.5), "threshold is 1.5"),
        (dict(select="threshold", steps=5), "must divide gen_length 16"),
        (dict(select="entropy_bound", steps=4), "the model decides how many forwards"),
        (dict(select="factor", schedule="linear_t"), "schedule = 'linear_t'"),
        (dict(schedule="keep_floor", block_length=8), "it needs one block"),
        (dict(cfg_scale=1.0, cache="dual"), "a cache of their own"),
        (dict(score="given"), "score = 'given' and order go together"),
        (dict(score="given", order=tuple(range(15)) + (14,)), "score = 'given' and order go together"),
        (dict(cache="dual", alignment="shift"), "threshold or schedule = 'linear_t'"),
        (dict(cache="dkv_pd"), "made for shifted logits"),
        (dict(cache="dkv_decode", alignment="shift", block_length=8), "not defined for blocks"),
        (dict(cache="dkv_greedy"), "must know in advance"),
        (dict(cache="dkv_right"), "choose one of none, prefix"),
        (dict(cache_steps=0), "cache_steps is 0"),
        (dict(eps=1.0, schedule="linear_t"), "eps is 1.0"),
        (dict(select="agreement", steps=4), "the model decides how many forwards"),
        (dict(select="agreement", cache="dual"), "with select = 'agreement' is not defined"),
        (dict(select="agreement", score="margin"), "which decides from left to right"),
        (dict(select="independent", cache="free"), "with select = 'independent' is not defined"),
    ],
)
def test_settings_that_do_not_go_together(given, message):
    with pytest.raises(UserError, match=message):
        MaskedConfig(gen_length=16, **given)


def test_the_objective_chooses_the_method_and_refuses_others():
    for objective in (Masked(), Masked(alignment="shift", norm="masked")):
        assert suited(objective, None) == "masked"
        settings = MaskedConfig.suited(MODEL, objective, dict(gen_length=48))
        config = MaskedConfig(**settings)
        assert config.alignment == objective.alignment
        assert config.block == (24 if objective.alignment == "same" else 48)
    assert METHODS["masked"] is MaskedConfig
    for given, block in ({}, 48), (dict(select="topk"), 24):  # ratios are what it has learnt, of all masks at once
        config = MaskedConfig(**MaskedConfig.suited(MODEL, Sedd(), dict(gen_length=48) | given))
        assert (suited(Sedd(), None), config.select, config.block) == ("masked", given.get("select", "scores"), block)
    with pytest.raises(UserError, match="cannot be decoded with the method autoregressive: decode it with masked"):
        suited(Masked(), "autoregressive")
    with pytest.raises(UserError, match="alignment is 'shift', but the model was trained with 'same'"):
        MaskedConfig.suited(MODEL, Masked(), dict(alignment="shift"))
    with pytest.raises(UserError, match="cannot be decoded with the method masked: decode it with autoregressive"):
        suited(Autoregressive(), "masked")
    with pytest.raises(UserError, match="no mask token"):
        generate(PARAMS, dataclasses.replace(MODEL, mask_token_id=None), CONFIG, [[3]])
