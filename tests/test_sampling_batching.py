"""Batches, refilling, streams, sampling, meshes, memory, and bad input of decoding."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_cases import MODEL, expected, oracle_forward, random_params, random_prompts, same_tokens

from refusion_jax.errors import UserError
from refusion_jax.model import cached_attention
from refusion_jax.model.attention import Packed
from refusion_jax.model.head import over_vocabulary
from refusion_jax.model.qwen3 import Qwen3, unstacked
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.sampling import (
    AutoregressiveConfig,
    Engine,
    PlanAndInfillConfig,
    Prompt,
    Report,
    generate,
    reduction,
    sampler_config,
    stream,
)
from refusion_jax.sampling import engine as engine_lib
from refusion_jax.sampling import programs as programs_lib
from refusion_jax.sampling.config import Settings

CONFIG = PlanAndInfillConfig(
    gen_length=32, slot_size=4, blocks=2, slot_threshold=0.5, token_threshold=0.35, speculate="on"
)
PARAMS = random_params(3, scale=1.2)
PROMPTS = random_prompts(5, 40) + random_prompts(6, 2, longest=60)
BATCH = 4


pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def answers():
    """All prompts through a batch of four rows."""
    report = Report()
    return generate(PARAMS, MODEL, CONFIG, PROMPTS, batch_size=BATCH, report=report), report


def all_logits(tokens):
    """[1, length] -> [1, length, vocab]."""
    positions = jnp.arange(tokens.shape[1])[None]
    hidden, _ = Qwen3(MODEL).apply({"params": PARAMS}, tokens, positions, Packed(jnp.ones_like(tokens)))
    return over_vocabulary(MODEL, PARAMS, hidden, lambda logits: logits)


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
    assert report.prefills < len(PROMPTS), "several rows are prefilled at once"
    assert report.batch == BATCH


def test_refilled_rows_wait_for_nobody(answers):
    answers, report = answers
    steps = [answer.forwards for answer in answers]
    in_fixed_batches = sum(max(steps[i : i + BATCH]) for i in range(0, len(steps), BATCH))
    print(f"{report.steps} forwards of the batch with refilling, {in_fixed_batches} in fixed batches")
    assert sum(steps) / BATCH <= report.steps < in_fixed_batches
    # Rows idle only when no prompt is left.
    assert report.steps <= sum(steps) / BATCH + max(steps)


def compiled(config=CONFIG, batch=BATCH, model=MODEL, mesh=None):
    """How many loops and prefills there are for a sampler."""
    programs = programs_lib.programs(programs_lib.make_sampler(model, config, batch, mesh), mesh)
    return programs.run.jitted._cache_size(), programs.prefill.jitted._cache_size()


def test_one_loop_per_sampler_batch_and_cache(monkeypatch):
    """Six calls with prompts of many lengths and any traced settings: one loop, one prefill for each width."""
    monkeypatch.setattr(programs_lib, "forward", chex.assert_max_traces(programs_lib.forward, n=1))
    monkeypatch.setattr(programs_lib, "prefill", chex.assert_max_traces(programs_lib.prefill, n=2))
    config = dataclasses.replace(CONFIG, blocks=4)  # that no other test has compiled
    other = dataclasses.replace(config, slot_threshold=0.7, token_threshold=0.1, temperature=0.5, top_k=3, top_p=0.9)
    for settings in (config, other):
        for prompts in (PROMPTS[:4], PROMPTS[4:11], [[2] * n for n in (1, 15, 16, 17, 40)]):
            generate(PARAMS, MODEL, settings, prompts, batch_size=BATCH)
    assert compiled(config) == (1, 2)


def test_tokens_do_not_depend_on_batch_order_or_padding(answers):
    answers, _ = answers
    alone = generate(PARAMS, MODEL, CONFIG, PROMPTS[7:8], batch_size=1, max_prompt_length=60)  # batch of one
    assert contents(alone[0]) == contents(answers[7])
    # Reversed: other rows, other neighbours, other left-overs in the cache. Padded: a long neighbour makes the bucket
    # larger.
    backwards = generate(PARAMS, MODEL, CONFIG, PROMPTS[::-1], batch_size=BATCH)
    assert [contents(a) for a in backwards[::-1]] == [contents(a) for a in answers]
    assert [a.forwards for a in backwards[::-1]] == [a.forwards for a in answers]


def test_left_over_cache_contents_do_not_matter():
    found = []
    for garbage in (0.0, 1e4):
        engine = Engine(PARAMS, MODEL, CONFIG, BATCH, max_prompt_length=60)
        cache = engine._state.cache
        cache = cache.replace(
            k=jax.tree.map(lambda x: x + garbage, cache.k), v=jax.tree.map(lambda x: x - garbage, cache.v)
        )
        engine._state = engine._state.replace(cache=cache)
        engine.add(Prompt(PROMPTS[0], CONFIG))
        found.append(engine.step(1000))
    assert found[0] == found[1]
    assert found[0][0].finished and found[0][0].tokens


def test_rows_have_their_own_settings(answers):
    """Side by side: greedy, sampled, other thresholds, a limit and a stop id; each as in a batch of its own kind."""
    configs = [
        CONFIG,
        dataclasses.replace(CONFIG, temperature=1.5, slot_threshold=0.2, token_threshold=0.05),
        dataclasses.replace(CONFIG, slot_threshold=0.9, token_threshold=0.9),
        dataclasses.replace(CONFIG, temperature=1.0, top_k=2, top_p=0.9),
    ]
    engine = Engine(PARAMS, MODEL, CONFIG, BATCH, max_prompt_length=60)
    for index, config in enumerate(configs):
        assert engine.add(Prompt(PROMPTS[index], config, index=index, seed=3)) == index
    assert engine.add(Prompt(PROMPTS[0], CONFIG)) is None, "full"
    together = []
    while engine.busy:
        together += engine.step(5)
    for answer in together:
        alone = generate(PARAMS, MODEL, configs[answer.index], PROMPTS[:4], batch_size=BATCH, seed=3)[answer.index]
        assert answer == alone


@pytest.mark.parametrize("method", ["plan_and_infill", "autoregressive"])
def test_limit_and_stop_ids_end_an_answer(method):
    config = {
        "plan_and_infill": dataclasses.replace(CONFIG, slot_threshold=0.999),
        "autoregressive": AutoregressiveConfig(CONFIG.gen_length),
    }[method]
    whole = max(generate(PARAMS, MODEL, config, PROMPTS[:12], batch_size=BATCH), key=lambda answer: len(answer.tokens))
    assert len(whole.tokens) > 12
    prompt = PROMPTS[whole.index]
    engine = Engine(PARAMS, MODEL, config, BATCH, max_prompt_length=60)
    stop = whole.tokens[5]
    engine.add(Prompt(prompt, config, index=whole.index, limit=9))
    engine.add(Prompt(prompt, config, index=whole.index, stop_ids=(stop,)))
    found = {}
    while engine.busy:
        for answer in engine.step(1000):
            found["limit" if answer.tokens[-1] != stop or len(answer.tokens) == 9 else "stop"] = answer.tokens
    assert len(found["limit"]) == 9
    assert found["stop"][-1] == stop and stop not in found["stop"][:-1]
    if method == "autoregressive":
        assert found["limit"] == whole.tokens[:9]
        assert found["stop"] == whole.tokens[: whole.tokens.index(stop) + 1]


@pytest.mark.parametrize("method", ["plan_and_infill", "autoregressive"])
def test_a_short_answer_takes_positions_and_cache_for_itself_only(method):
    config = {"plan_and_infill": CONFIG, "autoregressive": AutoregressiveConfig(CONFIG.gen_length)}[method]
    prompt = (PROMPTS[0] * 240)[: MODEL.max_position_embeddings - 12]  # 12: a limit of 9, rounded up to whole slots

    def decode(model, limit):
        engine = Engine(PARAMS, model, config, 1, max_prompt_length=model.max_position_embeddings - config.length)
        before = engine.cache_length
        engine.add(Prompt(prompt, config, limit=limit))
        (answer,) = engine.step(1000)
        assert engine.cache_length == before
        return answer

    roomy = dataclasses.replace(MODEL, max_position_embeddings=512)
    assert decode(MODEL, 9) == decode(roomy, 9)
    with pytest.raises(UserError, match="positions, more than"):
        decode(MODEL, 0)


def test_stream_of_a_prompt_is_chosen_apart_from_its_index():
    config = dataclasses.replace(CONFIG, temperature=2.0)
    engine = Engine(PARAMS, MODEL, config, 2, max_prompt_length=60)
    engine.add(Prompt(PROMPTS[0], config, index=7))
    (seventh,) = engine.step(1000)
    engine.add(Prompt(PROMPTS[0], config, index=1, stream=7))
    engine.add(Prompt(PROMPTS[0], config, index=2, stream=8))
    first, second = sorted(engine.step(1000) + engine.step(1000), key=lambda answer: answer.index)
    assert contents(first) == contents(seventh) != contents(second)


def test_engines_interleave_and_leave_nothing_behind():
    """Two engines on different meshes step in turn, one is abandoned; the caller's context stays its own."""
    model = dataclasses.replace(MODEL, num_kv_heads=2)
    params = random_params(3, 1.2, model)
    wanted = generate(params, model, CONFIG, PROMPTS[:8], batch_size=8, max_prompt_length=60)
    meshes = [make_mesh(2, 2, 2), make_mesh(4, 1, 2)]
    streams = []
    for mesh in meshes:
        spread = jax.device_put(params, sharding.param_shardings(model, mesh, sharding.DECODE_RULES))
        options = dict(batch_size=8, max_prompt_length=60, mesh=mesh, every=3)
        streams.append(stream(spread, model, CONFIG, PROMPTS[:8], **options))
    found = [[], []]
    for _ in range(20):
        for answers, running in zip(found, streams):
            answers.append(next(running))
            assert jax.sharding.get_abstract_mesh().empty, "no mesh is left set between answers"
    before = [compiled(batch=8, model=model, mesh=mesh) for mesh in meshes]
    streams[0].close()
    found[1] += list(streams[1])
    assert [compiled(batch=8, model=model, mesh=mesh) for mesh in meshes] == before, "interleaving compiles nothing"
    finished = sorted((a for a in found[1] if a.finished), key=lambda answer: answer.index)
    assert finished == wanted


