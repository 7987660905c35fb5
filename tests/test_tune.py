"""Settings found for a task: what is measured is what decoding with them gives, and what is chosen is on the curve."""

import dataclasses
import itertools
import json
import pathlib
import sys

import micro
import pytest

from refusion_jax import decoder as decoder_lib
from refusion_jax import generate, serve
from refusion_jax.config import load_config
from refusion_jax.errors import UserError
from refusion_jax.sampling import PlanAndInfillConfig
from refusion_jax.sampling.programs import make_sampler, programs

pytestmark = pytest.mark.usefixtures("quick_compiles")

QUERIES = ["sun", "moon", "stars", "rain", "snow", "wind", "ice", "fire", "sea", "sand"]
CONFIG = PlanAndInfillConfig(gen_length=8, slot_size=4, blocks=1, slot_threshold=0.5, token_threshold=0.3)


@pytest.fixture(scope="module")
def tool(repository):
    sys.path.insert(0, str(repository / "tools"))
    import tune_sampler

    yield tune_sampler
    sys.path.remove(str(repository / "tools"))


@pytest.fixture(scope="module")
def run(repository, tmp_path_factory) -> pathlib.Path:
    """The folder of a run with random weights; the responses of most of its data are what CONFIG makes of them."""
    folder = tmp_path_factory.mktemp("run")
    config = load_config(f"{repository}/tests/micro.py:data={folder}/data.json")
    micro.save_run(folder, config)
    decoder = decoder_lib.Decoder.load(str(folder))
    answers = list(decoder.stream(QUERIES, CONFIG))
    texts = {answer.generation.index: answer.text for answer in answers}
    records = [{"query": q, "response": texts[i] if i % 4 else "other"} for i, q in enumerate(QUERIES)]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def decoder(run):
    return decoder_lib.Decoder.load(str(run))


def test_points_are_what_decoding_gives(tool, run, decoder):
    """All thresholds in one batch, one compiled loop for all of them."""
    source = decoder_lib.run_sources(str(run), "train")[0]
    chosen = tool.examples_of(source, 8)
    configs = [
        dataclasses.replace(CONFIG, slot_threshold=slot, token_threshold=token)
        for slot, token in itertools.product((0.1, 0.5, 0.95), (0.05, 0.3, 0.9))
    ]
    loop = programs(make_sampler(decoder.model, CONFIG, 4, decoder.mesh), decoder.mesh).run.jitted
    before = loop._cache_size()
    points = tool.measure(decoder, source, chosen, configs, batch_size=4)
    assert loop._cache_size() <= before + 1
    assert [point.config for point in points] == configs
    for point in points[::4]:
        answers = list(decoder.stream([source[i][0] for i in chosen], point.config, batch_size=4))
        right = sum(source.score(chosen[a.generation.index], a.text) == 1.0 for a in answers)
        assert point.accuracy == right / len(chosen)
        tokens, forwards = (
            sum(f(a.generation) for a in answers) for f in (lambda g: len(g.tokens), lambda g: g.forwards)
        )
        assert point.speed == tokens / forwards
    assert len({point.speed for point in points}) > 1
    assert points[4].accuracy == sum(QUERIES.index(source[i][0]) % 4 > 0 for i in chosen) / len(chosen)


def test_curve_and_choice(tool):
    """Against trying all pairs; ties and equal points among them."""
    point = lambda accuracy, speed: tool.Point(CONFIG, accuracy, speed)
    points = [point(a / 10, s / 4) for a, s in itertools.product(range(11), range(1, 12)) if (a * 7 + s * 5) % 11 < 3]
    points = [p for p in points if p.accuracy + p.speed / 4 < 1.2] + [point(0.9, 1.0), point(0.9, 1.0)]
    beaten = lambda p: any(
        q.accuracy >= p.accuracy and q.speed >= p.speed and (q.accuracy, q.speed) != (p.accuracy, p.speed)
        for q in points
    )
    curve = tool.front(points)
    assert {(p.accuracy, p.speed) for p in curve} == {(p.accuracy, p.speed) for p in points if not beaten(p)}
    assert len(curve) == len({p.speed for p in curve}) > 2
    for tolerance in (0.0, 0.1, 0.35, 1.0):
        best = max(p.accuracy for p in points)
        near = [p for p in points if p.accuracy >= best - tolerance - 1e-9]
        chosen = tool.choose(points, tolerance)
        assert chosen in near and chosen.speed == max(p.speed for p in near)


