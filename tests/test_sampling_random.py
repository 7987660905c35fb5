"""The compiled sampler against the plain Python oracle on random models, every path of the algorithm taken."""

import collections

import numpy as np
import pytest
from sampling_cases import MODEL, expected, oracle_forward, random_params, random_prompts, same_tokens

from refusion_jax.sampling import PlanAndInfillConfig, generate
from refusion_jax.sampling.programs import make_sampler, programs

BATCH = 16
SHAPES = [(32, 4, 2), (25, 5, 1), (16, 2, 2), (14, 8, 2)]  # gen_length (not all whole slots), slot size, blocks
TRIALS = 7  # models and thresholds per shape


pytestmark = pytest.mark.usefixtures("quick_compiles")


def trials(shape_index: int, **options):
    """(parameters, settings, prompts) of each trial of a shape."""
    gen_length, slot_size, blocks = SHAPES[shape_index]
    rng = np.random.default_rng(shape_index)
    for trial in range(TRIALS):
        seed = 100 * shape_index + trial
        slot_threshold, token_threshold = (float(x) for x in rng.choice([0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0], 2))
        config = PlanAndInfillConfig(
            gen_length=gen_length,
            slot_size=slot_size,
            blocks=blocks,
            slot_threshold=slot_threshold,
            token_threshold=token_threshold,
            **options,
        )
        yield random_params(seed, scale=rng.uniform(0.6, 1.6)), config, random_prompts(seed, BATCH)


@pytest.fixture(scope="module")
def wanted():
    """What the oracle decodes in every trial of every shape, None where float64 and float32 might decide
    differently.
    """
    found = {}
    for shape in range(len(SHAPES)):
        for trial, (params, config, prompts) in enumerate(trials(shape)):
            forward = oracle_forward(params)
            decoded = [expected(forward, prompt, config) for prompt in prompts]
            found[shape, trial] = [d if d.margin > 2e-5 else None for d in decoded]
    return found


def test_every_path_is_taken(wanted):
    cases = [case for trial in wanted.values() for case in trial]
    stable = [case for case in cases if case is not None]
    paths = sum((case.paths for case in stable), collections.Counter())
    print(f"{len(stable)} of {len(cases)} cases, {dict(paths)}")
    assert len(stable) >= 300 and len(stable) > 0.9 * len(cases)
    for path in ("verified", "completion", "single best", "eos verified", "eos completed"):
        assert paths[path] >= 40, path
    for path in ("eos verified, earlier slots open", "eos completed, earlier slots open"):
        assert paths[path] >= 5, path


@pytest.mark.parametrize("shape", range(len(SHAPES)))
@pytest.mark.parametrize("speculate", ["off", "on"])
def test_equals_the_oracle(wanted, shape, speculate):
    forwards = collections.Counter()
    first = next(trials(shape, speculate=speculate))[1]
    loops = programs(make_sampler(MODEL, first, BATCH), None).run.jitted  # equal samplers of other tests share it
    before = loops._cache_size()
    for trial, (params, config, prompts) in enumerate(trials(shape, speculate=speculate)):
        answers = generate(params, MODEL, config, prompts, batch_size=BATCH)
        for prompt, answer, case in zip(prompts, answers, wanted[shape, trial], strict=True):
            if case is None:
                continue
            same_tokens(answer, case, prompt)
            forwards["oracle"] += case.forwards
            forwards["here"] += answer.forwards
            if speculate == "off":
                assert answer.forwards == case.forwards
                assert answer.tokens_forwarded >= case.tokens_forwarded
            else:
                assert answer.forwards <= case.forwards
    print(dict(forwards))
    if speculate == "on":
        assert forwards["here"] < 0.8 * forwards["oracle"]
    assert loops._cache_size() == before + 1, "thresholds and parameters are traced: one program per shape"
