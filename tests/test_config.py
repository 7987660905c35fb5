"""Configs: the ones that come with the project build, and whatever is wrong with one is said by name."""

import argparse
import dataclasses
import json
import math

import jax
import pytest

from refusion_jax import step as steps_lib
from refusion_jax.config import (
    Config,
    DataConfig,
    LoraConfig,
    MixtureConfig,
    OptimizerConfig,
    SourceConfig,
    add_config_arguments,
    from_config_dict,
    load_config,
    parse_config,
)
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig
from refusion_jax.objective.autoregressive import Autoregressive
from refusion_jax.objective.methods import METHODS
from refusion_jax.objective.refusion import Refusion
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.train import with_tokenizer

MODEL = dict(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    tie_embeddings=True,
)
CONFIGS = ["tiny", "small", "compare", "0p6b", "1p7b", "4b", "8b", "14b", "32b"]
PUBLISHED = {"0p6b": 0.596e9, "1p7b": 1.72e9, "4b": 4.02e9, "8b": 8.19e9, "14b": 14.77e9, "32b": 32.76e9}


def test_every_config_is_tested(repository):
    assert sorted(path.stem for path in (repository / "configs").glob("*.py")) == sorted([*CONFIGS, "finetune"])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_its_sharded_state(name, repository):
    """On eight devices, without any memory: right number of parameters, each device holding its part of everything."""
    config = load_config(str(repository / "configs" / f"{name}.py"))
    if config.model.mask_token_id is None:
        config = with_tokenizer(config, load_tokenizer(config.data.tokenizer))
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    state = steps_lib.build(config, mesh, 100).abstract_state
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    count = sum(leaf.size for _, leaf in leaves)
    here = {jax.tree_util.keystr(path): math.prod(leaf.sharding.shard_shape(leaf.shape)) for path, leaf in leaves}
    print(f"{name}: {count:,} parameters, {sum(here.values()):,} on each of {mesh.size} devices")
    assert count == config.model.num_params()
    for path, leaf in leaves:  # norms are whole on every device, matrices are split
        where = jax.tree_util.keystr(path)
        assert here[where] == (leaf.size if "norm" in where else leaf.size / mesh.size), where
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * count
    if name in PUBLISHED:
        assert count == pytest.approx(PUBLISHED[name], rel=1e-3)
        assert (config.batch_size, config.epochs, config.data.max_length, config.optimizer.lr) == (512, 4.0, 4096, 2e-5)
    elif name == "small":
        assert 0.8e8 < count < 1.2e8


@pytest.mark.parametrize("method", METHODS)
def test_a_config_takes_any_method_by_name(repository, method):
    objective = load_config(f"{repository / 'configs' / 'tiny.py'}:method={method}").objective
    own = ("slot_sizes", "mdm_weight_cap", "anneal_steps", "block_size", "maskable")  # of words of a few bytes
    same = {name: value for name, value in dataclasses.asdict(METHODS[method]).items() if name not in own}
    assert type(objective) is type(METHODS[method])
    assert {name: getattr(objective, name) for name in same} == same


def test_arguments_and_overrides(repository):
    path = str(repository / "configs" / "tiny.py")
    plain = load_config(path)
    assert load_config(f"{path}:steps=50") == dataclasses.replace(plain, steps=50)
    changed = load_config(
        path,
        {
            "optimizer.lr": "1e-4",
            "objective.slot_sizes": "[4, 32]",
            "model.dtype": "bfloat16",
            "lora.rank": "4",
            "seed": "7",
            "data.train.0.weight": "2",
            "data.train.0.options": "{'min_word_len': 5}",
            "data.evaluation": "[]",
        },
    )
    assert changed.optimizer == dataclasses.replace(plain.optimizer, lr=1e-4)
    assert (
        changed.objective.slot_sizes == (4, 32)
        and changed.model.dtype == "bfloat16"
        and changed.lora.rank == 4
        and changed.seed == 7
    )
    assert changed.data.train == (dataclasses.replace(plain.data.train[0], weight=2.0, options=(("min_word_len", 5),)),)
    assert changed.data.evaluation == ()


def test_a_config_survives_json(repository):
    """What stands in a checkpoint's metadata can be read back."""
    for name in ("tiny", "8b"):
        config = load_config(str(repository / "configs" / f"{name}.py"))
        assert from_config_dict(json.loads(config.to_json())) == config


@pytest.mark.parametrize("text", ["[['operators', ['+', '-']]]", "{'operators': ('+', '-')}"])
def test_an_option_may_be_a_list(text, repository):
    """Written in any way it is the same config, from JSON too, and one that can be looked up by."""
    path = str(repository / "configs" / "tiny.py")
    config = load_config(path, {"data.train.0.path": "basic_arithmetic", "data.train.0.options": text})
    assert config.data.train[0].options == (("operators", ("+", "-")),)
    assert {config: 1}[from_config_dict(json.loads(config.to_json()))] == 1