def test_file_is_taken_by_all_commands(tool, run, decoder, monkeypatch, tmp_path, capsys):
    out = tmp_path / "found" / "settings.json"
    words = [
        "--examples",
        "4",
        "--slot-sizes",
        "4",
        "--thresholds",
        "0.3,0.9",
        "--batch-size",
        "4",
        "--tolerance",
        "0",
    ]
    monkeypatch.setattr(decoder_lib.Decoder, "load", lambda *_, **__: decoder)
    tool.main(["--checkpoint", str(run), "--out", str(out), *words])
    table = capsys.readouterr().out
    assert "| data | chosen |" in table and "| data | held out |" in table
    assert out.with_suffix(".png").stat().st_size > 1000
    (settings,) = json.loads(out.read_text()).values()
    assert settings["slot_size"] == 4 and settings["slot_threshold"] in (0.3, 0.9)
    argv = ["--checkpoint", str(run), "--prompt", "sun", "--settings", str(out)]
    config = decoder_lib.settings_of(generate.arguments_of(argv), decoder)
    assert {name: getattr(config, name) for name in settings} == settings
    changed = decoder_lib.settings_of(generate.arguments_of([*argv, "--slot-threshold", "0.77"]), decoder)
    assert changed == dataclasses.replace(config, slot_threshold=0.77)

    pytest.importorskip("lm_eval")
    from refusion_jax import evaluate

    argv = ["--checkpoint", str(run), "--tasks", "held_out", "--settings", str(out), "--out", "nowhere"]
    ((benchmark, found),) = evaluate.documents.load("held_out", {}, str(run), None)
    tuned = evaluate.read_settings(out)
    assert evaluate.config_of(evaluate.arguments_of(argv), decoder, benchmark, found, tuned) == config

    protocol = pytest.importorskip("refusion_jax.serving.protocol")
    argv = ["--checkpoint", str(run), "--also", "autoregressive", "--settings", str(out), "--max-length", "100"]
    offer = serve.service_of(decoder, serve.arguments_of(argv)).offer
    assert list(offer.methods) == ["plan_and_infill", "autoregressive"]
    assert offer.methods["plan_and_infill"] == config
    assert offer.methods["autoregressive"].gen_length == settings["gen_length"]
    asked = {"prompt": "sun", "slot_threshold": 0.77}
    assert protocol.completion(asked, offer).config == changed


def test_settings_of_several_tasks(decoder, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"a": {"slot_size": 4, "gen_length": 16}, "b": {"slot_size": 8, "gen_length": 16}}))
    argv = ["--checkpoint", "none", "--prompt", "sun", "--settings", str(file)]
    config = lambda *more: decoder_lib.settings_of(generate.arguments_of([*argv, *more]), decoder)
    assert config("--task", "b").slot_size == 8 and config("--task", "a").slot_size == 4
    for more in ([], ["--task", "c"]):
        with pytest.raises(UserError, match="has settings for a, b; choose with --task"):
            config(*more)
    file.write_text(json.dumps({"slot_size": 4, "gen_length": 8}))
    assert config().slot_size == 4
    file.write_text("[]")
    with pytest.raises(UserError, match="holds a list; it must be one JSON object"):
        config()


def test_without_answers_to_check(tool, run, monkeypatch, tmp_path):
    found = decoder_lib.run_config(str(run))
    plain = found | {"data": found["data"] | {"train": [dict(kind="text", path="text.txt")]}}
    monkeypatch.setattr(decoder_lib, "run_config", lambda *_: plain)
    with pytest.raises(UserError, match="no train data with prompts, so no answers that can be checked"):
        tool.main(["--checkpoint", str(run), "--out", str(tmp_path / "settings.json")])


@pytest.mark.parametrize(
    "words, message",
    [(["--examples", "0"], "--examples is 0"), (["--tolerance", "-1"], "--tolerance is -1")],
)
def test_bad_arguments(tool, words, message):
    with pytest.raises(UserError, match=message):
        tool.main(["--checkpoint", "none", "--out", "settings.json", *words])
