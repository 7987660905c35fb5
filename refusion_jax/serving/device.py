"""The one thread that touches JAX: it takes jobs from a queue, keeps the engines busy, and says what there is of each
answer.

    device = Device({"plan_and_infill": make_engine}, make_scorer, max_waiting=256, observer=metrics)
    device.start()              # compiles everything; then device.state is READY
    device.submit([job])        # from any thread; the job's `notify` is called, in this thread, when something changes
    job.cancelled = "abort"     # its row is free after the current turn

A turn is a few forwards of one engine: requests join and leave between turns, and prompts are prefilled chunk by chunk
beside rows that go on. A forward takes as long for one row as for a full batch, so of several engines one with few rows
waits until it has more, though not for long.
"""

import collections
import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging

from refusion_jax.errors import UserError
from refusion_jax.sampling import Engine, Generation, Prompt
from refusion_jax.sampling.engine import PREFILL_WIDTHS
from refusion_jax.serving.scoring import Score, Scorer

WATCHED_FORWARDS = 4  # of a turn while somebody watches an answer
ALONE_FORWARDS = 16  # of a turn otherwise
LONGEST_WAIT = 8  # a row alone waits about so many times as long as its turn takes while another engine is full
WARMING, READY, BROKEN = "warming up", "ready", "broken"


class Full(Exception):
    """There are as many requests waiting as may."""


class TooLate(Exception):
    """A request's time was over before its answer was complete."""


class Failed(Exception):
    """The engine failed while it wrote an answer; the server is well."""


@dataclasses.dataclass(eq=False)
class Job:
    """One answer that is wanted, or the score of one text; the device thread fills in the second half.

    Attributes:
      lane: the engine's name; "": `prompt.tokens` are only scored.
      prompt: the request of the engine.
      notify: called in the device thread when there is something new.
      watched: `latest` is kept up to date while the answer is written.
      deadline: of time.monotonic().
      cancelled: set by whoever wants no more of the answer, to "stop" (a stop string) or "abort" (gone).
      latest: what there is of the answer; of one that is not watched, all at once.
      committed: tokens of it.
      score: of `prompt.tokens`.
      error: why there is no answer.
      reason: why it ended: stop, length or abort.
      queued, started, first, ended: when it came, got a row, had its first token, was done, of time.monotonic(); 0: not
        yet.
    """

    lane: str
    prompt: Prompt
    notify: Callable[[], None]
    watched: bool = False
    deadline: float = float("inf")
    cancelled: str = ""

    latest: Generation | None = None
    committed: int = 0
    score: Score | None = None
    error: Exception | None = None
    reason: str = ""
    queued: float = 0.0
    started: float = 0.0
    first: float = 0.0
    ended: float = 0.0


