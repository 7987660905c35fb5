"""Texts with holes: against the plain Python oracle, what is given stays, and what cannot be filled is refused."""

import collections
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import linen as nn
from micro import get_config
from sampling_cases import MODEL, oracle_forward, random_params, random_prompts

from refusion_jax import decoder as decoder_lib
from refusion_jax import generate
from refusion_jax.config import from_config_dict
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.decoder import Decoder
from refusion_jax.errors import UserError
from refusion_jax.infilling import Hole, Template, request
from refusion_jax.model.attention import Packed
from refusion_jax.model.head import over_vocabulary
from refusion_jax.model.qwen3 import Qwen3, init_params
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.sampling import AutoregressiveConfig, Engine, MaskedConfig, PlanAndInfillConfig, Prompt
from refusion_jax.sampling import generate as generate_ids
from refusion_jax.sampling.batching import serve

pytestmark = pytest.mark.usefixtures("quick_compiles")

CONFIG = PlanAndInfillConfig(
    gen_length=24, slot_size=4, blocks=2, slot_threshold=0.4, token_threshold=0.35, speculate="off"
)


def random_request(rng, config, index, slot=4):
    """Up to three holes of up to three slots among given tokens; one may begin or end the text."""
    tokens, positions, holes, at, left = [], [], [], 0, 6
    for part in range(rng.integers(2, 7)):
        if part % 2 == index % 2 and left:
            size = int(rng.integers(1, min(left, 3) + 1)) * slot
            holes.append((at, size))
            at, left = at + size, left - size // slot
        else:
            count = int(rng.integers(1, 7))
            tokens += rng.integers(2, MODEL.begin_token_id, count).tolist()
            positions += range(at, at + count)
            at += count
    limit = sum(size for _, size in holes)
    return Prompt(tokens, config, index, limit=limit, positions=positions, holes=tuple(holes))


@pytest.mark.parametrize("speculate", ["off", "on"])
def test_equals_the_oracle(speculate):
    """Tokens, their places and the order of commits; a stop id closes its hole and no other one."""
    paths, forwards = collections.Counter(), collections.Counter()
    rng = np.random.default_rng(0)
    for seed in range(6):
        params = random_params(seed, scale=rng.uniform(0.6, 1.6))
        forward = oracle_forward(params)
        config = dataclasses.replace(
            CONFIG,
            speculate=speculate,
            slot_threshold=rng.choice([0.2, 0.5, 0.9]),
            token_threshold=rng.uniform(0.1, 0.6),
        )
        requests = [r for r in (random_request(rng, config, index) for index in range(12)) if r.holes]
        engine = Engine(params, MODEL, config, 8, max_prompt_length=32)
        answers = {answer.index: answer for answer in serve(engine, requests)}
        for r in requests:
            wanted = oracle.decode(
                forward,
                r.tokens,
                gen_length=config.gen_length,
                slot_size=config.slot_size,
                blocks=config.blocks,
                slot_threshold=config.slot_threshold,
                token_threshold=config.token_threshold,
                mask_id=MODEL.mask_token_id,
                eos_id=MODEL.eos_token_id,
                banned=[MODEL.mask_token_id, MODEL.begin_token_id],
                positions=r.positions,
                holes=list(r.holes),
            )
            if wanted.margin < 2e-5:
                continue
            answer = answers[r.index]
            places = [position + i for position, size in r.holes for i in range(size)]
            assert [places[offset] for offset in answer.order] == wanted.commit_order
            assert answer.committed == wanted.commit_tokens and answer.rounds == wanted.rounds
            if speculate == "off":
                assert answer.forwards == wanted.forwards
            else:
                assert answer.forwards <= wanted.forwards
            forwards.update(here=answer.forwards, oracle=wanted.forwards)
            # Each hole up to its first EOS.
            found = dict(zip(wanted.commit_order, wanted.commit_tokens))
            at = 0
            for (position, size), part in zip(r.holes, answer.parts, strict=True):
                text = [found.get(position + i) for i in range(size)]
                if MODEL.eos_token_id in text:
                    text = text[: text.index(MODEL.eos_token_id) + 1]
                    paths["closed early"] += len(text) < size
                    paths["filled behind a closed hole"] += position < r.holes[-1][0]
                assert answer.tokens[at : at + part] == text
                at += part
            paths["several holes"] += len(r.holes) > 1
            paths["begins with a hole"] += r.holes[0][0] == 0
    print(dict(paths), dict(forwards))
    assert min(paths.values()) >= 5 and len(paths) == 4
    if speculate == "on":
        assert forwards["here"] < 0.85 * forwards["oracle"]


