"""The comparison of methods: its figures from known points, and its quick mode from nothing to the report."""

import json
import sys

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def tools(repository):
    """Makes the scripts in tools/ importable."""
    sys.path.insert(0, str(repository / "tools"))
    yield
    sys.path.remove(str(repository / "tools"))


def test_area_is_that_under_the_best_accuracy_within_reach(tools):
    import compare_report

    assert compare_report.area([], 4) == 0
    assert compare_report.area([(1, 0.8)], 4) == pytest.approx(0.2)
    assert compare_report.area([(1, 0.8), (3, 0.5)], 4) == pytest.approx((0.8 + 2 * 0.5) / 4)
    assert compare_report.area([(3, 0.5), (1, 0.4)], 4) == pytest.approx(3 * 0.5 / 4)  # a dominated point adds nothing
    assert compare_report.area([(9, 0.5)], 4) == pytest.approx(0.5)  # not beyond the bound


def point(decoding, threshold, accuracy, per_forward, speed=10.0):
    return {
        "decoding": decoding,
        "threshold": threshold,
        "accuracy": {"a": accuracy, "b": accuracy},
        "tokens_per_forward": per_forward,
        "tokens_per_second_1": speed,
        "tokens_per_second_16": 2 * speed,
        "nats_per_token": None,
        "bound": False,
    }


def test_rows_take_the_best_threshold_and_the_error_over_seeds(tools):
    import compare_report

    runs = []
    for seed, accuracy in enumerate((0.4, 0.6)):
        told = {"seed": seed, "seconds": 5.0, "lr": 1e-3}
        runs.append(told | {"method": "autoregressive", "points": [point("token by token", None, accuracy, 1.0)]})
        points = [point("slots", 0.5, 0.3, 4.0, 40.0), point("slots", 0.9, 0.5, 2.0, 30.0)]
        runs.append(told | {"method": "refusion", "points": points})
    plain, slots = compare_report.rows_of(runs)
    assert plain["accuracy"] == (pytest.approx(0.5), pytest.approx(0.1)) and plain["speed_1"] == (1.0, 0.0)
    assert slots["threshold"] == 0.9 and slots["speed_16"] == (3.0, 0.0) and slots["seeds"] == 2
    assert slots["area"][0] == pytest.approx((2 * 0.5 + 2 * 0.3) / compare_report.BOUND)
    assert "50.0 ± 10.0" in compare_report.table([plain, slots])


def test_methods_start_from_the_same_weights_and_see_the_same_rows(repository):
    """All that differs between the runs of a seed is the objective, and how answers are filled up for it."""
    import dataclasses

    from refusion_jax.config import load_config

    configs = [
        load_config(f"{repository}/configs/compare.py:method={m}") for m in ("autoregressive", "refusion", "llada")
    ]
    first, *others = (
        dataclasses.replace(
            config, objective=configs[0].objective, data=dataclasses.replace(config.data, response_multiple=1)
        )
        for config in configs
    )
    assert all(other == first for other in others) and len({config.objective.kind for config in configs}) == 3
    large = load_config(f"{repository}/configs/compare.py:scale=100m")
    assert 90e6 < large.model.num_params() < 110e6 and len(first.data.evaluation) == 5


def test_quick_comparison_makes_a_report_and_goes_on_with_what_is_finished(tools, repository, tmp_path, capsys):
    import compare_methods

    out = tmp_path / "out"
    config = f"{repository}/configs/compare.py:scale=quick,steps=6"
    command = [config, "--out", str(out), "--quick", "--methods", "autoregressive,refusion", "--examples", "2"]
    compare_methods.main(command)
    shown = capsys.readouterr()
    assert shown.err.count("training ") == 2
    report = (out / "report.md").read_text()
    rows_told = ("token by token |", "speculative |"), ("token by token |", "slots of 8 |")
    told = [f"| {method} | {row}" for method, rows in zip(("autoregressive", "refusion"), rows_told) for row in rows]
    for text in (*told, "--quick", "chain_sum"):
        assert text in report
    for picture in ("tokens_per_forward.png", "tokens_per_second_1.png", "tokens_per_second_16.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG") and picture in report
    rows = json.loads((out / "table.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"autoregressive", "refusion"}
    assert all(row["seconds"][0] > 0 and row["tokens_per_second_16"][0] > 0 for row in rows)
    without = [row["decoding"] for row in rows if row["nats_per_token"] is None]  # its likelihood is that of the first
    assert without == ["speculative"] and all(row["nats_per_token"][0] > 0 for row in rows if row["nats_per_token"])

    lost = next((out / "points").glob("refusion*/*.json"))
    lost.unlink()
    compare_methods.main(command)
    shown = capsys.readouterr()
    assert "training" not in shown.err and shown.err.count("decoding ") == 1 and lost.exists()
