"""The HTTP side: routes and their answers."""

import asyncio
import dataclasses
import importlib.metadata
import pathlib
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from refusion_jax.serving import around, protocol, responses
from refusion_jax.serving import metrics as metrics_lib
from refusion_jax.serving.around import RETRY_AFTER, Around, read_body, while_connected
from refusion_jax.serving.device import READY, Device
from refusion_jax.serving.exchange import Exchange
from refusion_jax.serving.protocol import BadRequest, Offer, Request

LONG = 4096  # bytes of a body that a tokenizer may take so long over that others should not wait for it
PAGE = pathlib.Path(__file__).parent / "page"


@dataclasses.dataclass
class Service:
    """What the routes share.

    Attributes:
      keys: of which a client needs one; none: it needs none.
      timeout: seconds until a request is given up.
      log_prompts: whether the log shows what was asked and answered.
      draining: no new requests are taken.
      active: requests under /v1 that are not answered yet.
    """

    offer: Offer
    device: Device
    metrics: metrics_lib.Metrics
    keys: Sequence[str] = ()
    timeout: float = 600.0
    log_prompts: bool = False
    draining: bool = dataclasses.field(default=False, init=False)
    active: int = dataclasses.field(default=0, init=False)

    # ------------------------------------------------------------------ completions

    async def completions(self, http: HttpRequest) -> Response:
        return await self._answer(http, protocol.completion, chat=False)

    async def chat(self, http: HttpRequest) -> Response:
        return await self._answer(http, protocol.chat, chat=True)

    async def _answer(self, http: HttpRequest, parse: Callable[[dict, Offer], Request], chat: bool) -> Response:
        content = await read_body(http)
        body = protocol.parse_json(content)
        short = len(content) < LONG
        request = parse(body, self.offer) if short else await asyncio.to_thread(parse, body, self.offer)
        if self.device.state != READY:
            raise HTTPException(503, f"The server is {self.device.state}.", RETRY_AFTER)
        exchange = Exchange(request, self.offer, self.device, self.timeout)
        identity = f"{'chatcmpl' if chat else 'cmpl'}-{http.state.id}"
        http.state.log["prompts"] = len(request.prompts)
        http.state.log["method"] = request.config.method
        if self.log_prompts:
            http.state.log["body"] = body
        if request.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            stream = self._stream(http, exchange, identity, chat)
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        async with while_connected(http, exchange):
            async for _ in exchange.updates():
                pass
            found = await self._whole(exchange, identity, chat)
            self._log_usage(http, exchange, found["usage"])
            return JSONResponse(found)

    async def _whole(self, exchange: Exchange, identity: str, chat: bool) -> dict[str, Any]:
        usage = responses.usage(exchange.request, exchange.writings)
        logprobs = await self._logprobs(exchange, chat)
        if chat:
            choices = [responses.message(*pair) for pair in zip(exchange.writings, logprobs)]
        else:
            echoes = self._echoes(exchange.request)
            choices = [responses.completion(*triple) for triple in zip(exchange.writings, echoes, logprobs)]
        kind = "chat.completion" if chat else "text_completion"
        return responses.body(kind, identity, self.offer.name, choices, usage)

    def _echoes(self, request: Request) -> list[str]:
        """What stands before each answer."""
        decode = self.offer.tokenizer.decode
        return [decode(prompt) if request.echo else "" for prompt in request.prompts for _ in range(request.n)]

    async def _logprobs(self, exchange: Exchange, chat: bool) -> list[dict[str, Any] | None]:
        """Of each answer, in the form of its endpoint; None where they were not asked for."""
        wanted = exchange.request.logprobs
        if wanted is None:
            return [None] * len(exchange.writings)
        form = responses.chat_logprobs if chat else responses.completion_logprobs
        return [form(self.offer.tokenizer, entries, wanted) for entries in await exchange.scores()]

    async def _stream(self, http: HttpRequest, exchange: Exchange, identity: str, chat: bool) -> AsyncIterator[bytes]:
        request, kind = exchange.request, "chat.completion.chunk" if chat else "text_completion"
        sent, echoes = [""] * len(exchange.writings), self._echoes(request)

        # Only a whole answer has log-probabilities: they come with its end, when all are written.
        ends_last = request.logprobs is not None or not request.limit

        def chunk(
            index: int,
            text: str | None,
            finish: str | None = None,
            role: bool = False,
            logprobs: dict | None = None,
            **more: Any,
        ) -> bytes:
            choice = responses.chunk_choice(chat, index, text, finish, role, logprobs)
            return responses.event(responses.body(kind, identity, self.offer.name, [choice]) | more)

        try:
            for writing, echo in zip(exchange.writings, echoes):
                if chat or echo:
                    yield chunk(writing.index, echo, role=True)
            async for changed in exchange.updates():
                for writing in changed:
                    i, more = writing.index, {}
                    if request.slots:
                        more["refusion"] = {"slots": writing.slots(), "forwards": writing.generation.forwards}
                    if request.diffusing:
                        new = echoes[i] + (writing.text if writing.finish else writing.whole())
                    else:
                        new = writing.text[len(sent[i]) :] or None
                    sent[i] = writing.text
                    finish = None if ends_last else writing.finish
                    if new is not None or more or finish:
                        yield chunk(i, new, finish, **more)
            usage = responses.usage(request, exchange.writings)
            if ends_last:
                for writing, echo, logprobs in zip(exchange.writings, echoes, await self._logprobs(exchange, chat)):
                    whole = echo + writing.text if request.diffusing else None  # what a client replaces all by
                    yield chunk(writing.index, whole, writing.finish, logprobs=logprobs)
            if request.include_usage:
                yield responses.event(responses.body(kind, identity, self.offer.name, [], usage))
            self._log_usage(http, exchange, usage)
            yield responses.DONE
        except Exception as error:
            found, status, _ = around.explained(error)
            http.state.log["error"] = found["error"]["message"]
            yield responses.event(found)
            yield responses.DONE
        finally:
            exchange.cancel()

    def _log_usage(self, http: HttpRequest, exchange: Exchange, usage: dict[str, Any]) -> None:
        http.state.log |= {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
        http.state.log["finish"] = [writing.finish for writing in exchange.writings]
        if self.log_prompts:
            http.state.log["answers"] = [writing.text for writing in exchange.writings]

    # ------------------------------------------------------------------ the rest

    async def health(self, _: HttpRequest) -> Response:
        if self.draining or self.device.state != READY:
            state = "draining" if self.draining else self.device.state
            return JSONResponse({"status": state}, 503, headers=RETRY_AFTER)
        return JSONResponse({"status": "ok"})

    async def ping(self, _: HttpRequest) -> Response:
        return Response(status_code=200)

    async def version(self, _: HttpRequest) -> Response:
        return JSONResponse({"version": importlib.metadata.version("refusion_jax")})

    async def models(self, _: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, http: HttpRequest) -> Response:
        if http.path_params["name"] != self.offer.name:
            raise HTTPException(404, f"There is no such model; this server has {self.offer.name!r}.")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.offer.name,
            "object": "model",
            "created": 0,
            "owned_by": "refusion_jax",
            "max_model_len": self.offer.max_length,
        }

    async def server_info(self, _: HttpRequest) -> Response:
        methods = {name: dataclasses.asdict(config) for name, config in self.offer.methods.items()}
        return JSONResponse(
            {
                "model": self.offer.name,
                "max_length": self.offer.max_length,
                "methods": methods,
                "own_settings": {name: config.changeable for name, config in self.offer.methods.items()},
                "batch_size": {name: lane.engine.batch for name, lane in self.device.lanes.items()},
                "max_waiting": self.device.max_waiting,
                "compilations_since_warm_up": self.metrics.compiled_since(),
                "internal_states": [{}],  # where sglang's benchmark looks for more
            }
        )

    async def metrics_text(self, _: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def flush_cache(self, _: HttpRequest) -> Response:
        self.device.flush()
        return JSONResponse({"flushed": True})

    async def tokenize(self, http: HttpRequest) -> Response:
        body = protocol.parse_json(await read_body(http))
        tokens = await asyncio.to_thread(self._tokens, body)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self.offer.max_length})

    def _tokens(self, body: dict) -> list[int]:
        if body.get("messages") is not None:
            return protocol.chat_ids(body, self.offer)
        # Clients send what they have rendered with the chat template.
        return self.offer.tokenizer.encode_rendered(protocol.text_of(body.get("prompt"), "prompt"))

    async def detokenize(self, http: HttpRequest) -> Response:
        body = protocol.parse_json(await read_body(http))
        tokens = body.get("tokens")
        if not isinstance(tokens, list):
            raise BadRequest(f"tokens is {protocol.shown(tokens)}; it must be an array of token ids.", "tokens")
        ids = protocol.ids_of(tokens, "tokens")
        return JSONResponse({"prompt": self.offer.tokenizer.decode(ids, skip_special_tokens=False)})

    async def tokenizer_info(self, _: HttpRequest) -> Response:
        tokenizer = self.offer.tokenizer
        name = lambda token: tokenizer.decode([token], skip_special_tokens=False)
        return JSONResponse(
            {
                "eos_token": name(tokenizer.eos_id),
                "bos_token": None,
                "pad_token": name(tokenizer.pad_id),
                "vocab_size": tokenizer.vocab_size,
                "chat_template": tokenizer.chat_template,
            }
        )

    async def page(self, _: HttpRequest) -> Response:
        return page_file("index.html")

    async def page_part(self, http: HttpRequest) -> Response:
        return page_file(http.path_params["name"])

    def application(self) -> Around:
        """The ASGI application."""
        get = lambda path, to: Route(path, to, methods=["GET"])
        post = lambda path, to: Route(path, to, methods=["POST"])
        routes = [
            get("/", self.page),
            get("/page/{name}", self.page_part),
            get("/health", self.health),
            get("/ping", self.ping),
            get("/version", self.version),
            get("/metrics", self.metrics_text),
            get("/server_info", self.server_info),
            get("/tokenizer_info", self.tokenizer_info),
            get("/v1/models", self.models),
            get("/v1/models/{name:path}", self.model),
            post("/v1/completions", self.completions),
            post("/v1/chat/completions", self.chat),
            post("/tokenize", self.tokenize),
            post("/detokenize", self.detokenize),
            post("/flush_cache", self.flush_cache),
        ]
        handlers = dict.fromkeys(around.REFUSALS, around.refused)
        return Around(Starlette(routes=routes, exception_handlers=handlers), self)


def page_file(name: str) -> Response:
    """A file of the page; nothing else of the disk."""
    if not re.fullmatch(r"[a-z]+\.(html|css|js)", name) or not (PAGE / name).is_file():
        raise HTTPException(404, "There is no such page.")
    headers = {
        "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return FileResponse(PAGE / name, headers=headers)
