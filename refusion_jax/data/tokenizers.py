"""Text to token ids: byte-level, or any Hugging Face tokenizer with a chat template.

Both give what the method needs (method section 1): an end-of-response id, a pad id, and the begin and mask ids as the
last two of the vocabulary when the tokenizer does not have them yet. Special ids in a prompt come from the chat
template alone: what users write can neither mask a token nor end their turn.
"""

import hashlib
import itertools
import json
import os
import pathlib
import re
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from refusion_jax import storage
from refusion_jax.errors import UserError

BEGIN_TOKEN = "<|beginoftext|>"
MASK_TOKEN = "<|mask|>"
CHAT_END_TOKEN = "<|im_end|>"
ROLES = ("system", "user", "assistant")  # templates write a role beside their special tokens: no others are let in
BYTES_FILE = "byte_tokenizer.json"  # what `ByteTokenizer.save` leaves in a folder

Message = Mapping[str, str]  # {"role": one of ROLES, "content": text}


class Tokenizer:
    """What both tokenizers share.

    Attributes:
      vocab_size: logical vocabulary; every id is below it. A model's table may have more rows.
      eos_id, pad_id, begin_id, mask_id: special ids.
      fingerprint: changes when any text could encode differently (keys the cache of tokenised data).
      chat_template: jinja2 text by which conversations are rendered; None: not by one.
    """

    vocab_size: int
    eos_id: int
    pad_id: int
    begin_id: int
    mask_id: int
    fingerprint: str
    chat_template: str | None = None

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Names of special tokens inside the text are spelled out, never turned into special ids."""
        return list(self.encode_batch([text])[0])

    def encode_rendered(self, text: str) -> list[int]:
        """Ids of a text in which names of special tokens are meant, such as one that a chat template has made."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Ids of each plain text."""
        raise NotImplementedError

    def encode_prompt(self, query: str) -> list[int]:
        """Ids of one user turn with the generation prompt added (method section 2)."""
        return list(self.encode_prompts([query])[0])

    def encode_prompts(self, queries: Sequence[str]) -> list[Sequence[int]]:
        """Ids of each query as one user turn, with the generation prompt added (method section 2)."""
        return self.encode_chats([[{"role": "user", "content": query}] for query in queries])

    def encode_chats(self, chats: Sequence[Sequence[Message]]) -> list[Sequence[int]]:
        """Ids of each conversation, with the generation prompt added (method section 2).

        Names of special tokens in the contents are spelled out, as in `encode`.

        Raises:
          UserError: a message without a role or text, no chat template, or a conversation that it does not accept.
        """
        raise NotImplementedError

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are not (yet) a whole character become U+FFFD."""
        raise NotImplementedError

    def save(self, folder: str | os.PathLike) -> None:
        """Writes files from which `load_tokenizer(folder)` makes the same tokenizer."""
        raise NotImplementedError


def check_messages(chat: Sequence[Message]) -> None:
    """Raises a UserError that names the first message of a conversation that is none."""
    for index, message in enumerate(chat):
        if message.get("role") not in ROLES:
            raise UserError(f"Message {index} has the role {message.get('role')!r}; choose one of {', '.join(ROLES)}.")
        if not isinstance(message.get("content"), str):
            raise UserError(f"Message {index} has the content {message.get('content')!r}; it must be a text.")
        check_text(message["content"], f"Message {index}")
    if not chat:
        raise UserError("The conversation has no message; a prompt needs at least one.")


def check_text(text: str, where: str) -> None:
    """Raises a UserError where a text, called so in it, has half of a surrogate pair, such as a byte that is no UTF-8
    becomes on a command line: no tokenizer can encode it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has {text[error.start]!r} at character {error.start}, which is no character; give UTF-8 text."
        ) from None


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes (ids 0..255) and six special ids.

    A prompt is `<user> query <assistant>`, two ids more than its bytes; an answer in a conversation ends with `<end>`.
    """

    SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", BEGIN_TOKEN, MASK_TOKEN)

    def __init__(self):
        self.pad_id, self.eos_id, self.user_id, self.assistant_id, self.begin_id, self.mask_id = range(256, 262)
        self.vocab_size = 262
        self.fingerprint = "bytes-1"

    def encode_batch(self, texts):
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def encode_chats(self, chats):
        return [[*itertools.chain.from_iterable(self._turns(chat)), self.assistant_id] for chat in chats]

    def _turns(self, chat):
        check_messages(chat)
        for message in chat:
            if message["role"] == "system":
                raise UserError("The byte tokenizer has no system turns; put the instruction into the user's turn.")
            if message["role"] == "user":
                yield self.user_id, *message["content"].encode("utf-8")
            else:
                yield self.assistant_id, *message["content"].encode("utf-8"), self.eos_id

    def encode(self, text):
        return list(text.encode("utf-8"))

    def encode_rendered(self, text):
        pieces = re.split("(" + "|".join(map(re.escape, self.SPECIAL)) + ")", text)  # with names at odd places
        ids = [[256 + self.SPECIAL.index(p)] if i % 2 else p.encode("utf-8") for i, p in enumerate(pieces)]
        return list(itertools.chain.from_iterable(ids))

    def decode(self, ids, skip_special_tokens=True):
        pieces = []
        for i in map(int, ids):
            if i < 256:
                pieces.append(bytes([i]))
            elif not skip_special_tokens:
                pieces.append(self.SPECIAL[i - 256].encode() if i < self.vocab_size else b"\xff")
        return b"".join(pieces).decode("utf-8", errors="replace")

    def save(self, folder):
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / BYTES_FILE).write_text(json.dumps({"tokenizer": "bytes", "special_tokens": self.SPECIAL}) + "\n")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `transformers` library; works offline for a folder. Adds absent begin and mask tokens."""

    def __init__(self, tokenizer, name: str):
        self._tokenizer, self._name, self.chat_template = tokenizer, name, tokenizer.chat_template
        self._lock = threading.Lock()  # the library keeps split_special_tokens in the object: threads would mix it up
        chat_end = [CHAT_END_TOKEN] if CHAT_END_TOKEN in tokenizer.get_vocab() else []
        known = {token.content for token in self._special_tokens()}
        tokenizer.add_tokens(
            [token for token in (BEGIN_TOKEN, MASK_TOKEN, *chat_end) if token not in known], special_tokens=True
        )
        special = sorted(self._special_tokens(), key=lambda token: len(token.content), reverse=True)
        self._begins = re.compile("|".join(_begin(token.content) for token in special))
        self._names = re.compile("(" + "|".join(map(_whole, special)) + ")")
        vocab = tokenizer.get_vocab()
        self.vocab_size = max(vocab.values()) + 1
        self.begin_id, self.mask_id = vocab[BEGIN_TOKEN], vocab[MASK_TOKEN]
        # A base model's tokenizer says "<|endoftext|>" is the end, but a chat turn ends with "<|im_end|>".
        self.eos_id = vocab.get(CHAT_END_TOKEN, tokenizer.eos_token_id)
        if self.eos_id is None:
            raise UserError(
                f"tokenizer {name!r} has neither an eos_token nor {CHAT_END_TOKEN!r}: a response could not end. "
                "Set eos_token in its tokenizer_config.json."
            )
        self.pad_id = self.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        backend = getattr(tokenizer, "backend_tokenizer", None)
        rules = (
            backend.to_str() if backend is not None else json.dumps(vocab, sort_keys=True) + type(tokenizer).__name__
        )
        self.fingerprint = hashlib.blake2b(
            f"prompts 2\n{rules}\n{tokenizer.chat_template}\n{self.eos_id}".encode(), digest_size=16
        ).hexdigest()

    def _special_tokens(self):
        return [token for token in self._tokenizer.added_tokens_decoder.values() if token.special]

    def _ids(self, texts: Sequence[str], *, split: bool) -> list[list[int]]:
        if not texts:
            return []
        with self._lock:
            return self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=split)["input_ids"]

    def encode_batch(self, texts):
        return self._ids(texts, split=True)

    def encode_rendered(self, text):
        return self._ids([text], split=False)[0]

    def encode_chats(self, chats):
        if not self._tokenizer.chat_template:
            raise UserError(
                f"tokenizer {self._name!r} has no chat template, so a query cannot become a prompt. Add chat_template "
                "to its tokenizer_config.json, or train on plain text (an empty query_field)."
            )
        rendered = [self._render(chat) for chat in chats]
        whole = iter(self._ids([text for text, mark in rendered if mark not in text], split=False))
        return [self._pieces(text, mark) if mark in text else next(whole) for text, mark in rendered]

    def _render(self, chat: Sequence[Message]) -> tuple[str, str]:
        """The text of a conversation, and a mark that breaks every name of a special token in its contents.

        A name that is whole is then the template's own. The mark stands behind the first character of a name: templates
        that strip contents, or look for other words in them, find what they always find.
        """
        check_messages(chat)
        taken = {*str(self._tokenizer.chat_template), *"".join(message["content"] for message in chat)}
        mark = next(
            c for c in map(chr, range(0xE000, sys.maxunicode)) if c not in taken
        )  # of no meaning, to begin with
        marked = [{"role": m["role"], "content": self._begins.sub(rf"\g<0>{mark}", m["content"])} for m in chat]
        try:
            text = self._tokenizer.apply_chat_template(marked, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # jinja2's, for instance what the template itself raises
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"the chat template of tokenizer {self._name!r} does not accept a conversation of "
                f"{', '.join(message['role'] for message in chat)} ({reason})."
            ) from error
        return text, mark

    def _pieces(self, text: str, mark: str) -> list[int]:
        """Ids of a marked text: whole names in it are special, what stands between them is plain text.

        Tokenizers themselves split at special tokens first, so a text without marks has the same ids as a whole.
        """
        pieces = self._names.split(text)  # plain texts, with names at odd places
        first, *texts = self._ids([piece.replace(mark, "") for piece in pieces[::2]], split=True)
        names = self._tokenizer.convert_tokens_to_ids([piece.strip() for piece in pieces[1::2]])
        return [*first, *itertools.chain.from_iterable((name, *ids) for name, ids in zip(names, texts, strict=True))]

    def decode(self, ids, skip_special_tokens=True):
        # Ids between the logical vocabulary and the table's end have no text.
        ids = [int(i) for i in ids if int(i) < self.vocab_size]
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def save(self, folder):
        self._tokenizer.save_pretrained(str(folder))


