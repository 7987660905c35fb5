"""Many prompts through one engine: results as they come, or all together."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from jax.sharding import Mesh

from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig
from refusion_jax.sampling.config import Generation, SamplerConfig, check_batch, check_prompts
from refusion_jax.sampling.engine import Engine, Prompt

UNLIMITED = 2**30  # passes: until a row is done


@dataclasses.dataclass
class Report:
    """What a call of `stream` or `generate` did, filled in as it goes."""

    batch: int = 0
    window: int = 0  # tokens of a row's window
    cache_length: int = 0
    steps: int = 0  # passes of the whole batch
    prefills: int = 0  # passes over prompts


def stream(
    params: dict,
    model: ModelConfig,
    config: SamplerConfig,
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    seed: int = 0,
    start: int = 0,
    stride: int = 1,
    every: int = 0,
    max_prompt_length: int = 0,
    mesh: Mesh | None = None,
    report: Report | None = None,
) -> Iterator[Generation]:
    """Decodes prompts, a batch at a time, and yields each answer as it is finished.

    A finished row gets the next prompt at once: nothing is compiled again, no row waits for another. The tokens of a
    prompt depend on the prompt, the settings, the seed and the prompt's index only.

    Args:
      params: parameters of the model.
      prompts: ids of each prompt.
      batch_size: rows of the batch; a power of two that is enough when there are fewer prompts.
      start, stride: index of the first prompt to decode, and distance to the next one; the answers are those of a call
        that decodes all.
      every: also yield what there is of every unfinished answer after every so many forwards; 0: never.
      max_prompt_length: make room for prompts of this length; 0: the longest given. Setting it keeps one compiled
        program over several calls.
      mesh: devices to decode on (rows over data x fsdp, weights over tensor).
      report: filled with counts.

    Raises:
      UserError: a prompt, the settings and the model do not fit together; no such batch size or seed.
    """
    check_prompts(prompts, model, config)
    check_batch(batch_size, seed)
    longest = max(map(len, prompts), default=0)
    if max_prompt_length and longest > max_prompt_length:
        raise UserError(
            f"Prompt {[len(p) > max_prompt_length for p in prompts].index(True)} has {longest} tokens, more than the "
            f"cache has room for beside the answer (max_prompt_length {max_prompt_length}); shorten it or raise "
            "max_prompt_length."
        )
    chosen = range(start, len(prompts), stride)
    if not chosen:
        return
    batch = min(batch_size, 1 << (len(chosen) - 1).bit_length())
    engine = Engine(params, model, config, batch, max_prompt_length=max_prompt_length or longest, mesh=mesh)
    report = report if report is not None else Report()
    report.batch, report.window, report.cache_length = engine.batch, engine.sampler.window, engine.cache_length
    for answer in serve(engine, (Prompt(prompts[i], config, i, seed) for i in chosen), every):
        report.steps, report.prefills = engine.steps, engine.prefills
        yield answer


def serve(engine: Engine, requests: Iterable[Prompt], every: int = 0) -> Iterator[Generation]:
    """Answers to requests, as many at a time as the engine has rows; `every` as in `stream`."""
    waiting = iter(requests)
    request = next(waiting, None)
    while request is not None or engine.busy:
        while request is not None and engine.add(request) is not None:
            request = next(waiting, None)
        yield from engine.step(every or UNLIMITED, unfinished=range(engine.batch) if every else ())


def generate(
    params: dict, model: ModelConfig, config: SamplerConfig, prompts: Sequence[Sequence[int]], **options
) -> list[Generation]:
    """The answers to all prompts, in their order. Arguments as for `stream`."""
    answers = [answer for answer in stream(params, model, config, prompts, **options) if answer.finished]
    return sorted(answers, key=lambda answer: answer.index)
