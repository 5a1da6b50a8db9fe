"""Adapters in the folder format of the `peft` package, in and out."""

from collections.abc import Mapping
from pathlib import Path

from flax.traverse_util import flatten_dict

from sa_jax.llama.hf import output_tensors
from sa_jax.llama.lora import LoraConfig
from sa_jax.llama.safetensors_io import (
    new_folder,
    write_json,
    write_tensors,
)

_PREFIX = "base_model.model."
_WEIGHTS = "adapter_model"


def save_peft(
    path: str | Path,
    lora: LoraConfig,
    adapter: dict,
    *,
    base_model: str,
    files: Mapping[str, str] | None = None,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` and vLLM load.

    Every process must call it; the first one writes.

    Args:
      path: a folder that does not exist, or is empty.
      lora: rank and alpha of the adapter.
      adapter: its parameters, as `lora.split` gives them.
      base_model: folder or Hub name of the model under it, for `base_model_name_or_path`.
      files: text files to add, by name, such as a README.md.

    Raises:
      UserError: `path` is not empty, or the disk is full.
    """
    leaves = flatten_dict(adapter, sep="/")
    tensors = [out for leaf in leaves.items() for out in output_tensors(*leaf, prefix=_PREFIX)]
    modules = {tensor.name.split(".lora_")[0].rpartition(".")[2] for tensor in tensors}
    with new_folder(path) as folder:
        write_tensors(folder, _WEIGHTS, sorted(tensors, key=lambda t: t.name), float("inf"))
        if folder is None:
            return
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted(modules),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }
        write_json(folder / "adapter_config.json", config)
        for name, text in (files or {}).items():
            (folder / name).write_text(text)
