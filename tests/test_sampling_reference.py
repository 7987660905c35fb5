"""Decodings recorded from the authors' code: the oracle repeats all of them, the compiled sampler those of some
settings.

`tools/check_reference.py tests/reference/tiny` compares the compiled sampler with all of them.
"""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from sampling_cases import expected, oracle_forward

from refusion_jax.checkpoint import load
from refusion_jax.parallel import sharding
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.sampling import PlanAndInfillConfig, generate

SETTINGS = [1, 8, 10]  # of the 15 recorded ones: slot sizes 4, 32 and 16, two and four blocks, one to eight slots each


pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def model(reference):
    return load.load_model_config(reference / "tiny" / "model")


@pytest.fixture(scope="module")
def params(reference, model):
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    params = load.load_params(reference / "tiny" / "model", model, mesh, sharding.DECODE_RULES, dtype="float32")
    return jax.tree.map(jnp.array, jax.device_get(params))


@pytest.fixture(scope="module")
def cases(reference):
    """Recorded cases, ten for each of 15 settings."""
    cases = [json.loads(line) for line in (reference / "tiny" / "decode.jsonl").read_text().splitlines()]
    assert len(cases) == 150
    return [cases[start : start + 10] for start in range(0, 150, 10)]


def sampler_of(case, **options):
    return PlanAndInfillConfig(
        gen_length=case["params"]["gen_length"],
        slot_size=case["params"]["slot_size"],
        blocks=case["params"]["serial_num_blocks"],
        slot_threshold=case["params"]["slot_threshold"],
        token_threshold=case["params"]["token_threshold"],
        **options,
    )


def test_oracle_repeats_every_recorded_case(cases, params, model):
    forward = oracle_forward(params, model)
    for case in sum(cases, []):
        found = expected(forward, case["prompt"], sampler_of(case), model)
        assert found.tokens == case["response"]
        assert found.commit_order == case["commit_order"]
        assert found.forwards == case["forwards"]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("speculate", ["off", "on"])
def test_sampler_repeats_recorded_cases_in_mixed_batches(cases, params, model, setting, speculate):
    group = cases[setting]
    # In a batch of 16 with six other prompts, one of them long enough for another prompt bucket.
    others = [group_[0]["prompt"] for group_ in cases[:5]] + [cases[0][1]["prompt"] * 3]
    prompts = [*others[:3], *(case["prompt"] for case in group), *others[3:]]
    answers = generate(params, model, sampler_of(group[0], speculate=speculate), prompts, batch_size=16)[3:13]
    for case, answer in zip(group, answers, strict=True):
        assert answer.tokens == case["response"]
        assert [len(case["prompt"]) + offset for offset in answer.order] == case["commit_order"]
        assert answer.forwards == case["forwards"] if speculate == "off" else answer.forwards <= case["forwards"]
    if speculate == "on":
        assert sum(answer.forwards for answer in answers) < 0.75 * sum(case["forwards"] for case in group)


OPTIMISED = """
import json, sys
from refusion_jax.decoder import parse_mesh
from refusion_jax.checkpoint import load
from refusion_jax.parallel import sharding
from refusion_jax.sampling import PlanAndInfillConfig, generate
model = load.load_model_config(sys.argv[1])
mesh = parse_mesh("1,1,1")
params = load.load_params(sys.argv[1], model, mesh, sharding.DECODE_RULES, dtype="float32")
for line in sys.stdin:
    prompts, settings = json.loads(line)
    answers = generate(params, model, PlanAndInfillConfig(**settings), prompts, batch_size=16, mesh=mesh)
    print(json.dumps([[a.tokens, a.order, a.forwards] for a in answers]))
"""


def test_programs_that_are_optimised_decode_the_same(cases, reference):
    """As users compile them: the tests' own process leaves XLA's optimisation out."""
    group = cases[SETTINGS[0]]
    prompts = [case["prompt"] for case in group]
    settings = dataclasses.asdict(sampler_of(group[0], speculate="on"))
    environ = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", OPTIMISED, reference / "tiny" / "model"],
        input=json.dumps([prompts, settings]),
        capture_output=True,
        text=True,
        env=environ,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    for case, (tokens, order, forwards) in zip(group, answers, strict=True):
        assert tokens == case["response"]
        assert [len(case["prompt"]) + offset for offset in order] == case["commit_order"]
        assert forwards <= case["forwards"]
