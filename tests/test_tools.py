"""tools/plot.py and tools/check_reference.py: what they draw and say, and what they say of bad input."""

import json
import runpy
import sys

import numpy as np
import pytest

from refusion_jax.errors import UserError


@pytest.fixture
def call(repository, monkeypatch):
    """Calls a tool's main with arguments."""

    def call(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool, *map(str, arguments)])
        monkeypatch.syspath_prepend(repository / "tools")  # as for a script
        runpy.run_path(str(repository / "tools" / f"{tool}.py"))["main"]()

    return call


# --- plot


def write_run(folder, scale, steps=(10, 20, 30)):
    """A run whose losses are known; returns its records."""
    folder.mkdir()
    records = [{"step": s, "kind": "train", "ar_loss": scale / s, "mdm_loss": 2 * scale / s, "lr": 1e-3} for s in steps]
    records += [
        {
            "step": s,
            "kind": "evaluation",
            "ar_loss": scale / s,
            "mdm_loss": 3 * scale / s,
            "ar_accuracy": s / 100,
            "mdm_accuracy": s / 200,
        }
        for s in steps[::2]
    ]
    records.sort(key=lambda record: record["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def test_plot_draws_what_the_runs_recorded(call, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.close("all")
    runs = {name: write_run(tmp_path / name, scale) for name, scale in (("a", 1.0), ("b", 5.0))}
    call("plot", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "new" / "loss.png")
    height, width, _ = plt.imread(tmp_path / "new" / "loss.png").shape
    assert width > 1000 and height > 300
    drawn = {line.get_label(): line.get_xydata().tolist() for axis in plt.gcf().axes[1:2] for line in axis.lines}
    for name, records in runs.items():
        for kind, label in (("train", "train"), ("evaluation", "held out")):
            assert drawn[f"{name} {label}"] == [[r["step"], r["mdm_loss"]] for r in records if r["kind"] == kind]
    accuracies = {line.get_label(): line.get_xydata().tolist() for line in plt.gcf().axes[2].lines}
    assert accuracies["b mdm"] == [[10, 0.05], [30, 0.15]]
    plt.close("all")


def test_plot_draws_the_terms_that_each_run_has(call, tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.close("all")
    write_run(tmp_path / "a", 1.0)
    (tmp_path / "b").mkdir()
    record = {"step": 10, "kind": "train", "mdm_loss": 2.0, "reconstruction_loss": 3.0}
    (tmp_path / "b" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    call("plot", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "loss.png")
    labels = {axis.get_title(): [line.get_label() for line in axis.lines] for axis in plt.gcf().axes}
    assert labels["ar loss"] == ["a train", "a held out"] and labels["reconstruction loss"] == ["b train"]
    assert labels["mdm loss"] == ["a train", "a held out", "b train"]
    plt.close("all")


def test_plot_names_what_it_cannot_read(call, tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(UserError, match=f"no {tmp_path}/absent/metrics.jsonl"):
        call("plot", tmp_path / "absent")
    write_run(tmp_path / "a", 1.0)
    with pytest.raises(UserError, match="Cannot write .*metrics.jsonl/x.png"):
        call("plot", tmp_path / "a", "--out", tmp_path / "a" / "metrics.jsonl" / "x.png")
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "kin')
    with pytest.raises(UserError, match="metrics.jsonl line 6 is not a record"):
        call("plot", tmp_path / "a")


# --- check_reference


def reference_copy(reference, name, folder):
    (folder / "model").symlink_to(reference / name / "model")
    return folder


def checked(call, capsys, *arguments):
    """(exit code, output) of check_reference."""
    with pytest.raises(SystemExit) as stopped:
        call("check_reference", *arguments)
    return stopped.value.code, capsys.readouterr().out


def test_check_reference_finds_equal_logits_and_says_how_far_others_are(call, capsys, reference, tmp_path):
    folder = reference_copy(reference, "qwen3_untied", tmp_path)
    data = dict(np.load(reference / "qwen3_untied" / "logits.npz"))
    np.savez(folder / "logits.npz", **data)
    assert checked(call, capsys, folder) == (0, "logits 2/2\n")
    data["logits_permuted"][1, 3, 5] += 0.01
    np.savez(folder / "logits.npz", **data)
    code, out = checked(call, capsys, folder, "--mesh", "2,2,1")
    assert code == 1 and out.startswith("logits 1/2\n  logits_permuted: max abs difference 1.0")
    data["logits"][0, 0, 0] = np.nan
    np.savez(folder / "logits.npz", **data)
    assert checked(call, capsys, folder)[1].startswith("logits 0/2")


def test_check_reference_lists_every_loss_that_differs(call, capsys, reference, tmp_path):
    folder = reference_copy(reference, "tiny", tmp_path)
    data = np.load(reference / "tiny" / "losses.npz")
    few = {key: data[key] for key in data.files if key.startswith(("batch0/", "batch1/"))}
    few["batch1/mdm_loss"] = few["batch1/mdm_loss"] * 1.001
    few["batch1/grad_norm"] = few["batch1/grad_norm"] * 1.01
    np.savez(folder / "losses.npz", **few)
    code, out = checked(call, capsys, folder)
    kind, *mismatches = out.splitlines()
    assert (code, kind) == (1, "losses 1/2")
    assert [line.split(":")[0].strip() for line in mismatches] == ["batch1 grad_norm", "batch1 mdm_loss"]
    assert "relative difference 9.90e-03" in mismatches[0] and "relative difference 9.99e-04" in mismatches[1]


def test_check_reference_names_what_is_missing(call, reference, tmp_path):
    with pytest.raises(UserError, match="has no folder 'model'"):
        call("check_reference", tmp_path)
    with pytest.raises(UserError, match="holds none of logits.npz, losses.npz"):
        call("check_reference", reference_copy(reference, "tiny", tmp_path))
