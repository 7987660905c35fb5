"""The server when something is wrong: requests, clients, the engine, the start."""

import asyncio
import collections
import concurrent.futures
import dataclasses
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.parse

import httpx2 as httpx
import openai
import pytest
import served
from served import ask, sample_values, wait_until_idle

from refusion_jax import serve
from refusion_jax.errors import UserError
from refusion_jax.sampling import MaskedConfig
from refusion_jax.serving import protocol

pytest_plugins = ["served"]


# --- Errors.


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 17}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stop": 3}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"logit_bias": {"3": 1}}, "logit_bias"),
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"extra_body": {"method": "guess"}}, "method"),
        ({"extra_body": {"slot_threshold": 2}}, "slot_threshold"),
        ({"extra_body": {"slot_size": 8}}, "slot_size"),
        ({"extra_body": {"timeout": 0}}, "timeout"),
        ({"extra_body": {"timeout": -1}}, "timeout"),
        ({"extra_body": {"stop_token_ids": [1e9]}}, "stop_token_ids"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, None),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ],
)
def test_bad_fields_are_named(client, fields, param):
    messages = [{"role": "user", "content": "sun"}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": messages} | fields)
    assert caught.value.param == param and caught.value.type == "invalid_request_error"
    assert caught.value.message


@pytest.mark.parametrize(
    "own, fields",
    [
        ({}, {"cfg_scale": 1.5}),
        ({"cfg_scale": 1.5}, {"cfg_scale": 0, "threshold": 0.5}),
        ({"schedule": "linear_t"}, {"steps": 64, "threshold": 0.5}),
    ],
)
def test_settings_that_need_other_programs_are_named(own, fields):
    config = MaskedConfig(gen_length=8, **own)
    offer = protocol.Offer(None, None, {"masked": config}, 64, 4, "tiny")
    with pytest.raises(protocol.BadRequest, match="when the server was started") as caught:
        protocol.settings(fields, offer)
    assert caught.value.param == next(iter(fields))
    assert ("cfg_scale" in config.changeable) == (config.cfg_scale > 0)


def test_keys_are_asked_for_under_v1_only(service):
    keyed = dataclasses.replace(service, keys=("right", "other"))
    with served.over_http(keyed) as address:
        for key in ("wrong", "rightx", "righ"):
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0).models.list()
        for key in ("right", "other"):
            assert openai.OpenAI(base_url=f"{address}/v1", api_key=key).models.list().data
        assert httpx.get(f"{address}/health").status_code == 200
        found = httpx.post(f"{address}/v1/completions", json={"prompt": "x"})
        assert found.status_code == 401 and found.json()["error"]["type"] == "authentication_error"


def test_full_queue_is_refused_with_a_time_to_try_again(client, service, http_client):
    service.device.max_waiting, before = 0, service.device.max_waiting
    try:
        found = http_client.post("/v1/completions", json={"prompt": "x"})
        assert found.status_code == 429 and int(found.headers["retry-after"]) >= 1
        assert found.json()["error"]["type"] == "rate_limit_error"
    finally:
        service.device.max_waiting = before
    assert http_client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_openai_client_tries_again_while_the_queue_is_full(address, service):
    service.device.max_waiting, before = 0, service.device.max_waiting
    seen = []

    def note(response) -> None:
        seen.append(response.status_code)
        service.device.max_waiting = before  # room again

    http = openai.DefaultHttpxClient(event_hooks={"response": [note]})
    patient = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=5, timeout=120, http_client=http)
    try:
        assert patient.completions.create(model="tiny", prompt="x").choices[0].finish_reason
    finally:
        service.device.max_waiting = before
    assert seen == [429, 200]


def test_deadline_ends_a_request(client, http_client, service):
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, "sun", extra_body={"timeout": 1e-6})
    assert caught.value.status_code == 504
    found = http_client.post("/v1/completions", json={"prompt": "x", "timeout": 1e-6, "stream": True})
    lines = [line for line in found.text.splitlines() if line]
    assert "error" in json.loads(lines[-2].removeprefix("data: ")) and lines[-1] == "data: [DONE]"
    wait_until_idle(service)


def test_deadline_is_one_of_scores_too(http_client, service):
    body = {"prompt": "x", "echo": True, "max_tokens": 0, "logprobs": 1}
    assert http_client.post("/v1/completions", json=body | {"timeout": 1e-6}).status_code == 504
    assert http_client.post("/v1/completions", json=body).status_code == 200
    wait_until_idle(service)


def test_upgrades_that_clients_offer_are_ignored(address, client):
    """As curl --http2 and Java's client offer them, with every request of a connection."""
    place = urllib.parse.urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    expected = client.completions.create(model="tiny", prompt="sun").choices[0].text
    headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    for extra in ("", " " * 100_000):  # a body that comes in pieces
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "sun"}) + extra, headers)
        response = connection.getresponse()
        found = json.loads(response.read())
        assert response.status == 200 and found["choices"][0]["text"] == expected
    connection.close()


