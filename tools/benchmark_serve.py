"""Measures the server: clients that send requests over HTTP, beside the same prompts through `generate`.

    python tools/benchmark.py serve --checkpoint runs/quickstart --clients 16 --requests 200 --gen-length 32
    python tools/benchmark.py serve --checkpoint runs/8b --mesh 1,1,4 --rate 20 --answer-lengths 64,256

The server runs in this process, on loopback, with the flags of `python -m refusion_jax.serve`; the clients in another.
`generate` answers the same prompts with as many rows and all of them at hand: what a server can reach at best.
One at a time: a client that waits for each answer before it asks again.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from benchmark_decode import random_prompts

from refusion_jax import compilation, serve
from refusion_jax.decoder import decoder_of, held_out
from refusion_jax.errors import UserError
from refusion_jax.sampling import Prompt
from refusion_jax.serving.app import Service
from refusion_jax.serving.device import BROKEN, READY


@dataclasses.dataclass(frozen=True)
class Question:
    """A request: ids of a prompt, most tokens of its answer, the sampler's method, and its kind: "whole", "streamed",
    "hang up" (streamed, and its client leaves in the middle) or "malformed".
    """

    prompt: list[int]
    limit: int
    method: str
    kind: str = "streamed"

    @property
    def answered(self) -> bool:
        return self.kind in ("whole", "streamed")

    def sent(self) -> dict[str, Any]:
        """What serve_clients.py is to send."""
        body = {"prompt": self.prompt, "max_tokens": self.limit, "method": self.method}
        if self.kind in ("streamed", "hang up"):
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if self.kind == "malformed":
            body["prompt"] = {"text": len(self.prompt)}
        return {"body": body, "refused": self.kind == "malformed", "hang_up": 25 * (self.kind == "hang up")}


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a client saw of a request; times in seconds since it was sent."""

    first: float
    whole: float
    tokens: int
    forwards: int
    text: str


def ask_all(port: int, questions: Sequence[Question], clients: int, rate: float = 0.0) -> tuple[list[Timing], float]:
    """Timings of the questions that are answered, in their order, and the seconds that all took; `rate`: requests per
    second that are sent, if enough clients are free; 0: as soon as one is.

    Raises:
      UserError: the server refused a request that is well formed, or took one that is not.
    """
    given = {"port": port, "clients": clients, "rate": rate, "questions": [question.sent() for question in questions]}
    command = [sys.executable, str(pathlib.Path(__file__).parent / "serve_clients.py")]
    found = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True)
    if found.returncode:
        raise UserError(f"The clients failed: {found.stderr.strip().splitlines()[-1]}")
    result = json.loads(found.stdout)
    timings = [
        Timing(
            seen["first"],
            seen["whole"],
            seen["usage"]["completion_tokens"],
            seen["usage"]["refusion"]["forwards"],
            seen["text"],
        )
        for seen in result["seen"]
        if seen
    ]
    return timings, result["seconds"]


def generate(service: Service, questions: Sequence[Question]) -> tuple[int, float]:
    """Tokens of all answers, and seconds, without a server: its engines, one after the other, which must be
    idle.
    """
    tokens, seconds = 0, 0.0
    for method, lane in service.device.lanes.items():
        engine, config = lane.engine, service.offer.methods[method]
        waiting = [(i, q) for i, q in enumerate(questions) if q.method == method]
        start = time.perf_counter()
        while waiting or engine.busy:
            while waiting:
                index, question = waiting[0]
                if engine.add(Prompt(question.prompt, config, index, limit=question.limit)) is None:
                    break
                waiting.pop(0)
            tokens += sum(len(answer.tokens) for answer in engine.step(2**30))
        seconds += time.perf_counter() - start
    return tokens, seconds


def written(service: Service) -> float:
    """Tokens of all answers so far, read or not."""
    return service.metrics.registry.get_sample_value("vllm:generation_tokens_total", {"model_name": service.offer.name})


