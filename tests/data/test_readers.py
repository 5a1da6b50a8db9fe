"""Every kind of file and folder gives the rows of plain JSONL; what cannot be read is one line."""

import csv
import gzip
import hashlib
import json
import re
import shutil

import datasets
import pytest

from sa_jax.data.readers import is_missing
from sa_jax.data.sources import current_digest, load_rows
from sa_jax.errors import UserError

ROWS = [
    {"prompt": "What is 2+2?", "response": "4"},
    {"prompt": "Say\nNone; please,\tnow", "response": "None"},
    {"prompt": 'A "quoted", é 中 prompt', "response": "1,5; or\t2"},
    {"prompt": "d", "response": "e"},
    {"prompt": "f", "response": "g"},
]


def plain(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(path, delimiter):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "response"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def zipped(content):
    return gzip.compress(content, mtime=0)  # the names of tests may not change


def used(source):
    return [{name: row[name] for name in row if name != "source"} for row in source]


@pytest.fixture
def expected(tmp_path):
    return used(load_rows(plain(tmp_path / "oracle.jsonl")))


# ---- Files.


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_a_table_may_have_another_delimiter(tmp_path, expected, name, delimiter):
    source = load_rows(table(tmp_path / name, delimiter))
    assert used(source) == expected
    assert [row["source"] for row in source][:2] == [f"{tmp_path}/{name}:{n}" for n in (2, 4)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
def test_compressed_files_are_those_inside(tmp_path, expected, name):
    file = tmp_path / name
    if name in ("a.csv", "a.tsv"):
        table(file, "," if name == "a.csv" else "\t")
    elif name == "a.json":
        file.write_text(json.dumps(ROWS))
    else:
        plain(file)
    half = len(file.read_bytes()) // 2  # a file may be compressed in parts, one after another
    parts = [zipped(part) for part in (file.read_bytes()[:half], file.read_bytes()[half:])]
    for suffix in (".gz", ".GZ"):
        outside = tmp_path / f"{name}{suffix}"
        outside.write_bytes(b"".join(parts))
        source, inside = load_rows(outside), load_rows(file)
        assert used(source) == expected == used(inside)
        places = [row["source"].replace(suffix, "") for row in source]
        assert places == [row["source"] for row in inside]
        assert source.sha256 == hashlib.sha256(b"".join(parts)).hexdigest() != inside.sha256


WHOLE = zipped(b'{"prompt": "x", "response": "y"}\n' * 9)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", WHOLE[:-9], "a.jsonl.gz is damaged or not gzip; copy it again: .*ended bef"),
        ("a.jsonl.gz", WHOLE[:-8] + b"0000" + WHOLE[-4:], "is damaged.*CRC check failed"),
        ("a.jsonl.gz", WHOLE[:12] + b"\xff" + WHOLE[13:], "is damaged or not gzip; copy it again"),
        ("a.jsonl.gz", b'{"prompt": "x", "response": "y"}\n', "not gzip.*: Not a gzipped file"),
        ("a.csv.gz", zipped(b"\n"), "a.csv.gz is empty"),
        ("a.jsonl.gz", zipped(b'{"prompt": 4}\n{'), "a.jsonl.gz:1: "),
        ("a.parquet.gz", WHOLE, r"cannot read .parquet.gz; use .*\.parquet"),
        ("a.jsonl.zst", b"x", "cannot read .jsonl.zst; use .json"),
        # No delimiter is guessed from what stands in quotes, and a wrong one gives no row.
        ("a.csv", b'"prompt;response"\n"q;a"\n', "its columns are prompt;response;"),
        ("a.csv", b"prompt;response\nq,a\n", "a.csv:2: .*2 fields of the header .prompt, response"),
        ("a.csv", b"prompt;response\nq;a;b\n", "a.csv:2: .*2 fields of the header"),
        ("a.csv", b"prompt,response\nq;a\n", "a.csv:2: .*2 fields of the header"),
        ("a.csv", b"prompt, long;response\nq, r;a\n", "its columns are prompt,  long;response"),
        ("a.csv", b"sep=;\nprompt;response\nq;a\n", "its columns are sep=, ;"),
        ("a.tsv", b"prompt\tresponse\nq\n", "a.tsv:2: .*2 fields of the header"),
        ("a.tsv", b'prompt\tresponse\n"Hi" he said\ta\n', "not valid CSV after line 1"),
        ("a.csv", "prompt;response\r\nq;a\r\n".encode("utf-16"), "a.csv: not UTF-8"),
    ],
)
def test_damaged_and_doubtful_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_rows(tmp_path / name)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_comma_inside_the_quotes_of_a_header_is_no_delimiter(tmp_path):
    (tmp_path / "a.csv").write_text('"prompt, whole";"answer"\nq, r;a\n')
    columns = {"prompt": "prompt, whole", "response": "answer"}
    (row,) = load_rows(tmp_path / "a.csv", columns)
    assert (row["prompt"], row["response"]) == ("q, r", "a")


