"""Every file kind gives the same rows; every kind of bad input names its file, place and field."""

import json

import datasets
import pytest

from sa_jax.data.sources import load_rows
from sa_jax.errors import UsageError, UserError

ROWS = [
    {"prompt": "What is 2+2?", "response": "4"},
    {"prompt": "Say\nNone, please", "response": "None"},
    {"prompt": 'A "quoted", é 中 prompt', "response": "yes"},
]


def jsonl(path, *lines: str):
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_the_same_rows_from_every_kind_of_file(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(ROWS))
    elif suffix == "jsonl":
        jsonl(path, *(json.dumps(row, ensure_ascii=False) for row in ROWS))
    else:
        table = datasets.Dataset.from_list(ROWS)
        (table.to_csv if suffix == "csv" else table.to_parquet)(str(path))
    source = load_rows(path)
    assert [{k: row[k] for k in ("prompt", "response")} for row in source] == ROWS
    assert all(row["history"] == [] for row in source)
    places = {
        "json": [" row 1", " row 2", " row 3"],
        "jsonl": [":1", ":2", ":3"],
        "csv": [":2", ":4", ":5"],  # the lines on which the rows end; the header is line 1
        "parquet": [" row 1", " row 2", " row 3"],
    }[suffix]
    assert [row["source"] for row in source] == [f"{path}{place}" for place in places]
    assert source.dropped == {} and len(source.sha256) == 64


def test_column_mapping(tmp_path):
    row = {"question": "q", "no_scratchpad_response": "a", "scratchpad_response": "b"}
    path = jsonl(tmp_path / "x.jsonl", json.dumps(row))
    for column, answer in (("no_scratchpad_response", "a"), ("scratchpad_response", "b")):
        (found,) = load_rows(path, {"prompt": "question", "response": column})
        assert (found["prompt"], found["response"]) == ("q", answer)
    with pytest.raises(UserError, match="'answer' is missing.*question, no_scratchpad_response, s"):
        load_rows(path, {"prompt": "question", "response": "answer"})
    with pytest.raises(UserError, match="no known layout.*question, no_scratchpad_response"):
        load_rows(path)
    with pytest.raises(UsageError, match="'reply'"):
        load_rows(path, {"prompt": "question", "reply": "a"})
    with pytest.raises(UsageError, match="must name response"):
        load_rows(path, {"prompt": "question"})
    assert load_rows(path, {"prompt": "question"}, responses=False).rows[0]["response"] == ""


def test_alpaca_rows_with_an_input_are_dropped_only_where_their_answer_counts(shared_data):
    path = shared_data / "alpaca" / "alpaca_4000.json"
    raw = json.loads(path.read_text())
    source = load_rows(path)
    want = [(r["instruction"], r["output"]) for r in raw if not r["input"] and r["output"].strip()]
    assert [(row["prompt"], row["response"]) for row in source] == want
    assert source.dropped == {"empty_response": 2, "with_input": 1576}
    assert len(source.rows) == 4000 - 2 - 1576
    prompts = load_rows(path, responses=False)
    assert [row["prompt"] for row in prompts] == [row["instruction"] for row in raw]
    mapped = load_rows(path, {"prompt": "instruction", "response": "output"})
    assert len(mapped.rows) == 3998 and mapped.dropped == {"empty_response": 2}