def post_and_hang_up(address: str, path: str, body: dict, read: int = 0) -> None:
    """Sends a request and goes away, after so many bytes of the answer."""
    place = urllib.parse.urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    if read:
        connection.getresponse().read(read)
    connection.close()


def test_clients_that_go_away_free_their_rows(address, service):
    body = {"prompt": ["x" * 50] * 8, "n": 8, "max_tokens": 16, "method": "autoregressive"}
    post_and_hang_up(address, "/v1/completions", body)
    post_and_hang_up(address, "/v1/completions", body | {"stream": True}, read=10)
    wait_until_idle(service)
    assert not any(lane.rows or lane.waiting for lane in service.device.lanes.values())


def test_who_does_not_read_or_never_finishes_asking_holds_no_row(address, service, client):
    place = urllib.parse.urlsplit(address)
    body = json.dumps({"prompt": ["x" * 50] * 4, "n": 8, "max_tokens": 16, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    silent, half = (socket.create_connection((place.hostname, place.port), timeout=60) for _ in range(2))
    silent.sendall(head + body)  # and reads nothing
    half.sendall(head + body[:20])  # and sends no more
    end = time.monotonic() + 60
    while not service.device.open:  # the first has come
        assert time.monotonic() < end
        time.sleep(0.001)
    while service.device.open:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert ask(client, "sun").choices[0].message.content
    for connection in (silent, half):
        connection.close()
    wait_until_idle(service)


def test_waiting_requests_whose_time_is_over_are_told_at_once(service, http_client):
    body = {"prompt": ["x"] * 40, "n": 4, "max_tokens": 16, "method": "autoregressive"}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        long = pool.submit(http_client.post, "/v1/completions", json=body)
        while not service.device.open:
            time.sleep(0.001)
        late = http_client.post("/v1/completions", json={"prompt": "x", "method": "autoregressive", "timeout": 1e-3})
        assert late.status_code == 504
        assert len(long.result().json()["choices"]) == 160
    wait_until_idle(service)


def test_engine_that_fails_costs_its_requests_and_no_more(client, service, monkeypatch):
    expected = ask(client, "sun").choices[0].message.content
    engine = service.device.lanes["plan_and_infill"].engine
    monkeypatch.setattr(engine, "collect", lambda *_, **__: 1 / 0)
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, "sun")
    assert caught.value.status_code == 500
    assert ask(client, "sun").choices[0].message.content == expected


# --- Bad bodies.


def mutated(rng: random.Random, body: dict) -> bytes:
    """A body with something wrong in it, or perhaps not."""
    junk = [
        None,
        True,
        -1,
        0,
        1,
        3.5,
        1e400,
        -(10**30),
        "",
        "x",
        "\x00",
        "\ud800",
        [],
        [[]],
        {},
        {"a": 1},
        [None],
        ["", 3],
    ]
    body = dict(body)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*body, *FIELDS])
        body[name] = rng.choice(junk) if rng.random() < 0.8 else [rng.choice(junk) for _ in range(rng.randint(0, 4))]
    text = json.dumps(body).encode("utf-8", errors="surrogatepass")
    match rng.randrange(8):
        case 0:
            at = rng.randrange(len(text))
            return text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
        case 1:
            return text[: rng.randrange(len(text))]
        case 2:
            return b"[" * rng.randint(1, 20000) + text
    return text


FIELDS = (
    *(
        "model",
        "prompt",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "n",
        "seed",
    ),
    *("stop", "stop_token_ids", "logprobs", "top_logprobs", "echo", "stream", "stream_options", "best_of", "suffix"),
    *("method", "slot_threshold", "token_threshold", "slot_size", "gen_length", "diffusing", "timeout", "logit_bias"),
    *("response_format", "tools", "tool_choice", "frequency_penalty", "min_p", "tokens", "user", "blocks", "window"),
)


def test_ten_thousand_bad_bodies_get_clear_answers(service):
    """Straight into the application; what they ask for is at most two tokens, or refused."""
    app, rng = service.application(), random.Random(0)
    bodies = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "sun"}], "max_tokens": 2},
        "/v1/completions": {"prompt": "sun", "max_tokens": 2},
        "/tokenize": {"prompt": "sun"},
        "/detokenize": {"tokens": [1, 2]},
    }

    async def post(path: str, body: bytes) -> tuple[int, bytes]:
        sent, told = [], asyncio.Event()

        async def receive():
            if not told.is_set():
                told.set()
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [],
            "query_string": b"",
            "http_version": "1.1",
        }
        await app(scope, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])

    async def all_of_them():
        statuses = collections.Counter()
        for _ in range(200):
            batch = [(path, mutated(rng, bodies[path])) for path in rng.choices(list(bodies), k=50)]
            for (path, body), (status, answer) in zip(batch, await asyncio.gather(*(post(*pair) for pair in batch))):
                statuses[status] += 1
                assert status in (200, 400, 404, 429, 504), (status, body[:300], answer)
                if status != 200:
                    error = json.loads(answer)["error"]
                    assert error["message"] and error["code"] == str(status)
        return statuses

    statuses = asyncio.run(all_of_them())
    assert statuses[400] > 5000 and statuses[200] > 100
    assert service.device.is_alive()
    wait_until_idle(service)