def test_a_hole_behind_a_prompt_is_an_answer():
    params, prompts = random_params(3, scale=1.2), random_prompts(5, 8)
    answers = generate_ids(params, MODEL, CONFIG, prompts, batch_size=4)
    engine = Engine(params, MODEL, CONFIG, 4, max_prompt_length=16)
    holes = [
        Prompt(p, CONFIG, i, limit=24, positions=range(len(p)), holes=((len(p), 24),)) for i, p in enumerate(prompts)
    ]
    for answer in serve(engine, holes):
        assert answer == answers[answer.index]


# --- Masked diffusion: holes of any size, one token per forward where the schedule says no more.

MASKED = MaskedConfig(gen_length=12, stop="length")


@pytest.fixture(scope="module")
def masked():
    """Parameters, and requests with holes of 2 to 6 tokens."""
    rng = np.random.default_rng(5)
    return random_params(3, scale=1.2), [
        r for r in (random_request(rng, MASKED, i, slot=2) for i in range(16)) if r.holes
    ]


@pytest.mark.parametrize(
    "given",
    [dict(), dict(alignment="shift"), dict(cache="dllm", prompt_interval=1, gen_interval=1)],
    ids=["same", "shift", "dllm"],
)
def test_masked_holes_equal_a_loop_that_forwards_the_whole_text(masked, given):
    """The surest token first; with dLLM-Cache where it computes everything again each time. What is given stays."""
    params, requests = masked
    config = dataclasses.replace(MASKED, **given)
    engine = Engine(params, MODEL, config, 4, max_prompt_length=32)
    by_index = {r.index: dataclasses.replace(r, config=config) for r in requests}
    for answer in serve(engine, by_index.values()):
        r = by_index[answer.index]
        places, text = r.places(r.limit)[0], np.full(len(r.tokens) + r.limit, MODEL.mask_token_id)
        text[list(r.positions)] = r.tokens
        for offset, token in zip(answer.order, answer.committed, strict=True):
            logits = whole_text_logits(params, jnp.pad(jnp.array(text), (0, 64 - len(text)), constant_values=-1))
            logits = np.array(logits)[np.maximum(np.arange(len(text)) - (config.alignment == "shift"), 0)]
            p = np.asarray(jax.nn.softmax(logits, axis=-1))
            drafts = np.where(
                np.isin(np.arange(logits.shape[1]), [MODEL.begin_token_id, MODEL.mask_token_id]), -np.inf, logits
            ).argmax(axis=-1)
            chosen = max(np.flatnonzero(text == MODEL.mask_token_id), key=lambda i: p[i, drafts[i]])
            assert (places[offset], token) == (chosen, drafts[chosen])
            text[chosen] = token
        assert MODEL.mask_token_id not in text
    assert max(len(r.holes) for r in requests) == 3 and {size for r in requests for _, size in r.holes} == {2, 4, 6}
    assert min(r.holes[0][0] for r in requests) == 0


@jax.jit
def whole_text_logits(params, tokens):
    """[length, vocab] of a text forwarded without any cache, each token seeing all; -1: padding."""
    context = Packed((tokens >= 0).astype(jnp.int32)[None], see="all", implementation="xla")
    positions = jnp.arange(len(tokens))[None]
    hidden, _ = Qwen3(MODEL).apply({"params": params}, jnp.maximum(tokens, 0)[None], positions, context)
    return over_vocabulary(MODEL, params, hidden, lambda logits: logits)[0]


