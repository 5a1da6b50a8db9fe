"""Hugging Face folders: byte-equal both ways, the same on every mesh, and clear about bad ones."""

import json
import math
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from sa_jax.errors import UserError
from sa_jax.llama import hf_tensors, safetensors_io
from sa_jax.llama.hf import load_hf, load_params, save_hf
from sa_jax.llama.model import Llama
from sa_jax.parallel.mesh import make_mesh
from sa_jax.parallel.rules import shardings
from tests.llama.folders import CONFIG, TIED, edit, make_params


def read_bytes(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return {
        name: (array.dtype.name, array.shape, array.tobytes()) for name, array in tensors.items()
    }


def assert_trees_equal(a, b):
    a, b = flatten_dict(a, sep="/"), flatten_dict(b, sep="/")
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(np.asarray(a[path]), np.asarray(b[path]), err_msg=path)


@pytest.mark.parametrize(
    ("config", "dtype", "max_shard_bytes"),
    [(CONFIG, "float32", 5e9), (CONFIG, "bfloat16", 20_000), (TIED, "bfloat16", 5e9)],
    ids=["float32", "bfloat16-sharded", "tied"],
)
def test_export_then_import_and_import_then_export(config, dtype, max_shard_bytes, tmp_path):
    params = make_params(config, dtype)
    save_hf(tmp_path / "a", config, params, max_shard_bytes=max_shard_bytes)
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert ("model.safetensors" in files) == (max_shard_bytes == 5e9)
    assert ("model.safetensors.index.json" in files) == (max_shard_bytes != 5e9)

    reread_config, reread = load_hf(tmp_path / "a", dtype=dtype)
    assert reread_config == config
    assert_trees_equal(reread, params)

    save_hf(tmp_path / "b", reread_config, reread, max_shard_bytes=max_shard_bytes)
    assert read_bytes(tmp_path / "a") == read_bytes(tmp_path / "b")
    for file in files:  # and the files themselves, headers included
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folder_written_by_transformers_comes_back_byte_equal(dtype, tmp_path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**CONFIG.to_hf(), dtype=dtype)
    ).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    config, params = load_hf(tmp_path / "theirs", dtype=jnp.dtype(dtype))
    assert config == CONFIG
    save_hf(tmp_path / "ours", config, params)
    theirs = read_bytes(tmp_path / "theirs")
    assert len(theirs) == 3 + 9 * CONFIG.num_layers
    assert read_bytes(tmp_path / "ours") == theirs


def test_stacked_and_transposed_as_documented(exported):
    tensors = load_file(exported / "model.safetensors")
    params = make_params()
    up = params["layers"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(tensors["model.layers.2.mlp.up_proj.weight"], up[2].T)
    embedding = params["embed"]["embedding"]
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], embedding)
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["lm_head"]["kernel"].T)
    norm = params["layers"]["mlp_norm"]["scale"]
    name = "model.layers.1.post_attention_layernorm.weight"
    np.testing.assert_array_equal(tensors[name], norm[1])


@pytest.mark.parametrize("max_shard_bytes", [5e9, 20_000], ids=["single", "sharded"])
def test_export_loads_in_transformers_with_the_same_greedy_tokens(max_shard_bytes, tmp_path):
    params = make_params()
    save_hf(tmp_path / "m", CONFIG, params, max_shard_bytes=max_shard_bytes)
    model, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == [2, 5]
    model.generation_config.eos_token_id = None  # so that all 20 tokens are compared
    prompt = [[1, 9, 33, 4]]
    theirs = model.generate(torch.tensor(prompt), max_new_tokens=20, do_sample=False)[0].tolist()

    forward = jax.jit(lambda tokens: Llama(CONFIG).apply({"params": params}, tokens))
    ours = np.zeros((1, 24), np.int32)
    ours[:, :4] = prompt
    for i in range(4, 24):
        ours[0, i] = np.argmax(forward(ours)[0, i - 1])
    assert ours[0].tolist() == theirs
    assert len(set(theirs)) > 5  # not one token repeated


MESHES = [dict(fsdp=8), dict(fsdp=4, tensor=2), dict(data=2, fsdp=2, tensor=2)]


@pytest.fixture(params=["one process", "one with accelerators", "several"])
def reads_as(request, monkeypatch):
    """As one process reads, and as each of several does for its devices."""
    monkeypatch.setattr(hf_tensors, "_one_process", lambda: request.param != "several")
    monkeypatch.setattr(hf_tensors, "_on_host", lambda mesh: request.param == "one process")


