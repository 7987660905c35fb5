"""Evaluation: what is scored, counted, resumed and refused, on a random byte-level model in a run's folder."""

import dataclasses
import json
import re
import shutil

import micro
import numpy as np
import pytest

pytest.importorskip("lm_eval")
import lm_eval  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from refusion_jax import decoder as decoder_lib  # noqa: E402
from refusion_jax import evaluate  # noqa: E402
from refusion_jax.checkpoint import orbax  # noqa: E402
from refusion_jax.config import Config, load_config  # noqa: E402
from refusion_jax.errors import UserError  # noqa: E402
from refusion_jax.evaluation import documents, run, tasks  # noqa: E402
from refusion_jax.evaluation.journal import Journal, Record  # noqa: E402
from refusion_jax.evaluation.likelihood import log_likelihoods  # noqa: E402
from refusion_jax.evaluation.model import DecoderLM  # noqa: E402
from refusion_jax.settings import build  # noqa: E402

# The same for all tests, so that the programs are compiled once.
SETTINGS = {"gen_length": 16, "slot_size": 4, "slot_threshold": 0.5, "token_threshold": 0.3, "speculate": "off"}
FLAGS = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
FLAGS += ["--batch-size", "2"]
QUERIES = [f"query {i}" for i in range(12)]

# A document of every benchmark, a right answer and a wrong one.
CASES = {
    "gsm8k": (
        {"question": "How many?", "answer": "6 * 203 = 1218\n#### 1,218"},
        "First 600, then 618. The answer is $1218.",
        "The answer is 1217, not 1218 as one might think, so the answer is 1217.",
    ),
    "math": (
        {"problem": "One half?", "solution": r"It is $\boxed{\frac{1}{2}}$."},
        r"Therefore it is $\boxed{\frac{2}{4}}$",
        r"$\boxed{2}$",
    ),
    "mmlu_pro": (
        {"question": "Which?", "options": ["one", "two"], "answer": "B"},
        "Because of two the answer is (B).",
        "the answer is (A). Or B",
    ),
    "arc_challenge": (
        {"question": "Which?", "choices": {"text": ["w", "x", "y", "z"]}, "answerKey": "3"},
        " C",
        " A",
    ),
    "gpqa": (
        {"Question": "Which?", "Correct Answer": "yes"} | {f"Incorrect Answer {i}": f"no {i}" for i in (1, 2, 3)},
        None,  # depends on how they are shuffled
        "(E)",
    ),
    "humaneval": (
        {
            "prompt": "import math\n\ndef root(x):\n    '''The root.'''\n",
            "entry_point": "root",
            "test": "def check(f):\n    assert f(9) == 3",
        },
        "def root(x):\n    return math.isqrt(x)\n```\nThat is all.",
        "def root(x):\n    return x\n```",
    ),
    "mbpp": (
        {"text": "Add two numbers.", "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]},
        "```python\ndef add(a, b):\n    return a + b\n```\n[DONE]",
        "def add(a, b):\n    return a\n[DONE]",
    ),
}


@pytest.fixture(scope="module")
def checkpoint(repository, tmp_path_factory) -> str:
    """The folder of a run of tests/micro.py whose large random weights are sure of what they say."""
    folder = tmp_path_factory.mktemp("run")
    source = {"kind": "json", "path": str(folder / "data.json")}
    (folder / "data.json").write_text(json.dumps([{"query": q, "response": "nothing like it"} for q in QUERIES]))
    config = load_config(f"{repository}/tests/micro.py:data={source['path']}")
    data = dataclasses.replace(config.data, evaluation=(dataclasses.replace(config.data.evaluation[0], stop=1.0),))
    model = dataclasses.replace(config.model, max_position_embeddings=128)
    config = dataclasses.replace(config, model=model, data=data)
    micro.save_run(folder, config)
    return str(folder)


@pytest.fixture(scope="module")
def decoder(checkpoint) -> decoder_lib.Decoder:
    return decoder_lib.Decoder.load(checkpoint)


@pytest.fixture
def loaded(decoder, monkeypatch):
    """The command takes the model that is loaded already."""
    monkeypatch.setattr(decoder_lib.Decoder, "load", lambda *_, **__: decoder)


def start(checkpoint, out, *arguments) -> dict:
    """Runs the command; what it leaves in results.json."""
    evaluate.main(["--checkpoint", checkpoint, "--out", str(out), *FLAGS, *map(str, arguments)])
    return json.loads((out / "results.json").read_text())


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Echo(LM):
    """Says what it was told to say."""

    def __init__(self, answers: list[str]):
        super().__init__()
        self.answers = answers
        self.asked: list[tuple] = []

    tokenizer_name = "echo"

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return json.dumps(chat_history)

    def generate_until(self, requests):
        self.asked = [request.args for request in requests]
        return self.answers

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


# --- What is right.


@pytest.mark.parametrize("name", CASES)
def test_right_answers_of_every_benchmark_score_all_and_wrong_ones_nothing(name):
    benchmark = tasks.BENCHMARKS[name]
    document, right, wrong = CASES[name]
    assert set(benchmark.fields) <= set(document)
    chosen = [benchmark.prepared(document, index) for index in range(6)]
    rights = [right or f"I think ({of['answer']})." for of in chosen]
    for answers, expected in ((rights, 1.0), ([wrong] * 6, 0.0), ([""] * 6, 0.0)):
        lm = Echo(answers)
        samples = run.samples_of(benchmark, chosen, run.texts_of(lm, benchmark, chosen))
        assert [sample.score for sample in samples] == [expected] * 6, samples
    context, settings = lm.asked[0]
    assert settings["until"] == list(benchmark.until)
    messages = json.loads(context)
    assert [m["role"] for m in messages] == ["system"] * bool(benchmark.description) + ["user"] + (
        ["assistant"] * bool(benchmark.prefix)
    )
    # The stock harness judges our tasks alike.
    found = lm_eval.simple_evaluate(
        model=Echo(rights[:3] + [wrong] * 3),
        tasks=[run.config_of(benchmark, chosen)],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
        confirm_run_unsafe_code=True,
    )
    assert found["results"][name]["exact_match,none"] == 0.5


def test_options_of_gpqa_are_shuffled_and_the_right_one_is_followed():
    document = CASES["gpqa"][0]
    prepared = [tasks.gpqa_prepared(document, index) for index in range(40)]
    assert {of["answer"] for of in prepared} == set("ABCD")
    assert all(of["options"]["ABCD".index(of["answer"])] == "yes" for of in prepared)
    assert prepared == [tasks.gpqa_prepared(document, index) for index in range(40)]


def test_a_body_alone_completes_humaneval_s_function():
    document, _, _ = CASES["humaneval"]
    benchmark = tasks.BENCHMARKS["humaneval"]
    found = run.verdicts(benchmark, [document] * 2, ["    return math.isqrt(x)\n", "\nreturn 3"])
    assert [score for _, score in found] == [1.0, 0.0] and "SyntaxError" in found[1][0]


def test_procedural_tasks_give_all_to_their_own_answers():
    pytest.importorskip("reasoning_gym")
    for name in documents.SUITE:
        [(benchmark, found)] = documents.load(name, {}, "", None)
        texts = [document["response"] for document in found[:5]]
        samples = run.samples_of(benchmark, found[:5], texts)
        assert [sample.score for sample in samples] == [1.0] * 5, name


# --- What is counted.


def test_answers_are_those_of_generate_and_figures_their_sums(loaded, checkpoint, decoder, tmp_path, capsys):
    """Held-out queries, of which the model says two as they are written."""
    answers = decoder.generate(QUERIES, batch_size=2, **SETTINGS)
    benchmark, found = documents.load("held_out", {}, checkpoint, None)[0]
    assert [document["query"] for document in found] == QUERIES
    result = start(checkpoint, tmp_path / "out", "--tasks", "held_out")[benchmark.name]
    [path] = (tmp_path / "out" / "samples").iterdir()
    samples = lines_of(path)
    assert [sample["text"] for sample in samples] == [answer.text for answer in answers]
    assert result["tokens"] == sum(len(answer.generation.tokens) for answer in answers)
    assert result["forwards"] == sum(answer.generation.forwards + 1 for answer in answers)  # a prompt: one pass
    assert result["seconds"] > 0 and result["accuracy"] == 0 and result["examples"] == 12
    shown = capsys.readouterr().out
    assert f"{result['tokens_per_forward']:.2f}" in shown and "0.0 ± 0.0" in shown


def test_accuracy_has_the_standard_error_of_a_mean():
    samples = [run.Sample(i, "", "", "", float(i < 3)) for i in range(10)]
    records = [Record(str(i), tokens=2, forwards=1, seconds=0.5, process=i % 2) for i in range(10)]
    result = run.result_of("task", "method", samples, records)
    assert result.accuracy == 0.3 and result.error == pytest.approx((0.3 * 0.7 / 9) ** 0.5)
    assert result.seconds == 2.5 and result.tokens_per_second == 8  # two processes at the same time


def test_stop_strings_end_answers_where_the_whole_one_would_be_cut(decoder):
    lm = DecoderLM(decoder, decoder.settings(**SETTINGS), batch_size=4)
    ask = lambda until: [
        lm_eval.api.instance.Instance("generate_until", {}, (query, {"until": until}), 0, ("task", i, 1))
        for i, query in enumerate(QUERIES[:6])
    ]
    whole = lm.generate_until(ask([]))
    counts = [record.tokens for record in lm.records]
    stop = next(text for text in whole if len(text) > 4)[2:4]
    cut = lm.generate_until(ask([stop, ""]))
    assert cut == [text.partition(stop)[0] for text in whole] and cut != whole
    for text, before, record in zip(cut, counts, lm.records):
        assert record.tokens <= before and (stop not in text)
        if len(text) > 0 and text not in whole:
            assert decoder.tokenizer.decode(decoder.tokenizer.encode(text)) == text
            assert record.tokens <= len(text.encode())
    assert sum(record.tokens for record in lm.records) < sum(counts)


def test_prompts_without_room_are_counted_and_named(loaded, checkpoint, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    long = {"question": "long " * 40, "answer": "#### 1"}
    with data.open("w") as file:
        for document in ({"question": "q", "answer": "#### 1"}, long, {"question": "r", "answer": "#### 1"}):
            file.write(json.dumps(document) + "\n")
    # The prompt alone is longer than the model's positions: all three fail with the benchmark's own wording.
    result = start(checkpoint, tmp_path / "out", "--tasks", "gsm8k", "--data", f"gsm8k={data}")["gsm8k"]
    assert set(result["failed"]) == {"0", "1", "2"} and result["accuracy"] == 0
    assert "more than the model's 128" in result["failed"]["1"]
    shown = capsys.readouterr().out
    assert "gsm8k, prompt 1 failed: The prompt has" in shown and "published" in shown


def test_options_are_chosen_by_the_method_s_likelihood(loaded, checkpoint, decoder, tmp_path):
    """Per character, and the accuracy is that of the choices; a method that gives no probability is refused."""
    endings = ["a", "bc", "def", "gh ij"]
    texts = [{"ctx": query, "endings": endings, "label": str(i % 4)} for i, query in enumerate(QUERIES[:5])]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(text) + "\n" for text in texts))
    arguments = ["--tasks", "hellaswag", "--data", f"hellaswag={data}"]
    result = start(checkpoint, tmp_path / "out", *arguments)["hellaswag"]
    encode = decoder.tokenizer.encode
    pairs = [(decoder.tokenizer.encode_prompt(text["ctx"]), encode(ending)) for text in texts for ending in endings]
    values = [value for value, _ in log_likelihoods(decoder, decoder.settings(**SETTINGS), pairs, batch_size=2)]
    per_character = np.reshape(values, (5, 4)) / [len(ending) for ending in endings]
    best = np.argmax(per_character, axis=1)
    said = [sample["text"] for sample in lines_of(tmp_path / "out" / "samples" / "hellaswag.jsonl")]
    assert said == [endings[i] for i in best]
    assert result["accuracy"] == np.mean(best == np.arange(5) % 4) and result["tokens"] == 0
    with pytest.raises(UserError, match="The method speculative gives no probability of a text"):
        evaluate.main(
            ["--checkpoint", checkpoint, "--out", str(tmp_path / "no"), *arguments, "--method", "speculative"]
        )


