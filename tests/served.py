"""A server in this process, on a random byte-level model that is sure of what it says; fixtures for tests of it.

PYTEST_DONT_REWRITE: tests import it before pytest does.
"""

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Iterator, Sequence

import httpx2 as httpx
import jax
import micro
import openai
import pytest
from jax.experimental.compilation_cache import compilation_cache

from refusion_jax import serve
from refusion_jax.config import load_config
from refusion_jax.decoder import Decoder
from refusion_jax.sampling import generate
from refusion_jax.serving.app import Service
from refusion_jax.serving.device import READY

SETTINGS = {"gen_length": 16, "slot_size": 4, "slot_threshold": 0.5, "token_threshold": 0.3, "speculate": "off"}
FLAGS = [
    *(word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))),
    *("--batch-size", "4", "--max-length", "192", "--also", "autoregressive", "--port", "0", "--name", "tiny"),
]


def write_checkpoint(folder, repository) -> None:
    """Fills a folder with a run of tests/micro.py."""
    config = load_config(f"{repository}/tests/micro.py:data={folder}/data.json")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, max_position_embeddings=256))
    micro.save_run(folder, config)


def ready(decoder: Decoder, flags: Sequence[str] = FLAGS) -> Service:
    """A service whose device thread is ready."""
    found = serve.service_of(decoder, serve.arguments_of(["--checkpoint", "tiny", *flags]))
    found.device.start()
    end = time.monotonic() + 600
    while found.device.state != READY:
        assert found.device.failure is None, found.device.failure
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


@contextlib.contextmanager
def over_http(found: Service) -> Iterator[str]:
    """The base address of a server that answers for a service, on this machine only."""
    listening = serve.listen("127.0.0.1", 0)
    listening.listen()  # connections wait until the server runs
    thread = threading.Thread(target=serve.run, args=(found, listening, 60))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        found.draining = True
        thread.join(60)
        found.draining = False
        assert not thread.is_alive()


QUERIES = ["sun", "moon and stars", "où", "four", "five", "a longer question " * 5]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """Where programs lie that every module of the server's needs: the first one compiles them, for all workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "served"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def compiled_once(compiled):
    settings = {
        "jax_compilation_cache_dir": os.environ["JAX_COMPILATION_CACHE_DIR"] or str(compiled),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield settings["jax_compilation_cache_dir"]
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # else JAX keeps the folder for all that comes after


@pytest.fixture(scope="module")
def decoder(repository, tmp_path_factory, compiled_once) -> Decoder:
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder, repository)
    return Decoder.load(str(folder))


@pytest.fixture(scope="module")
def service(decoder):
    return ready(decoder)


@pytest.fixture(scope="module")
def address(service):
    with over_http(service) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def http_client(address):
    with httpx.Client(base_url=address, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def answers(decoder):
    """What `generate` answers to every query alone, by method."""

    def alone(method, query):
        settings = SETTINGS if method == "plan_and_infill" else {"gen_length": 16}
        config = decoder.settings(method=method, **settings)
        ids = decoder.tokenizer.encode_prompts([query])
        return generate(decoder.params, decoder.model, config, ids, max_prompt_length=176)[0]

    return {
        (method, query): alone(method, query) for method in ("plan_and_infill", "autoregressive") for query in QUERIES
    }


def ask(client, query, **more):
    return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": query}], **more)


def wait_until_idle(service) -> None:
    end = time.monotonic() + 60
    while service.device.open or service.active:
        assert time.monotonic() < end, (service.device.open, service.active)
        time.sleep(0.01)


def sample_values(text: str) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in lines}
