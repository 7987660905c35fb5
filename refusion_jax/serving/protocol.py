"""What clients send: bodies to requests, or an error that says what is wrong with them.

Unknown and null fields are ignored, since clients send many of them; a field that would change the answer and is not
there is refused.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

from refusion_jax.data.tokenizers import Tokenizer, check_text
from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig
from refusion_jax.sampling import SamplerConfig
from refusion_jax.sampling.config import MAX_STOP_IDS, check_ids

MAX_STOPS = 16
MAX_CHOICES = 128  # n
COMPLETION_TOKENS = 16  # an answer of /v1/completions where max_tokens is not given
NEUTRAL = {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "min_p": 0, "min_tokens": 0}
ABSENT = ("logit_bias", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")


class BadRequest(UserError):
    """Of a client: `param` is the field, `status` the HTTP status."""

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.status = param, status


@dataclasses.dataclass(frozen=True)
class Offer:
    """What the server can do.

    Attributes:
      model: with its tokenizer.
      methods: settings of each method, by name; the first is the default.
      max_length: most tokens of prompt and answer.
      max_rows: answers that one request may ask for.
      name: of the model.
      scores: whether it gives log-probabilities: it reads from left to right.
    """

    model: ModelConfig
    tokenizer: Tokenizer
    methods: dict[str, SamplerConfig]
    max_length: int
    max_rows: int
    name: str
    scores: bool = True


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked request for completions.

    Attributes:
      prompts: ids of each prompt.
      config: settings of the sampler.
      limit: most tokens of an answer.
      n: answers to each prompt, with seeds seed, seed + 1, ..
      stops: texts that end an answer.
      stop_ids: ids that do, besides the model's EOS.
      logprobs: None: not asked for; else whether the most probable token is to be named too.
      echo: the answer begins with the prompt.
      suffix: ids of what stands behind the answer; the answer then fills `limit` positions before it.
      stream, include_usage, slots, diffusing: as page/api.html says.
      timeout: seconds the client waits; None: as long as the server does.
    """

    prompts: list[list[int]]
    config: SamplerConfig
    limit: int
    n: int = 1
    seed: int = 0
    stops: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    logprobs: bool | None = None
    echo: bool = False
    suffix: tuple[int, ...] = ()
    stream: bool = False
    include_usage: bool = False
    slots: bool = False
    diffusing: bool = False
    timeout: float | None = None


# --- Fields of any body.


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds."""

    def refuse(constant: str):
        raise BadRequest(f"The body contains {constant}, which is no JSON.")

    try:
        found = json.loads(body.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise BadRequest(f"The body is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    except json.JSONDecodeError as error:
        raise BadRequest(f"The body is not JSON: {error.msg} at line {error.lineno} column {error.colno}.") from None
    except (RecursionError, ValueError) as error:  # a ValueError: an integer of thousands of digits
        raise BadRequest(
            f"The body cannot be read ({type(error).__name__}): it is nested too deep or a number is too long."
        ) from None
    if not isinstance(found, dict):
        raise BadRequest(f"The body is a JSON {_kind(found)}; send an object.")
    return found


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")


def shown(value: Any) -> str:
    """A value in a message: not more than a line of it."""
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."


def text_of(value: Any, param: str) -> str:
    """A string that can be encoded."""
    if not isinstance(value, str):
        raise BadRequest(f"{param} is {shown(value)}; it must be a string.", param)
    try:
        check_text(value, param)
    except UserError as error:
        raise BadRequest(str(error), param) from None
    return value


def number(body: dict, name: str, default: Any, low: float, high: float = math.inf, whole: bool = False) -> Any:
    """A number within limits; `default` where it is absent or null."""
    value = body.get(name)
    if value is None:
        return default
    proper = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**65
    if not proper or (whole and value != int(value)):
        raise BadRequest(f"{name} is {shown(value)}; it must be a {'whole ' if whole else ''}number.", name)
    if not low <= value <= high:
        most = "" if high == math.inf else f" and at most {high}"
        raise BadRequest(f"{name} is {shown(value)}; it must be at least {low}{most}.", name)
    return int(value) if whole else float(value)


def flag(body: dict, name: str, param: str = "") -> bool:
    """A boolean; False where it is absent or null."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{param or name} is {shown(value)}; it must be true or false.", param or name)
    return bool(value)


def ids_of(value: list, param: str) -> list[int]:
    """A list of token ids."""
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < 2**31:
            raise BadRequest(f"{param} contains {shown(item)}; it must be an array of whole numbers from 0.", param)
    return value


# --- Bodies of the two endpoints.


