"""Serves a model over HTTP, in the form that clients of OpenAI's API expect, with a page to talk to it.

    python -m refusion_jax.serve --checkpoint runs/quickstart
    python -m refusion_jax.serve --checkpoint runs/8b --mesh 1,1,4 --batch-size 32 --host 0.0.0.0 --api-key-file keys
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "refusion", "max_tokens": 32}'

SIGTERM or Ctrl-C: new requests are refused, running ones are answered, then it ends; a second one ends it at once.
"""

import argparse
import functools
import ipaddress
import logging
import os
import pathlib
import re
import socket
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import logging as absl_logging

from refusion_jax import compilation
from refusion_jax.decoder import (
    Decoder,
    add_file_arguments,
    add_model_arguments,
    add_sampler_arguments,
    decoder_of,
    settings_of,
)
from refusion_jax.errors import UserError, run_main
from refusion_jax.sampling import Engine, SamplerConfig
from refusion_jax.sampling.methods import METHODS
from refusion_jax.sampling.prefixes import BLOCK
from refusion_jax.sampling.programs import cache_bucket, make_sampler

try:
    import uvicorn
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    from refusion_jax.serving import scoring
    from refusion_jax.serving.app import Service
    from refusion_jax.serving.device import BROKEN, WARMING, Device
    from refusion_jax.serving.metrics import Metrics
    from refusion_jax.serving.protocol import Offer
except ImportError as error:
    MISSING: ImportError | None = error
else:
    MISSING = None


def main(argv: Sequence[str] | None = None) -> None:
    arguments = arguments_of(argv)
    if MISSING:
        raise UserError(f"Serving needs further packages ({MISSING}). Install them: pip install 'refusion_jax[serve]'.")
    keys = read_keys(arguments)
    listening = listen(arguments.host, arguments.port)  # before the model is loaded, which may take minutes
    compilation.keep_programs()
    log_requests()
    absl_logging.set_verbosity(absl_logging.ERROR)

    decoder = decoder_of(arguments)
    service = service_of(decoder, arguments, keys)
    service.device.start()
    host, port = listening.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port} answers when its programs are compiled", flush=True)
    run(service, listening, arguments.grace)
    if service.device.failure:
        raise service.device.failure
    if service.device.state == WARMING:
        os._exit(0)  # the interpreter cannot end while another thread compiles


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, parsed."""
    parser = argparse.ArgumentParser(
        prog="python -m refusion_jax.serve",
        description=__doc__,
        epilog=compilation.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default 127.0.0.1: this machine only"
    )
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0: any that is free")
    parser.add_argument(
        "--api-key-file", type=pathlib.Path, metavar="FILE", help="a key on every line; clients need one"
    )
    parser.add_argument("--no-key", action="store_true", help="serve without a key on an address that others can reach")
    parser.add_argument("--name", default="", help="of the model, for clients; default: the checkpoint's folder")
    parser.add_argument(
        "--also",
        default="",
        metavar="METHOD,..",
        help="further methods that a request may choose; each has its own cache",
    )
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows of each method; default 16")
    parser.add_argument(
        "--max-length",
        type=int,
        default=0,
        metavar="N",
        help="most tokens of prompt and answer; default: 4096, or the model's",
    )
    parser.add_argument("--max-waiting", type=int, default=256, metavar="N", help="answers that may wait; default 256")
    parser.add_argument(
        "--prefix-tokens",
        type=int,
        default=-1,
        metavar="N",
        help="tokens of prompts' beginnings that each method keeps in its cache; default: 4 x --max-length; 0: none",
    )
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="of a request; default 600")
    parser.add_argument(
        "--grace", type=float, default=300, metavar="SECONDS", help="for running requests after SIGTERM; default 300"
    )
    parser.add_argument("--log-prompts", action="store_true", help="also log what is asked and answered")
    add_file_arguments(parser)
    add_sampler_arguments(parser)
    arguments = parser.parse_args(argv)
    for name in ("batch_size", "max_waiting"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least 1.")
    for name in ("timeout", "grace"):
        if not 0 < getattr(arguments, name) < 1e9:
            raise UserError(f"--{name} is {getattr(arguments, name)}; give seconds above 0.")
    return arguments


# --- What is needed before the model.


def read_keys(arguments: argparse.Namespace) -> list[str]:
    """The keys that clients may use; none: they need none.

    Raises:
      UserError: no such file, no key in it, or none where everybody could reach the server.
    """
    if arguments.api_key_file:
        try:
            lines = arguments.api_key_file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Cannot read --api-key-file {arguments.api_key_file} ({error}).") from None
        keys = [line.strip() for line in lines if line.strip()]
        if not keys:
            raise UserError(f"--api-key-file {arguments.api_key_file} holds no key; write one on a line.")
        return keys
    if not (is_loopback(arguments.host) or arguments.no_key):
        raise UserError(
            f"--host {arguments.host} can be reached from other machines and no key is asked for. Give --api-key-file "
            "FILE, or --no-key where a gateway in front asks for keys."
        )
    return []


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; connections are accepted when the server runs.

    Raises:
      UserError: the address is taken, not this machine's, or none at all.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}; choose one from 1 to 65535, or 0 for any that is free.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, UnicodeError) as error:  # a UnicodeError: a part of the name is too long, or empty
        raise UserError(
            f"Cannot listen on {host} port {port} ({error}). Choose another --port (0: any that is free) or --host."
        ) from None
    return found


# --- The model's part.


def service_of(decoder: Decoder, arguments: argparse.Namespace, keys: Sequence[str] = ()) -> "Service":
    """The service for a model; nothing is compiled yet.

    Raises:
      UserError: a method, length or batch that does not suit the model or the memory.
    """
    first = settings_of(arguments, decoder)
    also = [method for method in arguments.also.split(",") if method and method != first.method]
    for method in also:
        if method not in METHODS:
            raise UserError(f"--also names the method {method!r}; choose from {', '.join(METHODS)}.")
    methods = {first.method: first} | {method: settings_of(arguments, decoder, method=method) for method in also}
    max_length = arguments.max_length or min(4096, decoder.model.max_position_embeddings)
    longest = max(config.length for config in methods.values())
    if not longest < max_length <= decoder.model.max_position_embeddings:
        raise UserError(
            f"--max-length is {max_length}; it must be more than an answer's {longest} tokens (--gen-length) and at "
            f"most the model's {decoder.model.max_position_embeddings}."
        )
    blocks = (4 * max_length if arguments.prefix_tokens < 0 else arguments.prefix_tokens) // BLOCK
    check_memory(decoder, list(methods.values()), arguments.batch_size, max_length, blocks)
    name = arguments.name or pathlib.Path(arguments.checkpoint).resolve().name
    metrics = Metrics(name)
    lanes = {
        method: functools.partial(make_engine, decoder, config, arguments.batch_size, max_length, blocks)
        for method, config in methods.items()
    }
    causal = not (decoder.objective and decoder.objective.bidirectional)
    scorer = functools.partial(scoring.Scorer, decoder, max_length) if causal else None
    device = Device(lanes, scorer, max_waiting=arguments.max_waiting, observer=metrics)
    offer = Offer(decoder.model, decoder.tokenizer, methods, max_length, arguments.max_waiting, name, causal)
    return Service(offer, device, metrics, keys, arguments.timeout, arguments.log_prompts)


def make_engine(decoder: Decoder, config: SamplerConfig, batch: int, max_length: int, prefix_blocks: int) -> Engine:
    """An engine for prompts and answers of together `max_length` tokens."""
    return Engine(
        decoder.params,
        decoder.model,
        config,
        batch,
        max_prompt_length=max_length - config.length,
        prefix_blocks=prefix_blocks,
        mesh=decoder.mesh,
    )


def check_memory(
    decoder: Decoder, configs: Sequence[SamplerConfig], batch: int, max_length: int, prefix_blocks: int
) -> None:
    """Raises a UserError where the caches of all methods cannot fit."""
    model = decoder.model
    entry = 2 * model.num_layers * model.num_kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize
    windows = [make_sampler(model, config, batch, decoder.mesh).window for config in configs]
    entries = sum(cache_bucket(max_length + window) for window in windows)
    kept = len(configs) * prefix_blocks * BLOCK * entry / decoder.mesh.shape["tensor"]  # every shard of rows has a copy
    needed, free = batch * entries * entry / decoder.mesh.size + kept, free_memory(decoder.mesh.devices.flat[0])
    if needed > free:
        missing = (needed - free) / 2**30
        raise UserError(
            f"The cache for {batch} rows of {max_length} tokens takes {needed / 2**30:.2f} GiB on each device, "
            f"{missing:.2f} GiB more than are free. Lower --batch-size or --max-length, offer fewer methods, or spread "
            "the model over more devices with --mesh."
        )


def free_memory(device: jax.Device) -> float:
    """Bytes that are free where the device keeps its arrays; infinite where nobody says."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), float("inf"))