@pytest.mark.parametrize(
    "argument, overrides, message",
    [
        ("absent.py", {}, "no config file absent.py"),
        ("tiny.py:stepz=3", {}, "Unknown config argument 'stepz'.*steps"),
        ("tiny.py:steps=many", {}, "steps = 'many' is not of type int"),
        ("tiny.py:method=bert", {}, "method is 'bert'; choose one of refusion, autoregressive"),
        ("tiny.py", {"stepz": "3"}, "Unknown setting config.stepz"),
        ("tiny.py", {"optimizer.rate": "3"}, "Unknown setting config.optimizer.rate.*lr"),
        ("tiny.py", {"optimiser.lr": "3"}, "Unknown setting config.optimiser"),
        ("tiny.py", {"data.train.3.path": "x"}, "config.data.train.3.path.*'3'.*indices 0 to 0"),
        ("tiny.py", {"steps.x": "3"}, "config.steps.x"),
        ("tiny.py", {"steps": "1.5"}, r"config.steps is 1.5 \(float\); expected int"),
        ("tiny.py", {"steps": "soon"}, r"config.steps is 'soon' \(str\); expected int"),
        ("tiny.py", {"steps": "True"}, r"config.steps is True \(bool\); expected int"),
        ("tiny.py", {"model.scan_layers": "1"}, r"config.model.scan_layers is 1 \(int\); expected bool"),
        ("tiny.py", {"optimizer": "3"}, "config.optimizer is 3; expected a group"),
        ("tiny.py", {"objective.slot_sizes": "8"}, "config.objective.slot_sizes is 8; expected a list"),
        ("tiny.py", {"objective.slot_sizes": "[8, 'x']"}, r"config.objective.slot_sizes\[1\] is 'x'"),
        (
            "tiny.py",
            {"objective.kind": "'diffusion'"},
            "config.objective.kind is 'diffusion'; choose one of refusion, masked, block, sedd, auto",
        ),
        ("tiny.py", {"objective.kind": "autoregressive"}, "Unknown setting config.objective.ar_weight"),
        ("8b.py", {"objective.loss_chunk": "256"}, "Unknown setting config.objective.loss_chunk"),
        ("tiny.py", {"data.train": "[{'kind': 'json'}]"}, r"config.data.train\[0\] lacks the setting path"),
        ("tiny.py", {"model.num_kv_heads": "3"}, "num_kv_heads = 3"),
        ("tiny.py", {"epochs": "1e999"}, "config.epochs is inf"),
        pytest.param("tiny.py", {"epochs": f"1{'0' * 400}"}, "config.epochs is 10+; give a smaller number", id="huge"),
        ("tiny.py", {"seed": "99999999999999999999"}, "config.seed is 99999999999999999999; .*from 0 to 4294967295"),
        ("tiny.py", {"data.train.0.options": "[['a']]"}, r"options\[0\] is \['a'\]; expected a list of 2"),
        ("tiny.py", {"data.train.0.options": "[[3, 1]]"}, r"options\[0\]\[0\] is 3 \(int\); expected str"),
        ("tiny.py", {"data.train.0.options": "[['a', [{1}]]]"}, r"options\[0\]\[1\]\[0\] is \{1\} \(set\); expected"),
        ("compare.py:lr=nan", {}, "optimizer.lr is nan"),
        ("compare.py:lr=1e999", {}, "optimizer.lr is inf"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(argument, overrides, message, repository):
    with pytest.raises(UserError, match=message):
        load_config(argument if argument.startswith("absent") else str(repository / "configs" / argument), overrides)


def test_the_kind_chooses_the_objective(repository):
    path = str(repository / "configs" / "8b.py")
    assert load_config(path).objective == load_config(path, {"objective.kind": "refusion"}).objective == Refusion()
    config = load_config(path, {"objective.kind": "autoregressive"})
    assert config.objective == Autoregressive()
    assert from_config_dict(json.loads(config.to_json())) == config


def test_a_config_file_without_a_config(tmp_path):
    (tmp_path / "empty.py").write_text("settings = 1\n")
    with pytest.raises(UserError, match="empty.py has no function get_config"):
        load_config(str(tmp_path / "empty.py"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("def get_config(_):\n  return ConfigDict(\n", r"wrong.py line 2 raises SyntaxError \('\(' was never closed"),
        ("\nimport absent_module\n", "wrong.py line 2 raises ModuleNotFoundError .*absent_module"),
        ("\n\ndef get_config(_):\n  return lr\n", r"wrong.py line 4 raises NameError \(name 'lr' is not defined\)"),
        ("import json\ndef get_config(_):\n  return json.loads('{')\n", "wrong.py line 3 raises JSONDecodeError"),
        ("import ast\ndef get_config(_):\n  return ast.literal_eval('1 +')\n", "wrong.py line 3 raises SyntaxError"),
        ("def get_config(_):\n  return {'steps': 3}\n", "get_config of .*wrong.py returns .*must return .*ConfigDict"),
    ],
    ids=str,
)
def test_a_config_file_that_does_not_run_is_named_with_its_line(text, message, tmp_path):
    (tmp_path / "wrong.py").write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(str(tmp_path / "wrong.py"))


def test_command_line(repository):
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    parser.add_argument("--workdir")
    tiny = str(repository / "configs" / "tiny.py")
    arguments, config = parse_config(
        parser, ["--config", f"{tiny}:steps=9", "--config.optimizer.lr=0.5", "--config.seed", "3", "--workdir", "w"]
    )
    assert (arguments.workdir, config.steps, config.optimizer.lr, config.seed) == ("w", 9, 0.5, 3)
    for rest, message in (
        (["--wrkdir=w"], "Unknown argument --wrkdir"),
        (["extra"], "Unknown argument extra"),
        (["--config.seed"], "--config.seed has no value"),
    ):
        with pytest.raises(UserError, match=message):
            parse_config(parser, ["--config", tiny, *rest])


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (SourceConfig, dict(kind="csv", path="x"), "kind is 'csv'; choose one of json"),
        (SourceConfig, dict(kind="json", path="x", weight=0.0), "weight is 0.0"),
        (SourceConfig, dict(kind="json", path="x", weight=math.inf), "weight is inf"),
        (MixtureConfig, dict(step=0, shares=(1.0, math.nan)), "data.mixture has the shares .*nan"),
        (MixtureConfig, dict(step=0, shares=(1.0, math.inf)), "data.mixture has the shares .*inf"),
        (SourceConfig, dict(kind="json", path="x", start=0.5, stop=0.5), "start = 0.5 and stop = 0.5"),
        (DataConfig, dict(max_length=0), "data.max_length is 0"),
        (DataConfig, dict(max_examples_per_row=-1), "data.max_examples_per_row is -1"),
        (Refusion, dict(masking="all"), "objective.masking is 'all'"),
        (Refusion, dict(normalisation="token"), "objective.normalisation"),
        (Refusion, dict(slot_sizes=()), "objective.slot_sizes"),
        (Refusion, dict(slot_sizes=(4, 0)), "objective.slot_sizes"),
        (Refusion, dict(mdm_weight=-1.0), "objective.mdm_weight is -1.0"),
        (OptimizerConfig, dict(lr=0.0), "optimizer.lr is 0.0"),
        (OptimizerConfig, dict(lr=math.nan), "optimizer.lr is nan"),
        (OptimizerConfig, dict(eps=math.inf), "optimizer.eps is inf"),
        (OptimizerConfig, dict(weight_decay=math.nan), "optimizer.weight_decay is nan"),
        (OptimizerConfig, dict(schedule="linear"), "optimizer.schedule is 'linear'"),
        (OptimizerConfig, dict(warmup_steps=-1), "optimizer.warmup_steps is -1"),
        (OptimizerConfig, dict(b2=1.0), "optimizer.b2 = 1.0"),
        (LoraConfig, dict(rank=-1), "lora.rank is -1"),
        (LoraConfig, dict(rank=4, alpha=math.nan), "lora.alpha is nan"),
        (LoraConfig, dict(rank=4, targets=("query", "head")), "lora.targets"),
    ],
    ids=str,
)
def test_impossible_values_are_named(kind, settings, message):
    with pytest.raises(UserError, match=message):
        kind(**settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(batch_size=0), "config.batch_size is 0"),
        (dict(batch_size=6, accumulation=4), "batch_size = 6 is not a multiple of config.accumulation = 4"),
        (dict(steps=0, epochs=0.0), "say how long to train"),
        (dict(steps=-5), "config.steps is -5"),
        (dict(seed=-1), "config.seed is -1"),
        (dict(seed=2**32), "config.seed is 4294967296"),
        (dict(epochs=math.nan), "config.epochs is nan"),
        (dict(log_every=0), "config.log_every is 0"),
        (dict(keep_last=0), "config.keep_last is 0"),
    ],
    ids=str,
)
def test_impossible_runs_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Config(model=ModelConfig(**MODEL), data=DataConfig(), **settings)
