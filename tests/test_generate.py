"""The command line of decoding and the tools around it, on a random byte-level model in a run's folder."""

import argparse
import dataclasses
import io
import json
import os
import re
import sys

import micro
import pytest

from refusion_jax import decoder as decoder_lib
from refusion_jax import display, generate
from refusion_jax.config import load_config
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.errors import UserError
from refusion_jax.objective.block import Block as BlockObjective
from refusion_jax.objective.masked import Masked as MaskedObjective
from refusion_jax.sampling import Generation, PlanAndInfillConfig
from refusion_jax.sampling import generate as generate_ids

QUERIES = ["sun", "moon and stars", "où", "four", "five"]
# The same for all tests, so that the programs are compiled once.
SETTINGS = {"gen_length": 16, "slot_size": 4, "slot_threshold": 0.5, "token_threshold": 0.3, "speculate": "off"}
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))] + [
    "--batch-size",
    "2",
]


@pytest.fixture(scope="module")
def tools(repository):
    """Makes the scripts in tools/ importable."""
    sys.path.insert(0, str(repository / "tools"))
    yield
    sys.path.remove(str(repository / "tools"))


@pytest.fixture(scope="module")
def checkpoint(repository, tmp_path_factory) -> str:
    return save_run(repository, tmp_path_factory.mktemp("run"))


def save_run(repository, folder, **settings) -> str:
    """The folder of a run of tests/micro.py whose large random weights are sure of what they say."""
    config = load_config(f"{repository}/tests/micro.py:data={folder}/data.json")
    model = dataclasses.replace(config.model, max_position_embeddings=128)
    config = dataclasses.replace(config, model=model, **settings)
    micro.save_run(folder, config)
    return str(folder)


@pytest.fixture(scope="module")
def decoder(checkpoint) -> decoder_lib.Decoder:
    return decoder_lib.Decoder.load(checkpoint)


@pytest.fixture
def loaded(decoder, monkeypatch):
    """Commands take the model that is loaded already."""
    monkeypatch.setattr(decoder_lib.Decoder, "load", lambda *_, **__: decoder)


@pytest.fixture(scope="module")
def answers(decoder) -> list[decoder_lib.Answer]:
    return decoder.generate(QUERIES, batch_size=2, **SETTINGS)


def run(checkpoint, *arguments) -> None:
    generate.main(["--checkpoint", checkpoint, *map(str, arguments), *FLAGS])


def write_lines(path, lines) -> None:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def test_text_in_and_out_is_the_sampler_between_chat_template_and_decoding(decoder, answers):
    tokenizer = decoder.tokenizer
    ids = generate_ids(
        decoder.params,
        decoder.model,
        decoder.settings(**SETTINGS),
        tokenizer.encode_prompts(QUERIES),
        batch_size=2,
        mesh=decoder.mesh,
    )
    assert [a.generation for a in answers] == ids
    assert [a.text for a in answers] == [tokenizer.decode(g.tokens) for g in ids]
    assert max(max(g.rounds) for g in ids) > 0  # or the tests of order below would show little


def test_several_devices_give_the_answers_of_one(checkpoint, answers):
    """Rows over data and fsdp, weights over tensor, read by every device as its own part of them."""
    spread = decoder_lib.Decoder.load(checkpoint, mesh="2,2,2").generate(QUERIES, batch_size=4, **SETTINGS)
    assert spread == answers


def test_a_model_decodes_longer_texts_with_a_scaled_base(checkpoint):
    flags = argparse.ArgumentParser()
    decoder_lib.add_model_arguments(flags)
    lengths = ["--context-length", "256", "--trained-length", "64"]
    model = decoder_lib.decoder_of(flags.parse_args(["--checkpoint", checkpoint, *lengths])).model
    assert (model.max_position_embeddings, model.rope_factor) == (256, 3)
    with pytest.raises(UserError, match="original_max_position_embeddings = 128 .*max_position_embeddings = 100"):
        decoder_lib.Decoder.load(checkpoint, context_length=100)


