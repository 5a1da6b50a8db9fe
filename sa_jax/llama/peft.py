"""Adapters in the folder format of the `peft` package, in and out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from sa_jax.errors import UserError
from sa_jax.files import check_types
from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.hf import one_device_mesh, parameter_shapes
from sa_jax.llama.hf_tensors import MODULES, load_leaves, output_tensors
from sa_jax.llama.lora import LoraConfig, is_adapter_path
from sa_jax.llama.model import check_mesh
from sa_jax.llama.safetensors_io import Folder, read_headers, write_json, write_tensors

_PREFIX = "base_model.model."
_STEM = "adapter_model"
# Projections by their name there: q_proj -> attention/q.
_PROJECTIONS = {
    name.rpartition(".")[2]: path.removeprefix("layers/")
    for path, name in MODULES.items()
    if name.endswith("_proj")
}


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
      folder: as `safetensors_io.new_folder` gives it: None in all processes but the first.
      adapter: its parameters, as `lora.split` gives them.
      base_model: folder or Hub name of the base model, for `base_model_name_or_path`; peft resolves
        a relative folder from its own working directory.
      files: text files to add, by name, such as a README.md.
    """
    leaves = flatten_dict(adapter, sep="/")
    adapted = {path.rpartition("/")[0].removeprefix("layers/") for path in leaves}
    tensors = [
        tensor
        for path, leaf in leaves.items()
        for tensor in output_tensors(path, leaf, prefix=_PREFIX)
    ]
    write_tensors(folder, _STEM, sorted(tensors, key=lambda t: t.name), float("inf"))
    if folder is None:
        return
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(n for n, module in _PROJECTIONS.items() if module in adapted),
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
    """Reads an adapter folder onto a mesh, as `load_hf` reads a model: adapter_config.json and
    adapter_model.safetensors, for the model of `config`.

    Returns:
      Its configuration, and its parameters for `lora.combine`.

    Raises:
      UserError: it is not a plain LoRA of this model's projections, or its files are damaged.
    """
    mesh = one_device_mesh() if mesh is None else mesh
    check_mesh(config, mesh)
    folder = Folder(path)
    lora = _read_config(folder)
    shapes = parameter_shapes(config, dtype, lora)
    adapter_shapes = {path: leaf for path, leaf in shapes.items() if is_adapter_path(path)}
    entries = read_headers(folder, [f"{_STEM}.safetensors"])
    return lora, load_leaves(folder, entries, adapter_shapes, mesh, prefix=_PREFIX)


def _read_config(folder: Folder) -> LoraConfig:
    name = folder.name("adapter_config.json")
    peft = folder.read_json("adapter_config.json")
    if peft is None:
        raise UserError(f"{name} not found: an adapter folder in PEFT format is needed")
    # What would change the function and is not computed here.
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