def test_masked_holes_end_with_their_first_end(masked):
    """All that decoding to the last mask makes of each hole up to its end, and sooner."""
    params, requests = masked
    found = []
    for stop in ("length", "answer"):
        config = dataclasses.replace(MASKED, stop=stop)
        engine = Engine(params, MODEL, config, 4, max_prompt_length=32)
        answers = serve(engine, [dataclasses.replace(r, config=config, stop_ids=(2, 3)) for r in requests])
        found.append({answer.index: answer for answer in answers})
    whole, early = found
    for index in whole:
        assert (early[index].tokens, early[index].parts) == (whole[index].tokens, whole[index].parts)
    assert sum(answer.forwards for answer in early.values()) < sum(answer.forwards for answer in whole.values())


# --- Texts.


@pytest.fixture(scope="module")
def decoder():
    """A byte-level random model that is sure of what it says."""
    config = from_config_dict(get_config())
    model = dataclasses.replace(config.model, max_position_embeddings=128)
    params = nn.unbox(init_params(model, jax.random.key(3)))
    params["embed"]["embedding"] *= 60
    return Decoder(
        params, model, load_tokenizer("bytes"), make_mesh(1, 1, 1, devices=jax.devices()[:1]), config.objective
    )


SETTINGS = dict(slot_size=4, blocks=1, slot_threshold=0.3, token_threshold=0.2, speculate="off")


def test_given_texts_stay_and_holes_have_their_room(decoder):
    parts = ["def add(a, b):\n", Hole(8), "\nprint(", Hole(4), ")"]
    result = decoder.infill(parts, **SETTINGS)
    assert result.text == f"def add(a, b):\n{result.holes[0]}\nprint({result.holes[1]})"
    assert len(result.generation.parts) == 2
    assert 1 <= result.generation.parts[0] <= 8 and 1 <= result.generation.parts[1] <= 4
    assert sum(result.generation.parts) == len(result.generation.tokens)
    sent = request(Template(parts), decoder.tokenizer, decoder.model, decoder.settings(**SETTINGS, gen_length=12))
    assert sent.tokens == [*b"def add(a, b):\n\nprint()", decoder.tokenizer.eos_id]
    assert sent.holes == ((15, 8), (30, 4)) and list(sent.positions) == [*range(15), *range(23, 30), 34, 35]
    assert sent.limit == 12 and sent.stop_ids == (decoder.tokenizer.pad_id,)


def test_masked_fills_holes_of_any_size(decoder):
    masked = dataclasses.replace(decoder, objective=None)
    result = masked.infill(["def add(a, b):\n", Hole(5), "\nprint(", Hole(1), ")"], method="masked", block_length=0)
    assert result.text == f"def add(a, b):\n{result.holes[0]}\nprint({result.holes[1]})"
    assert 1 <= result.generation.parts[0] <= 5 and result.generation.parts[1] == 1


def test_a_batch_gives_what_each_gives_alone(decoder):
    """Templates of different sizes, with a prompt and without, in one batch."""
    templates = [
        Template(["ab", Hole(8), "cd"]),
        Template([Hole(4), " is the answer"], prompt="What?"),
        Template(["x = ", Hole(4), " + ", Hole(4), " + ", Hole(4)]),
    ]
    config = decoder.settings(**SETTINGS, gen_length=12)
    together = decoder.fill(templates, config, batch_size=2)
    for template, result in zip(templates, together, strict=True):
        alone = decoder.fill([template], config)[0]
        assert (result.text, result.holes) == (alone.text, alone.holes)
    assert together[1].text == together[1].holes[0] + " is the answer"


def test_end_and_pad_close_a_hole(decoder):
    """A model that says nothing else closes every hole with its first token."""
    for token in (decoder.tokenizer.eos_id, decoder.tokenizer.pad_id):
        params = jax.tree.map(jnp.zeros_like, decoder.params)
        table = np.zeros(params["embed"]["embedding"].shape, np.float32)
        table[:, 0] = 1.0
        table[token, 0] = 5.0
        params["embed"]["embedding"] = jnp.asarray(table)
        params["final_norm"]["scale"] = jnp.ones_like(params["final_norm"]["scale"])
        closing = dataclasses.replace(decoder, params=params)
        result = closing.infill(["a", Hole(8), "b", Hole(4), "c"], **SETTINGS)
        assert result.generation.parts == [1, 1] and result.text == "abc"