@pytest.mark.parametrize(
    "given",
    [{}, {"gen_length": 200}, {"slot_size": 7, "gen_length": 23}, {"gen_length": 1}],
)
def test_settings_that_are_not_given_suit_the_model(decoder, given):
    config = decoder.settings(temperature=None, **given)
    assert config.slot_size == given.get("slot_size", 32)  # the largest that the run trained with
    assert config.gen_length == given.get("gen_length", 64)  # half of the positions
    assert config.slots % config.blocks == 0 and config.temperature == 0


def test_file_keeps_order_and_fields(checkpoint, answers, tmp_path, capsys):
    lines = [
        {"prompt": QUERIES[0], "id": 7},
        {"query": QUERIES[1]},
        "",
        *({"prompt": q, "nested": {"a": [1]}} for q in QUERIES[2:]),
    ]
    write_lines(tmp_path / "in.jsonl", lines)
    run(checkpoint, "--prompts", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert found == [
        {**line, **generate.as_record(answer)} for line, answer in zip(filter(None, lines), answers, strict=True)
    ]
    assert set(found[1]) == {"query", "text", "tokens", "order", "rounds", "forwards", "tokens_per_forward"}
    assert "5 answers" in capsys.readouterr().err


def test_resumed_file_equals_an_uninterrupted_one(loaded, checkpoint, tmp_path):
    write_lines(tmp_path / "in.jsonl", [{"prompt": q} for q in QUERIES])
    out = tmp_path / "out.jsonl"
    arguments = ["--prompts", tmp_path / "in.jsonl", "--out", out, "--temperature", "1"]
    run(checkpoint, *arguments)
    whole = out.read_bytes()
    # Nothing, in the middle of a line, at the end of one without its newline, everything.
    for kept in (0, len(whole) // 2, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:kept])
        run(checkpoint, *arguments, "--resume")
        assert out.read_bytes() == whole
    with pytest.raises(UserError, match="--resume"):
        run(checkpoint, *arguments)
    write_lines(tmp_path / "in.jsonl", [{"prompt": q} for q in QUERIES[1:]])
    with pytest.raises(UserError, match="line 1 does not belong"):
        run(checkpoint, *arguments, "--resume")


BAD_LINES = {
    "{'prompt': 'x'}": "malformed JSON at column 2",
    '["prompt"]': "has no prompt",
    '{"text": "x"}': "has no prompt",
    '{"prompt": 3}': "the prompt is 3",
    '{"prompt": " "}': "not empty",
    json.dumps({"prompt": "long " * 30}): "152 tokens",
    json.dumps({"prompt": "\ud800"}): r"Message 0 has '\ud800' at character 0",
}


def test_bad_lines_are_named_and_can_be_skipped(loaded, checkpoint, answers, tmp_path, capsys):
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    for line, message in BAD_LINES.items():
        write_lines(path, [{"prompt": QUERIES[0]}, line])
        with pytest.raises(UserError, match=f"in.jsonl line 2: .*{re.escape(message)}"):
            run(checkpoint, "--prompts", path, "--out", out)
        assert not out.exists()
    good = [{"prompt": q} for q in QUERIES]
    write_lines(path, [good[0], *BAD_LINES, *good[1:]])
    capsys.readouterr()
    run(checkpoint, "--prompts", path, "--out", out, "--skip-bad")
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == [a.text for a in answers]
    reported = re.findall(r"skipped: .*in.jsonl line (\d+): ", capsys.readouterr().err)
    assert list(map(int, reported)) == list(range(2, 2 + len(BAD_LINES)))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "x", "--mesh", "1,2"], "three numbers"),
        (["--prompt", "x", "--mesh", "3,1,-1"], "does not fit"),
        (["--prompt", "x", "--step", "9"], "no checkpoint of step 9"),
        (["--prompt", ""], "Prompt 0 is empty"),
        (["--prompt", "a\udcff"], r"Message 0 has '\udcff' at character 1"),
        (["--prompt", "x", "--seed", "-1"], "seed is -1"),
        (["--prompt", "x", "--slot-threshold", "1.5"], "slot_threshold is 1.5"),
        (["--prompt", "x", "--temperature", "inf"], "temperature is inf"),
        (["--prompt", "x", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "x", "--blocks", "3"], "blocks"),
        (["--prompt", "x", "--gen-length", "128"], "more than the model's 128"),
        (["--prompts", "absent.jsonl", "--out", "out.jsonl"], "Cannot read absent.jsonl"),
        (["--prompts", "absent.jsonl"], "--out go together"),
        (["--infill", "absent.jsonl", "--resume"], "--resume is about a file of --prompts"),
        (["--prompt", "x", "--skip-bad"], "--skip-bad is about a file of --prompts"),
    ],
)
def test_bad_arguments_are_named(checkpoint, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        generate.main(["--checkpoint", checkpoint, *FLAGS, *arguments])


def test_order_is_shown_in_colours_or_numbers(loaded, checkpoint, decoder, answers, capsys, monkeypatch):
    answer = answers[1]
    shown = {}
    for color in ("always", "never", "auto"):  # auto: this is no terminal
        run(checkpoint, "--prompt", QUERIES[1], "--prompt", "x", "--show-order", "--color", color)
        shown[color] = capsys.readouterr().out
    assert "\033[" in shown["always"] and "\033[" not in shown["never"] and shown["auto"] == shown["never"]
    for text in shown.values():
        unmarked = re.sub(r"\033\[[0-9;]*m|\[\d+\]", "", text)
        assert answer.text in unmarked and "committed in round" in text

    # Each token carries the number of its own round.
    found = display.spans(decoder.tokenizer, answer.generation, decoder.model.eos_token_id)
    round_of = dict(zip(answer.generation.order, answer.generation.rounds))
    assert [r for _, r in found] == [round_of[p] for p in range(len(answer.generation.tokens))]

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert display.use_color("auto", terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not display.use_color("auto", terminal) and display.use_color("always", terminal)


@pytest.mark.parametrize("objective", [MaskedObjective(), BlockObjective(block_size=4)], ids=lambda o: o.kind)
def test_a_checkpoint_is_decoded_and_shown_by_its_objective(objective, repository, tools, tmp_path, capsys):
    """From the folder of a run: the method that suits what it was trained for, by the command and in a picture."""
    import visualize_decode
    from PIL import Image

    run = save_run(repository, tmp_path / "run", objective=objective)
    ask = ["--checkpoint", run, "--prompt", "sun", "--gen-length", "8"]
    with pytest.raises(UserError, match=f"objective '{objective.kind}' cannot be decoded .* with {objective.kind}"):
        generate.main([*ask, "--method", "autoregressive"])
    generate.main([*ask, "--show-order"])
    shown = capsys.readouterr()
    rounds, forwards = map(int, re.search(r"in (\d+) rounds and (\d+) forwards", shown.err).groups())
    assert re.search(r"\[\d\]", shown.out) and f"[n]: committed in round n of {rounds}\n" in shown.out
    visualize_decode.main([*ask, "--out", str(tmp_path / "decode.png")])
    with Image.open(tmp_path / "decode.gif") as animation:
        assert animation.n_frames == forwards > 1


def test_pieces_join_to_the_text_whatever_the_bytes():
    tokenizer = load_tokenizer("bytes")
    for text in (b"plain", "où 七十二 \U0001f600".encode(), b"a\xff\xfeb", "ù".encode()[:1], b""):
        ids = list(text)
        pieces = display.pieces(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids) and len(pieces) == len(ids)
    assert display.pieces(tokenizer, list("aù".encode())) == ["a", "", "ù"]


def test_unfinished_answer_shows_open_positions_up_to_the_first_end():
    tokenizer = load_tokenizer("bytes")
    end = tokenizer.eos_id
    answer = Generation(0, [], [5, 6, 7, 2, 3], [ord("x"), end, 9, ord("a"), ord("b")], [0, 0, 0, 1, 1], 4, 9, False)
    assert display.spans(tokenizer, answer, end) == [("·", None)] * 2 + [
        ("a", 1),
        ("b", 1),
        ("·", None),
        ("x", 0),
        ("", 0),
    ]


def test_live_text_is_replaced_in_place_and_fits_the_terminal(monkeypatch):
    """On a terminal of 5 lines: what is cleared leaves nothing, and no text reaches above the first line."""
    monkeypatch.setattr(display.shutil, "get_terminal_size", lambda *_, **__: os.terminal_size((10, 5)))
    stream = io.StringIO()
    live = display.Live(stream)
    live.show([("x" * 25, 0), ("\ny", 1)], 2, color=False)  # 3 rows and 1
    assert stream.getvalue() == "x" * 25 + "\ny"
    live.clear()
    assert stream.getvalue().endswith("\033[3A\r\033[J")
    live.show([(f"{n}\n", 0) for n in range(30)], 1, color=True)
    assert stream.getvalue().endswith("29\033[0m\n") and "\n25" not in stream.getvalue()


def test_interactive_answers_each_line_and_survives_a_bad_one(loaded, checkpoint, answers, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUERIES[0]}\n{'long ' * 30}\n{QUERIES[3]}\n\nnot asked\n"))
    run(checkpoint, "--interactive")
    shown = capsys.readouterr()
    assert shown.out.splitlines() == f"{answers[0].text}\n{answers[3].text}".splitlines()
    assert "152 tokens" in shown.err


def test_visualisation_has_a_frame_per_forward(loaded, tools, checkpoint, decoder, tmp_path):
    import visualize_decode
    from PIL import Image

    out = tmp_path / "pictures" / "decode.png"
    visualize_decode.main(["--checkpoint", checkpoint, "--prompt", QUERIES[1], "--out", str(out), *FLAGS[:-2]])
    answer = decoder.generate([QUERIES[1]], batch_size=1, **SETTINGS)[0].generation
    with Image.open(out) as picture, Image.open(out.with_suffix(".gif")) as animation:
        picture.load()
        assert picture.format == "PNG" and animation.n_frames == answer.forwards
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 10

    cells = visualize_decode.cells_of(decoder, answer)
    round_of = dict(zip(answer.order, answer.rounds))
    assert [cell.round for cell in cells] == [round_of.get(p) for p in range(max(answer.order) + 1)]
    assert sum(not cell.cut for cell in cells) == len(answer.tokens)
    painter = visualize_decode.Painter(cells, PlanAndInfillConfig(gen_length=16, slot_size=4, blocks=1))
    placed = [place for band in painter.bands for place in band]
    assert [p for p, *_ in placed] == list(range(len(cells)))
    assert all(right <= left for (_, _, right), (_, left, _) in zip(painter.bands[0], painter.bands[0][1:]))
    with pytest.raises(UserError, match="ends in .png"):
        visualize_decode.main(["--checkpoint", checkpoint, "--out", "decode.jpg"])


def test_converted_checkpoint_has_no_held_out_examples(reference):
    with pytest.raises(UserError, match="no held-out examples"):
        decoder_lib.held_out(reference / "tiny" / "model")


def test_benchmark_has_a_row_for_every_case(tools, repository, tmp_path, capsys):
    import benchmark_decode

    out = tmp_path / "benchmark.json"
    arguments = [
        "--config",
        f"{repository}/tests/micro.py",
        "--prompt-length",
        "5",
        "--gen-length",
        "16",
        "--slot-size",
        "8",
        "--tokens-per-forward",
        "1.5",
    ]
    benchmark_decode.main([*arguments, "--batch", "2", "--forwards", "2", "--json", str(out)])
    found = json.loads(out.read_text())
    cases = [(r["batch"], r["method"], r["speculate"]) for r in found["results"]]
    assert cases == [(2, "autoregressive", ""), (2, "plan_and_infill", "off"), (2, "plan_and_infill", "on")]
    assert capsys.readouterr().out.count("\n| ") == 2 + len(cases)
    assert found["same_tokens"]
    for r in found["results"]:
        assert (
            r["tokens_per_forward"] == pytest.approx(r["tokens"] / r["forwards"])
            and r["ms_per_forward"] > 0
            and r["temporary_bytes"] > 0
        )
        assert r["tokens_per_forward"] == 1 if r["method"] == "autoregressive" else r["tokens"] == 32
    off, on = found["results"][1:3]
    assert on["forwards"] < off["forwards"]
    assert 0.9 < off["tokens_per_forward"] < 2.1  # the threshold was searched for 1.5

    for bad, message in (
        (["--batch", "0"], "at least 1"),
        (["--batch", "2", "--prompts", "3"], "multiple"),
        (["--checkpoint", "x"], "either"),
    ):
        with pytest.raises(UserError, match=message):
            benchmark_decode.main([*arguments, *bad])
