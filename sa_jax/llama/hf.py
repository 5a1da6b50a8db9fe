"""Folders of Hugging Face models, and of adapters for the package `peft`, in and out: no torch, no
pickle, no second copy of the model."""

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from sa_jax.buckets import as_path, size_and_time
from sa_jax.errors import UserError
from sa_jax.files import check_types, explained
from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.hf_tensors import MODULES, load_leaves, output_tensors
from sa_jax.llama.lora import LoraConfig, is_adapter_path
from sa_jax.llama.model import check_mesh, parameter_shapes
from sa_jax.llama.safetensors_io import (
    Folder,
    OutputTensor,
    TensorEntry,
    new_folder,
    read_headers,
    read_rows,
    write_json,
    write_tensors,
)
from sa_jax.parallel.mesh import make_mesh

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

_ADAPTERS = "adapter_model"
_PEFT_PREFIX = "base_model.model."
# Projections by their name in transformers: q_proj -> attention/q.
_PROJECTIONS = {
    name.rpartition(".")[2]: path.removeprefix("layers/")
    for path, name in MODULES.items()
    if name.endswith("_proj")
}

_HASHED_WHOLE_BYTES = 2 << 30
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10

_GENERATION_TAG = re.compile(r"(\{%[-+]?\s*)(generation|endgeneration)(\s*[-+]?%\})")
_PLAIN_TAG = {"generation": "if true", "endgeneration": "endif"}


