"""Prompts that begin alike: the same answers, and fewer tokens forwarded."""

import dataclasses

import jax
import pytest
from sampling_cases import MODEL, random_params, random_prompts

from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.sampling import (
    AutoregressiveConfig,
    BlockConfig,
    Engine,
    MaskedConfig,
    PlanAndInfillConfig,
    Prompt,
)
from refusion_jax.sampling.prefixes import BLOCK

pytestmark = pytest.mark.usefixtures("quick_compiles")

PARAMS = random_params(3, scale=1.2)
MODEL = dataclasses.replace(MODEL, max_position_embeddings=512)
CONFIGS = {
    "plan_and_infill": PlanAndInfillConfig(gen_length=16, slot_size=4, blocks=2, slot_threshold=0.5),
    "autoregressive": AutoregressiveConfig(16),
}
BEGINNING = (random_prompts(5, 1, longest=12)[0] * 300)[: 2 * BLOCK]
PROMPTS = [BEGINNING + end for end in random_prompts(7, 6, longest=20)] + [
    BEGINNING,
    BEGINNING[:BLOCK] + [5, 6],
    [4, 5],
]


def decode(engine: Engine, config, prompts) -> list[list[int]]:
    """The answers, one prompt after the other."""
    answers = []
    for index, prompt in enumerate(prompts):
        engine.add(Prompt(prompt, config, index))
        answers += [answer.tokens for answer in engine.step(1000)]
    return answers


@pytest.mark.parametrize("method", list(CONFIGS))
def test_answers_are_the_same_and_less_is_forwarded(method):
    config = CONFIGS[method]
    make = lambda blocks: Engine(PARAMS, MODEL, config, 2, max_prompt_length=300, prefix_blocks=blocks)
    without, kept = make(0), make(8)
    expected = decode(without, config, PROMPTS)
    assert decode(kept, config, PROMPTS) == expected
    assert kept.prefills < without.prefills
    # All six begin with two blocks; the first had to be forwarded. A whole prompt keeps a last token to begin with.
    assert kept.prefixes.found == BLOCK * (2 * 5 + 1 + 1) and without.prefixes.found == 0
    kept.prefixes.clear()
    assert decode(kept, config, PROMPTS[:2]) == expected[:2]


def test_a_kept_beginning_is_unharmed_while_its_prompt_waits_and_others_decode():
    config = PlanAndInfillConfig(
        gen_length=64, slot_size=32, blocks=1, slot_threshold=0.9, token_threshold=0.3, speculate="off"
    )
    long, *ends = random_prompts(11, 4, longest=12)

    def answers(blocks):
        engine = Engine(PARAMS, MODEL, config, 3, max_prompt_length=400, prefix_blocks=blocks)
        decode(engine, config, [BEGINNING[:BLOCK] + [5]])
        engine.add(Prompt(ends[0], config, 0))
        found = engine.step(1)
        engine.add(Prompt((long * 400)[:400], config, 1))  # first in line, and takes two passes
        engine.add(Prompt(BEGINNING[:BLOCK] + ends[1], config, 2))
        for _ in range(100):
            found += engine.step(1)
        return {answer.index: answer.tokens for answer in found}, engine.prefixes.found

    expected, _ = answers(0)
    assert answers(4) == (expected, BLOCK) and len(expected) == 3


@pytest.mark.parametrize("config", [MaskedConfig(4, steps=2), BlockConfig(4, block_size=4)], ids=lambda c: c.method)
def test_nothing_is_kept_where_a_prompt_sees_what_is_behind(config):
    """What such a prompt leaves in the cache depends on its end and on the answer."""
    make = lambda blocks: Engine(PARAMS, MODEL, config, 2, max_prompt_length=300, prefix_blocks=blocks)
    asked, plain = make(8), make(0)
    assert decode(asked, config, PROMPTS[:3]) == decode(plain, config, PROMPTS[:3])
    assert (asked.prefills, asked.prefixes.asked, asked.prefixes.found) == (plain.prefills, 0, 0)


def test_what_was_used_last_is_kept():
    config = CONFIGS["autoregressive"]
    engine = Engine(PARAMS, MODEL, config, 2, max_prompt_length=300, prefix_blocks=1)
    other = [7] + BEGINNING[1:]
    decode(engine, config, [BEGINNING, BEGINNING, other, BEGINNING])
    assert engine.prefixes.found == BLOCK  # the second only: another prompt took the place of the first


def test_rows_on_several_devices():
    config = CONFIGS["autoregressive"]
    mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])
    engine = Engine(PARAMS, MODEL, config, 4, max_prompt_length=300, prefix_blocks=4, mesh=mesh)
    expected = decode(Engine(PARAMS, MODEL, config, 4, max_prompt_length=300, mesh=mesh), config, PROMPTS[:3])
    assert decode(engine, config, PROMPTS[:1]) == expected[:1]
    for index, prompt in enumerate(PROMPTS[:3]):  # in rows of both
        engine.add(Prompt(prompt, config, index))
    answers = [answer for _ in range(20) for answer in engine.step(1000)]
    assert [answer.tokens for answer in sorted(answers, key=lambda answer: answer.index)] == expected
    assert engine.prefixes.found == 3 * 2 * BLOCK