def test_a_cancelled_row_is_free_and_disturbs_nobody(answers):
    answers, _ = answers
    engine = Engine(PARAMS, MODEL, CONFIG, 2, max_prompt_length=60)
    for index in range(2):
        engine.add(Prompt(PROMPTS[index], CONFIG, index=index))
    engine.step(2)
    engine.cancel(0)
    assert engine.busy == 1
    assert engine.add(Prompt(PROMPTS[2], CONFIG, index=2)) == 0
    found = []
    while engine.busy:
        found += engine.step(1000)
    assert {a.index: contents(a) for a in found} == {i: contents(answers[i]) for i in (1, 2)}


def test_a_row_that_is_cancelled_while_the_device_works_can_be_given_away_at_once(answers):
    engine = Engine(PARAMS, MODEL, CONFIG, 1, max_prompt_length=40)
    row = engine.add(Prompt(PROMPTS[0], CONFIG, 0))
    engine.launch(1000)
    engine.cancel(row)
    assert engine.add(Prompt(PROMPTS[1], CONFIG, 1)) == row
    assert engine.collect() == []
    (answer,) = engine.step(1000)
    assert (answer.index, answer.tokens) == (1, answers[0][1].tokens)


def test_a_longer_prompt_makes_the_cache_grow(answers):
    answers, _ = answers
    engine = Engine(PARAMS, MODEL, CONFIG, 2)
    engine.add(Prompt(PROMPTS[0], CONFIG, index=0))
    engine.step(2)
    before = engine.cache_length
    long = [2, 3, 4, 5] * 30
    engine.add(Prompt(long, CONFIG, index=1))
    assert engine.cache_length > before
    found = []
    while engine.busy:
        found += engine.step(1000)
    by_index = {a.index: a for a in found}
    assert contents(by_index[0]) == contents(answers[0])
    wanted = expected(oracle_forward(PARAMS), long, CONFIG)
    same_tokens(by_index[1], wanted, long)


