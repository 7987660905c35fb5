"""Checkpoints of every kind are served: each request chooses among their methods' settings, and nothing is compiled."""

import dataclasses

import httpx2 as httpx
import jax
import micro
import pytest
import served
from flax import linen as nn

from refusion_jax import serve
from refusion_jax.config import from_config_dict
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.decoder import Decoder
from refusion_jax.infilling import Hole, Template, filled, request
from refusion_jax.model.qwen3 import init_params
from refusion_jax.objective.block import Block
from refusion_jax.objective.masked import Masked
from refusion_jax.objective.refusion import Refusion
from refusion_jax.parallel.mesh import make_mesh
from refusion_jax.sampling import Prompt
from refusion_jax.sampling.programs import decode_params
from refusion_jax.serving import metrics

QUERIES = ["sun", "où", "a longer question"]


@pytest.mark.parametrize(
    "objective, flags, own",
    [
        (Masked(), ["--select", "threshold"], {"threshold": 0.2}),
        (Block(block_size=4), [], {"threshold": 0.2, "max_tokens": 3}),
        (Refusion(causal_share=0.5), ["--method", "speculative"], {"stop_token_ids": [7], "max_tokens": 5}),
    ],
    ids=["masked", "block", "speculative"],
)
def test_answers_are_those_of_the_prompt_alone(objective, flags, own):
    model = dataclasses.replace(from_config_dict(micro.get_config()).model, max_position_embeddings=64)
    params = nn.unbox(init_params(model, jax.random.key(3)))
    params["embed"]["embedding"] *= 60  # sure of what it says
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    decoder = Decoder(decode_params(params, mesh), model, load_tokenizer("bytes"), mesh, objective)
    flags = [*flags, "--gen-length", "8", "--batch-size", "4", "--max-length", "64", "--name", "tiny"]
    service = served.ready(decoder, flags)
    (config,) = service.offer.methods.values()
    engine = serve.make_engine(decoder, config, 4, 64, 0)

    def alone(prompt: Prompt):
        engine.add(prompt)
        (answer,) = engine.step(1000)
        return answer

    def expected(query: str, **given) -> str:
        limit, stops = given.pop("max_tokens", 8), given.pop("stop_token_ids", ())
        settings = dataclasses.replace(config, **given)
        ids = decoder.tokenizer.encode(query)
        return decoder.tokenizer.decode(alone(Prompt(ids, settings, limit=limit, stop_ids=tuple(stops))).tokens)

    asked = {str(given): (given, [expected(query, **given) for query in QUERIES]) for given in ({"max_tokens": 8}, own)}
    template = Template(["def f(", Hole(6), "):"])
    hole = config.method == "masked" and alone(request(template, decoder.tokenizer, decoder.model, config))
    compiled = metrics.compilations()
    with served.over_http(service) as address:
        ask = lambda **body: httpx.post(f"{address}/v1/completions", json=body, timeout=60).json()
        for given, answers in asked.values():
            found = ask(prompt=QUERIES, method=config.method, **given)
            assert [choice["text"] for choice in found["choices"]] == answers
        for query, text in zip(QUERIES, asked[str({"max_tokens": 8})][1]):
            stop = next(filter(str.isascii, text), "never to be seen")
            assert ask(prompt=query, max_tokens=8, stop=stop)["choices"][0]["text"] == text.split(stop)[0]
        if hole:
            found = ask(prompt="def f(", suffix="):", max_tokens=6)["choices"][0]["text"]
            assert found == filled(template, decoder.tokenizer, hole).holes[0]
        room = 64 - config.up_to(1)  # for a prompt, two tokens of which are the conversation's
        for length in range(room - 9, room + 2):
            body = {"messages": [{"role": "user", "content": "x" * (length - 2)}]}
            found = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
            assert ("choices" in found) == (length <= room), (length, found)
        assert "offers" in ask(prompt="x", method="plan_and_infill")["error"]["message"]
    assert metrics.compilations() == compiled
