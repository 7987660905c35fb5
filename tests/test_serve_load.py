"""Many clients at once, some of whom hang up or talk nonsense: everybody gets the answer that they would get alone."""

import collections
import concurrent.futures
import dataclasses
import gc
import http.client
import json
import random
import resource
import threading
import urllib.parse

import jax
from served import ready, sample_values, wait_until_idle

from refusion_jax.serving import metrics

pytest_plugins = ["served"]

CLIENTS, REQUESTS = 64, 2000


@dataclasses.dataclass(frozen=True)
class Wanted:
    prompt: str
    max_tokens: int
    method: str

    def body(self, **more) -> dict:
        return {"prompt": self.prompt, "max_tokens": self.max_tokens, "method": self.method, **more}


class Client(threading.local):
    """A connection for each thread, made anew when it breaks."""

    connection = None

    def send(self, address: str, body: bytes) -> http.client.HTTPResponse:
        place = urllib.parse.urlsplit(address)
        self.connection = self.connection or http.client.HTTPConnection(place.hostname, place.port, timeout=300)
        self.connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        return self.connection.getresponse()

    def hang_up(self) -> None:
        self.connection.close()
        self.connection = None


def whole(response) -> str:
    assert response.status == 200, response.read()
    return json.loads(response.read())["choices"][0]["text"]


def streamed(response) -> str:
    lines = [line[6:] for line in response.read().splitlines() if line]
    assert lines.pop() == b"[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


def forwards(service) -> tuple[int, float]:
    """Passes of all engines, and how many rows took part in them, all together."""
    counted = sample_values(service.metrics.text().decode())[
        'vllm:diffusion_num_denoising_steps_total{model_name="tiny"}'
    ]
    return sum(lane.engine.steps for lane in service.device.lanes.values()), counted


def test_two_thousand_requests_of_64_clients(address, service):
    rng, client = random.Random(5), Client()
    wanted = [
        Wanted("".join(rng.choices("abcdefgh ", k=rng.randint(1, 100))), rng.randint(1, 16), method)
        for method in service.offer.methods
        for _ in range(24)
    ]
    alone = {one: whole(client.send(address, json.dumps(one.body()).encode())) for one in wanted}
    wait_until_idle(service)
    compiled, arrays, before = metrics.compilations(), len(jax.live_arrays()), forwards(service)
    kinds = ["whole"] * 55 + ["stream"] * 25 + ["hang up"] * 10 + ["nonsense"] * 10
    tasks = [(rng.choice(kinds), rng.choice(wanted)) for _ in range(REQUESTS)]
    nonsense = (b"{", b'{"prompt": 3}', b'{"prompt": "x", "n": -1}', b"\xff", b'{"prompt": "' + b"x" * 300 + b'"}')
    memory = []

    def one(number: int) -> str:
        kind, task = tasks[number]
        if number % 500 == 499:
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        if kind == "nonsense":
            response = client.send(address, nonsense[number % len(nonsense)])
            assert response.status == 400 and json.loads(response.read())["error"]["message"]
        elif kind == "hang up":
            response = client.send(address, json.dumps(task.body(stream=True)).encode())
            response.read(1 + number % 50)
            client.hang_up()
        else:
            response = client.send(address, json.dumps(task.body(stream=kind == "stream")).encode())
            found = (streamed if kind == "stream" else whole)(response)
            assert found == alone[task], (task, found)
        return kind

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        done = collections.Counter(pool.map(one, range(REQUESTS)))
    assert done.total() == REQUESTS and min(done.values()) > REQUESTS // 20
    wait_until_idle(service)
    gc.collect()
    assert metrics.compilations() == compiled
    assert len(jax.live_arrays()) == arrays
    assert memory[-1] - memory[0] < 64 << 10  # KiB
    # While so many wait, no row is idle for long: hardly more passes of a batch than full ones would be.
    passes, of_rows = (now - then for now, then in zip(forwards(service), before))
    assert of_rows > 0.6 * passes * 4, (passes, of_rows)


def test_benchmark_counts_what_was_answered(decoder, monkeypatch, repository):
    monkeypatch.syspath_prepend(str(repository / "tools"))
    import benchmark_serve

    mixed = ready(decoder)
    kinds = ["whole", "streamed", "streamed", "hang up", "malformed"] * 6
    questions = [
        benchmark_serve.Question([97 + i] * (i + 1), 12, method, kind)
        for i, (kind, method) in enumerate(zip(kinds, list(mixed.offer.methods) * len(kinds)))
    ]
    found = benchmark_serve.run(mixed, questions, clients=6, rate=0.0, alone=2)
    assert (found["requests"], found["answered"]) == (30, 18)
    assert 0 < found["of generate"] <= found["with unread answers"]
    assert 0 < found["first token p50 (ms)"] <= found["whole answer p99 (ms)"]
    assert 0 < found["rows in use"] <= 1
