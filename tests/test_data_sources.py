"""Every kind of source gives the same examples, and bad input is named with its place."""

import json
import os

import numpy as np
import pytest

from refusion_jax.config import DataConfig, SourceConfig
from refusion_jax.data.examples import in_part, prompt_hash
from refusion_jax.data.preparation import prepared
from refusion_jax.data.sources import open_source
from refusion_jax.data.tasks import final_answer
from refusion_jax.data.tokenizers import load_tokenizer
from refusion_jax.errors import UserError
from refusion_jax.prepare import prepare

EXAMPLES = [(f"question {i}?", f"Größe {i}\nanswer {i * i}") for i in range(20)]


def examples(source):
    return [source[i] for i in range(len(source))]


def read_all(source):
    return [example for unit in source.units(10**9) for example in source.read(unit)]


def write(path, kind, records):
    if kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "jsonl":
        path.write_text("\n\n".join(json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8")
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=7)
    elif kind == "array_record":
        from array_record.python.array_record_module import ArrayRecordWriter

        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in records:
            writer.write(json.dumps(record).encode())
        writer.close()


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "array_record"])
def test_files_globs_and_folders(kind, tmp_path):
    records = [{"id": i, "ask": q, "reply": r} for i, (q, r) in enumerate(EXAMPLES)]
    write(tmp_path / f"a.{kind}", kind, records[:12])
    write(tmp_path / f"b.{kind}", kind, records[12:])
    fields = dict(query_field="ask", response_field="reply")
    first = open_source(SourceConfig(kind, str(tmp_path / f"a.{kind}"), **fields))
    assert examples(first) == EXAMPLES[:12]
    for path in (tmp_path, tmp_path / f"*.{kind}"):
        source = open_source(SourceConfig(kind, str(path), **fields))
        assert examples(source) == EXAMPLES
        assert source[13] == EXAMPLES[13]
    documents = open_source(SourceConfig(kind, str(tmp_path), query_field="", response_field="reply"))
    assert documents[5] == (None, EXAMPLES[5][1])
    keys = {first.key(), source.key(), documents.key()}
    assert len(keys) == 3


def test_sample_file(test_data):
    source = open_source(SourceConfig("json", str(test_data / "data" / "query_response_100.json")))
    assert len(source) == 100 and all(query and response for query, response in examples(source))


