"""Low-rank adapters (LoRA, arXiv 2106.09685): which kernels carry one, splitting and merging."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """A rank-r adapter `x·A·B·(alpha/rank)` beside each kernel whose module path fits `targets`."""

    rank: int
    alpha: float
    # A regex, searched in module paths such as `attention/q` or `mlp/down`.
    targets: str = r"attention/(q|k|v|o)|mlp/(gate|up|down)"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def is_adapter_path(path: str) -> bool:
    """Whether a path is that of a leaf that LoRA trains, such as `layers/attention/q/lora_a`."""
    return path.endswith(("/lora_a", "/lora_b"))


def split(params: dict, is_first: Callable[[str], bool] = is_adapter_path) -> tuple[dict, dict]:
    """The leaves with such paths and the others, as two trees: adapter and base model."""
    leaves = flatten_dict(params, sep="/")
    first = {path: leaf for path, leaf in leaves.items() if is_first(path)}
    others = {path: leaf for path, leaf in leaves.items() if path not in first}
    return unflatten_dict(first, sep="/"), unflatten_dict(others, sep="/")


def combine(adapter: dict, base: dict) -> dict:
    """The inverse of `split`."""
    return unflatten_dict(flatten_dict(base, sep="/") | flatten_dict(adapter, sep="/"), sep="/")


def merge(params: dict, lora: LoraConfig) -> dict:
    """Adds every adapter to its kernel and drops it: the same function in fewer parameters.

    The sum is taken in float32 and cast back to the kernel's dtype; shardings are kept.
    """
    leaves = flatten_dict(params, sep="/")
    merged = {path: leaf for path, leaf in leaves.items() if not is_adapter_path(path)}
    for path, a in leaves.items():
        module, _, part = path.rpartition("/")
        if part == "lora_a":
            kernel = merged[f"{module}/kernel"]
            add = _adder(lora.scale, getattr(kernel, "sharding", None))
            merged[f"{module}/kernel"] = add(kernel, a, leaves[f"{module}/lora_b"])
    return unflatten_dict(merged, sep="/")


@functools.lru_cache(maxsize=64)
def _adder(scale: float, sharding: Sharding | None):
    def add(kernel_lio, a_lir, b_lro):
        delta_lio = jnp.einsum(
            "lir,lro->lio",
            a_lir.astype(jnp.float32),
            b_lro.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        return (kernel_lio.astype(jnp.float32) + scale * delta_lio).astype(kernel_lio.dtype)

    return jax.jit(add, out_shardings=sharding)
