"""The server, as the clients that people have see it."""

import dataclasses
import json
import re
import time

import openai
import pytest
from served import QUERIES, SETTINGS, ask, sample_values, wait_until_idle

from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.infilling import Hole, Template
from refusion_jax.sampling import AutoregressiveConfig, Generation, generate
from refusion_jax.serving import metrics, protocol, responses

pytest_plugins = ["served"]


@pytest.mark.parametrize("method", ["plan_and_infill", "autoregressive"])
def test_chat_gives_what_generate_does(client, decoder, answers, method):
    for query in QUERIES:
        expected = answers[method, query]
        found = ask(client, query, extra_body={"method": method})
        choice = found.choices[0]
        assert choice.message.content == decoder.tokenizer.decode(expected.tokens)
        assert choice.message.role == "assistant"
        assert choice.finish_reason == ("stop" if expected.tokens[-1] == decoder.model.eos_token_id else "length")
        assert found.usage.completion_tokens == len(expected.tokens)
        assert found.usage.prompt_tokens == len(decoder.tokenizer.encode_prompt(query))
        assert found.usage.refusion["forwards"] == expected.forwards
        assert found.usage.refusion["rounds"] == max(expected.rounds) + 1


def test_completions_take_texts_ids_and_batches(client, decoder, answers):
    ids = [decoder.tokenizer.encode_prompt(query) for query in QUERIES]
    expected = [decoder.tokenizer.decode(answers["plan_and_infill", query].tokens) for query in QUERIES]
    together = client.completions.create(model="tiny", prompt=ids, max_tokens=16)
    assert [choice.text for choice in together.choices] == expected
    assert [choice.index for choice in together.choices] == list(range(len(QUERIES)))
    assert client.completions.create(model="tiny", prompt=ids[1], max_tokens=16).choices[0].text == expected[1]
    text = client.completions.create(model="tiny", prompt="plain text", max_tokens=16).choices[0].text
    same = client.completions.create(model="tiny", prompt=list(b"plain text"), max_tokens=16).choices[0].text
    assert text == same
    assert len(client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=4).choices) == 2


def test_max_tokens_is_a_limit_and_names_the_reason(client):
    found = ask(client, "sun", max_tokens=3)
    assert found.usage.completion_tokens <= 3
    assert found.choices[0].finish_reason == "length"
    assert ask(client, "sun", max_completion_tokens=3).choices[0].message.content == found.choices[0].message.content


def test_chat_that_names_no_limit_may_fill_what_room_there_is(client):
    for length in range(170, 187):  # two tokens more are a prompt; slots have 4
        found = ask(client, "x" * length).usage
        assert found.prompt_tokens == length + 2 and 1 <= found.completion_tokens <= 192 - found.prompt_tokens


def test_models_and_other_pages_of_information(client, http_client):
    (model,) = client.models.list().data
    assert (model.id, model.max_model_len) == ("tiny", 192)
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    assert http_client.get("/health").status_code == http_client.get("/ping").status_code == 200
    assert "version" in http_client.get("/version").json()
    assert http_client.get("/server_info").json()["methods"].keys() == {"plan_and_infill", "autoregressive"}


def test_seeds_reproduce_and_rows_of_n_have_their_own(client):
    sampled = dict(temperature=1.5, seed=7, extra_body={"method": "autoregressive"})
    texts = lambda **more: [choice.message.content for choice in ask(client, "sun", **sampled | more).choices]
    three = texts(n=3)
    assert texts(n=3) == three and len(set(three)) == 3
    assert texts(seed=8) == three[1:2]  # row i has seed + i


def chunks_of(client, query, **more):
    return list(ask(client, query, stream=True, **more))


@pytest.mark.parametrize("method", ["plan_and_infill", "autoregressive"])
def test_stream_is_the_answer_in_pieces(client, answers, method):
    for query in QUERIES:
        whole = ask(client, query, extra_body={"method": method}).choices[0]
        chunks = chunks_of(client, query, extra_body={"method": method}, stream_options={"include_usage": True})
        *chunks, last = chunks
        assert last.choices == [] and last.usage.completion_tokens == len(answers[method, query].tokens)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.message.content
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].choices[0].finish_reason == whole.finish_reason


