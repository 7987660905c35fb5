"""One request and its answers: jobs handed to the device thread, and their texts as they grow."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator
from typing import Any

from refusion_jax.sampling import Prompt
from refusion_jax.serving import responses
from refusion_jax.serving.device import Device, Job
from refusion_jax.serving.protocol import Offer, Request


class Exchange:
    """A request on its way; used on the event loop only."""

    def __init__(self, request: Request, offer: Offer, device: Device, timeout: float):
        """`timeout`: seconds until it is given up.

        Raises:
          Full: the queue is.
        """
        self.request, self._offer, self._device = request, offer, device
        self._changed, self._loop = asyncio.Event(), asyncio.get_running_loop()
        self._deadline = time.monotonic() + min(timeout, request.timeout or timeout)
        watched = request.stream or bool(request.stops)
        eos = offer.model.eos_token_id
        rows = [(prompt, i) for prompt in request.prompts for i in range(request.n)]
        self.writings = [responses.Writing(offer.tokenizer, request, eos, index) for index in range(len(rows))]
        wanted = rows if request.limit else []  # an echo alone has no answer
        for writing in self.writings[len(wanted) :]:
            writing.finish = "length"
        self.jobs = [self._job(request.config.method, self._prompt(prompt, i), watched) for prompt, i in wanted]
        self._device.submit(self.jobs)

    def _prompt(self, tokens: list[int], number: int) -> Prompt:
        """The request to the engine for answer `number` to a prompt."""
        request, at = self.request, len(tokens)
        prompt = Prompt(
            tokens,
            request.config,
            seed=(request.seed + number) % 2**32,
            stream=0,
            limit=request.limit,
            stop_ids=request.stop_ids,
        )
        if not request.suffix:
            return prompt
        behind = at + request.limit
        return dataclasses.replace(
            prompt,
            tokens=[*tokens, *request.suffix],
            positions=[*range(at), *range(behind, behind + len(request.suffix))],
            holes=((at, request.limit),),
        )

    def _job(self, lane: str, prompt: Prompt, watched: bool = False) -> Job:
        return Job(lane, prompt, self._notify, watched, self._deadline)

    def _notify(self) -> None:
        """In the device thread."""
        try:
            self._loop.call_soon_threadsafe(self._changed.set)
        except RuntimeError:  # the loop is closed: nobody waits any more
            pass

    async def updates(self) -> AsyncIterator[list[responses.Writing]]:
        """The answers that have changed, until all are complete.

        Raises:
          The error of a job.
        """
        seen: list[Any] = [None] * len(self.jobs)
        while True:
            self._changed.clear()
            changed = []
            for i, (job, writing) in enumerate(zip(self.jobs, self.writings)):
                if job.error is not None:
                    raise job.error
                if job.latest is not seen[i] and writing.finish is None:
                    seen[i] = job.latest
                    writing.update(job.latest)
                    changed.append(writing)
                    if writing.finish and not job.ended:
                        job.cancelled = "stop"
            if changed:
                yield changed
            if all(writing.finish for writing in self.writings[: len(self.jobs)]):
                return
            await self._changed.wait()

    async def scores(self) -> list[list[tuple]]:
        """Of every answer, an entry per token (the prompt's too with `echo`): id, its log-probability, the most
        probable id and its log-probability; the first of a text has none.
        """
        request = self.request
        prompts = [prompt for prompt in request.prompts for _ in range(request.n)]
        answers = [writing.generation.tokens if writing.generation else [] for writing in self.writings]
        jobs = [self._job("", Prompt([*prompt, *answer], request.config)) for prompt, answer in zip(prompts, answers)]
        self._device.submit(jobs, bounded=False)
        self.jobs = self.jobs + jobs
        while not all(job.ended for job in jobs):
            self._changed.clear()
            if not all(job.ended for job in jobs):
                await self._changed.wait()
        found = []
        for prompt, job in zip(prompts, jobs):
            if job.error is not None:
                raise job.error
            given = zip(job.prompt.tokens[1:], job.score.logprobs, job.score.top, job.score.top_logprobs)
            entries = [(job.prompt.tokens[0], None, None, None), *given]
            found.append(entries if request.echo else entries[len(prompt) :])
        return found

    def cancel(self) -> None:
        """Frees the rows of answers that are not complete."""
        for job in self.jobs:
            if not job.ended and not job.cancelled:
                job.cancelled = "abort"