def test_long_prompts_are_prefilled_in_chunks_beside_running_rows(answers, monkeypatch):
    """A step makes no more passes over prompts than over rows, so that running rows go on; the answers are the same."""
    answers, _ = answers
    monkeypatch.setattr(engine_lib, "PREFILL_TOKENS", 8)
    monkeypatch.setattr(engine_lib, "PREFILL_WIDTHS", (4, 8))
    monkeypatch.setattr(cached_attention, "PREFILL_PART", 16)
    longest = max(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]))
    engine = Engine(PARAMS, MODEL, CONFIG, 2, max_prompt_length=60)
    engine.add(Prompt(PROMPTS[0], CONFIG, index=0))
    while not engine.steps:
        engine.step(1)
    engine.add(Prompt(PROMPTS[longest], CONFIG, index=longest))
    before, found = (engine.steps, engine.prefills), []
    while engine.busy:
        found += engine.step(1)
        if engine.prefills - before[1] < len(PROMPTS[longest]) // 8 and not found:
            assert engine.steps - before[0] == engine.prefills - before[1], "a pass of the rows for every chunk"
    assert engine.prefills - before[1] == -(-len(PROMPTS[longest]) // 8)
    assert {a.index: contents(a) for a in found} == {i: contents(answers[i]) for i in (0, longest)}


def test_temporaries_of_a_prefill_are_those_of_a_chunk(monkeypatch):
    """Of a prompt ten times as long, only the mask of a chunk takes more: a few numbers for each token of it and entry.

    A mask of the whole prompt would take more.
    """
    monkeypatch.setattr(cached_attention, "SCORE_BYTES", 2 * 16 * 512 * 4)

    def compile_prefill(prompt_length):
        model = dataclasses.replace(MODEL, num_layers=4, num_kv_heads=2, head_dim=64, max_position_embeddings=10000)
        params = random_params(0, 1.0, model)
        engine = Engine(params, model, CONFIG, 2, max_prompt_length=prompt_length)
        engine.add(Prompt([2] * prompt_length, CONFIG))
        chunk = engine._next_chunk()
        program = engine._programs.prefill.lower(engine._params, engine._state, chunk).compile()
        return program.memory_analysis().temp_size_in_bytes, engine.cache_length

    (short, small), (long, large) = compile_prefill(700), compile_prefill(7000)
    print(f"temporaries {short}, {long} bytes; cache of {small}, {large} entries")
    assert long - short < 12 * engine_lib.PREFILL_WIDTHS[-1] * (large - small)


def test_requests_that_need_another_engine_are_refused():
    engine = Engine(PARAMS, MODEL, CONFIG, 2)
    for prompt, message in (
        (Prompt([2], dataclasses.replace(CONFIG, slot_size=8)), "Use another engine"),
        (Prompt([2], CONFIG, limit=99), "limit 99; choose from 1 to 32"),
        (Prompt([2], CONFIG, stop_ids=tuple(range(8))), "8 stop_ids; at most 7"),
    ):
        with pytest.raises(UserError, match=message):
            engine.add(prompt)
    assert not engine.busy


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


@pytest.mark.parametrize("blocks", [2, 8])
def test_speculation_is_never_seen_in_a_token(blocks):
    """Also where a block has fewer tokens than a forward may carry. On a CPU auto carries where a window is given."""
    off, auto, given, on = (
        generate(PARAMS, MODEL, dataclasses.replace(CONFIG, blocks=blocks, **how), PROMPTS[:8], batch_size=1)
        for how in (dict(speculate="off"), dict(speculate="auto"), dict(speculate="auto", window=32), {})
    )
    forwards = [sum(a.forwards for a in answers) for answers in (off, auto, given, on)]
    assert forwards[0] == forwards[1] > forwards[2] >= forwards[3]
    for answers in (auto, given, on):
        assert [contents(a) for a in answers] == [contents(a) for a in off]


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_no_row_is_given_more_room_than_its_window_has(platform):
    cases = itertools.product((1, 3, 16, 200), (1, 4, 8), (1, 2, 4), ("off", "auto", "on"))
    for batch, slot_size, blocks, speculate in cases:
        config = dataclasses.replace(CONFIG, slot_size=slot_size, blocks=blocks, speculate=speculate)
        sampler = config.sampler(MODEL, batch, platform)
        assert max(sampler.widths) <= sampler.window and sampler.slots <= sampler.chunks


def test_cutting_to_one_id_is_greedy(answers):
    greedy = [contents(a) for a in answers[0][:8]]
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"top_p": 1e-39}, {"top_p": 1e-300}):
        config = dataclasses.replace(CONFIG, temperature=2.0, **options)
        cut = generate(PARAMS, MODEL, config, PROMPTS[:8], batch_size=BATCH, max_prompt_length=60)
        assert [contents(a) for a in cut] == greedy


