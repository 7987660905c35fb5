"""What surrounds every request: an id, the key, draining, the log; reading bodies, noticing who is gone, refusing."""

import asyncio
import contextlib
import hmac
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from refusion_jax.errors import UserError
from refusion_jax.serving import metrics as metrics_lib
from refusion_jax.serving import responses
from refusion_jax.serving.device import Failed, Full, TooLate
from refusion_jax.serving.exchange import Exchange
from refusion_jax.serving.protocol import BadRequest

MAX_BODY = 8 << 20  # bytes
BODY_SECONDS = 60  # that a client may take to send one
RETRY_AFTER = {"Retry-After": "1"}  # seconds, after 429 and 503
ONCE = {"x-should-retry": "false"}  # what clients of OpenAI's kind heed
REFUSALS = (HTTPException, UserError, Full, TooLate, Failed, ClientDisconnect, Exception)


async def read_body(http: HttpRequest) -> bytes:
    """The body of a request.

    Raises:
      BadRequest: it is too large, or does not come.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in http.stream():  # too large: to the end all the same, so that the client hears of it
                size += len(part)
                if size <= MAX_BODY:
                    parts.append(part)
                elif size > 32 * MAX_BODY:
                    break
    except TimeoutError:
        raise BadRequest(f"The body did not come within {BODY_SECONDS} seconds.", status=408) from None
    if size > MAX_BODY:
        raise BadRequest(f"The body is larger than {MAX_BODY} bytes; send less at a time.", status=413)
    return b"".join(parts)


@contextlib.asynccontextmanager
async def while_connected(http: HttpRequest, exchange: Exchange) -> AsyncIterator[None]:
    """Frees the rows when the client goes away, and in the end."""
    handler = asyncio.current_task()
    gone = False

    async def watch():
        nonlocal gone
        while (await http.receive())["type"] != "http.disconnect":
            pass
        gone = True
        handler.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not gone:
            raise
        handler.uncancel()
        raise ClientDisconnect from None
    finally:
        watcher.cancel()
        exchange.cancel()


def explained(error: Exception) -> tuple[dict[str, Any], int, dict[str, str]]:
    """(body, status, headers) for an error; what is nobody's business stays in the log."""
    if isinstance(error, BadRequest):
        return responses.error(str(error), error.status, error.param), error.status, {}
    if isinstance(error, UserError):
        return responses.error(str(error), 400), 400, {}
    if isinstance(error, Full):
        message = "The server has as many requests as it can queue; try again."
        return responses.error(message, 429), 429, RETRY_AFTER
    if isinstance(error, TooLate):
        return responses.error("The answer was not complete in time.", 504, kind="timeout_error"), 504, ONCE
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        return responses.error(str(error.detail), error.status_code), error.status_code, headers
    logging.error("a request failed", exc_info=error)  # Failed, or a defect of this server
    return responses.error("The server failed on this request; its log says why.", 500), 500, ONCE


async def refused(http: HttpRequest, error: Exception) -> Response:
    """The response to a request that raised."""
    if isinstance(error, ClientDisconnect):
        http.state.log["error"] = "the client is gone"
        return Response(status_code=499)
    found, status, headers = explained(error)
    http.state.log["error"] = found["error"]["message"]
    return JSONResponse(found, status, headers=headers)


class Around:
    """An application, and around it what every request needs; `service` is app.py's."""

    def __init__(self, app: Starlette, service: Any):
        self._app, self.service = app, service

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        service, path, start = self.service, scope["path"], time.monotonic()
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        identity = given if re.fullmatch(r"[A-Za-z0-9_.:-]{1,64}", given) else uuid.uuid4().hex
        fields: dict[str, Any] = {}
        scope.setdefault("state", {}).update(id=identity, log=fields)
        status = 0

        async def tagged(message: dict) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", identity.encode())]}
            await send(message)

        counted = path.startswith("/v1/")
        service.active += counted
        try:
            refusal = self._refusal(path, headers)
            # Whoever does not read what is sent is left alone some time after the answer is due.
            async with asyncio.timeout(service.timeout + 2 * BODY_SECONDS):
                await (refusal or self._app)(scope, receive, tagged)
        except TimeoutError:
            fields["error"] = "the client did not read its answer"
        finally:
            service.active -= counted
            if counted:
                seconds = round(time.monotonic() - start, 4)
                metrics_lib.log(request=identity, path=path, status=status, seconds=seconds, **fields)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> Response | None:
        """The response where the request is not let in."""
        if not path.startswith("/v1"):
            return None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        known = [hmac.compare_digest(key.strip(), right.encode()) for right in self.service.keys]
        if self.service.keys and not (scheme.lower() == b"bearer" and any(known)):
            message = "The API key is missing or wrong; send 'Authorization: Bearer KEY'."
            return JSONResponse(responses.error(message, 401), 401, headers={"WWW-Authenticate": "Bearer"})
        if self.service.draining:
            message = "The server is about to stop."
            return JSONResponse(responses.error(message, 503), 503, headers=RETRY_AFTER)
        return None
