"""Which parameters weight decay applies to."""

from typing import Any

import jax


def decay_mask(params: Any) -> Any:
    """True on leaves that weight decay applies to: all but the norms' scales."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) != "scale", params
    )