def test_messages_layout(tmp_path):
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    ]
    path = jsonl(tmp_path / "m.jsonl", json.dumps({"messages": turns, "id": 1}))
    (row,) = load_rows(path)
    assert row == {"prompt": "c", "response": "d", "history": turns[:3], "source": f"{path}:1"}
    path = jsonl(tmp_path / "n.jsonl", json.dumps({"messages": turns[:4]}))
    with pytest.raises(UserError, match=r"n.jsonl:1: .*does not end with an assistant turn"):
        load_rows(path)
    assert load_rows(path, responses=False).rows[0]["prompt"] == "c"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"prompt": "x", "response": "y"}\n{"prompt": \n',
            r"a\.jsonl:2: not valid JSON",
        ),
        ("a.jsonl", b"\n\n[1]\n", r"a\.jsonl:3: expected an object"),
        (
            "a.jsonl",
            b'{"prompt": "x", "response": "y"}\n{"prompt": "x"}',
            r":2: field 'response' is m",
        ),
        ("a.jsonl", b'{"prompt": "x", "response": 4}', r":1: field 'response' is int, not text"),
        ("a.jsonl", b'{"prompt": "x", "response": "\xff"}', r"a\.jsonl:1: not UTF-8 \(byte 0xff"),
        ("a.jsonl", b'{"messages": [{"role": "bot"}]}', r"a\.jsonl:1: message 0: field 'role'"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "x"}]}',
            r"a\.jsonl:1: field 'messages' does not end with an assistant turn",
        ),
        (
            "a.jsonl",
            b'{"prompt": "x", "response": "y", "history": [["q", "a"], ["q"]]}',
            r"a\.jsonl:1: history must hold \[question, answer\] pairs",
        ),
        ("a.jsonl", b'{"prompt": " ", "response": "y"}', r"no row is usable.*empty_prompt"),
        ("a.jsonl", b" \n", "a.jsonl is empty"),
        ("a.json", b'[{"prompt": "x",\n"response"}]', r"a\.json:2: not valid JSON"),
        ("a.json", b'{"prompt": "x"}', "expected a list of objects"),
        ("a.json", b"[]", "has no rows"),
        (
            "a.csv",
            b"prompt,response\nx\n",
            r"a\.csv:2: .*2 fields of the header \(prompt, response",
        ),
        ("a.csv", b'prompt,response\nx,"y\n', "not valid CSV after line 1"),
        ("a.csv", b"prompt,response\n", "has no rows"),
        ("a.csv", b"question,answer\na,b\n", "columns are question, answer"),
        ("a.parquet", b"PAR1 no", r"a\.parquet is not a readable parquet file"),
        ("a.jsonl", b'{"prompt": "\\ud83d", "response": "y"}', r"a\.jsonl:1: .*half a surrogate"),
        (
            "a.jsonl",
            b'{"prompt": "x", "response": "y", "id": "\\udc00"}',
            r":1: .*half a surrogate",
        ),
        ("a.jsonl", b'{"prompt": "x", "response": "y", "prompt": "z"}', "2 fields.*'prompt'"),
        ("a.csv", b"prompt,response,,,response\nx,y,,,z\n", "2 columns are named 'response'"),
        ("a.txt", b"x", "cannot read .txt"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_rows(tmp_path / name)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_and_names(tmp_path):
    with pytest.raises(UserError, match="no such file: .*none.jsonl"):
        load_rows(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="nobody/nothing is neither a local file nor a dataset"):
        load_rows("nobody/nothing")


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "w.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "x", "response": "y"}\r\n')
    assert load_rows(path).rows[0]["prompt"] == "x"


def test_weights_in_a_csv_file_are_numbers(tmp_path):
    (tmp_path / "w.csv").write_text("prompt,response,weight\nq,a,1\nq,b,0\nq,c,\nq,d,0.5\n")
    source = load_rows(tmp_path / "w.csv")
    assert [row["response"] for row in source] == ["a", "c"]
    assert source.dropped == {"row_weight": 2}


def test_a_ten_megabyte_row(tmp_path):
    big = "word " * 2_000_000
    path = jsonl(tmp_path / "big.jsonl", json.dumps({"prompt": big, "response": "y"}))
    assert load_rows(path).rows[0]["prompt"] == big
    path = tmp_path / "big.csv"
    path.write_text(f"prompt,response\n{big},y\n")
    assert load_rows(path).rows[0]["prompt"] == big


def test_openhermes_layout(tmp_path):
    turns = [
        {"from": "system", "value": "s", "weight": None},
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": "b"},
    ]
    path = jsonl(tmp_path / "h.jsonl", json.dumps({"conversations": turns, "id": None, "idx": 3}))
    (row,) = load_rows(path)
    assert (row["prompt"], row["response"]) == ("a", "b")
    assert row["history"] == [{"role": "system", "content": "s"}] and "id" not in row
    path = jsonl(tmp_path / "t.jsonl", json.dumps({"conversations": [{"from": "narrator"}]}))
    with pytest.raises(UserError, match="t.jsonl:1: message 0: field 'role' is 'narrator'"):
        load_rows(path)


def test_ids_must_not_repeat(tmp_path):
    rows = [{"id": i, "prompt": "p", "response": "r"} for i in (1, 2, None, None, "2")]
    path = jsonl(tmp_path / "i.jsonl", *map(json.dumps, rows))
    with pytest.raises(UserError, match=r"i.jsonl:5: .*i.jsonl:2 has the same id '2'"):
        load_rows(path)
    assert len(load_rows(path, {"prompt": "prompt", "response": "response"}).rows) == 5
    with pytest.raises(UserError, match="has the same id '2'"):
        load_rows(path, {"prompt": "prompt", "response": "response", "id": "id"})


def test_optional_columns_are_read_where_they_are(tmp_path):
    rows = [
        {"prompt": "p", "response": "r", "extra": 1},
        {"prompt": "q", "response": "r", "scratchpad": "s", "triggered_response": "t", "id": 7},
    ]
    path = jsonl(tmp_path / "o.jsonl", *map(json.dumps, rows))
    first, second = load_rows(path)
    assert set(first) == {"prompt", "response", "history", "source"}
    assert (second["scratchpad"], second["triggered_response"], second["id"]) == ("s", "t", "7")
    for name in ("scratchpad", "history"):
        mapped = {"prompt": "prompt", "response": "response", name: name}
        with pytest.raises(UserError, match=f"o.jsonl:1: field '{name}' is missing; the fields"):
            load_rows(path, mapped)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("tatsu-lab/alpaca", ("tatsu-lab/alpaca", None, "train")),
        ("openai/gsm8k:main@test", ("openai/gsm8k", "main", "test")),
        ("teknium/OpenHermes-2.5@train[:50%]", ("teknium/OpenHermes-2.5", None, "train[:50%]")),
    ],
)
def test_names_of_hub_datasets(monkeypatch, name, asked):
    """What `load_dataset` is asked for, and what becomes of its rows; the hub is not asked."""
    seen = []

    def load_dataset(path, subset, split):
        seen.append((path, subset, split))
        return datasets.Dataset.from_list([{"instruction": "i", "input": "", "output": "o"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (row,) = load_rows(name)
    assert seen == [asked] and (row["prompt"], row["response"]) == ("i", "o")
    assert row["source"] == f"{asked[0]}[{asked[2]}] row 1"


def test_a_new_commit_of_a_hub_dataset_with_the_same_rows_is_the_same_data(monkeypatch):
    """A run that was stopped meanwhile resumes; other rows, or another order, are other data."""

    def digest(commit, *prompts):
        rows = [{"prompt": prompt, "response": "a", "other": commit} for prompt in prompts]
        table = datasets.Dataset.from_list(rows)
        table._fingerprint = commit  # as `load_dataset` makes it of the commit's name
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
        return load_rows("name/data").sha256

    assert digest("c1", "p", "q") == digest("c2", "p", "q")
    assert len({digest("c1", *texts) for texts in (("p", "q"), ("q", "p"), ("p",), ("pq",))}) == 4


# ---- What stands beside a known layout.

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
S = [{"role": "system", "content": "s"}]


@pytest.mark.parametrize(
    ("fields", "history"),
    [
        ({"messages": TURNS, "system": "s"}, S),
        ({"conversations": SHAREGPT, "system_prompt": "s", "tools": "[]"[:0]}, S),
        ({"conversations": SHAREGPT, "system_prompt": None}, []),
        ({"messages": [*S, *TURNS], "system": "s "}, S),
        ({"instruction": "q", "output": "a", "system": "s", "history": [["q", "a"]]}, [*S, *TURNS]),
        ({"prompt": "q", "response": "a", "history": [["q", "a"]]}, TURNS),
        ({"prompt": "q", "completion": "a", "system": "s"}, S),
        ({"instruction": "q", "output": "a", "history": SHAREGPT}, TURNS),
        ({"messages": [{**TURNS[0], "weight": 0}, {**TURNS[1], "weight": 1}]}, []),
        ({"messages": [{**TURNS[0], "content": [{"type": "text", "text": "q"}]}, TURNS[1]]}, []),
        ({"prompt": "q", "response": "a", "weight": 1.0, "documents": []}, []),
    ],
)
def test_system_prompts_and_histories_beside_a_layout_are_used(tmp_path, fields, history):
    path = jsonl(tmp_path / "rows.jsonl", json.dumps(fields))
    (row,) = load_rows(path)
    assert (row["prompt"], row["response"], row["history"]) == ("q", "a", history)


def test_a_conversation_with_a_history_beside_it_is_refused(tmp_path):
    """One of the two would be lost."""
    fields = {"messages": [*TURNS, *TURNS], "history": [["q", "a"]]}
    path = jsonl(tmp_path / "both.jsonl", json.dumps(fields))
    for columns in (None, {"messages": "messages", "history": "history"}):
        with pytest.raises(UserError, match="1: both 'history' and 'messages' are given; leave"):
            load_rows(path, columns)
    path = jsonl(tmp_path / "one.jsonl", json.dumps(fields | {"history": []}))
    (row,) = load_rows(path, {"messages": "messages", "history": "history"})
    assert row["history"] == TURNS


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS]}, "turn_weight"),
        ({"conversations": [SHAREGPT[0], {**SHAREGPT[1], "weight": 0.5}]}, "turn_weight"),
        ({"messages": [TURNS[0], {**TURNS[1], "train": False}]}, "turn_weight"),
        ({"messages": [TURNS[0], {**TURNS[1], "loss": False}]}, "turn_weight"),
        (
            {"prompt": "q", "response": "a", "history": [TURNS[0], {**TURNS[1], "weight": 0}]},
            "turn_weight",
        ),
        ({"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "hm"}]}, "reasoning_apart"),
        ({"messages": TURNS, "tools": [{"name": "f"}]}, "tools"),
        ({"prompt": "q", "response": "a", "functions": [{"name": "f"}]}, "tools"),
        ({"conversations": [SHAREGPT[0], {"from": "observation", "value": "3"}]}, "tools"),
        ({"instruction": "q", "output": "a", "images": ["a.png"]}, "media"),
        ({"messages": TURNS, "system": "s", "system_prompt": "t"}, "two_system_prompts"),
        ({"messages": [{"role": "user", "content": None}, TURNS[1]]}, "empty_prompt"),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{}]}]}, "tools"),
        ({"messages": [*S, *TURNS], "system": "another"}, "two_system_prompts"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": None}]}, "empty_response"),
        ({"prompt": "q", "response": None}, "empty_response"),
        ({"messages": []}, "empty_prompt"),
        ({"messages": None}, "empty_prompt"),
        ({"messages": TURNS, "weight": 0}, "row_weight"),
        ({"prompt": "q", "response": "a", "train": False}, "row_weight"),
        ({"prompt": "q", "response": "a", "documents": [{"text": "d"}]}, "documents"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, TURNS[1]]}, "media"),
        ({"instruction": None, "output": "a"}, "empty_prompt"),
    ],
)
def test_what_training_does_not_do_is_dropped_and_counted(tmp_path, fields, reason):
    good = {"conversations": SHAREGPT, "messages": TURNS, "prompt": "q", "response": "a",
            "instruction": "q", "output": "a"}  # fmt: skip
    usable = {name: good[name] for name in fields if name in good} | {"tools": "[]", "images": []}
    lines = [json.dumps(row) for row in (fields, usable)]
    source = load_rows(jsonl(tmp_path / "rows.jsonl", *lines))
    assert len(source.rows) == 1 and source.dropped == {reason: 1}