def test_slots_of_a_stream_are_the_order_of_commitment(client, answers):
    for query in QUERIES:
        expected = answers["plan_and_infill", query]
        chunks = chunks_of(client, query, stream_options={"slots": True})
        slots = [slot for chunk in chunks[1:] for slot in chunk.refusion["slots"]]
        found = {at: (token, slot["round"]) for slot in slots for at, token in zip(slot["positions"], slot["tokens"])}
        assert found == dict(zip(expected.order, zip(expected.committed, expected.rounds)))
        assert all(at // 4 == slot["index"] for slot in slots for at in slot["positions"])
        assert "".join(text for slot in slots for text in slot["texts"])


@pytest.mark.parametrize("more", [{}, {"logprobs": True}, {"max_tokens": 3}], ids=str)
def test_diffusing_stream_replaces_and_ends_with_the_answer(client, more):
    for query in QUERIES:
        chunks = chunks_of(client, query, extra_body={"diffusing": True}, **more)
        whole = ask(client, query, **more).choices[0].message.content
        assert chunks[-1].choices[0].delta.content == whole
        nothing = chunks_of(client, query, extra_body={"diffusing": True}, **more | {"stop": whole[0]})
        assert nothing[-1].choices[0].delta.content == ""


@pytest.mark.parametrize("more", [{}, {"logprobs": 1}, {"logprobs": 1, "max_tokens": 0}], ids=str)
def test_diffusing_stream_keeps_the_prompt_that_it_echoes(client, more):
    body = dict(model="tiny", prompt=["some context", "où"], echo=True) | more
    found = {}
    for chunk in client.completions.create(stream=True, extra_body={"diffusing": True}, **body):
        (choice,) = chunk.choices
        assert choice.text.startswith(body["prompt"][choice.index])
        found[choice.index] = choice.text
    assert found == {choice.index: choice.text for choice in client.completions.create(**body).choices}


def test_stop_strings_cut_the_answer_and_nothing_of_them_is_shown(client, answers, decoder):
    tried = 0
    for query in QUERIES:
        text = decoder.tokenizer.decode(answers["plan_and_infill", query].tokens)
        at = next((i for i in range(1, len(text) - 2) if "\ufffd" not in text[i : i + 2]), None)
        if at is None:
            continue
        tried += 1
        stop = text[at : at + 2]
        expected = text[: text.index(stop)]
        found = ask(client, query, stop=stop).choices[0]
        assert (found.message.content, found.finish_reason) == (expected, "stop")
        chunks = chunks_of(client, query, stop=["never to be seen", stop])
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
    assert tried >= 2


@pytest.mark.parametrize("method", ["plan_and_infill", "autoregressive"])
def test_usage_and_logprobs_end_with_the_token_that_completes_a_stop_string(client, answers, decoder, method):
    tried = 0
    for query in QUERIES:
        tokens = answers[method, query].tokens
        texts = [decoder.tokenizer.decode(tokens[:count]) for count in range(len(tokens) + 1)]
        stop = next((letter for letter in texts[-1] if letter.isascii()), None)
        if stop is None:
            continue
        tried += 1
        count = next(count for count, text in enumerate(texts) if stop in text)
        found = ask(client, query, stop=stop, logprobs=True, extra_body={"method": method})
        assert found.usage.completion_tokens == len(found.choices[0].logprobs.content) == count
    assert tried >= 2


@pytest.mark.parametrize("step", [1, 2, 3, 9])
def test_stop_strings_end_an_answer_at_the_same_place_however_much_comes_at_once(step):
    tokenizer, config = load_tokenizer("bytes"), AutoregressiveConfig(gen_length=9)
    request = protocol.Request([[1]], config, 9, stops=("abcdef", "bc", "efg"))
    writing = responses.Writing(tokenizer, request, tokenizer.eos_id, 0)
    whole = Generation(0, list(b"xabcdefgh"), list(range(9)), list(b"xabcdefgh"), list(range(9)), 9, 9, True)
    for count in range(step, 10, step):
        if not writing.finish:
            writing.update(dataclasses.replace(responses.cut(whole, count), finished=count == 9))
    assert (writing.text, writing.finish) == ("xa", "stop")
    found = responses.usage(request, [writing])
    assert (found["completion_tokens"], found["refusion"]["rounds"]) == (4, 4)


def test_stop_ids_and_thresholds_are_each_requests_own(client, decoder, answers):
    first = answers["autoregressive", "sun"].tokens
    extra = {"method": "autoregressive", "stop_token_ids": [first[2]]}
    found = ask(client, "sun", extra_body=extra)
    assert found.usage.completion_tokens == first.index(first[2]) + 1 and found.choices[0].finish_reason == "stop"
    config = decoder.settings(**SETTINGS | {"slot_threshold": 0.0, "token_threshold": 0.9})
    ids = decoder.tokenizer.encode_prompts(["sun"])
    expected = generate(decoder.params, decoder.model, config, ids, max_prompt_length=176)[0]
    found = ask(client, "sun", extra_body={"slot_threshold": 0.0, "token_threshold": 0.9})
    assert found.usage.refusion["forwards"] == expected.forwards
    assert found.choices[0].message.content == decoder.tokenizer.decode(expected.tokens)


def test_unknown_null_and_neutral_fields_are_ignored(client, http_client):
    plain = ask(client, "sun").choices[0].message.content
    parts = [{"type": "text", "text": "s"}, {"type": "text", "text": "un"}]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": parts, "name": "me"}],
        **{name: None for name in ("temperature", "top_p", "stop", "seed", "n", "tools", "logit_bias", "max_tokens")},
        "presence_penalty": 0.0,
        "ignore_eos": False,
        "user": "me",
        "metadata": {"a": [1]},
        "top_k": -1,
        "repetition_penalty": 1.0,
        "response_format": {"type": "text"},
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "auto",
        "chat_template_kwargs": {},
    }
    assert http_client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == plain


