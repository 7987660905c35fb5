"""The benchmark beside PyTorch: both sides make the same tokens and losses; what is missing is named."""

import json
import sys

import pytest

from refusion_jax.errors import UserError


@pytest.fixture
def measure(monkeypatch, repository):
    """benchmark_peer's main on a tiny model, given more arguments."""
    monkeypatch.syspath_prepend(str(repository / "tools"))
    import benchmark_peer

    small = ["--config", f"{repository}/tests/micro.py", "--prompt-length", "9", "--repeats", "2"]
    return lambda *arguments: benchmark_peer.main([*small, *arguments])


@pytest.mark.torch
def test_both_sides_make_the_same(measure, tmp_path, capsys):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    out = tmp_path / "peer.json"
    lengths = ["--prefill", "20", "--dense-length", "32", "--packed-length", "64", "--packed-rows", "2"]
    decoding = ["--gen-length", "12", "--slot-size", "4", "--blocks", "1", "--tokens-per-forward", "1.5"]
    measure("--batch", "1,3", *lengths, *decoding, "--json", str(out))
    results = json.loads(out.read_text())["results"]
    names = ["autoregressive, batch 1", "autoregressive, batch 3"]
    names += ["plan-and-infill, off", "plan-and-infill, auto", "plan-and-infill, on"]
    names += ["prefill, 20", "training, 4 rows of 32", "training, 2 packed rows of 64"]
    assert [r["row"] for r in results] == names
    for r in results:
        assert r["same"] is (None if r["row"].startswith("plan") else True), r["row"]
        assert r["tokens"] > 0 and 0 < r["least"] <= r["ratio"] <= r["most"]
        assert len(r["turns"]) == 2 and all(run["cpu_seconds"] > 0 for turn in r["turns"] for run in turn)
    assert capsys.readouterr().out.count("\n| ") == 2 + len(names)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--authors", "nowhere"], "nowhere has no generate.py"),
        (["--python", "no-such-python"], "no-such-python cannot be started"),
        (["--rows", "autoregressive,speed"], "speed; choose from"),
        (["--checkpoint", "run"], "either"),
        (["--repeats", "0"], "at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(measure, arguments, message):
    with pytest.raises(UserError, match=message):
        measure(*arguments)


def test_an_environment_without_torch_is_named(measure, tmp_path):
    """An interpreter that finds no packages at all."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(UserError, match=r"No module named 'torch'.*refusion_jax\[torch\]"):
        measure("--python", str(bare))
