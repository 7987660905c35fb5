"""Text to token ids: byte-level, or any Hugging Face tokenizer with a chat template.

Both give what the method needs (method section 1): an end-of-response id, a pad id, and the begin and mask ids as the last two
of the vocabulary when the tokenizer does not have them yet.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from refusion_jax.errors import UserError

BEGIN_TOKEN = "<|beginoftext|>"
MASK_TOKEN = "<|mask|>"
CHAT_END_TOKEN = "<|im_end|>"
BYTES_FILE = "byte_tokenizer.json"  # what `ByteTokenizer.save` leaves in a folder


class Tokenizer:
    """What both tokenizers share.

    Attributes:
      vocab_size: logical vocabulary; every id is below it. A model's table may have more rows.
      eos_id, pad_id, begin_id, mask_id: special ids.
      fingerprint: changes when any text could encode differently (keys the cache of tokenised data).
    """

    vocab_size: int
    eos_id: int
    pad_id: int
    begin_id: int
    mask_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Names of special tokens inside the text are spelled out, never turned into special ids."""
        return list(self.encode_batch([text])[0])

    def encode_prompt(self, query: str) -> list[int]:
        """Ids of one user turn with the generation prompt added (method section 2)."""
        return list(self.encode_prompts([query])[0])

    def encode_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        raise NotImplementedError

    def encode_prompts(self, queries: Sequence[str]) -> list[Sequence[int]]:
        raise NotImplementedError

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are not (yet) a whole character become U+FFFD."""
        raise NotImplementedError

    def save(self, folder: str | os.PathLike) -> None:
        """Writes files from which `load_tokenizer(folder)` makes the same tokenizer."""
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes (ids 0..255) and six special ids. A prompt is `<user> query <assistant>`: two ids more than its bytes."""

    SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", BEGIN_TOKEN, MASK_TOKEN)

    def __init__(self):
        self.pad_id, self.eos_id, self.user_id, self.assistant_id, self.begin_id, self.mask_id = range(256, 262)
        self.vocab_size = 262
        self.fingerprint = "bytes-1"

    def encode_batch(self, texts):
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def encode_prompts(self, queries):
        return [[self.user_id, *query.encode("utf-8"), self.assistant_id] for query in queries]

    def encode(self, text):
        return list(text.encode("utf-8"))

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
    """A tokenizer of the `transformers` library; works offline for a folder. Adds the begin and mask tokens when absent."""

    def __init__(self, tokenizer, name: str):
        tokenizer.add_tokens(
            [t for t in (BEGIN_TOKEN, MASK_TOKEN) if t not in tokenizer.get_vocab()], special_tokens=True
        )
        self._tokenizer, self._name = tokenizer, name
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
            f"{rules}\n{tokenizer.chat_template}\n{self.eos_id}".encode(), digest_size=16
        ).hexdigest()

    def encode_batch(self, texts):
        return self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def encode_prompts(self, queries):
        if not self._tokenizer.chat_template:
            raise UserError(
                f"tokenizer {self._name!r} has no chat template, so a query cannot become a prompt. Add chat_template "
                "to its tokenizer_config.json, or train on plain text (an empty query_field)."
            )
        texts = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": query}], add_generation_prompt=True, tokenize=False
            )
            for query in queries
        ]
        return self._tokenizer(texts, add_special_tokens=False)["input_ids"]

    def decode(self, ids, skip_special_tokens=True):
        # Ids between the logical vocabulary and the table's end have no text.
        ids = [int(i) for i in ids if int(i) < self.vocab_size]
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def save(self, folder):
        self._tokenizer.save_pretrained(str(folder))


def load_tokenizer(spec: str) -> Tokenizer:
    """Makes a tokenizer.

    Args:
      spec: "bytes", a folder (written by `Tokenizer.save` or in Hugging Face layout), or a name on the Hugging Face hub.

    Raises:
      UserError: no such folder, not a tokenizer, or a name that cannot be downloaded.
    """
    spec = str(spec)
    if spec == "bytes":
        return ByteTokenizer()
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
