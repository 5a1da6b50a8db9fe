"""How every array is sharded: one ordered table from parameter path to PartitionSpec.

`fsdp` shards the axis that is not contracted over heads or features, `tensor` the other one
(Megatron's column- and row-parallel pairs), so a layer needs one reduction over `tensor` after
attention and one after the MLP. The leading axis of scanned leaves (layers) is never sharded.
"""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Rows of a batch are spread over both data-parallel axes.
BATCH_SPEC = P(("data", "fsdp"))

PARTITION_RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding$", P("tensor", "fsdp")),
    (r"lm_head/kernel$", P("fsdp", "tensor")),
    (r"attention/(q|k|v)/kernel$|mlp/(gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"attention/o/kernel$|mlp/down/kernel$", P(None, "tensor", "fsdp")),
    (r"attention/(q|k|v)/lora_a$|mlp/(gate|up)/lora_a$", P(None, "fsdp", None)),
    (r"attention/o/lora_a$|mlp/down/lora_a$", P(None, "tensor", None)),
    (r"attention/(q|k|v)/lora_b$|mlp/(gate|up)/lora_b$", P(None, None, "tensor")),
    (r"attention/o/lora_b$|mlp/down/lora_b$", P(None, None, "fsdp")),
    (r"(attention_norm|mlp_norm|final_norm|q_norm|k_norm)/scale$|attention/(q|k|v)/bias$", P()),
)


def path_string(path: tuple) -> str:
    """A `jax.tree_util` key path as `layers/attention/q/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def partition_spec(path: str, ndim: int) -> P:
    """The spec of one leaf; optimizer moments match through the parameter path they end in.

    Scalars (step counts) are replicated. Layers apart, `layer_0/...`, lack the axis of the stack.
    Raises ValueError unless exactly one rule matches.
    """
    if ndim == 0:
        return P()
    matches = [spec for pattern, spec in PARTITION_RULES if re.search(pattern, path)]
    if len(matches) != 1:
        raise ValueError(f"{len(matches)} partition rules match {path!r}; exactly one must")
    return P(*matches[0][1:]) if path.startswith("layer_") else matches[0]


def spec_axes(spec: P, ndim: int = 0) -> list[tuple[str, ...]]:
    """The mesh axes that shard each axis of an array; of `ndim` axes, where the spec has fewer."""
    axes = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    return axes + [()] * (ndim - len(axes))


def partition_specs(tree: Any) -> Any:
    """A tree of PartitionSpec with the structure of `tree` (arrays or ShapeDtypeStruct)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: partition_spec(path_string(path), leaf.ndim), tree
    )


def shardings(mesh: Mesh, tree: Any) -> Any:
    """A tree of NamedSharding with the structure of `tree`, for jit, restore and loading."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(tree))


def abstract(mesh: Mesh, tree: Any) -> Any:
    """`tree` as ShapeDtypeStructs that carry their shardings: a target to restore into."""
    return with_shardings(tree, shardings(mesh, tree))


def with_shardings(tree: Any, placed: Any) -> Any:
    """`tree` (arrays or their shapes) as ShapeDtypeStructs with the shardings of a like tree."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        placed,
    )
