"""A model of this project as lm-evaluation-harness takes it.

    from refusion_jax.decoder import Decoder
    from refusion_jax.evaluation.model import DecoderLM

    decoder = Decoder.load("runs/quickstart")
    lm = DecoderLM(decoder, decoder.settings(slot_threshold=0.6))
    lm_eval.simple_evaluate(model=lm, tasks=[...], apply_chat_template=True)

How answers are decoded is the sampler's settings' to say; of a task's own, `until` and `max_gen_toks` count, and its
temperature where it asks for samples (`do_sample`). The answer to a document depends on the document, the settings, the
seed and its number in the task: not on the batch, nor on what is resumed or shared by processes.
"""

import collections
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence

import jax
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from refusion_jax.decoder import Decoder
from refusion_jax.errors import UserError
from refusion_jax.evaluation import likelihood
from refusion_jax.evaluation.journal import Journal, Record
from refusion_jax.progress import Progress
from refusion_jax.sampling import SamplerConfig
from refusion_jax.sampling.batching import UNLIMITED
from refusion_jax.sampling.config import Generation, check_batch, check_prompt
from refusion_jax.sampling.engine import PREFILL_TOKENS, Engine, Prompt

CHAT = '{"messages": '  # how a context begins that `DecoderLM.apply_chat_template` made
REPEAT_BITS = 20  # documents of a task have lower numbers; above them stands which of its answers a document gets
PIECE = 8  # batches of likelihoods that are kept together
EVERY = 16  # forwards between two looks at unfinished answers, for their stop strings


