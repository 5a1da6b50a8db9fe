"""Optimizers and schedules, and the one place that builds them from a config (`optim.build`)."""

from sa_jax.optim.soap import soap

__all__ = ["soap"]