def completion(body: dict, offer: Offer) -> Request:
    """A body of /v1/completions."""
    prompt = body.get("prompt")
    if prompt is None:
        raise BadRequest(
            "prompt is missing; send a string, an array of strings, token ids, or an array of those.", "prompt"
        )
    several = isinstance(prompt, list) and (not prompt or isinstance(prompt[0], str | list))
    parts = prompt if several else [prompt]
    if not parts:
        raise BadRequest("prompt is an empty array; send at least one prompt.", "prompt")
    ids = []
    for part in parts:
        ids.append(
            ids_of(part, "prompt") if isinstance(part, list) else offer.tokenizer.encode(text_of(part, "prompt"))
        )
    logprobs = number(body, "logprobs", None, 0, 1, whole=True)
    best_of = number(body, "best_of", None, 1, MAX_CHOICES, whole=True)
    if best_of is not None and best_of != (body.get("n") or 1):
        raise BadRequest("best_of is not there; ask for n answers and choose among them.", "best_of")
    echo = flag(body, "echo")
    fields = common(body, offer, lambda config: COMPLETION_TOKENS, fewest=0 if echo else 1)
    if body.get("suffix"):
        if echo or logprobs is not None:
            raise BadRequest("suffix goes neither with echo nor with logprobs; leave them out.", "suffix")
        fields |= infilling(text_of(body["suffix"], "suffix"), fields, offer)
    return checked(Request(ids, logprobs=None if logprobs is None else logprobs > 0, echo=echo, **fields), offer)


def infilling(suffix: str, fields: dict[str, Any], offer: Offer) -> dict[str, Any]:
    """The fields that change where the answer is a hole between a prompt and a suffix: whole slots, which it may end
    early.
    """
    config, model = fields["config"], offer.model
    size = config.up_to(fields["limit"])
    try:
        config.check_holes([size])
    except UserError as error:
        raise BadRequest(str(error), "suffix") from None
    pad = () if model.pad_token_id in (None, model.eos_token_id) else (model.pad_token_id,)
    ids = (*map(int, offer.tokenizer.encode(suffix)), model.eos_token_id)
    return {"suffix": ids, "limit": size, "stop_ids": (*fields["stop_ids"], *pad)[: MAX_STOP_IDS - 1]}


def chat(body: dict, offer: Offer) -> Request:
    """A body of /v1/chat/completions."""
    if body.get("suffix"):
        raise BadRequest("suffix is for /v1/completions; leave it out.", "suffix")
    ids = chat_ids(body, offer)
    room = offer.max_length - len(ids)
    fields = common(body, offer, lambda config: longest(config, room))
    top = number(body, "top_logprobs", 0, 0, 1, whole=True)
    logprobs = top > 0 if flag(body, "logprobs") else None
    return checked(Request([ids], logprobs=logprobs, **fields), offer)