def _begin(name: str) -> str:
    """Pattern of the first character of a name, where the rest follows, or the text ends before the rest does."""
    rest = ""
    for character in reversed(name[1:]):
        rest = rf"(?:{re.escape(character)}{rest}|\s*\Z)"
    return f"{re.escape(name[0])}(?={rest})"


def _whole(token) -> str:
    """Pattern of a special token, with the white space that it takes along."""
    return (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")


def load_tokenizer(spec: str) -> Tokenizer:
    """Makes a tokenizer.

    Args:
      spec: "bytes", a folder or one's address in a bucket (of `Tokenizer.save` or in Hugging Face layout), or a name on
        the Hugging Face hub.

    Raises:
      UserError: no such folder, not a tokenizer, or a name that cannot be downloaded.
    """
    spec = str(spec)
    if spec == "bytes":
        return ByteTokenizer()
    if not storage.is_local(spec):
        with tempfile.TemporaryDirectory() as copy:
            storage.copy_folder(spec, copy, (".json", ".txt", ".jinja", ".model"))  # not the weights beside them
            return load_tokenizer(copy)
    folder = pathlib.Path(spec).expanduser()
    if (folder / BYTES_FILE).exists():
        return ByteTokenizer()
    if folder.is_dir():
        if not any(
            (folder / f).exists() for f in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
        ):
            raise UserError(
                f"the folder {spec!r} holds no tokenizer (no tokenizer.json or tokenizer_config.json). Give a folder "
                "with one, a name on the Hugging Face hub, or 'bytes'."
            )
    elif folder.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1:
        raise UserError(
            f"the tokenizer folder {spec!r} does not exist. Give a folder with a tokenizer.json, a name on the "
            "Hugging Face hub such as 'Qwen/Qwen3-0.6B', or 'bytes'."
        )
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found" is no news here
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UserError(
            f"tokenizer {spec!r} needs the transformers library ({error}). Install it: pip install 'refusion_jax[hf]'."
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else spec)
    except Exception as error:  # OSError, ValueError or one of the hub's own, depending on what is wrong
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        place = "load from this folder" if folder.is_dir() else "download from the Hugging Face hub"
        raise UserError(
            f"the tokenizer {spec!r} could not {place}: {reason} Give a folder with a tokenizer.json (a downloaded "
            "copy works offline), a valid name with network access, or 'bytes'."
        ) from error
    return HuggingFaceTokenizer(tokenizer, spec)
