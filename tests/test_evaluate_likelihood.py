"""Likelihoods: against Hugging Face's logits, against every conditional by itself, and as sums over all texts."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

pytest.importorskip("lm_eval")
import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from refusion_jax.checkpoint import load  # noqa: E402
from refusion_jax.data.tokenizers import load_tokenizer  # noqa: E402
from refusion_jax.decoder import Decoder, parse_mesh  # noqa: E402
from refusion_jax.errors import UserError  # noqa: E402
from refusion_jax.evaluation import likelihood  # noqa: E402
from refusion_jax.evaluation.journal import Journal  # noqa: E402
from refusion_jax.evaluation.likelihood import log_likelihoods  # noqa: E402
from refusion_jax.evaluation.model import DecoderLM  # noqa: E402
from refusion_jax.model.attention import Packed  # noqa: E402
from refusion_jax.model.config import ModelConfig  # noqa: E402
from refusion_jax.model.qwen3 import Qwen3, init_params  # noqa: E402
from refusion_jax.objective import likelihood as bounds  # noqa: E402
from refusion_jax.objective.masked import Masked  # noqa: E402
from refusion_jax.parallel import sharding  # noqa: E402
from refusion_jax.sampling.methods import sampler_config  # noqa: E402
from refusion_jax.sampling.programs import decode_params  # noqa: E402

SIZES = dict(hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
AUTOREGRESSIVE = sampler_config("autoregressive", gen_length=4)
SLOTS = sampler_config("plan_and_infill", gen_length=4, slot_size=2, blocks=1)


def random_decoder(vocab: int, **settings) -> Decoder:
    """Large random weights: what comes next depends much on what was before, and where."""
    model = ModelConfig(
        vocab_size=vocab,
        logical_vocab_size=vocab,
        tie_embeddings=True,
        mask_token_id=vocab - 1,
        eos_token_id=0,
        dtype="float32",
        max_position_embeddings=128,
        **SIZES,
    )
    params = nn.unbox(init_params(model, jax.random.key(5)))
    params = jax.tree.map(lambda x: x * 3, params)
    mesh = parse_mesh("1,1,1")
    return Decoder(decode_params(params, mesh), model, load_tokenizer("bytes"), mesh)


@pytest.fixture(scope="module")
def tiny() -> Decoder:
    return random_decoder(4)


def conditional(decoder: Decoder, before: list[int], at: int | None = None) -> np.ndarray:
    """Log probabilities [vocab] of what comes after `before`; with `at`, of a mask at that position behind it."""
    model = dataclasses.replace(decoder.model, scan_layers=False)
    tokens = before if at is None else [*before, model.mask_token_id]
    positions = [*range(len(before)), *([] if at is None else [at])]
    ids, places = (jnp.asarray([x], jnp.int32) for x in (tokens, positions))
    hidden, _ = Qwen3(model).apply({"params": decoder.params}, ids, places, Packed(jnp.ones_like(ids)))
    logits = hidden[0, -1] @ decoder.params["embed"]["embedding"].T
    return np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32)))


def test_autoregressive_likelihood_is_hugging_face_s(reference):
    for name in ("qwen3_tied", "qwen3_untied"):
        folder, data = reference / name / "model", np.load(reference / name / "logits.npz")
        mesh = parse_mesh("1,1,1")
        model = dataclasses.replace(load.load_model_config(folder), dtype="float32")
        params = load.load_params(folder, model, mesh, sharding.DECODE_RULES, "float32")
        decoder = Decoder(decode_params(params, mesh), model, load_tokenizer("bytes"), mesh)
        rows, pairs, expected = data["rows"], [], []
        for line, start in itertools.product(range(2), (0, 16, 40)):  # of each, ten tokens that logits are known of
            at = rows[start : start + 10]
            assert (np.diff(at) == 1).all()
            tokens = data["tokens"][line]
            pairs.append((tokens[: at[0] + 1], tokens[at[0] + 1 : at[-1] + 2]))
            logits = data["logits"][line, start : start + 10].astype(np.float64)
            chosen = logits[np.arange(10), pairs[-1][1]]
            expected.append(np.sum(chosen - np.log(np.exp(logits).sum(-1))))
        found = [value for value, _ in log_likelihoods(decoder, AUTOREGRESSIVE, pairs, batch_size=4)]
        np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("config", [AUTOREGRESSIVE, SLOTS])
@pytest.mark.parametrize("length", [1, 3, 4])
def test_probabilities_of_all_texts_of_a_length_sum_to_one(tiny, config, length):
    texts = list(itertools.product(range(4), repeat=length))
    found = log_likelihoods(tiny, config, [([1, 2, 0], text) for text in texts], batch_size=64)
    values = np.array([value for value, _ in found])
    assert np.exp(values).sum() == pytest.approx(1, abs=1e-5)
    assert values.std() > 0.2  # else a uniform distribution would pass
    assert sum(greedy for _, greedy in found) == 1


def test_slot_order_is_the_product_of_what_the_method_asks_for(tiny):
    """A slot's first token from its mask behind the slots before it, the others one by one inside the slot."""
    prompt, text = [1, 2, 0, 1], [2, 0, 3, 1, 2]
    expected = 0.0
    for start in range(0, len(text), 2):
        before = [*prompt, *text[:start]]
        expected += conditional(tiny, before, at=len(before))[text[start]]
        for j in range(start + 1, min(start + 2, len(text))):
            expected += conditional(tiny, [*prompt, *text[:j]])[text[j]]
    [(found, _)] = log_likelihoods(tiny, SLOTS, [(prompt, text)])
    assert found == pytest.approx(expected, rel=1e-5)
    plain = sum(conditional(tiny, [*prompt, *text[:j]])[text[j]] for j in range(len(text)))
    [(found, _)] = log_likelihoods(tiny, AUTOREGRESSIVE, [(prompt, text)])
    assert found == pytest.approx(plain, rel=1e-5) and abs(plain - expected) > 0.1