# ---- Folders of Parquet files.

HASH, UUID = "a09b74b3ef9c3b56", "3f2504e0-4f89-11d3-9a0c-0305e82c3301"


def shards(folder, *names, rows=ROWS):
    """Parquet files of these names, with the rows in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_list(rows)
    for index, name in enumerate(names):
        part = data.shard(len(names), index, contiguous=True)
        part.to_parquet(str(folder / f"{name}.parquet"))
    return folder


@pytest.mark.parametrize(
    "names",
    [
        [f"train-0000{i}-of-00003" for i in range(3)],
        [f"train-0000{i}-of-00002-{HASH}" for i in range(2)],
        ["train"],
        ["0000", "0001"],
        ["part-0", "part-1"],
        [f"part-0000{i}-{UUID}-c000.snappy" for i in range(2)],
    ],
)
@pytest.mark.parametrize("inside", ["", "data"])
def test_a_folder_of_parquet_files_is_one_source(tmp_path, expected, names, inside):
    folder = shards(tmp_path / "set" / inside, *names)
    (tmp_path / "set/README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "set/.cache/huggingface").mkdir(parents=True)
    source = load_rows(tmp_path / "set")
    assert used(source) == expected == used(load_rows(folder))
    assert source.path == str(tmp_path / "set")
    assert source.rows[0]["source"] == f"{folder / names[0]}.parquet row 1"
    assert f"{folder / names[-1]}.parquet row" in source.rows[-1]["source"]


def test_a_folder_with_several_splits_asks_for_one(tmp_path, expected):
    folder = shards(
        tmp_path / "set", "test-00000-of-00001", rows=[{"prompt": "t", "response": "u"}]
    )
    shards(folder, "train-00000-of-00002", "train-00001-of-00002")
    said = re.escape(f"{folder}: name one of its splits: {folder}@test, {folder}@train")
    for name in (folder, f"{folder}@dev", f"{folder}@"):
        with pytest.raises(UserError, match=f"^{said}$"):
            load_rows(name)
    assert used(load_rows(f"{folder}@train")) == expected
    assert [row["prompt"] for row in load_rows(f"{folder}@test")] == ["t"]
    shards(tmp_path / "words", "mmlu5shot-train", "mmlu5shot-test")  # these are no shards of one
    with pytest.raises(UserError, match="words@mmlu5shot-test, .*words@mmlu5shot-train$"):
        load_rows(tmp_path / "words")


def test_the_digest_of_a_folder_is_of_the_files_that_are_read(tmp_path):
    folder = shards(tmp_path / "set", *(f"train-0000{i}-of-00002" for i in range(2)))
    first = load_rows(f"{folder}@train").sha256
    shards(folder, "test-00000-of-00001")
    assert load_rows(f"{folder}@train").sha256 == first == current_digest(f"{folder}@train", None)
    files = [folder / f"train-0000{i}-of-00002.parquet" for i in range(2)]
    content = b"".join(file.read_bytes() for file in files)
    assert first == hashlib.sha256(content).hexdigest()
    shards(folder, *(f"train-0000{i}-of-00002" for i in range(2)), rows=ROWS[::-1])
    assert load_rows(f"{folder}@train").sha256 != first
    assert load_rows(f"{folder}@train").sha256 == current_digest(f"{folder}@train", None)


def test_what_is_wrong_in_a_folder_is_one_line(tmp_path):
    def refused(name, words):
        with pytest.raises(UserError, match=words) as caught:
            load_rows(f"{tmp_path}/{name}")
        assert "\n" not in str(caught.value)

    names = [f"train-0000{i}-of-00003" for i in range(3)]
    second = shards(tmp_path / "set", *names) / f"{names[1]}.parquet"
    second.unlink()
    refused("set", f"set has 2 files of the split 'train', but .*{names[0]}.parquet is one of 3; ")
    second.write_bytes(b"")
    refused("set", f"set/{names[1]}.parquet is empty")
    second.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused("set", f"set/{names[1]}.parquet is not a readable parquet file")
    shards(tmp_path / "set", names[1], rows=[{"question": "q", "answer": "a"}])
    refused("set", f"{names[1]}.parquet row 1: field 'prompt' is missing; .* question, answer$")
    datasets.Dataset.from_list(ROWS).select([]).to_parquet(str(second))
    assert len(load_rows(tmp_path / "set").rows) == 3  # of the others
    shards(tmp_path / "none", "train")
    shutil.copy(second, tmp_path / "none/train.parquet")
    refused("none@train", "none@train has no rows")
    shards(tmp_path / "sets/main", "train")
    shards(tmp_path / "sets/other", "train")
    refused("sets@train", "sets: name one of its folders: .*sets/main, .*sets/other$")
    (tmp_path / "lines").mkdir()
    plain(tmp_path / "lines/rows.jsonl")
    for name in ("lines", "lines@train"):
        refused(name, "lines is a folder; name a file in it")
    for name in ("lines/rows.jsonl@train", "none/none@train"):
        refused(name, f"no such file: .*{name}")


def test_a_file_or_folder_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain(tmp_path / "rows.jsonl.gz")
    (tmp_path / "a@b").mkdir()
    for name in ("rows.jsonl.gz", "a@b", "a@b@train", "org/name", "org/name:sub@train", tmp_path):
        assert not is_missing(str(name))
    for name in ("none.jsonl.gz", "none.tsv", "a/b/c", "a/b/c@train", f"{tmp_path}/c@train"):
        assert is_missing(name)


# ---- Saved folders.


def test_a_split_of_a_saved_folder(tmp_path, expected):
    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict(train=data.select([0]), dev=data).save_to_disk(tmp_path / "set")
    source = load_rows(f"{tmp_path}/set@dev")
    assert used(source) == expected == used(load_rows(tmp_path / "set/dev"))
    assert source.rows[0]["source"] == f"{tmp_path}/set@dev row 1"
    assert used(load_rows(f"{tmp_path}/set@train")) == expected[:1]
    with pytest.raises(UserError, match="set has no split 'test'; name the folder of a split"):
        load_rows(f"{tmp_path}/set@test")
    data.save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match="one has no splits; leave out @train"):
        load_rows(f"{tmp_path}/one@train")
    before = current_digest(f"{tmp_path}/set@dev", None)
    assert before == source.sha256
    shutil.rmtree(tmp_path / "set")
    assert current_digest(f"{tmp_path}/set@dev", None) is None
    datasets.DatasetDict(dev=data.select([0, 2])).save_to_disk(tmp_path / "set")
    assert current_digest(f"{tmp_path}/set@dev", None) not in (before, None)


# ---- Rows of TRL.


def turn(role, content):
    return {"role": role, "content": content}


def test_prompts_and_completions_of_trl_are_conversations(tmp_path):
    system, question, answer = turn("system", "s"), turn("user", "q"), turn("assistant", "a")
    rows = [
        {"prompt": [question], "completion": [answer], "id": 1},
        {"prompt": [system, question], "completion": [answer], "extra": None},
        {"prompt": [question], "completion": [answer, turn("user", "r"), turn("assistant", "b")]},
    ]
    messages = [{"messages": [*row["prompt"], *row["completion"]]} for row in rows]
    oracle = load_rows(plain(tmp_path / "oracle.jsonl", messages))
    assert oracle.rows[2]["history"] == [question, answer]
    path = plain(tmp_path / "trl.jsonl", rows)
    assert load_rows(path).rows == [
        {**row, "source": row["source"].replace("oracle", "trl")} for row in oracle
    ]
    data = datasets.Dataset.from_list(
        [{k: row[k] for k in ("prompt", "completion")} for row in rows]
    )
    data.to_parquet(str(tmp_path / "trl.parquet"))
    assert used(load_rows(tmp_path / "trl.parquet")) == used(oracle)
    # TRL does not train on an answer in the prompt.
    rows[1]["prompt"] = [question, answer, turn("user", "r")]
    source = load_rows(plain(path, rows))
    assert source.dropped == {"turn_weight": 1} and len(source.rows) == 2
    prompts = load_rows(path, responses=False)
    assert [row["prompt"] for row in prompts] == ["q", "r", "q"] and prompts.dropped == {}
    assert prompts.rows[1]["history"] == [question, answer]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": [turn("user", "q")], "completion": "a"}, "field 'prompt' is list, not text"),
        (
            {"prompt": [turn("user", "q")], "completion": [turn("user", "q")]},
            "does not end with an",
        ),
        ({"prompt": [], "completion": [turn("assistant", "a")]}, "has no user turn before"),
        ({"prompt": ["q"], "completion": ["a"]}, "message 0 is not an object"),
        ({"chosen": [turn("user", "q")]}, "for a list of turns --config.columns.messages=COLUMN"),
    ],
)
def test_rows_that_are_not_quite_of_trl(tmp_path, fields, words):
    with pytest.raises(UserError, match=f"rows.jsonl:1: .*{words}"):
        load_rows(plain(tmp_path / "rows.jsonl", [fields]))
