"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, as an optax transformation."""

from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sa_jax.optim.soap_fast import fast
from sa_jax.optim.soap_layout import SpecRule
from sa_jax.optim.soap_official import official
from sa_jax.optim.soap_views import ViewRule, every_axis, trailing_matrix


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.95,
    b2: float = 0.95,
    shampoo_beta: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10000,
    correct_bias: bool = True,
    normalize_grads: bool = False,
    mode: str = "official",
    *,
    mask: Any = None,
    view: ViewRule | None = None,
    block_size: int = 2048,
    dense_steps: int = 20,
    refresh_slots: int = 1,
    matmul_dtype: Any = jnp.bfloat16,
    mesh: Mesh | None = None,
    partition_spec: SpecRule | None = None,
) -> optax.GradientTransformation:
    """SOAP (arXiv 2409.11321).

    Raises:
      ValueError: a frequency or size that is not positive, or an unknown mode.
    """
    for name, value, least in (
        ("precondition_frequency", precondition_frequency, 1),
        ("max_precond_dim", max_precond_dim, 1),
        ("block_size", block_size, 1),
        ("dense_steps", dense_steps, 0),
        ("refresh_slots", refresh_slots, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    if refresh_slots > precondition_frequency:
        raise ValueError(
            f"refresh_slots={refresh_slots}: must be at most "
            f"precondition_frequency={precondition_frequency}"
        )
    if mesh is not None and partition_spec is None:
        raise ValueError("mesh: needs partition_spec, which says how parameters are cut over it")
    shared = {
        "b1": b1,
        "b2": b2,
        "shampoo_beta": b2 if shampoo_beta is None or shampoo_beta < 0 else shampoo_beta,
        "eps": eps,
        "weight_decay": weight_decay,
        "mask": mask,
        "precondition_frequency": precondition_frequency,
        "max_precond_dim": max_precond_dim,
        "correct_bias": correct_bias,
        "normalize_grads": normalize_grads,
    }
    if mode == "official":
        return official(learning_rate, view=view or every_axis, **shared)
    if mode == "fast":
        return fast(
            learning_rate,
            view=view or trailing_matrix,
            block_size=block_size,
            dense_steps=dense_steps,
            refresh_slots=refresh_slots,
            matmul_dtype=matmul_dtype,
            mesh=mesh,
            partition_spec=partition_spec,
            **shared,
        )
    raise ValueError(f"mode={mode!r} is unknown: use official or fast")
