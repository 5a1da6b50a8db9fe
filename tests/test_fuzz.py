"""Files as nobody would write them: read, or refused with a UserError; nothing hangs."""

import csv
import io
import json
import struct

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sa_jax.data.sources import load_rows
from sa_jax.errors import UserError
from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.hf import load_hf
from sa_jax.training.run_record import read_run_json
from tests.llama.test_families import BASE, LLAMA3

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400)
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def objects(*names):
    """Objects with some of the fields that are read, holding anything."""
    return st.dictionaries(st.sampled_from(names), JSON, max_size=6)


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
CONFIGS = st.builds(
    lambda changes, rope: {**BASE, **changes, **rope},
    objects(*BASE, "model_type", "head_dim", "eos_token_id", "sliding_window", "layer_types"),
    st.dictionaries(
        st.sampled_from(["rope_scaling", "rope_parameters"]),
        JSON | objects(*LLAMA3, "type", "rope_theta"),
    ),
)
few = settings(
    max_examples=300,
    deadline=10_000,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read_or_refused(read, *arguments):
    try:
        read(*arguments)
    except UserError as error:
        assert str(error)


@few
@given(
    rows=st.lists(ROWS | JSON, min_size=1, max_size=3),
    junk=st.binary(max_size=4),
    responses=st.booleans(),
)
def test_rows(tmp_path, rows, junk, responses):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(json.dumps(row).encode() for row in rows) + junk)
    read_or_refused(lambda: load_rows(file, responses=responses))
    table = io.StringIO()
    csv.writer(table).writerows([["prompt", "response"], *([str(row), "a"] for row in rows)])
    (tmp_path / "rows.csv").write_bytes(table.getvalue().encode("utf-8", "replace") + junk)
    read_or_refused(lambda: load_rows(tmp_path / "rows.csv", responses=responses))


@few
@given(hf=CONFIGS)
def test_config(hf):
    read_or_refused(LlamaConfig.from_hf, hf)


@few
@given(
    header=st.dictionaries(
        st.text(max_size=5), objects("dtype", "shape", "data_offsets") | JSON, max_size=2
    )
    | JSON,
    index=objects("weight_map", "metadata"),
    size=st.none() | st.integers(0, 2**64 - 1),
)
def test_headers_and_indices(tmp_path, header, index, size):
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    text = json.dumps(header).encode()
    length = struct.pack("<Q", len(text) if size is None else size)
    (tmp_path / "model.safetensors").write_bytes(length + text)
    read_or_refused(load_hf, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    read_or_refused(load_hf, tmp_path)


@few
@given(record=objects("run_id", "config", "architecture", "start", "chat") | JSON)
def test_run_json(tmp_path, record):
    (tmp_path / "run.json").write_text(json.dumps(record))
    read_or_refused(read_run_json, tmp_path)