def test_batch_padding_and_order_change_nothing(tiny):
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 4, 1 + i % 7).tolist(), rng.integers(0, 4, (5 * i) % 60).tolist()) for i in range(9)]
    alone = [log_likelihoods(tiny, SLOTS, [pair])[0] for pair in pairs]
    together = log_likelihoods(tiny, SLOTS, pairs, batch_size=4)
    np.testing.assert_allclose([v for v, _ in alone], [v for v, _ in together], rtol=1e-5, atol=1e-5)
    assert [g for _, g in alone] == [g for _, g in together]
    assert pairs[0][1] == [] and together[0] == (0.0, True)


def test_model_object_works_in_the_stock_harness(reference):
    """Of a multiple-choice task the most probable choice is taken; texts are joined as other models join them."""
    decoder = random_decoder(262)
    lm = DecoderLM(decoder, AUTOREGRESSIVE, batch_size=4)
    [request] = [Instance("loglikelihood", {}, ("a b ", "c"), 0)]
    [(value, _)] = lm.loglikelihood([request])
    expected = log_likelihoods(decoder, AUTOREGRESSIVE, [(list(b"a b"), list(b" c"))])[0][0]
    assert value == expected
    [rolling] = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("x" * 300,), 0)])
    assert math.isfinite(rolling) and rolling < 0
    short = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("xyz",), 0)])[0]
    begin = decoder.tokenizer.begin_id
    assert short == pytest.approx(log_likelihoods(decoder, AUTOREGRESSIVE, [([begin], list(b"xyz"))])[0][0])

    import datasets

    documents = datasets.Dataset.from_dict({"question": ["one?", "two?"], "choices": [["a", "bc"], ["d", "e"]]})
    task = {
        "task": "choose",
        "custom_dataset": lambda **_: {"test": documents},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    options = dict(tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0)
    for chat in (False, True):
        found = lm_eval.simple_evaluate(model=lm, apply_chat_template=chat, **options)["samples"]["choose"]
        for sample in found:
            values = [value[0][0] for value in sample["resps"]]
            assert sample["acc"] == float(np.argmax(values) == 0) and values[0] != values[1]


def test_likelihoods_are_kept_one_by_one(tmp_path, monkeypatch):
    """A bound's draws are those of the text's number, whatever is computed again."""
    decoder = dataclasses.replace(random_decoder(262), objective=Masked())
    asked = [Instance("loglikelihood", {}, ("a", "xy"[: 1 + i % 2] * (1 + i)), i) for i in range(5)]

    def likelihoods() -> list:
        journal = Journal(tmp_path, "choose")
        lm = DecoderLM(decoder, sampler_config("masked", gen_length=4), batch_size=64, journal=journal)
        found = lm.loglikelihood(asked)
        journal.close()
        return found

    whole, path = likelihoods(), tmp_path / "choose.0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 5
    path.write_text("".join(lines[:2]) + lines[2][:10])  # killed while the third was written
    computed = []

    def counted(*given, numbers):
        computed.extend(numbers)
        return log_likelihoods(*given, numbers=numbers)

    monkeypatch.setattr(likelihood, "log_likelihoods", counted)
    assert likelihoods() == whole and len(computed) == 3
    assert likelihoods() == whole and len(computed) == 3


def test_masked_models_have_the_bound_of_their_objective(tiny):
    decoder = dataclasses.replace(tiny, objective=Masked())
    pairs = [([1, 2], [2, 1, 0, 1]), ([2], [0])]
    found = log_likelihoods(decoder, sampler_config("masked", gen_length=4), pairs, batch_size=4, samples=6)
    model = dataclasses.replace(decoder.model, scan_layers=False)
    prompts, answers = zip(*pairs)
    options = dict(samples=8, batch_size=4)  # whole batches
    expected = bounds.log_likelihood(Masked(), model, decoder.params, prompts, answers, jax.random.key(0), **options)
    assert [value for value, _ in found] == pytest.approx(expected.tolist(), rel=1e-6)
    assert not any(greedy for _, greedy in found) and expected[0] < -1


def test_methods_without_a_likelihood_and_texts_too_long_are_refused(tiny):
    @dataclasses.dataclass(frozen=True)
    class Other:
        method: str = "other"

    with pytest.raises(UserError, match="method other gives no probability"):
        log_likelihoods(tiny, Other(), [([1], [2])])
    with pytest.raises(UserError, match="Text 1 has 140 tokens"):
        log_likelihoods(tiny, SLOTS, [([1], [2]), ([1] * 100, [2] * 40)])
