"""Block diffusion decoding: what authors' code recorded, the exact cache, batches, and what is random."""

import collections
import dataclasses
import json

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
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.sampling import BlockConfig, Report, engine, generate, sampler_config
from refusion_jax.sampling.block import below_p, linear_t

pytestmark = pytest.mark.usefixtures("quick_compiles")
PARAMS = random_params(3, 1.5)


# --- The authors' decodings.


@pytest.mark.parametrize(
    "method, sampler, size",
    [
        ("sdar", "sequential", 4),
        ("sdar", "low_confidence_static", 16),
        ("sdar", "low_confidence_dynamic", 8),
        ("sdar", "entropy_bounded", 16),
        ("sdar", "dllm_low_confidence", 16),
        ("bd3", "first_hitting", 4),
        ("bd3", "ddpm", 8),
    ],
)
def test_recorded_decodings_are_repeated(method, sampler, size, repository, reference, monkeypatch):
    """Tokens, the forward that decided each, and forwards; in batches, whose rows are refilled."""
    monkeypatch.syspath_prepend(repository / "tools")
    import reference_decode

    folder = reference / "methods" / method
    model = load.load_model_config(folder / "model")
    model = type(model)(**{**vars(model), "mask_token_id": 95, "dtype": "float32", "attention": "xla"})
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    params = load.load_params(folder / "model", model, mesh, sharding.DECODE_RULES, dtype="float32")
    params = jax.tree.map(jnp.array, jax.device_get(params))
    recorded = reference_decode.read(folder / "decode.jsonl", model.vocab_size)
    lines = (folder / "decode.jsonl").read_text().splitlines()
    params_of = [json.loads(line)["params"] for line in lines]
    wanted = {"sampler": sampler, "block_size": size}
    cases = [case for case, given in zip(recorded, params_of, strict=True) if wanted.items() <= given.items()]
    if sampler == "ddpm":  # a program for each number of steps
        cases = [case for case in cases if case.config.steps == cases[0].config.steps]
    answers = list(reference_decode.decode(params, model, cases, batch=8))
    assert len(answers) == len(cases) >= 5
    assert not [line for case, answer in answers for line in reference_decode.mismatches(case, answer, "decode")]


def test_dllm_rounds_what_falls_due():
    assert linear_t(16, 3).tolist() == [5, 5, 6]
    assert linear_t(4, 8).tolist() == [1, 1, 1, 1]
    assert all(linear_t(tokens, steps).sum() == tokens for tokens in range(1, 33) for steps in range(1, 33))


# --- The cache is exact.


@jax.jit
def probabilities(tokens, size):
    """[length, vocab] of a whole text, forwarded without any cache."""
    blocks = jnp.arange(tokens.shape[1])[None] // size
    context = Packed(jnp.ones_like(tokens), blocks=blocks, see="block", implementation="xla")
    hidden, _ = Qwen3(MODEL).apply({"params": PARAMS}, tokens, jnp.arange(tokens.shape[1])[None], context)
    return over_vocabulary(MODEL, PARAMS, hidden, jax.nn.softmax)[0]


def by_hand(prompt, config, length=64):
    """(tokens, order) of greedy decoding with reveal dynamic and one token at least, all forwarded every time."""
    size = config.block_size
    end = -(-(len(prompt) + config.gen_length) // size) * size
    text, order = np.full(length, MODEL.mask_token_id), []
    text[: len(prompt)] = prompt
    for start in range(len(prompt) // size * size, end, size):
        place = np.arange(length)
        open = (place >= max(start, len(prompt))) & (place < start + size)
        while open.any():
            found = np.array(probabilities(text[None], size))
            found[:, [MODEL.mask_token_id, MODEL.begin_token_id]] = 0
            sure = open & (found.max(axis=1) > config.threshold)
            best = np.argmax(np.where(open, found.max(axis=1), -1))
            chosen = np.flatnonzero(sure) if sure.any() else np.array([best])
            text[chosen], open[chosen] = found[chosen].argmax(axis=1), False
            order += (chosen - len(prompt)).tolist()
        if MODEL.eos_token_id in text[len(prompt) : start + size]:
            break
    answer = text[len(prompt) : start + size].tolist()
    stop = answer.index(MODEL.eos_token_id) + 1 if MODEL.eos_token_id in answer else len(answer)
    return answer[:stop], order


@pytest.mark.parametrize("size", [3, 4])
def test_the_cache_of_blocks_changes_nothing(size, monkeypatch):
    """Prompts shorter than a block, of whole blocks and of several chunks, which no block straddles."""
    config = BlockConfig(gen_length=14, block_size=size, threshold=0.6)
    prompts = [p[:n] for p, n in zip(random_prompts(5, 40, longest=40), range(1, 40), strict=False) if len(p) >= n]
    prompts += random_prompts(6, 3, longest=40)
    assert max(map(len, prompts)) > 16 and min(map(len, prompts)) < size
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 8)
    monkeypatch.setattr(engine, "PREFILL_WIDTHS", (4, 8))
    report = Report()
    answers = generate(PARAMS, MODEL, config, prompts, batch_size=4, report=report)
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens, order = by_hand(prompt, config)
        assert (answer.tokens, answer.order) == (tokens, order)
        blocks = (len(prompt) + len(answer.committed)) // size - len(prompt) // size
        assert answer.tokens_forwarded == len(prompt) // size * size + answer.forwards * size
        assert answer.forwards == len(set(answer.rounds)) + blocks
    assert report.prefills > len(prompts) / 4


def test_batch_and_mesh_change_nothing():
    config = BlockConfig(gen_length=10, reveal="entropy", gamma=1.0, temperature=0.8, top_p=0.9)
    prompts = random_prompts(7, 16)
    wanted = generate(PARAMS, MODEL, config, prompts, batch_size=16)
    assert generate(PARAMS, MODEL, config, prompts, batch_size=4) == wanted
    mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])
    with sharding.use(mesh, sharding.DECODE_RULES):
        assert generate(PARAMS, MODEL, config, prompts, batch_size=4, mesh=mesh) == wanted