# --- Bad input.


@pytest.mark.parametrize(
    "parts, message",
    [
        (["a", Hole(4), "b", Hole(10)], "Hole 1 has 10 tokens, but holes are whole slots of slot_size 4: make it 12"),
        (["a", Hole(0)], "Hole 0 has 0 tokens"),
        (["nothing to do"], "no hole"),
        ([Hole(8)], "Nothing is given"),
        (["", Hole(8)], "Nothing is given"),
        (["a", 4], "is 4; it must be a text or a Hole"),
        (["a\ud800", Hole(8)], r"'a\\ud800' of the template has '\\ud800' at character 1"),
        (["a" * 100, Hole(64)], "164 positions .*more than the model's 128"),
    ],
)
def test_bad_templates(decoder, parts, message):
    with pytest.raises(UserError, match=message):
        decoder.infill(parts, **SETTINGS)


def test_methods_from_left_to_right_fill_no_holes(decoder):
    unknown = dataclasses.replace(decoder, objective=None)
    for method in ("autoregressive", "speculative", "block"):
        with pytest.raises(UserError, match=f"{method} .*fills no holes; plan_and_infill and masked do"):
            unknown.infill(["a", Hole(4)], method=method)
    with pytest.raises(UserError, match="2 holes.* cache = 'dkv_pd' .* one hole only: use cache = 'none'"):
        unknown.infill(["a", Hole(4), "b", Hole(3)], method="masked", alignment="shift", cache="dkv_pd")
    config = AutoregressiveConfig(gen_length=8)
    engine = Engine(decoder.params, decoder.model, config, 1)
    with pytest.raises(UserError, match="fills no holes"):
        engine.add(Prompt([65], config, limit=4, positions=[0], holes=((1, 4),)))


# --- The command line.

FLAGS = ["--slot-size", "4", "--blocks", "1", "--slot-threshold", "0.3", "--token-threshold", "0.2"]


@pytest.fixture
def command(decoder, monkeypatch):
    """The command with the model that is there already."""
    monkeypatch.setattr(decoder_lib.Decoder, "load", lambda *_, **__: decoder)
    return lambda *words: generate.main(["--checkpoint", "none", "--speculate", "off", *FLAGS, *map(str, words)])


def test_templates_of_a_file(command, decoder, tmp_path, capsys):
    file, out = tmp_path / "templates.jsonl", tmp_path / "filled.jsonl"
    records = [{"template": ["ab", 8, "cd"], "name": "first"}, {"prompt": "Sum?", "template": ["is ", 4]}]
    file.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    command("--infill", file, "--out", out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    config = decoder.settings(**SETTINGS, gen_length=8)
    expected = decoder.fill([Template(["ab", Hole(8), "cd"]), Template(["is ", Hole(4)], "Sum?")], config)
    assert [line["text"] for line in lines] == [result.text for result in expected]
    assert [line["holes"] for line in lines] == [result.holes for result in expected]
    assert lines[0]["name"] == "first" and lines[0]["forwards"] == expected[0].generation.forwards
    command("--infill", file)
    assert capsys.readouterr().out == "".join(result.text + "\n" for result in expected)
    with pytest.raises(UserError, match="exists"):
        command("--infill", file, "--out", out)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"template": ["a", 4]}\n{"template": ["a", 6]}', "line 2: Hole 0 has 6 tokens.*make it 8"),
        ('{"template": ["a"]}', "line 1: The template has no hole"),
        ('{"text": "a"}', "line 1: .*has no template"),
        ('{"template": ["a", true]}', "line 1: .*has no template"),
        ('{"template": ["a", 4], "prompt": 3}', "line 1: the prompt is 3"),
        ('{"template": ["a", 4}', "line 1: malformed JSON"),
        ("\n", "has no line"),
    ],
)
def test_bad_files(command, tmp_path, content, message):
    (tmp_path / "templates.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        command("--infill", tmp_path / "templates.jsonl")
    with pytest.raises(UserError, match="Cannot read"):
        command("--infill", tmp_path / "nowhere.jsonl")