def load_hf(
    path: str | Path, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> tuple[LlamaConfig, dict]:
    """Reads a Hugging Face Llama folder, local or `gs://`, onto a mesh.

    Args:
      path: a folder with config.json and model.safetensors, or shards and their index.
      mesh: where to lay the parameters out, by `parallel.rules`; by default the first device.
      dtype: of the parameters, whatever the file's.

    Returns:
      The architecture and the parameters (see `llama.model`).

    Raises:
      UserError: a tensor or file is missing, damaged, not finite, of a wrong shape, or too much.
      UsageError: the model does not divide over the mesh.
    """
    config = LlamaConfig.load(str(path).removeprefix("file://"))
    return config, load_params(path, config, mesh, dtype)


def load_params(
    path: str | Path, config: LlamaConfig, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> dict:
    """The parameters alone; see `load_hf`."""
    mesh = one_device_mesh() if mesh is None else mesh
    check_mesh(config, mesh)
    folder = Folder(path)
    entries = read_headers(folder, _weight_files(folder))
    ignored = {name for name in entries if name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        ignored.add("lm_head.weight")
    params = load_leaves(folder, entries, parameter_shapes(config, dtype), mesh, ignored)
    if config.tie_word_embeddings:  # after the tensors' own checks
        _check_tied(folder, entries)
    return params


def weights_digest(path: str | Path) -> str:
    """A digest that identifies the weights in a folder of a model or of adapters.

    It is 'sha256:…' of the names and all bytes of its weight files. Above 2 GiB it is
    'sampled-sha256:…', of their names, sizes, headers and 64 evenly spread pieces of 64 KiB of each
    file. The latter detects another model, but may miss a change of single weights. UserError if
    there are no such files, or one cannot be read.
    """
    folder = as_path(path)
    adapters = not (folder / "config.json").exists()
    names = [f"{_ADAPTERS}.safetensors"] if adapters else _weight_files(Folder(path))
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing: download the folder again")
    with explained(path, "reading its weights"):
        files = tuple((name, *size_and_time(folder / name)) for name in names)
        sampled = sum(size for _, size, _ in files) > _HASHED_WHOLE_BYTES
        return _digest(folder, files, sampled)


@functools.cache
def _digest(folder: Path, files: tuple[tuple[str, int, int], ...], sampled: bool) -> str:
    """`weights_digest` of files by name, size and time of change."""
    digest = hashlib.sha256()
    for name, size, _ in files:
        digest.update(f"{name} {size}\n".encode())
        with (folder / name).open("rb") as file:
            if not sampled:
                while block := file.read(1 << 20):
                    digest.update(block)
                continue
            begin = 8 + int.from_bytes(file.read(8), "little")
            digest.update(file.read(begin - 8))
            for number in range(_SAMPLES):
                file.seek(begin + (size - begin) * number // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return f"{'sampled-' * sampled}sha256:{digest.hexdigest()}"


def _check_tied(folder: Folder, entries: Mapping[str, TensorEntry]) -> None:
    """UserError if the files have an output head that differs, which a tied model would ignore."""
    head, embedding = entries.get("lm_head.weight"), entries.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
    if same:
        rows = (read_rows(folder, [(entry, 0, entry.shape[0])]) for entry in (head, embedding))
        same = all(a.fetch().tobytes() == b.fetch().tobytes() for a, b in zip(*rows, strict=True))
    if not same:
        raise UserError(
            f"{folder.name('config.json')} says tie_word_embeddings: true, but lm_head.weight in "
            f"{folder.name(head.file)} is not the embedding; set tie_word_embeddings to false, or "
            "remove lm_head.weight"
        )


def one_device_mesh() -> Mesh:
    """The default mesh: the first local device."""
    return make_mesh(devices=jax.local_devices()[:1])


def save_hf(
    path: str | Path,
    config: LlamaConfig,
    params: dict,
    *,
    dtype: Any = None,
    extra_config: Mapping[str, Any] | None = None,
    tokenizer_folder: str | Path | None = None,
    chat_template: str | None = None,
    stop_token_ids: Sequence[int] = (),
    files: Mapping[str, str] | None = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes a folder that transformers and vLLM load; it appears whole or not at all.

    Every process must call it; the first one writes. UserError if `path` is not empty, or the disk
    is full.

    Args:
      path: a folder that does not exist, or is empty.
      params: the parameters, adapters merged (see `lora.merge`).
      dtype: of the tensors written; by default that of the parameters.
      extra_config: further fields of config.json, such as a run id.
      tokenizer_folder: its tokenizer files are copied.
      chat_template: jinja text that replaces the tokenizer's own.
      stop_token_ids: tokens that end an answer, for generation_config.json; () takes those of
        `config`, which config.json always has.
      files: text files to add, by name, such as a README.md.
      max_shard_bytes: a larger model is written in several files and an index.
    """
    leaves = flatten_dict(params, sep="/")
    expected = parameter_shapes(config, jnp.float32)
    wrong = leaves.keys() ^ expected.keys()
    wrong |= {leaf for leaf in leaves.keys() - wrong if leaves[leaf].shape != expected[leaf].shape}
    if wrong:
        raise ValueError(f"params do not fit the config (adapters not merged?): {sorted(wrong)}")
    written_dtype = jnp.dtype(leaves["embed/embedding"].dtype if dtype is None else dtype)
    with new_folder(path) as folder:
        tensors = [
            out for name, leaf in leaves.items() for out in output_tensors(name, leaf, dtype)
        ]
        tensors.sort(key=_place_in_model)
        write_tensors(folder, "model", tensors, max_shard_bytes)
        if folder is None:
            return
        hf = {
            **config.to_hf(),
            "torch_dtype": written_dtype.name,  # read by transformers 4 and 5 alike, and by vLLM
            # Without it transformers 4.57 calls every tokenizer of a large vocabulary wrong.
            "transformers_version": metadata.version("transformers"),
            **(extra_config or {}),
        }
        write_json(folder / "config.json", hf)
        write_prompt_files(folder, config, tokenizer_folder, chat_template, stop_token_ids)
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")


def write_prompt_files(
    folder: Path,
    config: LlamaConfig,
    tokenizer_folder: str | Path | None,
    chat_template: str | None,
    stop_token_ids: Sequence[int],
) -> None:
    """Writes the tokenizer, chat template and stop tokens; the arguments are those of `save_hf`."""
    hf = config.to_hf()
    eos = list(stop_token_ids) or hf["eos_token_id"]
    generation = {"bos_token_id": hf["bos_token_id"], "eos_token_id": eos}
    if tokenizer_folder is not None:
        source = Folder(tokenizer_folder)
        # How the base is sampled: its temperature, top_p and the like.
        generation = {**(source.read_json("generation_config.json") or {}), **generation}
        for name in _TOKENIZER_FILES:
            if (content := source.read(name)) is not None:
                (folder / name).write_bytes(content)
    write_json(folder / "generation_config.json", generation)
    if chat_template is not None:
        # Plain jinja2 does not know the tag that marks what the loss counts. An `if` in its place
        # does not change the white space around it.
        text = _GENERATION_TAG.sub(lambda tag: tag[1] + _PLAIN_TAG[tag[2]] + tag[3], chat_template)
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
        if (tokenizer := Folder(folder).read_json("tokenizer_config.json")) is not None:
            # Transformers 5 saves a class and a field that 4 does not know. This class takes
            # tokenizer.json as it is, as the run did.
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
            # Of this class 4 makes token_type_ids too, which no Llama takes.
            tokenizer.setdefault("model_input_names", ["input_ids", "attention_mask"])
            if isinstance(tokenizer.get("extra_special_tokens"), list):
                tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
            # Transformers before 4.48, and text-generation-inference, read no chat_template.jinja.
            tokenizer["chat_template"] = text
            write_json(folder / "tokenizer_config.json", tokenizer)


def write_peft(
    folder: Path | None,
    lora: LoraConfig,
    adapter: dict,
    *,
    base_model: str,
    files: Mapping[str, str],
) -> None:
    """Writes files that `peft.PeftModel.from_pretrained` and vLLM load. Every process calls it.

    Args:
      folder: as `new_folder` gives it: None in all processes but the first.
      adapter: its parameters, as `lora.split` gives them.
      base_model: folder or Hub name; peft resolves a relative folder from its own working
        directory.
      files: text files to add, by name, such as a README.md.
    """
    leaves = flatten_dict(adapter, sep="/")
    adapted = {path.rpartition("/")[0].removeprefix("layers/") for path in leaves}
    tensors = [
        tensor
        for path, leaf in leaves.items()
        for tensor in output_tensors(path, leaf, prefix=_PEFT_PREFIX)
    ]
    write_tensors(folder, _ADAPTERS, sorted(tensors, key=lambda t: t.name), float("inf"))
    if folder is None:
        return
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(name for name in _PROJECTIONS if _PROJECTIONS[name] in adapted),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", config)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def load_peft(
    path: str | Path, config: LlamaConfig, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> tuple[LoraConfig, dict]:
    """Reads a folder of adapters for the model of `config` onto a mesh, as `load_hf` reads a model.

    Returns the adapters' configuration, and their parameters for `lora.combine`. UserError if they
    are not a plain LoRA of this model's projections, or the files are damaged.
    """
    mesh = one_device_mesh() if mesh is None else mesh
    check_mesh(config, mesh)
    folder = Folder(path)
    lora = _read_peft_config(folder)
    shapes = parameter_shapes(config, dtype, lora)
    adapter_shapes = {path: leaf for path, leaf in shapes.items() if is_adapter_path(path)}
    entries = read_headers(folder, [f"{_ADAPTERS}.safetensors"])
    return lora, load_leaves(folder, entries, adapter_shapes, mesh, prefix=_PEFT_PREFIX)


def _read_peft_config(folder: Folder) -> LoraConfig:
    name = folder.name("adapter_config.json")
    peft = folder.read_json("adapter_config.json")
    if peft is None:
        raise UserError(f"{name} not found: an adapter folder in PEFT format is needed")
    # Fields that would change the function, which is computed only for these values.
    for field, plain in (
        ("peft_type", "LORA"),
        ("bias", "none"),
        ("use_dora", False),
        ("use_rslora", False),
        ("fan_in_fan_out", False),
        ("rank_pattern", {}),
        ("alpha_pattern", {}),
        ("modules_to_save", []),
        ("layers_to_transform", []),
        ("alora_invocation_tokens", []),
    ):
        if (peft.get(field) or plain) != plain:
            raise UserError(f"{name}: {field}={peft[field]!r} is not supported (only {plain!r})")
    start = peft.get("init_lora_weights", True)
    if start not in (True, False, None, "gaussian", "orthogonal", "eva", "mica"):
        raise UserError(
            f"{name}: init_lora_weights={start!r} changes the base model too, which is not "
            "supported (of pissa, corda and olora PEFT makes plain adapters: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    targets = peft.get("target_modules")
    if not isinstance(targets, list) or not all(target in [*_PROJECTIONS] for target in targets):
        known = ", ".join(_PROJECTIONS)
        raise UserError(f"{name}: target_modules={targets!r} must be a list of some of {known}")
    check_types(peft, {"r": 1, "lora_alpha": 1.0}, name, whole=True)
    if not 0 < peft["r"] < 2**31:
        raise UserError(f"{name}: r={peft['r']} must be a whole number above 0")
    regex = "|".join(sorted(f"{_PROJECTIONS[target]}$" for target in targets))
    return LoraConfig(rank=peft["r"], alpha=peft["lora_alpha"], targets=regex)


def _weight_files(folder: Folder) -> list[str]:
    """The safetensors files of a model folder, checked against the index if there is one."""
    single, index_name = "model.safetensors", "model.safetensors.index.json"
    # Asking for no more than the length word tells whether the file is there.
    if folder.read(single, slice(0, 1)) is not None:
        return [single]
    index = folder.read_json(index_name)
    if index is None:
        raise UserError(
            f"{folder.path} has neither {single} nor {index_name}: the model's weights must be "
            "in safetensors format"
        )
    weight_map = index.get("weight_map")
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise UserError(
            f"{folder.name(index_name)} has no weight_map of file names: download it again"
        )
    return sorted(set(files))


def _place_in_model(tensor: OutputTensor) -> tuple[int, int, str]:
    """Sort key: embedding, layer 0, layer 1, ..., final norm, head; a shard holds whole layers."""
    if layer := re.match(r"model\.layers\.(\d+)\.", tensor.name):
        return 1, int(layer[1]), tensor.name
    return (0 if "embed_tokens" in tensor.name else 2), 0, tensor.name