def chat_ids(body: dict, offer: Offer) -> list[int]:
    """Ids of a body's `messages`, the generation prompt added."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages is missing; send an array of {role, content}.", "messages")
    return list(offer.tokenizer.encode_chats([[message_of(message, i) for i, message in enumerate(messages)]])[0])


def message_of(message: Any, index: int) -> dict[str, str]:
    """Role and text of a message; content may be parts, of which only texts can be read."""
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise BadRequest(f"{where} is {shown(message)}; it must be an object with role and content.", "messages")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise BadRequest(f"{where}.content has a part {shown(part)}; this model reads text only.", "messages")
        content = "".join(text_of(part.get("text"), f"{where}.content") for part in content)
    role = "system" if message.get("role") == "developer" else message.get("role")
    return {"role": text_of(role, f"{where}.role"), "content": text_of(content, f"{where}.content")}


def longest(config: SamplerConfig, room: int) -> int:
    """Tokens of the longest answer that takes at most `room` positions: slots and blocks are whole. At least 1."""
    return next((limit for limit in range(min(room, config.length), 1, -1) if config.up_to(limit) <= room), 1)


def common(body: dict, offer: Offer, default_tokens: Callable[[SamplerConfig], int], fewest: int = 1) -> dict[str, Any]:
    """The fields that both endpoints have; `fewest` tokens are the least an answer may be limited to."""
    refuse_absent(body)
    if body.get("model") not in (None, "", offer.name):
        raise BadRequest(f"There is no model {shown(body['model'])}; this server has {offer.name!r}.", "model", 404)
    config = settings(body, offer)
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    limit = number(body, name, min(default_tokens(config), config.length), fewest, whole=True)
    if limit > config.length:
        raise BadRequest(
            f"{name} is {shown(body[name])}; answers have at most {config.length} tokens here (--gen-length).",
            name,
        )
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise BadRequest(f"stream_options is {shown(options)}; it must be an object.", "stream_options")
    options = options or {}
    return dict(
        config=config,
        limit=limit,
        n=number(body, "n", 1, 1, MAX_CHOICES, whole=True),
        seed=number(body, "seed", 0, -(2**63), 2**64 - 1, whole=True) % 2**32,
        stops=stops_of(body),
        stop_ids=stop_ids_of(body),
        stream=flag(body, "stream"),
        include_usage=flag(options, "include_usage", "stream_options.include_usage"),
        slots=flag(options, "slots", "stream_options.slots"),
        diffusing=flag(body, "diffusing"),
        timeout=number(body, "timeout", None, 1e-6),
    )


def settings(body: dict, offer: Offer) -> SamplerConfig:
    """The sampler's settings: the method's own, with what the body says instead."""
    method = body.get("method")
    if method is not None and (not isinstance(method, str) or method not in offer.methods):
        raise BadRequest(f"method is {shown(method)}; this server offers {', '.join(offer.methods)}.", "method")
    config = offer.methods[method or next(iter(offer.methods))]
    changes = {}
    for field in dataclasses.fields(config):
        value, own = body.get(field.name), getattr(config, field.name)
        if value is None or field.name == "stop":  # a request's are strings, whatever a method calls so
            continue
        if field.name not in config.changeable:
            if value != own:
                raise BadRequest(
                    f"{field.name} is {shown(value)}; it was set to {own} when the server was started.", field.name
                )
            continue
        if isinstance(own, tuple):
            if not isinstance(value, list):
                raise BadRequest(f"{field.name} is {shown(value)}; it must be an array of numbers.", field.name)
            changes[field.name] = tuple(ids_of(value, field.name))
            continue
        whole = isinstance(own, int)
        value = number(body, field.name, own, -math.inf, whole=whole)
        if abs(value) >= 2**31:
            raise BadRequest(f"{field.name} is {shown(body[field.name])}; that is out of range.", field.name)
        changes[field.name] = max(value, 0) if field.name == "top_k" and value == -1 else value  # vLLM's -1: all
    alone = lambda name: dataclasses.replace(config, **{name: changes[name]})
    try:
        found = dataclasses.replace(config, **changes)
        other = [name for name in changes if found.static != config.static != alone(name).static]
    except UserError as error:
        raise BadRequest(str(error), next((name for name in changes if name in str(error)), None)) from None
    if other:
        raise BadRequest(
            f"{other[0]} is {shown(body[other[0]])}, which needs other programs than those compiled for "
            f"{getattr(config, other[0])} when the server was started. Leave it out, or start the server with it.",
            other[0],
        )
    return found


def refuse_absent(body: dict) -> None:
    """Refuses what would change the answer and is not there."""
    for name, neutral in NEUTRAL.items():
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or value != neutral):
            raise BadRequest(f"{name} is {shown(value)}; only {neutral}, which changes nothing, is possible.", name)
    for name in ABSENT:
        if body.get(name):
            raise BadRequest(f"{name} is not there; leave it out.", name)
    form = body.get("response_format")
    if form is not None and (not isinstance(form, dict) or form.get("type") != "text"):
        raise BadRequest(f'response_format is {shown(form)}; only {{"type": "text"}} is possible.', "response_format")
    if body.get("tools") and body.get("tool_choice") not in (None, "auto", "none"):
        raise BadRequest("tool_choice demands a call of a tool; this model calls none.", "tool_choice")
    if body.get("use_beam_search"):
        raise BadRequest("use_beam_search is not there; leave it out.", "use_beam_search")


def stops_of(body: dict) -> tuple[str, ...]:
    """`stop`: a string, or an array of them."""
    stop = body.get("stop")
    stops = [] if stop is None else stop if isinstance(stop, list) else [stop]
    if len(stops) > MAX_STOPS:
        raise BadRequest(f"stop has {len(stops)} strings; at most {MAX_STOPS} are possible.", "stop")
    return tuple(text for text in (text_of(item, "stop") for item in stops) if text)


def stop_ids_of(body: dict) -> tuple[int, ...]:
    """`stop_token_ids`: an array of ids."""
    ids = body.get("stop_token_ids")
    if ids is not None and not isinstance(ids, list):
        raise BadRequest(f"stop_token_ids is {shown(ids)}; it must be an array of token ids.", "stop_token_ids")
    ids = ids_of(ids or [], "stop_token_ids")
    if len(ids) >= MAX_STOP_IDS:
        raise BadRequest(
            f"stop_token_ids has {len(ids)} ids; at most {MAX_STOP_IDS - 1} are possible.", "stop_token_ids"
        )
    return tuple(ids)


def checked(request: Request, offer: Offer) -> Request:
    """The request, if the server has room for it and the model knows its ids."""
    if request.logprobs is not None and not offer.scores:
        raise BadRequest(
            "This model does not read from left to right, so it has no logprobs; leave them out.", "logprobs"
        )
    rows = len(request.prompts) * request.n
    if rows > offer.max_rows:
        raise BadRequest(
            f"The request asks for {rows} answers (prompts times n); at most {offer.max_rows} are possible.", "n"
        )
    for index, prompt in enumerate(request.prompts):
        given = len(prompt) + len(request.suffix)
        total = given + (request.config.up_to(request.limit) if request.limit else 0)
        if total > offer.max_length:
            raise BadRequest(
                f"Prompt {index} has {given} tokens and its answer up to {request.limit}: that takes {total} of this "
                f"server's {offer.max_length}. Shorten the prompt or lower max_tokens.",
                "max_tokens",
            )
        try:
            check_ids(prompt, offer.model, f"Prompt {index}")
        except UserError as error:
            raise BadRequest(str(error), "prompt") from None
    return request