# --- What is kept.


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_killed_evaluation_goes_on_and_ends_as_an_uninterrupted_one(loaded, checkpoint, tmp_path, temperature):
    arguments = ["--tasks", "held_out", "--temperature", temperature]
    start(checkpoint, tmp_path / "whole", *arguments)
    [whole] = (tmp_path / "whole" / "samples").iterdir()
    [answers] = (tmp_path / "whole" / "answers").glob("*.0.jsonl")
    kept = answers.read_bytes()
    for size in (0, len(kept) // 2, len(kept)):  # nothing, up to the middle of a line, everything
        out = tmp_path / f"out{size}"
        (out / "answers").mkdir(parents=True)
        (out / "answers" / answers.name).write_bytes(kept[:size])
        start(checkpoint, out, *arguments)
        assert (out / "samples" / whole.name).read_bytes() == whole.read_bytes()
        found = (out / "answers" / answers.name).read_bytes()
        assert found.startswith(kept[:size].rpartition(b"\n")[0]) and len(found.splitlines()) == len(QUERIES)
    with pytest.raises(UserError, match="begun with slot_threshold = 0.5, not 0.9"):
        start(checkpoint, tmp_path / "whole", *arguments, "--slot-threshold", "0.9")


def test_answers_of_older_weights_are_not_taken_for_those_of_newer_ones(loaded, checkpoint, tmp_path):
    newer = shutil.copytree(checkpoint, tmp_path / "run")
    start(str(newer), tmp_path / "out", "--tasks", "held_out", "--limit", "1")
    micro.save_run(newer, build(Config, orbax.read_meta(newer)["config"], "config"), step=2)
    with pytest.raises(UserError, match="begun with weights = .*Choose another --out"):
        start(str(newer), tmp_path / "out", "--tasks", "held_out", "--limit", "1")


def test_documents_that_are_added_leave_the_others_alone(loaded, checkpoint, tmp_path):
    arguments = ["--tasks", "held_out", "--temperature", "1"]
    start(checkpoint, tmp_path / "some", *arguments, "--limit", "5")
    more = start(checkpoint, tmp_path / "some", *arguments)
    assert {name: result["examples"] for name, result in more.items()} == {name: 12 for name in more}
    start(checkpoint, tmp_path / "all", *arguments)
    read = lambda out: [path.read_bytes() for path in (tmp_path / out / "samples").iterdir()]
    assert read("some") == read("all")


def test_damaged_answers_are_named(tmp_path):
    (tmp_path / "task.0.jsonl").write_text('{"key": "a"}\nnothing\n{"key": "b"}\n')
    with pytest.raises(UserError, match="task.0.jsonl line 2 is no answer"):
        Journal(tmp_path, "task")


# --- What is refused.


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "gsm8"], "no task 'gsm8'; the closest are gsm8k"),
        (["--tasks", ","], "name at least one"),
        (["--tasks", "humaneval", "--data", "humaneval=DATA"], "Say --run-code if"),
        (["--tasks", "gsm8k", "--data", "gsm8k=absent.jsonl"], "Cannot read absent.jsonl"),
        (["--tasks", "gsm8k", "--data", "gsm9k=DATA"], "write TASK=FILE.jsonl with one of"),
        (["--tasks", "gsm8k", "--data", "DATA"], "write TASK=FILE.jsonl"),
        (["--tasks", "gsm8k", "--data", "gsm8k=BAD"], "bad.jsonl line 2: malformed JSON at column 2"),
        (
            ["--tasks", "mbpp", "--data", "mbpp=DATA"],
            "data.jsonl line 1: the task mbpp needs the fields text, test_list",
        ),
        (["--tasks", "held_out", "--limit", "-1"], "--limit is -1"),
        (["--tasks", "held_out", "--settings", "absent.json"], "Cannot read --settings absent.json"),
        (["--tasks", "held_out", "--settings", "DATA"], "Cannot read --settings|has no setting"),
        (["--tasks", "held_out", "--settings", "MISTYPED"], "has settings for 'spel_backward', which is no task"),
        (["--tasks", "held_out", "--settings", "MIXED"], "'gsm8k' = 5 beside settings by task"),
        (["--tasks", "held_out", "--settings", "TYPED"], "temperature is '0.5' .str.; expected float"),
        (["--tasks", "held_out", "--batch-size", "0"], "batch_size is 0"),
        (["--tasks", "held_out", "--seed", "-1"], "seed is -1"),
        (["--tasks", "gsm8k", "--data", "gsm8k=ODD"], "odd.jsonl: document 2 is not as the task gsm8k takes it"),
    ],
)
def test_bad_arguments_are_named(loaded, checkpoint, tmp_path, arguments, message):
    humaneval = CASES["humaneval"][0]
    (tmp_path / "data.jsonl").write_text(json.dumps(humaneval | CASES["gsm8k"][0]) + "\n")
    (tmp_path / "bad.jsonl").write_text(json.dumps(CASES["gsm8k"][0]) + "\n{'question': 1}\n")
    odd = [CASES["gsm8k"][0], {"question": "How many?", "answer": "None."}]
    (tmp_path / "odd.jsonl").write_text("\n".join(map(json.dumps, odd)))
    settings = {
        "MISTYPED": {"spel_backward": {"slot_threshold": 0.5}},
        "MIXED": {"spell_backward": {}, "gsm8k": 5},
        "TYPED": {"temperature": "0.5"},
    }
    for name, values in settings.items():
        (tmp_path / name).write_text(json.dumps(values))
    files = {"DATA": "data.jsonl", "BAD": "bad.jsonl", "ODD": "odd.jsonl"} | dict(zip(settings, settings))
    places = {name: str(tmp_path / file) for name, file in files.items()}
    arguments = [re.sub("|".join(places), lambda m: places[m.group()], argument) for argument in arguments]
    with pytest.raises(UserError, match=message):
        start(checkpoint, tmp_path / "out", *arguments)