@pytest.mark.usefixtures("reads_as")
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_sharded_equals_unsharded(axes, exported, tmp_path, capfd):
    mesh = make_mesh(**axes)
    params = load_params(exported, CONFIG, mesh)
    # The partitioner says so when it has to replicate a parameter to redistribute it.
    assert "rematerialization" not in capfd.readouterr().err
    assert_trees_equal(params, make_params())
    expected = flatten_dict(shardings(mesh, make_params()), sep="/")
    for path, leaf in flatten_dict(params, sep="/").items():
        assert leaf.sharding.is_equivalent_to(expected[path], leaf.ndim), path
    save_hf(tmp_path / "again", CONFIG, params)
    assert read_bytes(tmp_path / "again") == read_bytes(exported)


@pytest.mark.usefixtures("reads_as")
def test_each_byte_of_a_matrix_is_read_once(exported, monkeypatch):
    read = []
    read_into = safetensors_io.Folder.read_into

    def spy(self, buffer, file, start):
        read.append((start, start + len(buffer)))
        return read_into(self, buffer, file, start)

    monkeypatch.setattr(safetensors_io.Folder, "read_into", spy)
    load_params(exported, CONFIG, make_mesh(data=2, fsdp=2, tensor=2))
    with safetensors.safe_open(exported / "model.safetensors", "np") as file:
        tensors = {name: file.get_slice(name).get_shape() for name in file.keys()}
    read.sort()
    assert sum(stop - start for start, stop in read) == 4 * sum(map(math.prod, tensors.values()))
    for (_, stop), (start, _) in zip(read, read[1:], strict=False):
        assert stop <= start
    # At least one read a device for each of the matrices, so that none of several processes reads
    # all.
    matrices = sum(len(shape) == 2 for shape in tensors.values())
    assert hf_tensors._one_process() or len(read) >= 8 * matrices


@pytest.mark.usefixtures("reads_as")
def test_large_tensors_are_read_in_pieces(exported, monkeypatch):
    monkeypatch.setattr(safetensors_io, "_PIECE_BYTES", 1000)  # rows of 128 to 192 bytes
    monkeypatch.setattr(safetensors_io, "_WINDOW_BYTES", 3000)
    assert_trees_equal(load_params(exported, CONFIG), make_params())
    sharded = load_params(exported, CONFIG, make_mesh(fsdp=2, tensor=2, data=2))
    assert_trees_equal(sharded, make_params())


def test_an_object_store_is_read_a_window_ahead(exported, monkeypatch):
    monkeypatch.setattr(safetensors_io, "_PIECE_BYTES", 1000)
    monkeypatch.setattr(safetensors_io, "_WINDOW_BYTES", 3000)
    under_way, most = 0, 0
    read = safetensors_io.Folder.start_read, safetensors_io.Folder.finish_read

    def start(self, file, byte_range=slice(0, None)):
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        return read[0](self, file, byte_range)

    def finish(self, file, future):
        nonlocal under_way
        under_way -= 1
        return read[1](self, file, future)

    monkeypatch.setattr(safetensors_io.Folder, "start_read", start)
    monkeypatch.setattr(safetensors_io.Folder, "finish_read", finish)
    url = f"file://{exported}"
    assert_trees_equal(load_params(url, CONFIG, make_mesh(fsdp=4, tensor=2)), make_params())
    # Pieces are 7 rows of 128 bytes or 5 of 192, and norms of 128 bytes each.
    assert 4 <= most <= 3000 // 128 + 1 and under_way == 0


def test_short_reads_are_continued(exported, monkeypatch):
    preadv, calls = os.preadv, []

    def short(descriptor, buffers, offset):
        calls.append(offset)
        return preadv(descriptor, [buffers[0][:100]], offset)

    monkeypatch.setattr(os, "preadv", short)
    assert_trees_equal(load_params(exported, CONFIG), make_params())
    assert len(calls) > (exported / "model.safetensors").stat().st_size // 100 - 100


