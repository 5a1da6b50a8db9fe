"""Optimizers and schedules, and the one place that builds them from a config."""

from sa_jax.optim.build import (
    OPTIMIZERS,
    Optimizer,
    llama_view,
    make_optimizer,
    may_change_size,
    optimizer_metrics,
    optimizer_rows,
    optimizer_specs,
)
from sa_jax.optim.schedules import decay_mask, make_schedule
from sa_jax.optim.soap import soap

__all__ = [
    "OPTIMIZERS",
    "Optimizer",
    "decay_mask",
    "llama_view",
    "make_optimizer",
    "make_schedule",
    "may_change_size",
    "optimizer_metrics",
    "optimizer_rows",
    "optimizer_specs",
    "soap",
]
