"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, as an optax transformation."""

from typing import Any

import optax

from sa_jax.optim.soap_official import official
from sa_jax.optim.soap_views import ViewRule, every_axis


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
) -> optax.GradientTransformation:
    """SOAP (arXiv 2409.11321).

    Raises:
      ValueError: a frequency or size that is not positive, or an unknown mode.
    """
    for name, value in (
        ("precondition_frequency", precondition_frequency),
        ("max_precond_dim", max_precond_dim),
    ):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
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
    raise ValueError(f"mode={mode!r} is unknown: use official or fast")
