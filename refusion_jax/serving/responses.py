"""Bodies that the server sends: completions, chunks of a stream, errors."""

import bisect
import dataclasses
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

from refusion_jax import display
from refusion_jax.data.tokenizers import Tokenizer
from refusion_jax.sampling import Generation
from refusion_jax.serving.protocol import Request

ERRORS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Writing:
    """The text of one answer, which grows."""

    def __init__(self, tokenizer: Tokenizer, request: Request, eos: int, index: int):
        self._tokenizer, self._request, self.index = tokenizer, request, index
        self._ends = (eos, *request.stop_ids)
        self.generation: Generation | None = None
        self.text = ""  # what may be shown: nothing that a stop string or the rest of a character could still change
        self.finish: str | None = None
        self._shown: dict[int, tuple[int, int]] = {}

    def update(self, generation: Generation) -> None:
        """Takes what there is of the answer now, up to the first token with which a stop string is complete."""
        self.generation = generation
        text = self._tokenizer.decode(generation.tokens)
        if self._stops(text):
            # However many tokens there are by now, the answer ends with the fewest that have a stop string in them.
            decode = lambda count: self._tokenizer.decode(generation.tokens[:count])
            counts = range(len(generation.tokens))
            count = bisect.bisect_left(counts, True, key=lambda count: bool(self._stops(decode(count))))
            self.generation, text = cut(generation, count), decode(count)
            self.text, self.finish = text[: min(self._stops(text))], "stop"
        elif generation.finished:
            ended = bool(generation.tokens) and generation.tokens[-1] in self._ends
            self.text, self.finish = text, "stop" if ended else "length"
        else:
            text = text.rstrip("\ufffd")
            safe = len(text) - max((len(stop) - 1 for stop in self._request.stops), default=0)
            if safe > len(self.text):
                self.text = text[:safe]

    def _stops(self, text: str) -> list[int]:
        """Where stop strings begin."""
        return [at for at in (text.find(stop) for stop in self._request.stops) if at >= 0]

    def whole(self) -> str:
        """All that is written, wherever it stands; a dot for every open token before it."""
        ends = set(self._ends) & set(self.generation.committed)
        end = next(iter(ends), self._ends[0])
        return "".join(text for text, _ in display.spans(self._tokenizer, self.generation, end))

    def slots(self) -> list[dict[str, Any]]:
        """What has been committed since the last call, in runs of one slot and round."""
        generation = self.generation
        now = dict(zip(generation.order, zip(generation.committed, generation.rounds)))
        size = max(1, self._request.config.groups[0])
        runs: dict[tuple[int, int], dict[int, int]] = {}
        for at, (token, round_) in sorted(now.items()):
            if self._shown.get(at) != (token, round_):
                runs.setdefault((at // size, round_), {})[at] = token
        self._shown = now
        return [
            {
                "index": slot,
                "round": round_,
                "positions": list(tokens),
                "tokens": list(tokens.values()),
                "texts": display.pieces(self._tokenizer, list(tokens.values())),
            }
            for (slot, round_), tokens in runs.items()
        ]


def cut(generation: Generation, count: int) -> Generation:
    """The first `count` tokens of an answer."""
    kept = [i for i, at in enumerate(generation.order) if at < count]
    of = lambda values: [values[i] for i in kept]
    return dataclasses.replace(
        generation,
        tokens=generation.tokens[:count],
        order=of(generation.order),
        committed=of(generation.committed),
        rounds=of(generation.rounds),
    )


# --- Usage.


def usage(request: Request, writings: Sequence[Writing]) -> dict[str, Any]:
    """Tokens of prompts and answers, and how they were decoded."""
    generations = [writing.generation for writing in writings if writing.generation]
    prompt = sum(len(prompt) + len(request.suffix) for prompt in request.prompts)
    tokens = sum(len(generation.tokens) for generation in generations)
    forwards = sum(generation.forwards for generation in generations)
    rounds = sum(max(generation.rounds, default=-1) + 1 for generation in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "refusion": {
            "forwards": forwards,
            "rounds": rounds,
            "tokens_per_forward": tokens / forwards if forwards else 0.0,
        },
    }


# --- Whole answers.


def body(kind: str, identity: str, model: str, choices: list[dict], usage: dict | None = None) -> dict[str, Any]:
    """What all answers have in common; `kind` is the object's."""
    found = {"id": identity, "object": kind, "created": int(time.time()), "model": model, "choices": choices}
    return found if usage is None else {**found, "usage": usage}


def completion(writing: Writing, prompt: str, logprobs: dict | None) -> dict[str, Any]:
    """A choice of /v1/completions; `prompt` is echoed."""
    return {
        "index": writing.index,
        "text": prompt + writing.text,
        "finish_reason": writing.finish,
        "logprobs": logprobs,
    }


def message(writing: Writing, logprobs: dict | None) -> dict[str, Any]:
    """A choice of /v1/chat/completions."""
    return {
        "index": writing.index,
        "message": {"role": "assistant", "content": writing.text},
        "finish_reason": writing.finish,
        "logprobs": logprobs,
    }


def completion_logprobs(tokenizer: Tokenizer, entries: Sequence[tuple], top: bool) -> dict[str, Any]:
    """Of (id, its log-probability or None, most probable id, its log-probability), token by token."""
    texts = [tokenizer.decode([token], skip_special_tokens=False) for token, *_ in entries]
    name = lambda token: tokenizer.decode([token], skip_special_tokens=False)
    best = [
        None if logprob is None else {text: logprob, name(first): first_logprob}
        for text, (_, logprob, first, first_logprob) in zip(texts, entries)
    ]
    return {
        "tokens": texts,
        "token_logprobs": [logprob for _, logprob, *_ in entries],
        "top_logprobs": best if top else None,
        "text_offset": [0, *itertools.accumulate(map(len, texts))][:-1],
    }


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[tuple], top: bool) -> dict[str, Any]:
    """The same in chat's form."""

    def one(token, logprob):
        text = tokenizer.decode([token], skip_special_tokens=False)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8"))}

    return {
        "content": [
            {**one(token, logprob), "top_logprobs": [one(first, best)] if top else []}
            for token, logprob, first, best in entries
        ]
    }


# --- Streams.


def event(found: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(found, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n\n"


DONE = b"data: [DONE]\n\n"


def chunk_choice(
    chat: bool, index: int, text: str | None, finish: str | None, role: bool = False, logprobs: dict | None = None
) -> dict[str, Any]:
    """A choice of a chunk; `text` None: it says nothing of the text."""
    if not chat:
        return {"index": index, "text": text or "", "finish_reason": finish, "logprobs": logprobs}
    delta = ({"role": "assistant"} if role else {}) | ({} if text is None else {"content": text})
    return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}


# --- Errors.


def error(message: str, status: int, param: str | None = None, kind: str = "") -> dict[str, Any]:
    """The schema of OpenAI's errors."""
    kind = kind or ERRORS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": str(status)}}
