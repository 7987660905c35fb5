"""Many processes end together: when one fails or dies, each of the others says which, and why, and exits with code 2.

Process 0 keeps a TCP connection with each other process. One that fails says so on it before it ends, with its message; of
one that is killed the operating system closes the connection, at once; and a machine that vanishes no longer answers the
keep-alive packets. Process 0 tells all the others what it learns. No heartbeats of our own: a process whose Python is busy
is not taken for dead. A process that hangs as a whole, its machine alive, is left to JAX's own heartbeats.
"""

import atexit
import contextlib
import ctypes
import os
import secrets
import signal
import socket
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Iterator

import jax

from refusion_jax.errors import UserError
from refusion_jax.parallel import distributed

CONNECT_TIMEOUT = 60  # seconds for all processes to connect to process 0
GRACE = 2  # seconds for a process to come to its own error when another has failed


@contextlib.contextmanager
def others() -> Iterator[None]:
    """Runs the body, all that the processes do together, and ends every process when it fails on one of them.

    When another process fails or dies, the body never returns: wherever it is, in a collective too, this process prints
    the reason and exits with code 2. What the body raises here is told to the others and goes on to the caller; the
    process then ends without the shutdown of jax.distributed, which would wait for them. Comes after
    `distributed.initialize`; with one process it does nothing.
    """
    links = _connect() if jax.process_count() > 1 else {}
    watch = _Watch(links)
    try:
        yield
    except BaseException as error:
        if links:
            watch.failed(error)
        raise
    watch.tell("done")


class _Link:
    """A connection with another process, which speaks in lines."""

    def __init__(self, connection: socket.socket):
        self._connection, self.host, self.lines = connection, "", self._read()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # It ends after 3/4 of the time in which JAX would notice, and abort.
        quarter = max(2, distributed.HEARTBEAT_TIMEOUT // 4)
        for name, value in {"TCP_KEEPIDLE": quarter, "TCP_KEEPINTVL": quarter // 2, "TCP_KEEPCNT": 4}.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, line: str) -> None:
        with contextlib.suppress(OSError):  # it is gone: its listener knows
            self._connection.sendall(f"{line}\n".encode())

    def wait(self, seconds: float | None) -> None:
        """How long to wait for a line; None for ever."""
        self._connection.settimeout(seconds)

    def _read(self) -> Iterator[str]:
        """Its lines until the connection ends, however it ends."""
        rest = b""
        with contextlib.suppress(OSError):
            while part := self._connection.recv(4096):
                *lines, rest = (rest + part).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)


class _Watch:
    """Listens to the other processes: process 0 to all of them, every other one to process 0."""

    def __init__(self, links: dict[int, _Link]):
        self._links = links
        self._index = jax.process_index()  # asked now: at the end JAX closes its backends while we still listen
        self._failed = threading.Event()  # this process ends by itself
        self._lock = threading.Lock()  # taken for good by whoever ends this process
        for index, link in links.items():
            link.wait(None)
            threading.Thread(target=self._listen, args=(index, link), daemon=True).start()

    def tell(self, line: str) -> None:
        with self._lock:
            for link in self._links.values():
                link.send(line)

    def failed(self, error: BaseException) -> None:
        """Tells the others how the body ended here."""
        code = 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        if code == 1:
            time.sleep(2 * GRACE)  # if it is a collective that broke with another process, a listener ends us meanwhile
        self._failed.set()
        message = str(error) if code == 2 else "".join(traceback.format_exception_only(error))
        message = textwrap.shorten(message, 1000, placeholder=" ...")
        self.tell(f"failed process {self._index} (host {socket.gethostname()}) failed: {message}")
        atexit.register(self._leave, code)  # comes before JAX's own handler, registered earlier

    def _listen(self, index: int, link: _Link) -> None:
        kind = ""
        for line in link.lines:
            kind, _, reason = line.partition(" ")
            if kind != "done":
                return self._stop(kind, reason)
        if not kind:
            self._stop(
                "gone",
                f"process {index} (host {link.host}) ended without a word: killed, out of memory, or its machine is "
                "down. Look at its log; start the job again with the same --workdir to resume from the last checkpoint.",
            )

    def _stop(self, kind: str, reason: str) -> None:
        """Ends this process, unless it has failed by itself, or does so now: all may meet the same error."""
        with self._lock:
            for link in self._links.values() if self._index == 0 else ():
                link.send(f"{kind} {reason}")
            if not self._failed.wait(0 if kind == "gone" else GRACE):
                print(f"error: {reason}", file=sys.stderr, flush=True)
                self._leave(2)

    def _leave(self, code: int) -> None:
        if self._index == 0:
            time.sleep(GRACE)  # the last to go, as JAX aborts all others when its coordinator closes
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _connect() -> dict[int, _Link]:
    """Connections by index of the other process; none, and a line that says so, when they cannot be had."""
    try:
        # Private: JAX's store of keys that all processes see, and the address of process 0.
        from jax._src.distributed import global_state

        store, address = global_state.client, global_state.coordinator_address.rsplit(":", 1)[0].strip("[]")
        return _accept(store) if jax.process_index() == 0 else {0: _call(store, address)}
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        print(
            f"process {jax.process_index()}: no connection that tells why another process ends ({error}), JAX alone "
            "will",
            flush=True,
        )
        return {}


def _accept(store: object) -> dict[int, _Link]:
    """On process 0: waits for the calls of all others."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    links, token, end = {}, secrets.token_hex(8), time.monotonic() + CONNECT_TIMEOUT
    with socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=family == socket.AF_INET6) as server:
        store.key_value_set("refusion_jax/watch", f"{server.getsockname()[1]} {token} {socket.gethostname()}")
        try:
            while len(links) < jax.process_count() - 1:
                server.settimeout(max(0.01, end - time.monotonic()))
                link = _Link(server.accept()[0])
                link.wait(5)
                match next(link.lines, "").split():
                    case [said, index, host] if said == token:  # whoever else calls a port that is open
                        links[int(index)], link.host = link, host
        except TimeoutError:
            for link in links.values():
                link.send("done")
            raise OSError(
                f"{len(links)} of {jax.process_count() - 1} processes called within {CONNECT_TIMEOUT} s"
            ) from None
    return links


def _call(store: object, address: str) -> _Link:
    """On every other process: calls process 0."""
    port, token, host = store.blocking_key_value_get("refusion_jax/watch", CONNECT_TIMEOUT * 1000).split()
    link = _Link(socket.create_connection((address, int(port)), CONNECT_TIMEOUT))
    link.host = host
    link.send(f"{token} {jax.process_index()} {socket.gethostname()}")
    # When process 0 dies JAX prints and aborts, as soon as we learn of it. With the C function `sleep` as its handler,
    # SIGABRT holds that thread for the signal's number of seconds, 6: time for the listener to say what happened.
    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, libc.sleep)
    return link