class Lane:
    """An engine, the jobs in its rows, and those that wait for one."""

    def __init__(self, make: Callable[[], Engine]):
        self._make = make
        self.engine = make()
        self.waiting: collections.deque[Job] = collections.deque()
        self.rows: dict[int, Job] = {}
        self.waited = 0.0  # see Device._next
        self.seconds = 1e-6  # that its last turn took; at first the least, so that it soon has one

    def restart(self) -> None:
        """An empty engine in place of one that failed; its programs are compiled already."""
        self.engine, self.rows = self._make(), {}

    def warm_up(self) -> None:
        """Runs each of the engine's programs."""
        model, length = self.engine.model, self.engine.sampler.length
        room = self.engine.cache_length - length - self.engine.sampler.window
        longest = max(1, min(room, model.max_position_embeddings - length))
        ordinary = next(
            i for i in range(model.logical_vocab_size) if i not in (model.mask_token_id, model.eos_token_id)
        )
        for width in PREFILL_WIDTHS:
            prompt = [ordinary] * min(width, longest)
            row = self.engine.add(Prompt(prompt, self.engine.config))
            self.engine.step(1)
            self.engine.cancel(row)
        for _ in range(2):  # a prefix is kept, and then found
            row = self.engine.add(Prompt([ordinary] * longest, self.engine.config))
            self.engine.prefill(-(-longest // PREFILL_WIDTHS[0]))
            self.engine.cancel(row)
        self.engine.prefixes.clear()


class Device(threading.Thread):
    """The thread. Everything but `submit`, `state` and the counts is its own."""

    def __init__(
        self,
        lanes: dict[str, Callable[[], Engine]],
        scorer: Callable[[], Scorer] | None,
        *,
        max_waiting: int,
        observer: Any,
    ):
        """
        Args:
          lanes: by name, what makes an engine.
          scorer: what makes the scorer; None: nothing will be scored.
          max_waiting: jobs that may wait for a row.
          observer: told by `turn(device)` before every turn and when there is nothing to do, `finished(job)`, and
            `warm()` (see metrics.py).
        """
        super().__init__(name="device", daemon=True)
        self._makers, self._make_scorer, self._observer = lanes, scorer, observer
        self._inbox: queue.SimpleQueue[Sequence[Job] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._count = itertools.count()  # index of every prompt: updates are told apart by it
        self.max_waiting, self.waiting, self.open = max_waiting, 0, 0
        self.lanes: dict[str, Lane] = {}
        self._last = 0.0  # when a lane was last chosen
        self._news: list[Job] = []  # jobs whose `notify` is to be called
        self.state, self.failure = WARMING, None

    # ------------------------------------------------------------------ from other threads

    def submit(self, jobs: Sequence[Job], bounded: bool = True) -> None:
        """Takes jobs, all or none; unless `bounded`, all.

        Raises:
          Full: they are too many for the queue now.
        """
        now = time.monotonic()
        for job in jobs:
            job.queued = now
        with self._lock:
            if bounded and self.waiting + len(jobs) > self.max_waiting:
                raise Full
            self.waiting += len(jobs)
            self.open += len(jobs)
        self._inbox.put(jobs)

    def flush(self) -> None:
        """Forgets all beginnings of prompts, before the next turn."""
        self._inbox.put(None)

    # ------------------------------------------------------------------ the thread

    def run(self) -> None:
        try:
            self._warm_up()
        except Exception as error:  # whoever waits for it is told
            self.state, self.failure = BROKEN, error
            return
        self.state = READY
        while True:
            self._receive()
            for lane in self.lanes.values():
                self._guarded(lane, self._refill)
            self._observer.turn(self)
            self._guarded(self._next(), self._turn)

    def _warm_up(self) -> None:
        for name, make in self._makers.items():
            self.lanes[name] = Lane(make)
            self.lanes[name].warm_up()
        if self._make_scorer:
            self.scorer = self._make_scorer()
            self.scorer.warm_up()
        self._observer.warm()

    def _receive(self) -> None:
        """Takes what is in the inbox; waits for something if there is nothing else to do."""
        idle = not any(lane.rows or lane.waiting for lane in self.lanes.values())
        if idle:
            self._tell()
            self._observer.turn(self)
        try:
            self._sort(self._inbox.get(block=idle))
            while True:
                self._sort(self._inbox.get_nowait())
        except queue.Empty:
            pass

    def _sort(self, jobs: Sequence[Job] | None) -> None:
        if jobs is None:
            for lane in self.lanes.values():
                lane.engine.prefixes.clear()
        for job in jobs or ():
            if job.lane:
                self.lanes[job.lane].waiting.append(job)
            else:
                self._score(job)

    def _score(self, job: Job) -> None:
        self._start(job)
        if job.cancelled or time.monotonic() > job.deadline:
            return self._end(job, None if job.cancelled else TooLate())
        try:
            job.score = self.scorer(job.prompt.tokens)
            self._end(job)
        except Exception as error:
            self._end(job, Failed(str(error)))

    def _guarded(self, lane: Lane, act: Callable[[Lane], None]) -> None:
        """What XLA raises costs this engine's answers; the others and the requests to come are not concerned."""
        try:
            act(lane)
        except Exception as error:
            logging.exception("an engine failed and is made anew")
            for job in lane.rows.values():
                self._end(job, Failed(str(error)))
            lane.restart()

    def _refill(self, lane: Lane) -> None:
        """Rows that are not wanted any more are freed, free ones given away."""
        self._drop(lane)
        self._admit(lane)

    def _next(self) -> Lane:
        """The lane whose rows have, all together, waited longest for its turn, in units of what that takes."""
        now = time.monotonic()
        for lane in self.lanes.values():
            if lane.rows:
                lane.waited += (
                    (now - self._last) / lane.seconds * max(len(lane.rows), lane.engine.batch // LONGEST_WAIT)
                )
        self._last = now
        lane = max(self.lanes.values(), key=lambda lane: lane.waited)
        lane.waited = 0.0
        return lane

    def _turn(self, lane: Lane) -> None:
        if not lane.rows:
            return self._tell()
        start = time.monotonic()
        eager = any(job.watched for lane in self.lanes.values() for job in lane.rows.values())
        watched = [row for row, job in lane.rows.items() if job.watched]
        lane.engine.launch(WATCHED_FORWARDS if eager else ALONE_FORWARDS)
        self._tell()  # while the device works: it would wait for all that clients do now
        updates = lane.engine.collect(watched)
        now, by_index = time.monotonic(), {}
        lane.seconds = now - start
        for row, job in lane.rows.items():
            by_index[job.prompt.index] = row, job
            job.committed = int(lane.engine.committed[row])
            if job.committed and not job.first:
                job.first = now
        for generation in updates:
            self._update(lane, *by_index[generation.index], generation)

    def _drop(self, lane: Lane) -> None:
        """Ends jobs that nobody wants any more, and those whose time is over."""
        now = time.monotonic()
        over = lambda job: job.cancelled or now > job.deadline
        for row, job in list(lane.rows.items()):
            if over(job):
                lane.engine.cancel(row)
                del lane.rows[row]
                self._end(job, None if job.cancelled else TooLate())
        for job in [job for job in lane.waiting if over(job)]:
            lane.waiting.remove(job)
            self._start(job)
            self._end(job, None if job.cancelled else TooLate())

    def _admit(self, lane: Lane) -> None:
        """Gives rows to waiting jobs, first come, first served."""
        while lane.waiting:
            job = lane.waiting[0]
            job.prompt = dataclasses.replace(job.prompt, index=next(self._count))
            refusal = None
            try:
                row = lane.engine.add(job.prompt)
            except UserError as error:
                refusal = error
            if refusal is None and row is None:
                return
            lane.waiting.popleft()
            self._start(job)
            if refusal is None:
                lane.rows[row] = job
            else:
                self._end(job, refusal)

    def _update(self, lane: Lane, row: int, job: Job, generation: Generation) -> None:
        if generation.finished:
            del lane.rows[row]
            job.latest = generation
            ends = (lane.engine.model.eos_token_id, *job.prompt.stop_ids)
            job.reason = "stop" if generation.tokens and generation.tokens[-1] in ends else "length"
            self._end(job)
        elif job.latest is None or len(generation.order) > len(job.latest.order):
            job.latest = generation
            self._news.append(job)

    def _start(self, job: Job) -> None:
        job.started = time.monotonic()
        with self._lock:
            self.waiting -= 1

    def _end(self, job: Job, error: Exception | None = None) -> None:
        job.error, job.ended, job.reason = error, time.monotonic(), job.cancelled or job.reason
        with self._lock:
            self.open -= 1
        self._news.append(job)

    def _tell(self) -> None:
        """Calls everybody for whom there is something new."""
        news, self._news = self._news, []
        for job in dict.fromkeys(news):
            if job.ended:
                self._observer.finished(job)
            job.notify()

    @property
    def running(self) -> int:
        """Jobs in a row."""
        return sum(len(lane.rows) for lane in list(self.lanes.values()))

    @property
    def prefix_counts(self) -> tuple[int, int]:
        """Tokens of prompts that were looked for among kept beginnings, and those found there."""
        kept = [lane.engine.prefixes for lane in self.lanes.values()]
        return sum(prefixes.asked for prefixes in kept), sum(prefixes.found for prefixes in kept)

    @property
    def cache_used(self) -> float:
        """Part of the caches' entries that hold a token."""
        jobs = [job for lane in self.lanes.values() for job in lane.rows.values()]
        used = sum(len(job.prompt.tokens) + job.committed for job in jobs)
        return used / sum(lane.engine.batch * lane.engine.cache_length for lane in self.lanes.values())