def test_plain_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8")
    (tmp_path / "b.txt").write_text("three\n", encoding="utf-8")
    assert examples(open_source(SourceConfig("text", str(tmp_path)))) == [(None, "one\n\ntwo"), (None, "three\n")]
    parts = open_source(SourceConfig("text", str(tmp_path), options=(("separator", "\n\n"),)))
    assert examples(parts) == [(None, "one"), (None, "two"), (None, "three")]


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A TFDS data set built on the spot."""
    import tensorflow_datasets as tfds

    class QaPairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict(
                {"ask": tfds.features.Text(), "reply": tfds.features.Text(), "number": np.int64}
            )
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, 12), "test": self._generate_examples(12, 20)}

        def _generate_examples(self, start, stop):
            for i in range(start, stop):
                yield i, {"ask": EXAMPLES[i][0], "reply": EXAMPLES[i][1], "number": i}

    folder = tmp_path_factory.mktemp("tfds")
    QaPairs(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds_by_name_and_by_folder(tfds_folder):
    fields = dict(query_field="ask", response_field="reply")
    by_name = open_source(SourceConfig("tfds", "qa_pairs", options=(("data_dir", str(tfds_folder)),), **fields))
    by_folder = open_source(SourceConfig("tfds", str(tfds_folder / "qa_pairs" / "1.0.0"), split="test", **fields))
    assert sorted(examples(by_name)) == sorted(EXAMPLES[:12])  # TFDS shuffles when it writes
    assert sorted(examples(by_folder)) == sorted(EXAMPLES[12:])
    assert by_name.key() != by_folder.key()
    for file in (tfds_folder / "qa_pairs" / "1.0.0").iterdir():  # as in another machine's copy
        os.utime(file, (0, 0))
    assert open_source(by_folder.config).key() == by_folder.key()
    bad = {
        "split": dict(split="validation", **fields),
        "no field 'question'.*'ask'": dict(query_field="question", response_field="reply"),
        "must be a string": dict(query_field="number", response_field="reply"),
    }
    for message, settings in bad.items():
        source = open_source(SourceConfig("tfds", str(tfds_folder / "qa_pairs" / "1.0.0"), **settings))
        with pytest.raises(UserError, match=message):
            source[0]
    with pytest.raises(UserError, match="no dataset_info.json"):
        open_source(SourceConfig("tfds", str(tfds_folder))).key()
    with pytest.raises(UserError, match="'no_such_set' could not be found or prepared"):
        open_source(SourceConfig("tfds", "no_such_set", options=(("data_dir", str(tfds_folder)),))).key()


def test_procedural_tasks_repeat_and_are_scored():
    source = open_source(SourceConfig("procedural", "gsm_symbolic", size=30, seed=7))
    again = open_source(SourceConfig("procedural", "gsm_symbolic", size=30, seed=7))
    assert examples(source) == examples(again)
    for i in range(30):
        query, response = source[i]
        answer = final_answer(response)
        assert (
            len(response) > len(answer)
            and source.score(i, response) == 1
            and source.score(i, f"so\n#### {answer}") == 1
        )
        assert source.score(i, f"#### 1{answer}") < 1 and source.score(i, "") < 1
    easy = open_source(SourceConfig("procedural", "chain_sum", size=50, options=(("min_terms", 2), ("max_terms", 2))))
    for i in range(50):
        query, response = easy[i]
        assert eval(query.split(":")[1].strip(" =")) == int(response) and easy.score(i, response) == 1
    assert source.key() != open_source(SourceConfig("procedural", "gsm_symbolic", size=30, seed=8)).key()


def test_exact_match_of_file_sources(tmp_path):
    write(tmp_path / "a.json", "json", [{"query": "q", "response": "2 + 3 = 5\n#### 5"}])
    source = open_source(SourceConfig("json", str(tmp_path / "a.json")))
    assert source.score(0, "it is #### 5") == 1 and source.score(0, "#### 6") == 0


def test_parts_are_disjoint_in_prompts_and_cover_the_source():
    config = dict(kind="procedural", path="spell_backward", size=2000)  # words repeat
    train, held_out = (open_source(SourceConfig(**config, start=a, stop=b)) for a, b in ((0, 0.8), (0.8, 1)))
    train_part, held_part = list(train.part()), list(held_out.part())
    assert sorted(train_part + held_part) == list(range(2000)) and 300 < len(held_part) < 500
    prompts = [train[i][0] for i in range(2000)]
    assert len(set(prompts)) < 2000
    assert not {prompts[i] for i in train_part} & {prompts[i] for i in held_part}
    hashes = np.array([prompt_hash(*train[i]) for i in range(2000)], np.uint64)
    assert np.flatnonzero(in_part(hashes, 0.8, 1)).tolist() == held_part


BAD_RECORDS = {
    "missing field": (
        [{"query": "a", "response": "b"}, {"query": "a", "answer": "b"}],
        r"record 1 .*no field 'response'; its fields are 'query', 'answer'",
    ),
    "empty response": ([{"query": "a", "response": " \n"}], r"record 0 .*response.*is empty"),
    "wrong type": ([{"query": "a", "response": 5}], r"record 0 .*'response' is 5, a int"),
    "no text": ([{"query": None, "response": "b"}], r"record 0 .*'query' is None, a NoneType"),
    "not an object": ([["a", "b"]], r"record 0 .*is a list, not an object"),
    "half a character": ([{"query": "\ud800", "response": "b"}], r"record 0 .*'query' is not valid text"),
}


@pytest.mark.parametrize("value", ["1" * 5000, "[" * 100_000 + "]" * 100_000], ids=["digits", "brackets"])
def test_json_that_python_cannot_read_is_named_with_its_place(value, tmp_path):
    good, bad = '{"query": "a", "response": "b"}', f'{{"query": "a", "response": {value}}}'
    (tmp_path / "a.json").write_text(f"[{good}, {bad}]")
    (tmp_path / "a.jsonl").write_text(f"{good}\n{bad}")
    for name, place in (("a.json", r"a\.json: "), ("a.jsonl", r"a\.jsonl, line 2: ")):
        source = open_source(SourceConfig(name.partition(".")[2], str(tmp_path / name)))
        for use in (lambda: examples(source), lambda: read_all(source)):
            with pytest.raises(UserError, match=f"{place}JSON that cannot be read"):
                use()
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    writer.write(bad.encode())
    writer.close()
    with pytest.raises(UserError, match=r"record 0 .*malformed JSON"):
        examples(open_source(SourceConfig("array_record", str(tmp_path / "a.array_record"))))


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_bad_records_are_named(case, tmp_path):
    records, message = BAD_RECORDS[case]
    write(tmp_path / "a.json", "json", records)
    with pytest.raises(UserError, match=message):
        examples(open_source(SourceConfig("json", str(tmp_path / "a.json"))))
    (tmp_path / "a.jsonl").write_text("\n" + "\n".join(map(json.dumps, records)))
    with pytest.raises(UserError, match=rf"a\.jsonl, line {len(records) + 1}"):
        examples(open_source(SourceConfig("jsonl", str(tmp_path / "a.jsonl"))))


def test_malformed_files_are_named(tmp_path):
    cases = {
        "a.json": (
            '[{"query": "a", "response": "b"},\n {"query": "a" "response": "b"}]',
            r"a\.json, line 2, column 16",
        ),
        "b.json": ('{"query": "a", "response": "b"}', r"b\.json holds a JSON dict, not a list"),
        "c.json": ("", r"c\.json, line 1"),
        "d.jsonl": ('{"query": "a", "response": "b"}\n{"query": ', r"d\.jsonl, line 2"),
        "e.parquet": ("not parquet", r"e\.parquet cannot be read as Parquet"),
        "f.array_record": ("not records", r"f\.array_record.* cannot be read as ArrayRecord"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            examples(open_source(SourceConfig(name.partition(".")[2], str(tmp_path / name))))
    (tmp_path / "g.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match=r"g\.txt is not UTF-8"):
        examples(open_source(SourceConfig("text", str(tmp_path / "g.txt"))))


def test_missing_data_is_named(tmp_path):
    for kind in ("json", "jsonl", "text", "parquet", "array_record"):
        with pytest.raises(UserError, match=r"nothing\.x' is missing"):
            open_source(SourceConfig(kind, str(tmp_path / "nothing.x"))).key()
        with pytest.raises(UserError, match="the folder holds no"):
            open_source(SourceConfig(kind, str(tmp_path))).key()
    with pytest.raises(UserError, match="cannot make the task 'no_such_task'"):
        open_source(SourceConfig("procedural", "no_such_task")).key()


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("text", {"seperator": "---"}, "text:.* has the option 'seperator'; .*kind 'text' know 'separator'. Correct"),
        ("text", {"separator": 3}, "text:.* has the option separator = 3; it must be the text"),
        ("json", {"separator": "---"}, "json:.* has the option 'separator'; .*kind 'json' know none"),
        ("jsonl", {"separator": "---"}, "has the option 'separator'"),
        ("parquet", {"separator": "---"}, "has the option 'separator'"),
        ("array_record", {"separator": "---"}, "has the option 'separator'"),
        ("tfds", {"folder": "x"}, "has the option 'folder'; .*kind 'tfds' know 'data_dir'"),
        ("procedural", {"no_such_option": 1}, "cannot make the task 'chain_sum'.*no_such_option"),
        ("procedural", {"max_terms": "x"}, "cannot make the task 'chain_sum'.*max_terms"),
        ("procedural", {"max_terms": 2.5}, "cannot make example 0 of the task 'chain_sum'.*max_terms"),
        ("procedural", {"query_pattern": "("}, r"query_pattern of the task 'chain_sum' is '\('.*missing \)"),
        ("procedural", {"query_pattern": "=$"}, "query_pattern of .* is '=\\$'.* it has no group"),
        ("procedural", {"query_pattern": 5}, "query_pattern of .* is 5.* must be string"),
        ("procedural", {"query_pattern": "(,)"}, r"query_pattern '\(,\)' is not found in the question"),
        ("procedural", {"query_pattern": "(,)?="}, r"query_pattern '\(,\)\?=' is not found .* or its group"),
    ],
    ids=str,
)
def test_options_that_nobody_knows_or_can_use_are_named(kind, options, message):
    config = SourceConfig(kind, "chain_sum" if kind == "procedural" else "anything", options=tuple(options.items()))
    with pytest.raises(UserError, match=message):
        open_source(config)[0]


def test_an_option_that_is_given_twice_is_named():
    with pytest.raises(UserError, match="has the option 'separator' more than once"):
        open_source(SourceConfig("text", "anything", options=(("separator", "a"), ("separator", "b"))))


def test_parquet_names_the_columns(tmp_path):
    write(tmp_path / "a.parquet", "parquet", [{"a": "x", "b": "y"}])
    with pytest.raises(UserError, match=r"a\.parquet has no field 'query'; its fields are 'a', 'b'"):
        examples(open_source(SourceConfig("parquet", str(tmp_path / "a.parquet"), response_field="b")))


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_a_damaged_page_of_a_parquet_file_is_named(compression, tmp_path):
    """By whatever reads it: a run that makes its cache and `prepare` do not blame the place they write to."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.Table.from_pylist([{"query": "q" * 50, "response": f"{i} and the rest"} for i in range(1000)])
    pyarrow.parquet.write_table(table, path, compression=compression, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 100] = b"\xff" * 100
    path.write_bytes(content)
    config = SourceConfig("parquet", str(path))
    tokenizer = load_tokenizer("bytes")
    for use in (
        lambda: examples(open_source(config)),
        lambda: prepared(open_source(config), tokenizer, tmp_path / "cache"),
        lambda: prepare(DataConfig(train=(config,)), tmp_path / "store"),
    ):
        with pytest.raises(UserError, match=r"a\.parquet.* cannot be read as Parquet: .* Write it again"):
            use()


def test_unreadable_file(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UserError, match=r"a\.json' cannot be read"):
        open_source(SourceConfig("json", str(tmp_path))).key()