def test_bfloat16_decodes_what_float32_does():
    """The first token is the same where float32 is not in doubt; every answer is whole."""
    config = BlockConfig(gen_length=10, reveal="sequential", stop="length")
    model = dataclasses.replace(MODEL, dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    prompts = random_prompts(8, 12)
    exact = generate(PARAMS, MODEL, config, prompts, batch_size=4)
    rounded = generate(params, model, config, prompts, batch_size=4)
    assert sum(a.committed[0] == b.committed[0] for a, b in zip(exact, rounded, strict=True)) >= 10
    assert all(len(a.committed) == len(b.committed) and sorted(b.order) == b.order for a, b in zip(exact, rounded))


def test_a_request_with_a_limit_ends_with_its_block():
    requests = [engine.Prompt([2, 3, 4], BlockConfig(gen_length=20, stop="length"), i, limit=i) for i in (1, 2, 6, 20)]
    batch = engine.Engine(PARAMS, MODEL, requests[0].config, 4)
    for request in requests:
        batch.add(request)
    answers = []
    while batch.busy:
        answers += batch.step(100)
    for answer in answers:
        assert len(answer.committed) == -(-(3 + answer.index) // 4) * 4 - 3
        assert len(answer.tokens) <= answer.index


# --- What is random.


@pytest.mark.parametrize("reveal, steps", [("first_hitting", 0), ("ddpm", 3)])
def test_random_orders_have_their_distribution(reveal, steps):
    """First hitting: all orders of a block's three open tokens alike. DDPM: each token at any of the steps alike."""
    config = BlockConfig(gen_length=3, reveal=reveal, steps=steps, temperature=1.0, stop="length")
    answers = generate(PARAMS, MODEL, config, [[2]] * 600, batch_size=64)
    if reveal == "first_hitting":
        assert {answer.forwards for answer in answers} == {4}
        counts = collections.Counter(tuple(answer.order) for answer in answers)
        assert len(counts) == 6
        assert sum((count - 100) ** 2 / 100 for count in counts.values()) < 20.5  # 0.1 % point, 5 degrees
        return
    # Three tokens in three steps: the number of different ones is 1, 2 or 3 with probability 3, 18 and 6 in 27.
    counts = collections.Counter(answer.forwards - 1 for answer in answers)
    expected = {n: 600 * ways / 27 for n, ways in {1: 3, 2: 18, 3: 6}.items()}
    assert sum((counts[n] - wanted) ** 2 / wanted for n, wanted in expected.items()) < 13.8  # 2 degrees


def test_tokens_are_drawn_from_the_nucleus():
    """The first token of a block of one, whose distribution is that of a forward by hand, without the id that reaches
    top-p.
    """
    found = np.array(probabilities(np.array([[2, 5, MODEL.mask_token_id]]), 1))[2]
    found[[MODEL.mask_token_id, MODEL.begin_token_id]] = 0
    order = np.argsort(-found)
    p = found[order] / found.sum()
    top_p = float(p[:3].sum() + p[3] / 2)
    config = BlockConfig(gen_length=1, block_size=1, reveal="first_hitting", temperature=1.0, top_p=top_p)
    answers = generate(PARAMS, MODEL, config, [[2, 5]] * 800, batch_size=64)
    counts = collections.Counter(answer.tokens[0] for answer in answers)
    assert set(counts) <= set(order[:3].tolist())
    wanted = 800 * p[:3] / p[:3].sum()
    deviation = np.array([counts[i] for i in order[:3].tolist()]) - wanted
    assert (np.abs(deviation) < 4 * np.sqrt(wanted)).all()


def test_the_nucleus_is_below_p():
    p = jnp.array([[0.5, 0.3, 0.15, 0.05]] * 5)
    kept = below_p(jnp.log(p), jnp.array([0.3, 0.6, 0.85, 0.97, 1.0])) > -jnp.inf
    assert kept.sum(axis=1).tolist() == [1, 1, 2, 3, 4]


# --- Settings.


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"block_size": 0}, "block_size is 0; choose from 1 to 256"),
        ({"block_size": 512}, "choose from 1 to 256"),
        ({"threshold": 1.5}, r"must lie in \[0, 1\]"),
        ({"gamma": -1.0}, "a number of nats"),
        ({"steps": -1}, "at least 1, or 0"),
        ({"steps": 5}, "some forwards would decide nothing; choose at most 4"),
        ({"reveal": "entropy", "steps": 4}, "leave steps at 0"),
        ({"reveal": "static", "fallback": "leftmost"}, "too few sure tokens"),
        ({"reveal": "sequential", "schedule": "linear_t"}, "reveal = 'static' only"),
        ({"reveal": "all"}, "choose one of sequential, static, dynamic"),
        ({"cache": "dual"}, "has no setting 'cache'"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message) as raised:
        sampler_config("block", **settings)
    assert "\n" not in str(raised.value)