# --- Running.


# The head of a request up to the name of its first header `Upgrade`.
UPGRADE = re.compile(rb"\A([A-Z]+ [^\r\n]+\r\n(?:[^\r\n]+\r\n)*?)upgrade:", re.IGNORECASE)


def log_requests() -> None:
    """Lines of requests go to stderr."""
    log, handler = logging.getLogger("refusion_jax.serving"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def run(service: "Service", listening: socket.socket, grace: float) -> None:
    """Serves until a signal, or until the device thread has failed to start."""

    class Server(uvicorn.Server):
        stop_by = float("inf")

        def handle_exit(self, sig, frame):
            if service.draining:
                self.should_exit = self.force_exit = True
            service.draining, self.stop_by = True, time.monotonic() + grace

        async def on_tick(self, counter):
            drained = service.draining and (not service.active or time.monotonic() > self.stop_by)
            return await super().on_tick(counter) or drained or service.device.state == BROKEN

    class Protocol(HttpToolsProtocol):
        def data_received(self, data: bytes) -> None:
            # httptools takes the body behind `Upgrade: h2c`, which curl --http2 and Java's client send with every
            # request, for another protocol's. So it does not get to see that header, which servers may ignore.
            super().data_received(UPGRADE.sub(rb"\1x-upgrade:", data))

    config = uvicorn.Config(
        service.application(),
        http=Protocol,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=min(5, grace),  # for what is on its way to clients
        server_header=False,
        proxy_headers=False,
    )
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # between two turns the device thread waits for the interpreter, and the device for it
    try:
        Server(config).run(sockets=[listening])
    finally:
        sys.setswitchinterval(before)


if __name__ == "__main__":
    run_main(main)