def test_samples_follow_the_distribution():
    n = 4000
    logits = jax.random.normal(jax.random.key(1), (MODEL.vocab_size,)) * 2
    keys = jax.random.split(jax.random.key(2), n)
    probs = np.array(jax.nn.softmax(logits / 2.0))
    probs[[MODEL.mask_token_id, MODEL.begin_token_id]] = 0
    for top_k, top_p in ((0, 1.0), (4, 1.0), (0, 0.7), (3, 0.9)):
        ranked = np.sort(probs)[::-1] / probs.sum()
        if top_k:
            ranked[top_k:] = 0
            ranked /= ranked.sum()
        keep = int((np.cumsum(ranked) - ranked < top_p).sum())
        wanted = np.where(probs >= np.sort(probs)[::-1][min(keep, top_k or keep) - 1], probs, 0)
        config = dataclasses.replace(CONFIG, temperature=2.0, top_k=top_k, top_p=top_p)
        query = reduction.Query.of(jnp.zeros(n, int), keys, Settings.of(config, MODEL.eos_token_id))
        drafts = reduction.reduce(MODEL, jnp.broadcast_to(logits, (n, MODEL.vocab_size)), query, sampled=True).draft
        found = np.bincount(np.asarray(drafts), minlength=MODEL.vocab_size) / n
        np.testing.assert_allclose(found, wanted / wanted.sum(), atol=0.03)