class Compiling:
    """When this process has traced and compiled: disjoint intervals, in seconds of `time.perf_counter`."""

    intervals: list[tuple[float, float]] = []

    @classmethod
    def listen(cls, event: str, seconds: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            end = time.perf_counter()
            while cls.intervals and cls.intervals[-1][0] >= end - seconds:  # a part of this one
                cls.intervals.pop()
            cls.intervals.append((end - seconds, end))

    @classmethod
    def since(cls, start: float) -> float:
        return sum(end - max(begin, start) for begin, end in cls.intervals if end > start)


jax.monitoring.register_event_duration_secs_listener(Compiling.listen)


@dataclasses.dataclass(frozen=True)
class Request:
    """A document's question: ids of its prompt, and how its answer is to be written (`limit` 0: as long as may be)."""

    key: str
    tokens: Sequence[int]
    config: SamplerConfig
    index: int
    limit: int
    until: tuple[str, ...]


class DecoderLM(LM):
    """Answers and likelihoods of a decoder, with given settings of its sampler."""

    def __init__(
        self,
        decoder: Decoder,
        config: SamplerConfig,
        *,
        batch_size: int = 8,
        seed: int = 0,
        journal: Journal | None = None,
    ):
        """
        Args:
          batch_size: rows decoded at a time.
          seed: of sampling.
          journal: where answers are kept, and found again; None: in memory.

        Raises:
          UserError: no such batch size or seed.
        """
        super().__init__()
        check_batch(batch_size, seed)
        self.decoder, self.config = decoder, config
        self.batch_size, self.seed = batch_size, seed
        self.journal = journal or Journal()
        self.records: list[Record] = []  # of the last call's answers, in the order of its requests

    # --- Prompts.

    @property
    def tokenizer_name(self) -> str:
        return self.decoder.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.tokenizer_name if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as JSON, which becomes ids where it is answered: so no text in it becomes a special id.

        Args:
          add_generation_prompt: False where the last message is the beginning of the answer.
        """
        return f"{CHAT}{json.dumps(chat_history)}}}"

    def get_model_info(self) -> dict:
        return {"method": self.config.method, "settings": dataclasses.asdict(self.config), "seed": self.seed}

    def encode(self, context: str) -> list[int]:
        """Ids of a context: a conversation, whose last message may be the beginning of the answer, or a plain text."""
        tokenizer = self.decoder.tokenizer
        if context.startswith(CHAT):
            messages = json.loads(context)["messages"]
            began = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
            return [*tokenizer.encode_chats([messages])[0], *tokenizer.encode(began)]
        return list(tokenizer.encode(context)) or [tokenizer.begin_id]

    # --- Answers.

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Texts of the answers, cut before the first stop string; empty where the prompt leaves no room."""
        self.records = []
        for task in dict.fromkeys(request.task_name for request in requests):
            self.records += self._of_task([request for request in requests if request.task_name == task])
        return [record.text for record in self.records]

    def _of_task(self, requests: list[Instance]) -> list[Record]:
        seen: collections.Counter[str] = collections.Counter()
        wanted = []
        for request in requests:
            context, settings = request.args
            key = key_of(context, settings, request.doc_id)
            wanted.append(self._request(f"{key}-{seen[key]}", context, settings, request.doc_id or 0, seen[key]))
            seen[key] += 1
        return self._kept(
            "answer", [request.key for request in wanted], lambda share: self.answers([wanted[i] for i in share])
        )

    def _kept(self, what: str, keys: Sequence[str], compute: Callable[[list[int]], Iterator[Record]]) -> list[Record]:
        """The records of keys: from the journal, and of those that are not there each process computes a share.

        Args:
          compute: gives, for places in `keys`, their records as they are there.
        """
        self.journal.agree()
        missing = [i for i, key in enumerate(keys) if key not in self.journal]
        done = len(keys) - len(missing)
        progress = Progress(what, len(keys), begun=done, enabled=jax.process_index() == 0)
        last = time.perf_counter()
        for record in compute(missing[jax.process_index() :: jax.process_count()]):
            last, before = time.perf_counter(), last
            self.journal.add(dataclasses.replace(record, seconds=max(0.0, last - before - Compiling.since(before))))
            done += jax.process_count()
            progress.show(min(done, len(keys)), self.journal.rates())
        self.journal.agree()
        return [self.journal[key] for key in keys]

    def _request(self, key: str, context: str, settings: dict, index: int, repeat: int) -> Request:
        config = self.config
        if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
            own = {name: settings[name] for name in ("top_k", "top_p") if settings.get(name)}
            config = dataclasses.replace(config, temperature=float(settings.get("temperature", 1.0)), **own)
        until, most = settings.get("until") or [], int(settings.get("max_gen_toks") or 0)
        return Request(
            key=key,
            tokens=self.encode(context),
            config=config,
            index=index + (repeat << REPEAT_BITS),
            limit=most if 0 < most < config.length else 0,
            until=(until,) if isinstance(until, str) else tuple(filter(None, until)),
        )

    def answers(self, requests: Sequence[Request]) -> Iterator[Record]:
        """Records of the answers as they are finished, and of the prompts that cannot be answered, these first."""
        fitting = []
        for request in requests:
            try:
                check_prompt(request.tokens, self.decoder.model, request.config)
                fitting.append(request)
            except UserError as error:
                yield Record(request.key, failure=str(error))
        if not fitting:
            return
        engine = Engine(
            self.decoder.params,
            self.decoder.model,
            self.config,
            min(self.batch_size, 1 << (len(fitting) - 1).bit_length()),
            max_prompt_length=max(len(request.tokens) for request in fitting),
            mesh=self.decoder.mesh,
        )
        asked: dict[int, tuple[int, Request]] = {}  # by index: row and request
        waiting = fitting[::-1]
        while waiting or asked:
            while waiting:
                request = waiting[-1]
                row = engine.add(Prompt(request.tokens, request.config, request.index, self.seed, request.limit))
                if row is None:
                    break
                asked[request.index] = row, waiting.pop()
            stops = [row for row, request in asked.values() if request.until]
            for generation in engine.step(EVERY if stops else UNLIMITED, unfinished=stops):
                row, request = asked[generation.index]
                record = self._record(request, generation)
                if record is None:
                    continue
                if not generation.finished:
                    engine.cancel(row)
                del asked[generation.index]
                yield record

    def _record(self, request: Request, generation: Generation) -> Record | None:
        """The answer, if it is finished or has come to a stop string.

        An unfinished answer's tokens are those up to the first open position; a stop string in them ends it.
        """
        decode = self.decoder.tokenizer.decode
        text = decode(generation.tokens)
        ends = [text.index(stop) for stop in request.until if stop in text]
        if not ends and not generation.finished:
            return None
        tokens = len(generation.tokens)
        if ends:
            text = text[: min(ends)]
            tokens = next(n for n in range(tokens + 1) if decode(generation.tokens[:n]).startswith(text))
        passes = -(-len(request.tokens) // PREFILL_TOKENS)
        return Record(request.key, text=text, tokens=tokens, forwards=generation.forwards + passes)

    # --- Likelihoods.

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log probability of each continuation after its context, and whether it is what greedy decoding would say."""
        return self._likelihoods([self._pair(*request.args) for request in requests])

    def _pair(self, context: str, continuation: str) -> likelihood.Pair:
        tokenizer = self.decoder.tokenizer
        if context.startswith(CHAT):
            return self.encode(context), list(tokenizer.encode(continuation))
        # White space between the two belongs to the continuation, whose first token it often begins.
        kept = context.rstrip()
        first = list(tokenizer.encode(kept))
        whole = list(tokenizer.encode(context + continuation))
        return (first or [tokenizer.begin_id]), whole[len(first) :]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log probability of each text from its beginning, in pieces of the model's length where it is longer."""
        tokenizer, longest = self.decoder.tokenizer, self.decoder.model.max_position_embeddings
        pairs, owner = [], []
        for index, request in enumerate(requests):
            ids = list(tokenizer.encode(request.args[0]))
            windows = utils.get_rolling_token_windows(ids, tokenizer.begin_id, longest - 1, 1)
            for window in map(utils.make_disjoint_window, windows):
                pairs.append(window)
                owner.append(index)
        totals = [0.0] * len(requests)
        for index, (value, _) in zip(owner, self._likelihoods(pairs)):
            totals[index] += value
        return totals

    def _likelihoods(self, pairs: Sequence[likelihood.Pair]) -> list[tuple[float, bool]]:
        """Kept and shared by processes as answers are, a few batches at a time."""
        likelihood.check(self.decoder, self.config, pairs)
        keys = [key_of("", {"pair": pair}, number) for number, pair in enumerate(pairs)]

        def compute(share: list[int]) -> Iterator[Record]:
            share = sorted(share, key=lambda i: sum(map(len, pairs[i])))
            for start in range(0, len(share), PIECE * self.batch_size):
                numbers = share[start : start + PIECE * self.batch_size]
                chosen = [pairs[i] for i in numbers]
                found = likelihood.log_likelihoods(self.decoder, self.config, chosen, self.batch_size, numbers=numbers)
                for i, (value, greedy) in zip(numbers, found, strict=True):
                    yield Record(keys[i], likelihood=value, greedy=greedy)

        return [(record.likelihood, record.greedy) for record in self._kept("likelihood", keys, compute)]


def key_of(context: str, settings: dict, index: int | None) -> str:
    """Changes with a document's prompt, its number in the task and what its answer is to be like."""
    told = json.dumps([context, settings, index], sort_keys=True, default=str)
    return hashlib.blake2b(told.encode(), digest_size=12).hexdigest()