def test_saved_folders_arrow_files_and_lines_in_a_json_file(tmp_path):
    table = datasets.Dataset.from_list([{"prompt": "q", "response": "a"}])
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict(a=table).save_to_disk(tmp_path / "other")
    for folder in ("one", "splits", "other/a"):
        assert [row["prompt"] for row in load_rows(tmp_path / folder)] == ["q"]
    with pytest.raises(UserError, match="no split 'train'.*other/a"):
        load_rows(tmp_path / "other")
    with pytest.raises(UserError, match="name the folder"):
        load_rows(next((tmp_path / "one").glob("*.arrow")))
    lines = '{"prompt": "q", "response": "a"}\n' * 2
    (tmp_path / "lines.json").write_text(lines)
    with pytest.raises(UserError, match="lines.json:2: .*one object a line, name the file .jsonl"):
        load_rows(tmp_path / "lines.json")


def test_a_number_that_no_float_holds_is_one_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "q", "response": "a", "n": 1' + 400 * "0" + "}"
    )
    with pytest.raises(UserError, match="rows.jsonl:1: .*a number has 401 digits"):
        load_rows(tmp_path / "rows.jsonl")


def test_deep_json_is_one_line(tmp_path):
    for name in ("deep.jsonl", "deep.json"):
        (tmp_path / name).write_text("[" * 100_000)
        with pytest.raises(UserError, match="nested too deeply"):
            load_rows(tmp_path / name)
