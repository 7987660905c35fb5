"""Ids, special tokens and chat prompts of both tokenizers."""

import dataclasses
import random

import pytest

from refusion_jax.checkpoint.load import with_tokenizer
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.errors import UserError
from refusion_jax.model.config import ModelConfig

TEXTS = [
    "",
    "hello",
    "  two  spaces, then a comma . ' s",
    "Größe 世界 🙂\n\ttab",
    "a <|mask|> and <|im_end|> in text",
    "1234 + 5 = 1239",
]


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """A Hugging Face folder with a byte-level vocabulary, no chat template, no begin or mask token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("small")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen3(test_data):
    return load_tokenizer(str(test_data / "tokenizers" / "qwen3"))


def test_qwen3_ids(qwen3):
    assert (qwen3.begin_id, qwen3.mask_id, qwen3.vocab_size) == (151669, 151670, 151671)
    assert (qwen3.eos_id, qwen3.pad_id) == (151645, 151643)


def test_qwen3_prompt_is_one_user_turn_with_generation_prompt(qwen3):
    ids = qwen3.encode_prompt("What is 2 + 3?")
    assert (
        qwen3.decode(ids, skip_special_tokens=False)
        == "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[0] == 151644 and qwen3.eos_id in ids


def test_added_tokens_come_last_and_only_once(small_folder, tmp_path):
    tokenizer = load_tokenizer(str(small_folder))
    assert (tokenizer.begin_id, tokenizer.mask_id, tokenizer.vocab_size) == (258, 259, 260)
    tokenizer.save(tmp_path)
    assert load_tokenizer(str(tmp_path)).vocab_size == 260


@pytest.mark.parametrize("kind", ["bytes", "small", "qwen3"])
def test_text_survives_and_never_makes_special_ids(kind, request):
    tokenizer = {
        "bytes": lambda: load_tokenizer("bytes"),
        "qwen3": lambda: request.getfixturevalue("qwen3"),
        "small": lambda: load_tokenizer(str(request.getfixturevalue("small_folder"))),
    }[kind]()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.eos_id, tokenizer.pad_id, tokenizer.begin_id, tokenizer.mask_id} & set(ids)
    assert [list(ids) for ids in tokenizer.encode_batch(TEXTS)] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("kind", ["bytes", "qwen3"])
def test_save_and_load_give_the_same_tokenizer(kind, request, tmp_path):
    tokenizer = load_tokenizer("bytes") if kind == "bytes" else request.getfixturevalue("qwen3")
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode_prompt("Größe?") == tokenizer.encode_prompt("Größe?")
    names = ("vocab_size", "eos_id", "pad_id", "begin_id", "mask_id")
    assert [getattr(loaded, n) for n in names] == [getattr(tokenizer, n) for n in names]


def test_decode_of_cut_characters_and_special_ids():
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer.encode("é世")
    assert tokenizer.decode(ids[:1]) == "\ufffd" and tokenizer.decode(ids[:4]) == "é\ufffd"
    assert tokenizer.decode([*ids, tokenizer.eos_id, tokenizer.mask_id]) == "é世"
    assert tokenizer.decode([tokenizer.mask_id], skip_special_tokens=False) == "<|mask|>"
    for seed in range(20):  # any ids give text
        ids = random.Random(seed).choices(range(tokenizer.vocab_size), k=50)
        assert isinstance(tokenizer.decode(ids), str)


def test_byte_prompt_is_two_ids_longer_than_its_bytes():
    tokenizer = load_tokenizer("bytes")
    assert len(tokenizer.encode_prompt("abc")) == 5 and tokenizer.encode_prompt("abc")[1:-1] == list(b"abc")


def test_tokenizer_must_fit_the_model():
    tokenizer = load_tokenizer("bytes")
    model = ModelConfig(
        vocab_size=262,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        tie_embeddings=True,
    )
    fitted = with_tokenizer(model, tokenizer, "here")
    assert (fitted.mask_token_id, fitted.logical_vocab_size) == (tokenizer.mask_id, 262)
    with pytest.raises(UserError, match=r"here.* 261 rows.* 262 ids.*mask id is 261.*at least 262"):
        with_tokenizer(dataclasses.replace(model, vocab_size=261, logical_vocab_size=0), tokenizer, "here")
    with pytest.raises(UserError, match=r"mask_token_id is 95.*261"):
        with_tokenizer(dataclasses.replace(model, mask_token_id=95), tokenizer, "here")


def test_bad_tokenizers(tmp_path, small_folder, monkeypatch):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="could not load from this folder"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(str(small_folder)).encode_prompt("hi")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'nobody/nothing' could not download"):
        load_tokenizer("nobody/nothing")
