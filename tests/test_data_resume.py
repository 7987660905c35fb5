"""A run goes on in the rows that it was begun with, or says what has changed."""

import dataclasses
import json
import pathlib
import re
import shutil

import micro
import pytest
from processes import finish, start

from refusion_jax import train as train_lib
from refusion_jax.checkpoint import orbax
from refusion_jax.config import from_config_dict
from refusion_jax.errors import UserError


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(config, folder) of a run that has made two of its steps."""
    folder = tmp_path_factory.mktemp("begun")
    micro.write_examples(folder / "data.json")
    config = from_config_dict(micro.get_config(f"data={folder / 'data.json'},steps=2"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, evaluation=()), keep_best=0)
    train_lib.train(config, folder / "run")
    return config, folder


@pytest.fixture
def run(begun, tmp_path):
    """A copy of the run, to go on with."""
    return shutil.copytree(begun[1] / "run", tmp_path / "run")


def with_data(config, **changes):
    return dataclasses.replace(config, steps=3, data=dataclasses.replace(config.data, **changes))


def test_the_checkpoint_says_which_rows_it_was_trained_on(begun):
    config, folder = begun
    rows = orbax.read_meta(folder / "run")["rows"]
    assert (rows["seed"], rows["data.max_length"], rows["data.train.0.start"]) == (0, 64, 0.2)


def test_a_resumed_run_with_other_rows_is_refused_naming_them(begun, run, tmp_path):
    config, folder = begun
    with pytest.raises(UserError, match="trained on other rows: seed is 1 here and 0 in the checkpoint. Use"):
        train_lib.train(dataclasses.replace(config, steps=3, seed=1), run)
    (source,) = config.data.train
    micro.write_examples(tmp_path / "more.json", count=61)
    more = dataclasses.replace(source, path=str(tmp_path / "more.json"))
    with pytest.raises(UserError, match="rows: data.train.0.content is [0-9a-f]+ here and [0-9a-f]+ in the checkpoint"):
        train_lib.train(with_data(config, train=(more,)), run)
    with pytest.raises(UserError, match="data.max_length is 48 here and 64 .*or --config.data.allow_change=true"):
        train_lib.train(with_data(config, max_length=48), run)
    assert orbax.steps_in(run) == [2]


def test_a_run_as_long_as_its_epochs_keeps_its_batch_size(begun, run):
    config, _ = begun
    other = dataclasses.replace(config, steps=0, epochs=4.0, batch_size=2 * config.batch_size)
    with pytest.raises(UserError, match=f"has had {2 * config.batch_size} rows in 2 steps. Set config.steps"):
        train_lib.train(other, run)
    train_lib.train(dataclasses.replace(other, steps=3), run)  # who says how long it is may change it
    assert micro.read_checkpoint(run, 3)["next_row"] == 2 * config.batch_size + other.batch_size


def test_who_means_it_goes_on_from_the_same_row_number(begun, run, capfd):
    config, _ = begun
    changed = dataclasses.replace(with_data(config, allow_change=True), seed=1)
    train_lib.train(changed, run)
    assert "goes on with other rows: seed is 1 here and 0 in the checkpoint" in capfd.readouterr().err
    found = micro.read_checkpoint(run, 3)
    assert found["next_row"] == 3 * config.batch_size
    assert orbax.read_meta(run)["rows"]["seed"] == 1  # from now on these are its rows
    train_lib.train(dataclasses.replace(changed, data=config.data), run)


def test_a_checkpoint_from_before_rows_were_written_down_is_taken(begun, run, capfd):
    config, _ = begun
    file = run / "checkpoints" / "2" / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta["rows"], meta["base"]
    file.write_text(json.dumps(meta))
    train_lib.train(dataclasses.replace(config, steps=3), run)
    assert "does not say what rows it was trained on" in capfd.readouterr().err
    assert orbax.read_meta(run)["rows"]["seed"] == 0


SCRIPT = """
import os, pathlib, sys
import micro
from refusion_jax import train
from refusion_jax.config import from_config_dict
from refusion_jax.errors import run_main
from refusion_jax.parallel import distributed

def main():
    folder = pathlib.Path(sys.argv[1])
    distributed.initialize()
    config = from_config_dict(micro.get_config("data=data.json"))
    os.chdir(folder / os.environ["JAX_PROCESS_ID"])  # there each process has a file of its own of that name
    with distributed.together():
        train.train(config, folder / "run")

run_main(main)
"""


def test_processes_with_other_data_all_stop_naming_them(tmp_path):
    for index in range(2):
        (tmp_path / str(index)).mkdir()
        micro.write_examples(tmp_path / str(index) / "data.json", count=60 + index)
    tests = str(pathlib.Path(micro.__file__).parent)
    codes, outputs = finish(start(["-c", SCRIPT, tmp_path], processes=2, folder=tmp_path, PYTHONPATH=tests), tmp_path)
    assert codes == [2, 2], outputs
    message = r'disagree on the run: rows.data.train.0.content is "\w+" on process 0 but "\w+" on process 1'
    for output in outputs:
        assert re.search(message, " ".join(output.split())), output
    assert orbax.steps_in(tmp_path / "run") == []