def test_sampled_autoregressive_decoding_follows_its_distribution():
    """Sequences of three tokens from one prompt, counted against the product of the model's own probabilities."""
    config = AutoregressiveConfig(gen_length=3, temperature=1.3)
    n, prompt = 3000, PROMPTS[0]
    found = generate(PARAMS, MODEL, config, [prompt] * n, batch_size=64)
    allowed = np.ones(MODEL.vocab_size, bool)
    allowed[[MODEL.mask_token_id, MODEL.begin_token_id]] = False

    @jax.jit
    def after(tokens):
        scores = jnp.where(allowed, all_logits(tokens[None])[0, -1] / 1.3, -jnp.inf)
        return jax.nn.softmax(scores)

    for length in (1, 2, 3):
        counts = {}
        for answer in found:
            if len(answer.tokens) >= length:
                counts[tuple(answer.tokens[:length])] = counts.get(tuple(answer.tokens[:length]), 0) + 1
        for start, count in sorted(counts.items(), key=lambda item: -item[1])[:5]:
            wanted = 1.0
            for i, token in enumerate(start):
                wanted *= float(after(jnp.array(prompt + list(start[:i])))[token])
            sigma = (wanted * (1 - wanted) / n) ** 0.5
            assert abs(count / n - wanted) < 4.5 * sigma + 1e-4, (start, count / n, wanted)


@pytest.mark.parametrize("count", [1, 2, 7, 60, 61, 100])
def test_cutting_without_sorting_keeps_what_sorting_keeps(count):
    """The largest `count` of logits of either sign, of those equal to the least all; excluded ids stay excluded."""
    logits = np.random.default_rng(0).normal(size=(3, 2, 64)).astype(np.float32) * 10
    logits[0], logits[1, 0, :20], logits[2] = np.round(logits[0]), 0.0, -abs(logits[2])
    logits[..., [5, 9, 33]] = -np.inf
    found = reduction._cut(jnp.array(logits), lambda kept: kept.sum(axis=-1) >= count)
    least = np.sort(logits, axis=-1)[..., ::-1][..., min(count, 64) - 1]
    np.testing.assert_array_equal(found, np.where(logits >= least[..., None], logits, -np.inf))