def test_large_bodies_are_refused_and_the_server_goes_on(client, http_client):
    found = http_client.post("/v1/completions", content=b'{"prompt": "' + b"x" * (100 << 20) + b'"}')
    assert found.status_code == 413 and "larger" in found.json()["error"]["message"]
    assert ask(client, "sun").choices[0].message.content


def test_prompts_of_every_length_around_the_limits(client):
    for tokens in range(170, 180):
        create = lambda n=tokens: client.completions.create(model="tiny", prompt="x" * n, max_tokens=16)
        if tokens + 16 <= 192:
            assert create().usage.prompt_tokens == tokens
        else:
            with pytest.raises(openai.BadRequestError, match="Shorten the prompt"):
                create()
    for answer in range(1, 8):  # whole slots of 4
        create = lambda n=answer: client.completions.create(model="tiny", prompt="x" * 188, max_tokens=n)
        if answer <= 4:
            assert create().usage.prompt_tokens == 188
        else:
            with pytest.raises(openai.BadRequestError):
                create()


# --- The process.


def test_sigterm_under_load_finishes_what_runs(compiled_once, repository, tmp_path):
    served.write_checkpoint(tmp_path, repository)
    command = [
        sys.executable,
        "-m",
        "refusion_jax.serve",
        "--checkpoint",
        str(tmp_path),
        *served.FLAGS,
    ]
    environ = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": compiled_once,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with open(tmp_path / "log", "wb") as log:  # a pipe that nobody reads could fill up
        process = subprocess.Popen(command, cwd=repository, env=environ, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        base = process.stdout.readline().split()[0]
        body = {"prompt": ["x" * 20] * 8, "n": 16, "max_tokens": 16, "method": "autoregressive"}
        with httpx.Client(base_url=base, timeout=120) as client, concurrent.futures.ThreadPoolExecutor(2) as pool:
            end = time.monotonic() + 300
            while client.get("/health").status_code != 200:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.2)
            ask_twice = lambda: [pool.submit(client.post, "/v1/completions", json=body) for _ in range(2)]
            load = ask_twice()
            while not sample_values(client.get("/metrics").text)['vllm:num_requests_running{model_name="tiny"}']:
                assert time.monotonic() < end
                if all(one.done() for one in load):  # too quick to be seen
                    load = ask_twice()
            process.send_signal(signal.SIGTERM)
            while client.get("/health").status_code == 200:  # until the signal has come
                assert process.poll() is None
            refused = client.post("/v1/completions", json={"prompt": "x"})
            assert refused.status_code == 503 and "retry-after" in refused.headers
            answers = [one.result() for one in load]
            running = [answer for answer in answers if answer.status_code != 503]  # the other may have come after it
            assert running and all(len(answer.json()["choices"]) == 128 for answer in running)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--host", "0.0.0.0"], "no key is asked for"),
        (["--api-key-file", "/nowhere/keys"], "Cannot read --api-key-file"),
        (["--port", "99999"], "--port is 99999"),
        (["--host", "192.0.2.1", "--no-key"], "Cannot listen"),
        (["--host", "x" * 70 + ".com", "--no-key"], "Cannot listen"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--timeout", "-1"], "--timeout is -1"),
    ],
)
def test_bad_start_ups_are_named_before_the_model_is_loaded(flags, message):
    with pytest.raises(UserError, match=message):
        serve.main(["--checkpoint", "/nowhere", "--port", "0", *flags])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--max-length", "16"], "--max-length is 16"),
        (["--max-length", "4096"], "at most the model's 256"),
        (["--batch-size", "100000000"], "GiB more than are free"),
        (["--also", "guess"], "the method 'guess'"),
        (["--also", "masked"], "cannot be decoded with the method masked"),
        (["--method", "block"], "decode it with plan_and_infill"),
    ],
)
def test_settings_that_do_not_suit_the_model_are_named(decoder, flags, message):
    with pytest.raises(UserError, match=message):
        serve.service_of(decoder, serve.arguments_of(["--checkpoint", "x", *served.FLAGS, *flags]))


def test_mesh_that_does_not_divide_is_named(tmp_path, repository):
    served.write_checkpoint(tmp_path, repository)
    with pytest.raises(UserError, match="tensor = 3 does not divide model.num_heads"):
        serve.main(["--checkpoint", str(tmp_path), *served.FLAGS, "--mesh", "1,1,3"])


def test_port_in_use_is_named():
    taken = serve.listen("127.0.0.1", 0)
    taken.listen()
    with pytest.raises(UserError, match="Choose another --port"):
        serve.listen("127.0.0.1", taken.getsockname()[1])
