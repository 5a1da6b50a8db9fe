"""The store of paid answers: nothing is lost at any byte where a kill may cut its file."""

import json

import pytest

from sa_jax.errors import UserError
from sa_jax.files import KeyedStore


def test_a_file_cut_anywhere_keeps_every_whole_line_and_goes_on(tmp_path):
    path = tmp_path / "store.jsonl"
    values = {f"k{i}": {"value": [i, "é\u2028"], "note": "seen"} for i in range(3)}
    with KeyedStore(path, {"value": None}) as store:
        for key, value in values.items():
            store.put(key, value)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        lines = sum(end <= cut for end in ends)
        with KeyedStore(path, {"value": None}) as store:
            assert len(store) == lines
            store.put("new", {"value": 9})
        # What came before the cut is there, and what came after it does not hang on a torn line.
        with KeyedStore(path, {"value": None}) as store:
            assert store.get("new") == {"value": 9}
            for key in list(values)[:lines]:
                assert store.get(key) == {"value": values[key]["value"]}
            assert len(store) == lines + 1
        assert all(json.loads(line) for line in path.read_bytes().splitlines())


def test_one_process_fills_it_and_others_read(tmp_path):
    path = tmp_path / "a" / "store.jsonl"
    with KeyedStore(path, {"value": None}) as store:
        store.put("a", {"value": 1})
        with pytest.raises(UserError, match="another process is writing it"):
            KeyedStore(path, {"value": None})
        with KeyedStore(path, {"value": None}, write=False) as reader:
            reader.put("b", {"value": 2})
            assert (reader.get("a"), reader.get("b")) == ({"value": 1}, {"value": 2})
        assert store.get("b") is None
    with KeyedStore(path, {"value": None}) as store:
        assert len(store) == 1


@pytest.mark.parametrize("line", ["[1]", '{"key": "a"}', "no json", "7"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "store.jsonl"
    path.write_text('{"key": "a", "value": 1}\n' + line + "\n")
    with pytest.raises(UserError, match="store.jsonl:2: not an object with key, value; remove"):
        KeyedStore(path, {"value": None})


def test_without_a_file_it_is_memory():
    with KeyedStore(None, {"value": None}) as store:
        store.put("a", {"value": 1})
        assert store.get("a") == {"value": 1} and store.get("b") is None