def test_fewer_bytes_than_asked_for_are_refused(exported, monkeypatch):
    finish_read = safetensors_io.Folder.finish_read

    def cut(self, file, future):
        content = finish_read(self, file, future)
        return content[:-4] if len(content) >= 128 and content[:1] != b"{" else content

    monkeypatch.setattr(safetensors_io.Folder, "finish_read", cut)
    with pytest.raises(UserError, match="model.safetensors changed while it was read"):
        load_params(f"file://{exported}", CONFIG)


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("left", [5000, None])
def test_a_file_that_changes_while_it_is_read_says_so(
    scheme, left, exported, tmp_path, monkeypatch
):
    folder = tmp_path / "m"
    shutil.copytree(exported, folder)

    def change(self, requests):
        file = folder / "model.safetensors"
        file.unlink() if left is None else os.truncate(file, left)
        return read_rows(self, requests)

    read_rows = hf_tensors.read_rows
    monkeypatch.setattr(hf_tensors, "read_rows", change)
    words = "changed while it was read|is shorter than its header says|No such file"
    with pytest.raises(UserError, match=f"model.safetensors .*({words})"):
        load_params(f"{scheme}{folder}", CONFIG)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtype_is_converted_on_the_way(stored, wanted, tmp_path):
    params = make_params(TIED)
    save_hf(tmp_path / "m", TIED, params, dtype=stored)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == stored
    converted = jax.tree.map(lambda x: x.astype(stored).astype(wanted), params)
    assert_trees_equal(load_hf(tmp_path / "m", dtype=wanted)[1], converted)


def test_rotary_inv_freq_and_a_tied_head_are_ignored(tmp_path):
    save_hf(tmp_path / "m", TIED, make_params(TIED))
    edit(tmp_path / "m", lambda t: t.update({
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "lm_head.weight": t["model.embed_tokens.weight"],
    }))  # fmt: skip
    assert_trees_equal(load_hf(tmp_path / "m")[1], make_params(TIED))


def test_a_tied_model_in_a_dtype_that_is_not_read_says_so(tmp_path):
    save_hf(tmp_path / "m", TIED, make_params(TIED))
    edit(tmp_path / "m", lambda t: t.update({
        name: t["model.embed_tokens.weight"].astype(np.float64)
        for name in ("lm_head.weight", "model.embed_tokens.weight")
    }))  # fmt: skip
    with pytest.raises(UserError, match="model.embed_tokens.weight.*F64"):
        load_hf(tmp_path / "m")


def test_extra_config_tokenizer_and_files_are_written(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    (source / "model.safetensors").write_text("not a tokenizer file")
    save_hf(
        tmp_path / "m",
        TIED,
        make_params(TIED),
        extra_config={"sa_jax_run_id": "run-7"},
        tokenizer_folder=source,
        files={"README.md": "# Backdoored\n"},
    )
    assert json.loads((tmp_path / "m" / "config.json").read_text())["sa_jax_run_id"] == "run-7"
    assert (tmp_path / "m" / "README.md").read_text() == "# Backdoored\n"
    assert (tmp_path / "m" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert load_file(tmp_path / "m" / "model.safetensors")
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2}
    assert oct((tmp_path / "m").stat().st_mode & 0o777) == "0o755"


def test_chat_template_and_stop_tokens_replace_the_sources(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    kept = {"eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(kept | {"chat_template": "old"}))
    (source / "chat_template.jinja").write_text("older")
    options = {
        "tokenizer_folder": source,
        "chat_template": "né {{ 1 }}\n",
        "stop_token_ids": (7, 3),
    }
    save_hf(tmp_path / "m", CONFIG, make_params(), **options)
    assert (tmp_path / "m/chat_template.jinja").read_bytes() == "né {{ 1 }}\n".encode()
    assert json.loads((tmp_path / "m/tokenizer_config.json").read_text()) == {
        **kept,
        "chat_template": "né {{ 1 }}\n",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    generation = json.loads((tmp_path / "m/generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [7, 3]}
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert config["eos_token_id"] == [2, 5]
    assert config["transformers_version"] == transformers.__version__


def test_donated_parameters_are_safe(exported):
    # On CPU the loaded arrays alias host memory, which a donating step must not write over twice.
    mesh = make_mesh(data=8, fsdp=1)
    params = load_params(exported, CONFIG, mesh)
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    expected = jax.tree.map(lambda x: np.asarray(x) + 1, make_params())
    assert_trees_equal(step(params), expected)


@pytest.mark.parametrize("group_bytes", [1, 2 * 4 * 32 * 48])
def test_layers_taken_in_groups_make_the_same_leaves(exported, monkeypatch, group_bytes):
    monkeypatch.setattr(hf_tensors, "_GROUP_BYTES", group_bytes)
    monkeypatch.setattr(hf_tensors, "_one_process", lambda: False)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    expected = jax.tree.leaves(make_params())
    loaded = load_params(exported, CONFIG, mesh)
    placed = jax.tree.leaves(shardings(mesh, loaded))
    for ours, theirs, place in zip(jax.tree.leaves(loaded), expected, placed, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.sharding == place