@pytest.mark.parametrize("given", [{"batch_size": 0}, {"seed": -1}, {"seed": 2**32}], ids=str)
def test_bad_batches_and_seeds_are_named(decoder, given):
    ((name, value),) = given.items()
    with pytest.raises(UserError, match=f"{name} is {value}"):
        DecoderLM(decoder, decoder.settings(), **given)


def test_data_that_cannot_be_had_say_how_to_give_them(monkeypatch):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"mbpp .*Couldn't reach the hub.*--data mbpp=FILE.jsonl, with the fields text"):
        documents.load("mbpp", {}, "", None)


def test_settings_come_from_flags_then_file_then_authors(decoder, tmp_path):
    benchmark = tasks.BENCHMARKS["math"]
    parse = lambda *words: evaluate.arguments_of(["--checkpoint", "x", "--tasks", "math", "--out", "o", *words])
    of = lambda tuned, *words: evaluate.config_of(parse(*words), decoder, benchmark, [{}], tuned)
    given = ["--authors", "--gen-length", "64", "--blocks", "1"]
    assert (of({}, *given).slot_size, of({}, *given).token_threshold) == (32, 0.6)
    assert of({"token_threshold": 0.2}, *given).token_threshold == 0.2
    assert of({"math": {"token_threshold": 0.3}, "mbpp": {"token_threshold": 1.0}}, *given).token_threshold == 0.3
    assert of({"token_threshold": 0.2}, *given, "--token-threshold", "0.7").token_threshold == 0.7
    autoregressive = of({}, "--authors", "--gen-length", "64", "--method", "autoregressive")
    assert autoregressive.method == "autoregressive" and autoregressive.gen_length == 64


