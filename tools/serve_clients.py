"""Clients of a server, for benchmark_serve.py. They are a process of their own: in the server's they would take turns
with it at one interpreter.

On stdin an object with port, clients, rate (requests per second; 0: as many as there are clients) and questions: each
with the body of /v1/completions, `refused`, whether that is malformed, and `hang_up`, bytes of the answer after which
the client closes the connection (0: it reads on). On stdout, in their order, what the clients saw (null of those that
hung up or were refused), and the seconds that all took.
"""

import concurrent.futures
import http.client
import json
import sys
import threading
import time
from typing import Any

_own = threading.local()  # connection: of a client, kept between its requests


def ask(port: int, body: Any, refused: bool, hang_up: int) -> dict[str, Any] | None:
    """Sends a request and reads its answer to the end: seconds to the first token and to the last, text and usage.

    Raises:
      RuntimeError: the server refused what is well formed or answered what is not, or failed.
    """
    if not hasattr(_own, "connection"):
        _own.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    start, first, text, usage = time.perf_counter(), 0.0, [], {}
    _own.connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = _own.connection.getresponse()
    if response.status != (400 if refused else 200):
        raise RuntimeError(f"the server answered {response.status}: {response.read().decode()}")
    if refused or hang_up:
        response.read(hang_up or None)
        if hang_up:
            _own.connection.close()
            del _own.connection
        return None
    for line in response:
        line = line.removeprefix(b"data: ").strip()
        if not line.startswith(b"{"):
            continue
        chunk = json.loads(line)
        if "error" in chunk:
            raise RuntimeError(f"the server failed: {chunk['error']['message']}")
        first = first or time.perf_counter() - start
        text.extend(choice["text"] for choice in chunk["choices"])
        usage = chunk.get("usage") or usage
    response.read()  # nothing: it frees the connection, as iterating does not
    return {"first": first, "whole": time.perf_counter() - start, "text": "".join(text), "usage": usage}


def ask_all(port: int, clients: int, rate: float, questions: list[dict[str, Any]]) -> dict[str, Any]:
    """As said above."""
    start = time.perf_counter()

    def when_due(number: int) -> dict[str, Any]:
        time.sleep(max(0.0, start + number / rate - time.perf_counter()) if rate else 0.0)
        return ask(port, **questions[number])

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        seen = list(pool.map(when_due, range(len(questions))))
    return {"seen": seen, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    json.dump(ask_all(**json.load(sys.stdin)), sys.stdout)
