"""The benchmark of the training step measures the real step on the real input pipeline."""

import json
import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tools"))
import benchmark_train

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_figures_agree_with_one_another(monkeypatch, tmp_path, capsys):
    small = {"model.num_layers": 1, "model.hidden_size": 32, "model.intermediate_size": 32, "data.max_length": 64}
    arguments = [
        "--config",
        str(ROOT / "configs/tiny.py"),
        *(f"--config.{name}={value}" for name, value in small.items()),
    ]
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "benchmark.py train",
            *arguments,
            "--synthetic",
            "--batch",
            "8",
            "--steps",
            "2",
            "--json",
            str(tmp_path / "f.json"),
            "--profile",
            str(tmp_path / "traces"),
        ],
    )
    benchmark_train.main()
    (result,) = json.loads((tmp_path / "f.json").read_text())["results"]
    assert result["tokens_per_second"] * result["step_seconds"] == pytest.approx(8 * 64 * (1 - result["padding"]))
    assert 0 <= result["padding"] < 0.5 and 0 <= result["input_wait"] < 1
    assert result["peak_bytes"] > 0 and result["compile_seconds"] > 0 and result["corruption"] > 0
    assert result["mfu"] is None  # a CPU's peak is not known
    assert list((tmp_path / "traces").glob("batch8-length64-*/**/*.xplane.pb"))
    header, line, row = capsys.readouterr().out.splitlines()[-3:]
    assert header.count("|") == line.count("|") == row.count("|") and "mfu" not in header