# --- Several processes.


def in_processes(count, folder, command) -> list[str]:
    """What each of so many processes printed."""
    from processes import finish
    from processes import start as start_processes

    folder.mkdir()
    codes, texts = finish(start_processes(command, folder=folder, processes=count, devices=1), folder)
    assert codes == [0] * count, texts
    return texts


def test_two_processes_give_what_one_does(checkpoint, decoder, tmp_path):
    command = ["-m", "refusion_jax.evaluate", "--checkpoint", checkpoint, "--tasks", "held_out", *FLAGS]
    texts = in_processes(2, tmp_path / "logs", [*command, "--out", tmp_path / "out"])
    [path] = (tmp_path / "out" / "samples").iterdir()
    expected = [answer.text for answer in decoder.generate(QUERIES, batch_size=2, **SETTINGS)]
    assert [sample["text"] for sample in lines_of(path)] == expected
    shares = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "out" / "answers").glob("*.jsonl"))]
    assert shares == [6, 6]
    assert "accuracy" in texts[0] and "accuracy" not in texts[1]


def test_two_processes_answer_a_file_in_its_order(checkpoint, decoder, tmp_path):
    """With one part finished by half, as a kill leaves it: no answer is decoded twice, none is lost."""
    out, prompts = tmp_path / "out.jsonl", tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": query}) + "\n" for query in QUERIES[:7]))
    kept = [{"prompt": QUERIES[i], "text": f"kept {i}"} for i in (1, 3)]
    out.with_name("out.jsonl.1-of-2").write_text("".join(json.dumps(line) + "\n" for line in kept))
    command = ["-m", "refusion_jax.generate", "--checkpoint", checkpoint, "--temperature", "1", *FLAGS]
    in_processes(2, tmp_path / "logs", [*command, "--prompts", prompts, "--out", out, "--resume"])
    found = lines_of(out)
    assert [line["prompt"] for line in found] == QUERIES[:7]
    expected = [answer.text for answer in decoder.generate(QUERIES[:7], batch_size=2, temperature=1.0, **SETTINGS)]
    expected[1], expected[3] = "kept 1", "kept 3"
    assert [line["text"] for line in found] == expected
    assert sorted(path.name for path in tmp_path.glob("out.jsonl*")) == ["out.jsonl"]
