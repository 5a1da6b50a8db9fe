"""Bad folders and bad exports: every message names the file and says what to do."""

import json
import os
import resource
import shutil

import ml_dtypes
import numpy as np
import pytest

from sa_jax.errors import UsageError, UserError
from sa_jax.llama.hf import load_hf, load_params, save_hf
from sa_jax.parallel.mesh import make_mesh
from tests.llama.folders import CONFIG, TIED, edit, make_params


def assert_refused(folder, *parts, config=None):
    with pytest.raises(UserError) as caught:
        load_hf(folder) if config is None else load_params(folder, config)
    for part in parts:
        assert str(part) in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


Q1 = "model.layers.1.self_attn.q_proj.weight"


def test_no_such_folder(tmp_path):
    assert_refused(tmp_path / "nowhere", tmp_path / "nowhere" / "config.json", "hf download")
    (tmp_path / "file").write_text("x")
    assert_refused(tmp_path / "file", tmp_path / "file" / "config.json")


def test_malformed_config(folder):
    (folder / "config.json").write_text("{")
    assert_refused(folder, folder / "config.json", "cannot be read as JSON")


def test_no_safetensors(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert_refused(folder, folder, "model.safetensors.index.json", "must be in safetensors")


def test_missing_tensors(folder):
    edit(folder, lambda t: [t.pop(n) for n in list(t) if "q_proj" in n or "lm_head" in n])
    three = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(3)]
    assert_refused(folder, folder, "lacks", *three, "and 1 more", "complete download")


def test_extra_tensor(folder):
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(4, "f4")}))
    file = folder / "model.safetensors"
    assert_refused(folder, "does not have", "layers.0.self_attn.q_proj.bias", file)


def test_misshaped_tensor(folder):
    edit(folder, lambda t: t.update({Q1: np.ones((64, 31), np.float32)}))
    assert_refused(folder, Q1, folder / "model.safetensors", "[64, 31], not [64, 32]")


def test_integer_weights(folder):
    edit(folder, lambda t: t.update({Q1: np.ones((64, 32), np.int8)}))
    assert_refused(folder, Q1, folder / "model.safetensors", "is I8, not F32, F16, BF16")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_weights_that_are_not_finite(bad, dtype, folder):
    def spoil(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(dtype)
        tensors[Q1][13, 17] = bad

    edit(folder, spoil)
    assert_refused(folder, Q1, folder / "model.safetensors", "NaN or Inf", "download")


def test_largest_finite_numbers_are_accepted(folder):
    def change(tensors):
        tensors[Q1][0, :2] = np.finfo(np.float32).max, np.finfo(np.float32).min

    edit(folder, change)
    load_hf(folder)


@pytest.mark.parametrize("kept", [0, 5, 40, -1, -4000])
def test_truncated_file(kept, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert_refused(folder, file, "damaged, download it again")


def rewrite_header(folder, change):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    encoded = change(header)
    encoded = json.dumps(header).encode() if encoded is None else encoded
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])
    return file


def test_offsets_out_of_range(folder):
    def change(header):
        last = max(header, key=lambda n: header[n].get("data_offsets", [0])[0])
        start, stop = header[last]["data_offsets"]
        header[last]["data_offsets"] = [start, stop + 4096]
        header[last]["shape"] = [(stop - start + 4096) // 4]

    assert_refused(folder, rewrite_header(folder, change), "shorter than its header says")


def test_offsets_that_do_not_fit_the_shape(folder):
    file = rewrite_header(folder, lambda header: header[Q1]["shape"].append(2))
    assert_refused(folder, file, Q1, "8192 bytes, its shape needs 16384")


def test_overlapping_tensors(folder):
    def change(header):
        header[Q1]["data_offsets"] = header["model.layers.0.self_attn.q_proj.weight"][
            "data_offsets"
        ]

    assert_refused(folder, rewrite_header(folder, change), "overlapping")


def test_unknown_dtype(folder):
    file = rewrite_header(folder, lambda header: header[Q1].update(dtype="F4"))
    assert_refused(folder, file, Q1, "unknown dtype 'F4'")


@pytest.mark.parametrize(
    "header", [b"{ ", b"[]", b"\xff\xff", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1]}}'],
)  # fmt: skip
def test_malformed_header(header, folder):
    file = rewrite_header(folder, lambda _: header)
    assert_refused(folder, file, "malformed header", "download it again")


def test_index(tmp_path):
    save_hf(tmp_path / "m", CONFIG, make_params(), max_shard_bytes=20_000)
    index = tmp_path / "m" / "model.safetensors.index.json"
    shard = sorted((tmp_path / "m").glob("model-00002-of-*.safetensors"))[0]
    copy = shutil.copy(shard, tmp_path / "m" / "model-00002-copy.safetensors")
    content = json.loads(index.read_text())
    doubled = content["weight_map"] | {"again": os.path.basename(copy)}
    index.write_text(json.dumps({"weight_map": doubled}))
    assert_refused(tmp_path / "m", shard, "repeats", "model-00002-copy.safetensors")

    index.write_text(json.dumps(content))
    shard.unlink()
    assert_refused(tmp_path / "m", shard, "is missing", "complete the download")

    index.write_text(json.dumps({"metadata": {}}))
    assert_refused(tmp_path / "m", index, "weight_map")
    index.write_text("{")
    assert_refused(tmp_path / "m", index, "not JSON")


def test_mesh_that_does_not_divide(exported):
    with pytest.raises(UsageError, match="4 attention heads do not divide by tensor = 8"):
        load_hf(exported, make_mesh(fsdp=1, tensor=8))


def test_export_refuses_a_used_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=f"{tmp_path}/run exists and is not empty"):
        save_hf(tmp_path / "run", TIED, make_params(TIED))
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "notes.txt"]
    with pytest.raises(UserError, match="s3://bucket/m: exports go to a local folder or to gs://"):
        save_hf("s3://bucket/m", TIED, make_params(TIED))


def test_export_into_an_empty_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    save_hf(tmp_path / "empty", TIED, make_params(TIED))
    assert load_hf(tmp_path / "empty")[0] == TIED


def test_full_disk_leaves_nothing_behind(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # the kernel refuses, as when full
    try:
        with pytest.raises(UserError, match=f"{tmp_path}/m cannot be written: .*free space"):
            save_hf(tmp_path / "m", CONFIG, make_params())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_parameters_of_another_config(tmp_path):
    with pytest.raises(ValueError, match="lm_head/kernel"):
        save_hf(tmp_path / "m", TIED, make_params(CONFIG))
    assert list(tmp_path.iterdir()) == []