def test_suffix_makes_the_answer_a_hole(client, decoder):
    config = decoder.settings(**SETTINGS)
    for prompt, size in (("def add(a, b):", 8), ("où", 16)):
        (expected,) = decoder.fill([Template([prompt, Hole(size), "print(add(1, 2))"])], config)
        found = client.completions.create(model="tiny", prompt=prompt, suffix="print(add(1, 2))", max_tokens=size - 1)
        assert found.choices[0].text == expected.holes[0]
        assert found.usage.prompt_tokens == len(prompt.encode()) + len("print(add(1, 2))") + 1
    with pytest.raises(openai.BadRequestError, match="holes") as caught:
        client.completions.create(model="tiny", prompt="a", suffix="b", extra_body={"method": "autoregressive"})
    assert caught.value.param == "suffix"


# --- What is compiled, counted and logged.


def test_nothing_is_compiled_after_the_warm_up(service, client, http_client):
    before = metrics.compilations()
    for query in ("x", "y" * 60, "z" * 100):
        for method in service.offer.methods:
            ask(client, query, max_tokens=4, extra_body={"method": method})
            ask(client, query, max_tokens=4, temperature=1, top_p=0.5, n=3, extra_body={"method": method})
        for echo in (True, False):
            body = {"prompt": query, "echo": echo, "logprobs": 1, "max_tokens": 1}
            assert http_client.post("/v1/completions", json=body).status_code == 200
    assert metrics.compilations() == before
    assert http_client.get("/server_info").json()["compilations_since_warm_up"] >= 0


def test_metrics_count_what_was_answered(client, http_client, service):
    wait_until_idle(service)
    before = sample_values(http_client.get("/metrics").text)
    found = ask(client, "sun")
    wait_until_idle(service)
    after = sample_values(http_client.get("/metrics").text)
    label = '{model_name="tiny"}'
    gained = lambda name: after[name + label] - before[name + label]
    assert gained("vllm:prompt_tokens_total") == found.usage.prompt_tokens
    assert gained("vllm:generation_tokens_total") == found.usage.completion_tokens
    assert gained("vllm:diffusion_num_denoising_steps_total") == found.usage.refusion["forwards"]
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert gained(f"vllm:{name}_count") == 1
    assert after["vllm:num_requests_running" + label] == after["vllm:num_requests_waiting" + label] == 0
    assert sum(value for name, value in after.items() if name.startswith("vllm:request_success_total")) >= 1


def test_prompts_that_begin_alike_are_forwarded_once(http_client, service):
    counts = lambda: [
        sample_values(http_client.get("/metrics").text)[f'vllm:prefix_cache_{name}_total{{model_name="tiny"}}']
        for name in ("queries", "hits")
    ]

    def answers():
        """To two prompts that share 128 tokens; and what was looked for and found meanwhile."""
        before = counts()
        bodies = [{"prompt": "begin alike " * 11 + end, "max_tokens": 8} for end in ("one", "another")]
        found = [http_client.post("/v1/completions", json=body).json()["choices"][0]["text"] for body in bodies]
        wait_until_idle(service)
        return found, [now - then for now, then in zip(counts(), before)]

    http_client.post("/flush_cache")
    first, (asked, hits) = answers()
    assert (asked, hits) == (2 * 132 + len("one") + len("another") - 2, 128)
    second, (_, hits) = answers()
    assert second == first and hits == 256
    http_client.post("/flush_cache")
    third, (_, hits) = answers()
    assert third == first and hits == 128


@pytest.mark.parametrize("identity", ["\xe9", "a b", "x" * 65])
def test_ids_of_requests_that_are_no_words_are_replaced(http_client, identity):
    found = http_client.get("/health", headers={"X-Request-Id": identity.encode("latin-1")}).headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{32}", found)


def test_log_has_a_line_per_request_and_no_text_of_it(client, caplog):
    with caplog.at_level("INFO", logger="refusion_jax.serving"):
        response = ask(client, "a secret", extra_headers={"X-Request-Id": "mine-1"})
        time.sleep(0.2)
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "refusion_jax.serving"]
    (line,) = [line for line in lines if line["request"] == "mine-1"]
    assert line["status"] == 200 and line["completion_tokens"] == response.usage.completion_tokens
    assert "secret" not in json.dumps(line)