def test_autoregressive_equals_an_argmax_loop():
    config = AutoregressiveConfig(gen_length=10)
    found = generate(PARAMS, MODEL, config, PROMPTS[:9], batch_size=BATCH, max_prompt_length=60)
    allowed = np.ones(MODEL.vocab_size, bool)
    allowed[[MODEL.mask_token_id, MODEL.begin_token_id]] = False
    forward = jax.jit(all_logits)
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


def test_temporaries_of_the_loop_do_not_grow_with_the_cache(monkeypatch):
    """Neither with its layers (there is no copy of it) nor with its length (scores of at most SCORE_BYTES exist)."""
    # Parts of 512 entries or fewer in the narrowest forward: one of them is copied.
    monkeypatch.setattr(cached_attention, "SCORE_BYTES", 2 * 2 * 4 * 512 * 4)

    config = dataclasses.replace(CONFIG, speculate="off")

    def compile_loop(layers, cache_length):
        model = dataclasses.replace(MODEL, num_layers=layers, num_kv_heads=2, head_dim=64)
        sampler = programs_lib.make_sampler(model, config, 2)
        programs = programs_lib.programs(sampler, None)
        params = jax.eval_shape(lambda: unstacked(random_params(0, 1.0, model)))
        state = jax.eval_shape(lambda: programs_lib.empty(sampler, Settings.of(config, 1), 2, cache_length))
        program = programs.run.lower(params, state, np.int32(1), np.int32(1)).compile()
        assert "callback" not in program.as_text(), "the loop never asks the host"
        bytes_ = sum(x.size * 4 for x in jax.tree.leaves((state.cache.k, state.cache.v)))
        return program.memory_analysis().temp_size_in_bytes, bytes_

    temporaries, cache = zip(*(compile_loop(layers, length) for layers, length in ((4, 1024), (8, 1024), (4, 4096))))
    print(f"temporaries {temporaries} bytes, cache {cache} bytes")
    for more, larger in zip(temporaries[1:], cache[1:], strict=True):
        assert more - temporaries[0] < 0.01 * (larger - cache[0])


def test_bfloat16_decodes():
    config = dataclasses.replace(MODEL, dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    report = Report()
    found = generate(params, config, CONFIG, PROMPTS[:4], batch_size=BATCH, max_prompt_length=60, report=report)
    state = Engine(params, config, CONFIG, BATCH)._state
    assert {x.dtype for x in jax.tree.leaves((state.cache.k, state.cache.v))} == {jnp.dtype("bfloat16")}
    for answer in found:
        assert len(answer.tokens) == CONFIG.length or answer.tokens[-1] == MODEL.eos_token_id
        assert not {MODEL.mask_token_id, MODEL.begin_token_id} & set(answer.tokens)


def test_gen_length_is_rounded_up_to_whole_slots():
    assert PlanAndInfillConfig(gen_length=62, slot_size=4, blocks=1).length == 64


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
        ({"top_k": 2**31}, "top_k is 2147483648; it must be a number of at most 2147483647"),
        ({"temperature": 1e39}, "temperature is 1e.39; it must be a number of at most 3.40"),
        ({"speculate": "yes"}, "speculate is 'yes'"),
        ({"method": "beam"}, "method is 'beam'"),
        ({"method": "autoregressive", "speculate": "on"}, "has no setting 'speculate'; it is one of plan_and_infill"),
        ({"slots": 3}, "has no setting 'slots'; it has gen_length"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(UserError, match=message):
        sampler_config(**{"method": "plan_and_infill"} | options)


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
        ([[2]], {}, {"seed": -1}, "seed is -1"),
        ([[2]], {}, {"seed": 2**32}, "seed is 4294967296; it must lie in 0 .. 4294967295"),
    ],
)
def test_bad_prompts_and_models(prompts, model, options, message):
    with pytest.raises(UserError, match=message):
        generate(PARAMS, dataclasses.replace(MODEL, **model), CONFIG, prompts, **options)


def test_no_prompts_is_no_answers():
    assert generate(PARAMS, MODEL, CONFIG, []) == []
