"""Measures the server: clients that send requests over HTTP, beside the same prompts through `generate`.

    python tools/benchmark.py serve --checkpoint runs/quickstart --clients 16 --requests 200 --gen-length 32
    python tools/benchmark.py serve --checkpoint runs/8b --mesh 1,1,4 --rate 20 --answer-lengths 64,256

The server runs in this process, on loopback, with the flags of `python -m refusion_jax.serve`. Requests are streamed.
`generate` answers the same prompts with as many rows and all of them at hand: what a server can reach at best.
One at a time: a client that waits for each answer before it asks again.
"""

import argparse
import concurrent.futures
import dataclasses
import http.client
import itertools
import json
import pathlib
import statistics
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
    """A request: ids of a prompt, most tokens of its answer, and the sampler's method."""

    prompt: list[int]
    limit: int
    method: str


@dataclasses.dataclass(frozen=True)
class Timing:
    """What a client saw of a request; times in seconds since it was sent."""

    first: float
    whole: float
    tokens: int
    forwards: int
    text: str


def ask(port: int, question: Question, key: str = "") -> Timing:
    """Sends a request and reads its stream to the end.

    Raises:
      UserError: the server refused it.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    body = {
        "prompt": question.prompt,
        "max_tokens": question.limit,
        "method": question.method,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    start, first, text, usage = time.perf_counter(), 0.0, [], {}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise UserError(f"The server answered {response.status}: {response.read().decode()}")
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            raise UserError(f"The server failed: {chunk['error']['message']}")
        first = first or time.perf_counter() - start
        text.extend(choice["text"] for choice in chunk["choices"])
        usage = chunk.get("usage") or usage
    connection.close()
    whole = time.perf_counter() - start
    return Timing(first, whole, usage["completion_tokens"], usage["refusion"]["forwards"], "".join(text))


def ask_all(port: int, questions: Sequence[Question], clients: int, rate: float) -> tuple[list[Timing], float]:
    """Timings in the order of the questions, and the seconds that all took.

    Args:
      rate: requests per second that are sent, if enough clients are free; 0: as soon as one is.
    """
    start = time.perf_counter()

    def when_due(item: tuple[int, Question]) -> Timing:
        number, question = item
        time.sleep(max(0.0, start + number / rate - time.perf_counter()) if rate else 0.0)
        return ask(port, question)

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        timings = list(pool.map(when_due, enumerate(questions)))
    return timings, time.perf_counter() - start


def generate(service: Service, questions: Sequence[Question]) -> tuple[int, float]:
    """Tokens of all answers, and seconds, without a server: its engines, one after the other."""
    tokens, seconds = 0, 0.0
    for method, lane in service.device.lanes.items():
        engine, config = lane.engine, service.offer.methods[method]  # idle, now that the server is stopped
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


def run(service: Service, questions: Sequence[Question], clients: int, rate: float, alone: int) -> dict[str, Any]:
    """Figures of a service whose device thread is ready."""
    listening = serve.listen("127.0.0.1", 0)
    listening.listen()  # connections wait until the server runs
    port = listening.getsockname()[1]
    thread = threading.Thread(target=serve.run, args=(service, listening, 60))
    thread.start()
    try:
        ask_all(port, questions[: min(len(questions), clients)], clients, 0.0)  # warm
        engines = [lane.engine for lane in service.device.lanes.values()]
        before = sum(engine.steps for engine in engines)
        timings, seconds = ask_all(port, questions, clients, rate)
        steps = sum(engine.steps for engine in engines) - before
        one, one_seconds = ask_all(port, questions[:alone], 1, 0.0)
    finally:
        service.draining = True
        thread.join()
    tokens, bound_seconds = generate(service, questions)
    forwards = sum(timing.forwards for timing in timings)
    of = lambda values: (statistics.median(values), sorted(values)[min(len(values) - 1, len(values) * 99 // 100)])
    first, whole = of([timing.first for timing in timings]), of([timing.whole for timing in timings])
    served = sum(timing.tokens for timing in timings) / seconds
    return {
        "requests": len(timings),
        "clients": clients,
        "requests per second": len(timings) / seconds,
        "tokens per second": served,
        "of generate": served / (tokens / bound_seconds),
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
    turns = zip(itertools.cycle(prompts), itertools.cycle(limits), itertools.cycle(methods))
    return [Question(*turn) for turn in itertools.islice(turns, arguments.requests)]


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
    parser.add_argument("--alone", type=int, default=16, metavar="N", help="requests one at a time; default 16")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the figures there too")
    arguments, rest = parser.parse_known_args(argv)
    if min(arguments.clients, arguments.requests, arguments.alone) < 1 or not arguments.rate >= 0:
        raise UserError("--clients, --requests and --alone must be at least 1, --rate 0 (no limit) or above.")
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
