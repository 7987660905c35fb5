"""Compiled programs are kept on disk: what another start finds, and who decides where, or that nothing is kept."""

import json
import os
import pathlib

import pytest
from micro import write_examples
from processes import finish, start

COUNT = """
import collections, json, sys, jax
from refusion_jax import compilation
events = collections.Counter()
def count(event, **_):
    events[event.removeprefix("/jax/compilation_cache/")] += 1
jax.monitoring.register_event_listener(count)
"""
JOBS = """
from refusion_jax import generate, train
workdir, config = sys.argv[1:]
sys.argv[1:] = ["--workdir", workdir, "--config", config]
train.main()
generate.main(["--checkpoint", workdir, "--prompt", "x", "--gen-length", "8", "--slot-size", "4", "--blocks", "2"])
print(json.dumps(events))
"""
JIT = """
compilation.keep_programs()
jax.jit(lambda x: x + 1)(1)
print(json.dumps(events))
"""


def run(program, *arguments, folder, **environ) -> tuple[dict, str]:
    """Cache events and output of a program in a process of its own; only `environ` says where programs are kept."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
            patch.delenv(name, raising=False)
        (code,), (output,) = finish(
            start(["-c", COUNT + program, *arguments], folder=folder, devices=1, **environ), folder
        )
    assert code == 0, output
    return json.loads(output.splitlines()[-1]), output


def test_another_start_compiles_nothing(tmp_path):
    """Training and decoding, in another process and another folder."""
    write_examples(tmp_path / "data.json")
    config = f"{pathlib.Path(__file__).parent / 'micro.py'}:steps=2,data={tmp_path / 'data.json'}"
    home = tmp_path / "home"
    first, second = (run(JOBS, tmp_path / run_, config, folder=tmp_path, XDG_CACHE_HOME=str(home))[0] for run_ in "ab")
    assert first["cache_misses"] == len(list((home / "refusion_jax" / "programs").glob("*-cache"))) > 10
    assert "cache_misses" not in second and second["cache_hits"] == second["compile_requests_use_cache"]


def test_the_environment_decides(tmp_path):
    home = {"XDG_CACHE_HOME": str(tmp_path / "home")}
    assert not run(JIT, folder=tmp_path, **home, JAX_ENABLE_COMPILATION_CACHE="false")[0].get("cache_misses")
    assert not run(JIT, folder=tmp_path, **home, JAX_COMPILATION_CACHE_DIR="")[0].get("cache_misses")
    other = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "other"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    run(JIT, folder=tmp_path, **home, **other)
    assert not (tmp_path / "home").exists() and os.listdir(tmp_path / "other")


def test_a_folder_that_cannot_be_written_costs_a_line(tmp_path):
    (tmp_path / "file").touch()
    events, output = run(JIT, folder=tmp_path, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert "cache_misses" not in events
    assert output.splitlines()[0].startswith(f"compiled programs are not kept: cannot write {tmp_path}/file/")
