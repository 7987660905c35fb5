"""Batches, refilling, streams, sampling, meshes, memory, and bad input of decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_cases import MODEL, expected, oracle_forward, random_params, random_prompts, same_tokens

from refusion_jax.errors import UserError
from refusion_jax.model.qwen3 import Qwen3, logits
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.sampling import Report, SamplerConfig, batching, generate, stream
from refusion_jax.sampling.config import Settings

CONFIG = SamplerConfig(gen_length=32, slot_size=4, blocks=2, slot_threshold=0.5, token_threshold=0.35, speculate="on")
PARAMS = random_params(3, scale=1.2)
PROMPTS = random_prompts(5, 40) + random_prompts(6, 2, longest=60)
BATCH = 4


pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def answers():
    """All prompts through a batch of four rows."""
    report = Report()
    return generate(PARAMS, MODEL, CONFIG, PROMPTS, batch_size=BATCH, report=report), report


def contents(answer):
    return dataclasses.replace(answer, index=0, forwards=0, tokens_forwarded=0)


def test_any_number_of_prompts_through_a_small_batch(answers):
    answers, report = answers
    assert [answer.index for answer in answers] == list(range(len(PROMPTS)))
    forward = oracle_forward(PARAMS)
    stable = 0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        wanted = expected(forward, prompt, CONFIG)
        if wanted.margin > 2e-5:
            stable += 1
            same_tokens(answer, wanted, prompt)
            assert answer.tokens_per_forward == len(wanted.tokens) / answer.forwards
    assert stable > 0.9 * len(PROMPTS)
    # The first forward of a prompt is the one over the prompt; the rest are steps of the loop.
    assert report.prefills == len(PROMPTS)
    assert report.batch == BATCH


def test_refilled_rows_wait_for_nobody(answers):
    answers, report = answers
    steps = [answer.forwards - 1 for answer in answers]
    in_fixed_batches = sum(max(steps[i : i + BATCH]) for i in range(0, len(steps), BATCH))
    print(f"{report.steps} forwards of the batch with refilling, {in_fixed_batches} in fixed batches")
    assert sum(steps) / BATCH <= report.steps < in_fixed_batches
    # Rows idle only when no prompt is left.
    assert report.steps <= sum(steps) / BATCH + max(steps)


def test_nothing_is_compiled_for_a_refill():
    compiled = lambda: (batching.run._cache_size(), batching.prefill._cache_size())
    generate(PARAMS, MODEL, CONFIG, PROMPTS[:BATCH], batch_size=BATCH, max_prompt_length=60)
    before = compiled()
    other = dataclasses.replace(CONFIG, slot_threshold=0.7, token_threshold=0.1, temperature=0.5, top_k=3, top_p=0.9)
    generate(PARAMS, MODEL, other, PROMPTS[:11], batch_size=BATCH, max_prompt_length=60)
    assert compiled() == before


def test_tokens_do_not_depend_on_batch_order_or_padding(answers):
    answers, _ = answers
    alone = generate(PARAMS, MODEL, CONFIG, PROMPTS[7:8], batch_size=1, max_prompt_length=60)  # batch of one
    assert contents(alone[0]) == contents(answers[7])
    # Reversed: other rows, other neighbours, other left-overs in the cache. Padded: a long neighbour makes the bucket larger.
    backwards = generate(PARAMS, MODEL, CONFIG, PROMPTS[::-1], batch_size=BATCH)
    assert [contents(a) for a in backwards[::-1]] == [contents(a) for a in answers]
    assert [a.forwards for a in backwards[::-1]] == [a.forwards for a in answers]


def test_left_over_cache_contents_do_not_matter():
    sampler = batching.make_sampler(MODEL, CONFIG, BATCH)
    settings, keys = Settings.of(CONFIG), jax.random.split(jax.random.key(0), 1)
    prompt = np.array([PROMPTS[0] + [0] * (32 - len(PROMPTS[0]))])
    found = []
    for garbage in (0.0, 1e4):
        state = batching.empty(sampler, BATCH, 64 + CONFIG.length + sampler.window)
        cache = state.cache.replace(k=state.cache.k + garbage, v=state.cache.v - garbage)
        state = batching.prefill(
            sampler,
            PARAMS,
            state.replace(cache=cache),
            settings,
            np.array([2]),
            prompt,
            np.array([len(PROMPTS[0])]),
            keys,
        )
        state, _ = batching.run(sampler, PARAMS, state, settings, 1000, BATCH)
        found.append(jax.device_get((state.rows.tokens, state.rows.offsets, state.rows.count)))
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert found[0][2].tolist()[2] > 0


def test_stream_shows_answers_as_they_grow(answers):
    answers, _ = answers
    seen = {}
    finished = []
    for answer in stream(PARAMS, MODEL, CONFIG, PROMPTS[:6], batch_size=BATCH, max_prompt_length=60, every=1):
        before = seen.get(answer.index, [])
        assert answer.order[: len(before)] == before, "what is committed stays"
        seen[answer.index] = answer.order
        if answer.finished:
            finished.append(answer.index)
            assert contents(answer) == contents(answers[answer.index])
    assert sorted(finished) == list(range(6))
    assert finished != sorted(finished), "short answers do not wait for long ones before them"


def test_sampling_is_reproducible_and_has_a_stream_per_prompt():
    config = dataclasses.replace(CONFIG, temperature=1.5, slot_threshold=0.2, token_threshold=0.05)
    prompts = [PROMPTS[0]] * 6
    tokens = lambda **options: [
        a.committed for a in generate(PARAMS, MODEL, config, prompts, batch_size=BATCH, max_prompt_length=60, **options)
    ]
    first = tokens(seed=1)
    assert first == tokens(seed=1)
    assert first != tokens(seed=2)
    assert len({tuple(t) for t in first}) > 1, "the same prompt twice is sampled twice"


def test_sampling_does_not_depend_on_the_batch_or_on_speculation():
    config = dataclasses.replace(CONFIG, temperature=1.0, slot_threshold=0.2, token_threshold=0.05)
    here = generate(PARAMS, MODEL, config, PROMPTS[:8], batch_size=BATCH, max_prompt_length=60)
    off = generate(
        PARAMS, MODEL, dataclasses.replace(config, speculate="off"), PROMPTS[:8], batch_size=8, max_prompt_length=60
    )
    assert [contents(a) for a in here] == [contents(a) for a in off]
    assert sum(a.forwards for a in here) < sum(a.forwards for a in off)


def test_cutting_to_one_id_is_greedy(answers):
    greedy = [contents(a) for a in answers[0][:8]]
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        config = dataclasses.replace(CONFIG, temperature=2.0, **options)
        cut = generate(PARAMS, MODEL, config, PROMPTS[:8], batch_size=BATCH, max_prompt_length=60)
        assert [contents(a) for a in cut] == greedy


def test_samples_follow_the_distribution():
    from refusion_jax.sampling.reduction import reduce_logits

    n = 4000
    hidden = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (MODEL.hidden_size,)), (1, n, MODEL.hidden_size))
    keys = jax.random.split(jax.random.key(2), (1, n))
    probs = np.array(jax.nn.softmax(logits(MODEL, PARAMS, hidden[0, 0]) / 2.0))
    probs[[MODEL.mask_token_id, MODEL.begin_token_id]] = 0
    for top_k, top_p in ((0, 1.0), (4, 1.0), (0, 0.7), (3, 0.9)):
        ranked = np.sort(probs)[::-1] / probs.sum()
        if top_k:
            ranked[top_k:] = 0
            ranked /= ranked.sum()
        keep = int((np.cumsum(ranked) - ranked < top_p).sum())
        wanted = np.where(probs >= np.sort(probs)[::-1][min(keep, top_k or keep) - 1], probs, 0)
        settings = Settings.of(dataclasses.replace(CONFIG, temperature=2.0, top_k=top_k, top_p=top_p))
        drafts = reduce_logits(MODEL, PARAMS, hidden, jnp.zeros((1, n), int), keys, settings).draft
        found = np.bincount(np.asarray(drafts)[0], minlength=MODEL.vocab_size) / n
        np.testing.assert_allclose(found, wanted / wanted.sum(), atol=0.03)


@pytest.mark.parametrize("count", [1, 2, 7, 60, 61, 100])
def test_cutting_without_sorting_keeps_what_sorting_keeps(count):
    """The largest `count` of logits of either sign, of those equal to the least all; excluded ids stay excluded."""
    from refusion_jax.sampling.reduction import _cut

    logits = np.random.default_rng(0).normal(size=(3, 2, 64)).astype(np.float32) * 10
    logits[0], logits[1, 0, :20], logits[2] = np.round(logits[0]), 0.0, -abs(logits[2])
    logits[..., [5, 9, 33]] = -np.inf
    found = _cut(jnp.array(logits), lambda kept: kept.sum(axis=-1) >= count)
    least = np.sort(logits, axis=-1)[..., ::-1][..., min(count, 64) - 1]
    np.testing.assert_array_equal(found, np.where(logits >= least[..., None], logits, -np.inf))


def test_autoregressive_equals_an_argmax_loop():
    config = SamplerConfig(method="autoregressive", gen_length=10)
    found = generate(PARAMS, MODEL, config, PROMPTS[:9], batch_size=BATCH, max_prompt_length=60)
    allowed = np.ones(MODEL.vocab_size, bool)
    allowed[[MODEL.mask_token_id, MODEL.begin_token_id]] = False
    forward = jax.jit(
        lambda tokens: logits(MODEL, PARAMS, Qwen3(MODEL).apply({"params": PARAMS}, tokens, jnp.arange(32)[None]))
    )
    for prompt, answer in zip(PROMPTS[:9], found, strict=True):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 10 and tokens[len(prompt) :][-1:] != [MODEL.eos_token_id]:
            scores = forward(jnp.array([tokens + [0] * (32 - len(tokens))]))[0, len(tokens) - 1]
            tokens.append(int(np.where(allowed, scores, -np.inf).argmax()))
        assert answer.tokens == tokens[len(prompt) :]
        assert answer.forwards == len(answer.tokens)
        assert answer.order == list(range(len(answer.tokens)))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (4, 1, 2)])
def test_same_tokens_on_a_mesh(answers, shape):
    config = dataclasses.replace(MODEL, num_kv_heads=2)
    params = random_params(3, 1.2, config)
    one = generate(params, config, CONFIG, PROMPTS[:10], batch_size=8, max_prompt_length=32)
    mesh = make_mesh(*shape)
    spread = jax.device_put(params, sharding.param_shardings(config, mesh, sharding.DECODE_RULES))
    many = generate(spread, config, CONFIG, PROMPTS[:10], batch_size=8, max_prompt_length=32, mesh=mesh)
    assert [contents(a) for a in many] == [contents(a) for a in one]


def test_temporaries_of_the_loop_do_not_grow_with_the_cache():
    """Neither with its layers (there is no copy of it) nor with its length (scores exist for a chunk of it at a time)."""

    def compiled(layers, cache_length):
        config = dataclasses.replace(MODEL, num_layers=layers, num_kv_heads=2, head_dim=64)
        sampler = batching.make_sampler(config, CONFIG, 2)
        params = jax.eval_shape(lambda: random_params(0, 1.0, config))
        state = jax.eval_shape(lambda: sampler.empty(2, cache_length))
        program = batching.run.lower(sampler, params, state, Settings.of(CONFIG), 1, 1).compile()
        assert "callback" not in program.as_text(), "the loop never asks the host"
        return program.memory_analysis().temp_size_in_bytes, 2 * state.cache.k.size * 4

    temporaries, cache = zip(*(compiled(layers, length) for layers, length in ((4, 1024), (8, 1024), (4, 4096))))
    print(f"temporaries {temporaries} bytes, cache {cache} bytes")
    assert max(temporaries) < 1.02 * min(temporaries)


def test_bfloat16_decodes():
    config = dataclasses.replace(MODEL, dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    report = Report()
    found = generate(params, config, CONFIG, PROMPTS[:4], batch_size=BATCH, max_prompt_length=60, report=report)
    state = jax.eval_shape(lambda: batching.make_sampler(config, CONFIG, BATCH).empty(BATCH, report.cache_length))
    assert state.cache.k.dtype == jnp.bfloat16
    for answer in found:
        assert len(answer.tokens) == CONFIG.length or answer.tokens[-1] == MODEL.eos_token_id
        assert not {MODEL.mask_token_id, MODEL.begin_token_id} & set(answer.tokens)


def test_gen_length_is_rounded_up_to_whole_slots():
    assert SamplerConfig(gen_length=62, slot_size=4, blocks=1).length == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gen_length": 40, "slot_size": 8, "blocks": 2}, "multiple of slot_size 8"),
        ({"gen_length": 0}, "gen_length is 0"),
        ({"slot_threshold": 1.5}, "slot_threshold is 1.5"),
        ({"token_threshold": -0.1}, "token_threshold is -0.1"),
        ({"token_threshold": float("nan")}, "token_threshold is nan"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_k": -2}, "top_k is -2"),
        ({"speculate": "yes"}, "speculate is 'yes'"),
        ({"method": "beam"}, "method is 'beam'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(UserError, match=message):
        SamplerConfig(**options)


@pytest.mark.parametrize(
    ("prompts", "model", "options", "message"),
    [
        ([[2, 3], []], {}, {}, "Prompt 1 is empty"),
        ([[2, 14]], {}, {}, "Prompt 0 contains id 14, outside the model's vocabulary of 14"),
        ([[2, -1]], {}, {}, "contains id -1"),
        ([[2, 13]], {}, {}, "contains the mask token"),
        ([[2] * 225], {}, {}, "257 positions, more than the model's 256"),
        ([[2] * 33], {}, {"max_prompt_length": 32}, "more than the cache has room for"),
        ([[2]], {"mask_token_id": None}, {}, "no mask token"),
        ([[2]], {"eos_token_id": None}, {}, "no end-of-sequence token"),
        ([[2]], {}, {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_prompts_and_models(prompts, model, options, message):
    with pytest.raises(UserError, match=message):
        generate(PARAMS, dataclasses.replace(MODEL, **model), CONFIG, prompts, **options)


def test_no_prompts_is_no_answers():
    assert generate(PARAMS, MODEL, CONFIG, []) == []