def run(service: Service, questions: Sequence[Question], clients: int, rate: float, alone: int) -> dict[str, Any]:
    """Figures of a service whose device thread is ready. Tokens are those of requests that are answered, here and
    there; in "with unread answers" those of clients that hung up count too, as far as they were written.
    """
    answered = [question for question in questions if question.answered]
    bounds = [generate(service, answered)]
    listening = serve.listen("127.0.0.1", 0)
    listening.listen()  # connections wait until the server runs
    port = listening.getsockname()[1]
    thread = threading.Thread(target=serve.run, args=(service, listening, 60))
    thread.start()
    try:
        ask_all(port, questions[: min(len(questions), clients)], clients, 0.0)  # warm
        engines = [lane.engine for lane in service.device.lanes.values()]
        counts = lambda: (sum(engine.steps for engine in engines), written(service))
        before = counts()
        timings, seconds = ask_all(port, questions, clients, rate)
        steps, wrote = (now - then for now, then in zip(counts(), before))
        one, one_seconds = ask_all(port, answered[:alone], 1, 0.0)
    finally:
        service.draining = True
        thread.join()
    bounds.append(generate(service, answered))  # before and after: machines are not equally fast all the time
    tokens, bound_seconds = map(sum, zip(*bounds))
    forwards = sum(timing.forwards for timing in timings)
    of = lambda values: (statistics.median(values), sorted(values)[min(len(values) - 1, len(values) * 99 // 100)])
    streamed = [timing.first for timing, question in zip(timings, answered) if question.kind == "streamed"]
    first, whole = of(streamed or [float("nan")]), of([timing.whole for timing in timings])
    served = sum(timing.tokens for timing in timings) / seconds
    return {
        "requests": len(questions),
        "answered": len(timings),
        "clients": clients,
        "requests per second": len(questions) / seconds,
        "tokens per second": served,
        "of generate": served / (tokens / bound_seconds),
        "with unread answers": wrote / seconds / (tokens / bound_seconds),
        "over one at a time": served / (sum(timing.tokens for timing in one) / one_seconds),
        "first token p50 (ms)": 1e3 * first[0],
        "first token p99 (ms)": 1e3 * first[1],
        "whole answer p50 (ms)": 1e3 * whole[0],
        "whole answer p99 (ms)": 1e3 * whole[1],
        "rows in use": forwards / (steps * engines[0].batch),
        "tokens per forward": sum(timing.tokens for timing in timings) / forwards,
    }


def questions_of(arguments: argparse.Namespace, service: Service, checkpoint: str) -> list[Question]:
    """Held-out prompts of the run, or random ones of given lengths; lengths of answers and methods in turn."""
    model, methods = service.offer.model, list(service.offer.methods)
    if arguments.prompt_lengths:
        sizes = itertools.cycle(numbers(arguments.prompt_lengths, "--prompt-lengths"))
        prompts = [random_prompts(model, 1, next(sizes))[0] for _ in range(min(arguments.requests, 64))]
    else:
        source = held_out(checkpoint)[0]
        queries = [source[i][0] for i in itertools.islice(source.part(), arguments.requests)]
        prompts = [list(map(int, ids)) for ids in service.offer.tokenizer.encode_prompts(queries)]
    limits = numbers(arguments.answer_lengths, "--answer-lengths") or [service.offer.methods[methods[0]].length]
    shares = {"streamed": arguments.streamed, "hang up": arguments.hang_up, "malformed": arguments.malformed}
    shares["whole"] = max(0.0, 1 - sum(shares.values()))
    kinds = random.Random(0).choices(list(shares), list(shares.values()), k=arguments.requests)
    cycle = itertools.cycle
    return [Question(*turn) for turn in zip(cycle(prompts), cycle(limits), cycle(methods), kinds)]


def numbers(text: str, flag: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",") if part]
    except ValueError:
        found = [0]
    if any(number < 1 for number in found):
        raise UserError(f"{flag} is {text!r}; give numbers of at least 1, such as 16,64.")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="All other flags are those of python -m refusion_jax.serve.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--clients", type=int, default=16, metavar="N", help="requests in flight; default 16")
    parser.add_argument("--requests", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--rate", type=float, default=0.0, metavar="X", help="requests per second; default: no limit")
    parser.add_argument("--prompt-lengths", default="", metavar="N,..", help="random prompts; default: held-out ones")
    parser.add_argument(
        "--answer-lengths", default="", metavar="N,..", help="max_tokens in turn; default: --gen-length"
    )
    parser.add_argument(
        "--streamed", type=float, metavar="SHARE", help="of the requests; default: all that are answered"
    )
    parser.add_argument(
        "--hang-up", type=float, default=0.0, metavar="SHARE", help="whose clients leave; default: none"
    )
    parser.add_argument("--malformed", type=float, default=0.0, metavar="SHARE", help="refused; default: none")
    parser.add_argument("--alone", type=int, default=16, metavar="N", help="requests one at a time; default 16")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there too")
    arguments, rest = parser.parse_known_args(argv)
    if min(arguments.clients, arguments.requests, arguments.alone) < 1 or not arguments.rate >= 0:
        raise UserError("--clients, --requests and --alone must be at least 1, --rate 0 (no limit) or above.")
    if arguments.streamed is None:
        arguments.streamed = 1 - arguments.hang_up - arguments.malformed
    shares = arguments.streamed, arguments.hang_up, arguments.malformed
    rounding = 1e-9
    if min(shares) < 0 or sum(shares) > 1 + rounding or arguments.hang_up + arguments.malformed > 1 - rounding:
        raise UserError(
            "--streamed, --hang-up and --malformed are "
            + ", ".join(map(str, shares))
            + ": give shares of the requests from 0 to 1, that leave some to be answered."
        )
    compilation.keep_programs()
    flags = serve.arguments_of(rest)
    service = serve.service_of(decoder_of(flags), flags)
    service.device.start()
    while service.device.state != READY:
        if service.device.state == BROKEN:
            raise service.device.failure
        time.sleep(0.05)
    questions = questions_of(arguments, service, flags.checkpoint)
    figures = run(service, questions, arguments.clients, arguments.rate, arguments.alone)
    print("\n".join(f"{name:24} {value:.4g}" for name, value in figures.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
