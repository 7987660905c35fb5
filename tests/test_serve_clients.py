"""What other clients send, likelihoods and lm-eval among it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from served import QUERIES, ask

from refusion_jax.model.attention import Packed
from refusion_jax.model.head import over_vocabulary
from refusion_jax.model.qwen3 import Qwen3

pytest_plugins = ["served"]


# --- What other clients send, as their sources have it.


@pytest.mark.parametrize(
    "path, body",
    [
        # vllm bench serve
        (
            "/v1/completions",
            {
                "prompt": "x",
                "temperature": 0.0,
                "repetition_penalty": 1.0,
                "max_tokens": 8,
                "logprobs": None,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": False,
            },
        ),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
                "stream": True,
                "max_completion_tokens": 8,
                "stream_options": {"include_usage": True},
            },
        ),
        # sglang.bench_serving
        (
            "/v1/completions",
            {
                "prompt": "x",
                "temperature": 0.0,
                "best_of": 1,
                "max_tokens": 8,
                "stream": True,
                "ignore_eos": True,
            },
        ),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "x"}],
                "temperature": 0.0,
                "max_tokens": 8,
                "stream": True,
                "ignore_eos": True,
            },
        ),
        # langchain-openai
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "x"}],
                "stream": True,
                "temperature": 0.7,
                "n": 1,
                "stream_options": {"include_usage": True},
            },
        ),
        # Open WebUI
        (
            "/v1/chat/completions",
            {
                "stream": True,
                "messages": [{"role": "user", "content": "x"}],
                "max_tokens": 8,
                "user": {},
                "metadata": None,
                "params": {},
                "features": {},
                "session_id": "s",
                "chat_id": "c",
                "stream_options": {"include_usage": True},
            },
        ),
    ],
)
def test_bodies_of_other_clients(http_client, path, body):
    """Every line is JSON or the end, as their parsers demand; the usage comes, if asked for, last and alone."""
    found = http_client.post(path, json={"model": "tiny"} | body)
    assert found.headers["content-type"].startswith("text/event-stream") and found.headers["x-accel-buffering"] == "no"
    lines = [line for line in found.text.splitlines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines.pop() == "data: [DONE]"
    chunks = [json.loads(line[6:]) for line in lines]
    if "stream_options" in body:
        last = chunks.pop()
        assert last["choices"] == [] and last["usage"]["total_tokens"] > last["usage"]["completion_tokens"] > 0
    assert all("usage" not in chunk and "error" not in chunk and len(chunk["choices"]) == 1 for chunk in chunks)


def test_langchain(address, decoder, answers):
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(base_url=f"{address}/v1", api_key="none", model="tiny", max_retries=0)
    expected = [decoder.tokenizer.decode(answers["plan_and_infill", query].tokens) for query in QUERIES]
    assert [answer.content for answer in model.batch(QUERIES)] == expected
    assert "".join(chunk.content for chunk in model.stream(QUERIES[0])) == expected[0]
    answer = model.bind(logprobs=True).invoke(QUERIES[0])
    assert answer.usage_metadata["output_tokens"] == len(answer.response_metadata["logprobs"]["content"])


# --- Likelihood, tokens.


def left_to_right(decoder, ids) -> np.ndarray:
    """[n - 1] log-probabilities of the ids of a text after the first."""
    tokens = jnp.asarray(ids)[None]
    positions = jnp.arange(len(ids))[None]
    model = dataclasses.replace(decoder.model, scan_layers=False)
    hidden, _ = Qwen3(model).apply({"params": decoder.params}, tokens, positions, Packed(jnp.ones_like(tokens)))
    logits = over_vocabulary(model, decoder.params, hidden, lambda logits: logits)
    return np.asarray(jax.nn.log_softmax(logits)[0, jnp.arange(len(ids) - 1), jnp.asarray(ids[1:])])


def test_echo_gives_the_likelihood_of_prompts(client, decoder):
    """The form in which lm-eval asks for it: a batch of ids, one token more, which it drops."""
    prompts = [list(b"some context and its end"), list(b"short")]
    found = client.completions.create(model="tiny", prompt=prompts, max_tokens=1, logprobs=1, echo=True, temperature=0)
    for prompt, choice in zip(prompts, found.choices):
        given = choice.logprobs.token_logprobs
        assert len(given) == len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs) == len(prompt) + 1
        assert given[0] is None and choice.logprobs.top_logprobs[0] is None
        np.testing.assert_allclose(given[1:-1], left_to_right(decoder, prompt), rtol=1e-4, atol=1e-4)
        assert choice.text.startswith(bytes(prompt).decode())
        for logprob, top in zip(given[1:], choice.logprobs.top_logprobs[1:]):
            assert max(top.values()) >= logprob
    only = client.completions.create(model="tiny", prompt=prompts[0], max_tokens=0, logprobs=0, echo=True).choices[0]
    assert only.logprobs.token_logprobs == found.choices[0].logprobs.token_logprobs[:-1]


def test_a_prompt_alone_may_take_all_the_room(client):
    body = dict(model="tiny", prompt="a" * 192, max_tokens=0, echo=True)
    (choice,) = client.completions.create(logprobs=0, **body).choices
    assert choice.text == body["prompt"] and len(choice.logprobs.tokens) == 192
    with pytest.raises(openai.BadRequestError, match="takes 193 of this server's 192"):
        client.completions.create(**body | {"prompt": "a" * 193})


def test_logprobs_of_an_answer(client, decoder, answers):
    expected = answers["autoregressive", "sun"]
    found = ask(client, "sun", logprobs=True, top_logprobs=1, extra_body={"method": "autoregressive"})
    content = found.choices[0].logprobs.content
    assert len(content) == len(expected.tokens)
    ids = [*decoder.tokenizer.encode_prompt("sun"), *expected.tokens]
    scores = left_to_right(decoder, ids)[-len(content) :]
    np.testing.assert_allclose([entry.logprob for entry in content], scores, rtol=1e-4, atol=1e-4)
    # Greedy decoding from left to right takes the most probable token each time.
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in content)


def test_logprobs_of_a_stream_come_with_its_end(client):
    asked = dict(logprobs=True, top_logprobs=1)
    whole = ask(client, "sun", **asked).choices[0]
    chunks = [chunk.choices[0] for chunk in ask(client, "sun", stream=True, **asked)]
    assert "".join(choice.delta.content or "" for choice in chunks) == whole.message.content
    assert [
        entry for choice in chunks if choice.logprobs for entry in choice.logprobs.content
    ] == whole.logprobs.content
    assert [choice.finish_reason for choice in chunks] == [None] * (len(chunks) - 1) + [whole.finish_reason]
    for limit in (0, 4):
        body = dict(model="tiny", prompt=["some context", "où"], max_tokens=limit, echo=True, logprobs=1)
        expected, found = client.completions.create(**body).choices, ["", ""]
        for chunk in client.completions.create(stream=True, **body):
            (choice,) = chunk.choices
            found[choice.index] += choice.text
            if choice.finish_reason:
                same = expected[choice.index]
                assert (choice.finish_reason, choice.logprobs) == (same.finish_reason, same.logprobs)
        assert found == [choice.text for choice in expected]


def test_tokens_there_and_back(http_client, decoder):
    """Names of special tokens are meant, as in what a client has rendered."""
    text = "<|user|>où<|assistant|>"
    found = http_client.post("/tokenize", json={"prompt": text}).json()
    assert found["tokens"] == decoder.tokenizer.encode_prompt("où") and found["count"] == len(found["tokens"])
    assert http_client.post("/detokenize", json={"tokens": found["tokens"]}).json()["prompt"] == text
    messages = [{"role": "user", "content": "où"}]
    assert http_client.post("/tokenize", json={"messages": messages}).json()["tokens"] == found["tokens"]
    assert http_client.get("/tokenizer_info").json()["eos_token"] == "<|end|>"
    assert http_client.post("/flush_cache").status_code == 200


def test_special_tokens_in_prompts_are_text(client, decoder):
    found = client.completions.create(model="tiny", prompt="<|mask|><|end|>", max_tokens=4)
    assert found.usage.prompt_tokens == len("<|mask|><|end|>")


# --- lm-eval's own clients.


def test_lm_eval_gets_likelihoods_and_answers(address, decoder, answers):
    lm_eval = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    completions = lm_eval.LocalCompletionsAPI(
        base_url=f"{address}/v1/completions", model="tiny", max_length=192, batch_size=2, num_concurrent=2
    )
    assert completions.tokenizer_backend == "remote"  # this server's
    instance = lambda kind, *arguments: Instance(kind, {}, arguments, 0)
    pairs = [("some context", " and its end"), ("short", " one"), ("x", "y")]
    found = completions.loglikelihood([instance("loglikelihood", *pair) for pair in pairs])
    for (context, continuation), (logprob, greedy) in zip(pairs, found):
        scores = left_to_right(decoder, list((context + continuation).encode()))[-len(continuation) :]
        assert logprob == pytest.approx(scores.sum(), rel=1e-4, abs=1e-3) and isinstance(greedy, bool)
    chat = lm_eval.LocalChatCompletion(base_url=f"{address}/v1/chat/completions", model="tiny", num_concurrent=1)
    queries = QUERIES[:3]
    messages = [json.dumps([{"role": "user", "content": query}]) for query in queries]
    options = {"until": ["never to be seen"], "max_gen_toks": 16, "do_sample": False}
    prompts = [instance("generate_until", lm_eval_prompt(message), dict(options)) for message in messages]
    expected = [decoder.tokenizer.decode(answers["plan_and_infill", query].tokens) for query in queries]
    assert chat.generate_until(prompts) == expected
    plain = completions.generate_until([instance("generate_until", "<|user|>sun<|assistant|>", dict(options))])
    assert plain == expected[:1]


def lm_eval_prompt(messages: str):
    from lm_eval.models.api_models import JsonChatStr

    return JsonChatStr(messages)
