"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, as an optax transformation."""

from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sa_jax.optim.soap_fast import fast
from sa_jax.optim.soap_layout import LONGEST_SIDE
from sa_jax.optim.soap_official import official
from sa_jax.optim.soap_shared import Settings, SpecRule, ViewRule, every_axis, trailing_matrix


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.95,
    b2: float = 0.95,
    shampoo_beta: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    precondition_frequency: int = 10,
    max_precond_dim: int | None = None,
    correct_bias: bool = True,
    normalize_grads: bool = False,
    mode: str = "official",
    *,
    mask: Any = None,
    view: ViewRule | None = None,
    block_size: int = 2048,
    block_above: int | None = None,
    dense_steps: int = 20,
    refresh_slots: int = 1,
    matmul_dtype: Any = jnp.bfloat16,
    mesh: Mesh | None = None,
    partition_spec: SpecRule | None = None,
) -> optax.GradientTransformation:
    """SOAP (Vyas et al., arXiv 2409.11321): Adam in the eigenbasis of Shampoo's factors.

    For a matrix G [r, c], averages of G·Gᵀ and Gᵀ·G have bases Q_r [r, r] and Q_c [c, c]; Adam runs
    on Q_rᵀ·G·Q_c, and its step is rotated back. The first call only builds the bases, and updates
    nothing. Vectors and scalars get Adam, one call late. All state is float32 (official mode:
    float64 for float64 parameters). Updates have the state's dtype, so that bfloat16 parameters are
    rounded once, by `optax.apply_updates`.

    `mode="official"` is exactly the authors' code (github.com/nikhilvyas/SOAP, a1e5535), up to
    column signs: an eigendecomposition first, whole factors, no checks. `mode="fast"` is for large
    models; docs/soap.md says how it differs and what it costs.

    Args:
      learning_rate: a number, or a schedule of the number of calls before this one.
      b1, b2: decay rates of Adam's averages, which are in the rotated basis.
      shampoo_beta: decay rate of the factors; None or negative: b2.
      eps: added to the root of the second average, outside the bias correction.
      weight_decay: decoupled, applied with this call's rate to the parameter just updated.
      precondition_frequency: calls from one refresh of the bases to the next.
      max_precond_dim: a side longer than this has no basis. None: 10000, as in the official code;
        in the fast mode, which cuts long sides, 65536.
      correct_bias: Adam's bias correction.
      normalize_grads: scales each tensor's direction to a root mean square of 1.
      mode: "official" or "fast".
      mask: which leaves decay, as in `optax.adamw`: a tree of bool, or a function of params.
      view: from a leaf's path ("mlp/up/kernel") and shape to its `TensorView`, which says what is
        one tensor and what its sides are. Default in the official mode: every axis of an array is a
        side, as in the official code. Default in the fast mode: the last two axes are a matrix, and
        the axes before them count matrices.

    Args of the fast mode only:
      block_size: a long side is divided into equal blocks of at most this length, each with its own
        factor.
      block_above: sides longer than this are divided; None: those longer than block_size.
      dense_steps: the number of first steps at each of which the bases are refreshed.
      refresh_slots: 1 refreshes all bases at the same step. A larger number (up to
        precondition_frequency) spreads the matrices over as many steps of a period. Each device
        spreads its own, so meshes differ in when a matrix is refreshed.
      matmul_dtype: dtype of the operands of products with gradients, which accumulate in float32,
        and of the directions that go back to the parameters. Products that make bases have float32
        operands.
      mesh: puts the state on owners over all axes of a mesh (Auto or Explicit; where it is
        Explicit, call `init` and `update` under `jax.set_mesh`). None: one device.
      partition_spec: from a leaf's path and number of axes to the PartitionSpec of its parameters
        and gradients.

    Returns:
      A transformation whose state is an `OfficialState` or a `FastState`. `update` needs params
      if there is weight decay. The fast state's `skipped` counts calls with a gradient that was
      not finite (they change nothing), and `rejected` how often a matrix was not updated because
      its basis or factor could not be used.

    Raises:
      ValueError: a frequency or size that is not positive, an unknown mode, a mesh without
        partition_spec; in `init`, a view that does not fit a parameter.

    Example:
      tx = optax.chain(optax.clip_by_global_norm(1.0), soap(3e-3, mode="fast"))
      state = tx.init(params)
      updates, state = tx.update(gradients, state, params)
      params = optax.apply_updates(params, updates)
    """
    if max_precond_dim is None:
        max_precond_dim = 10000 if mode == "official" else LONGEST_SIDE
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
    if mode not in ("official", "fast"):
        raise ValueError(f"mode={mode!r} is unknown: use official or fast")
    settings = Settings(
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        shampoo_beta=b2 if shampoo_beta is None or shampoo_beta < 0 else shampoo_beta,
        eps=eps,
        weight_decay=weight_decay,
        precondition_frequency=precondition_frequency,
        max_precond_dim=max_precond_dim,
        correct_bias=correct_bias,
        normalize_grads=normalize_grads,
        mask=mask,
        view=view or (every_axis if mode == "official" else trailing_matrix),
        block_size=block_size,
        block_above=block_size if block_above is None else block_above,
        dense_steps=dense_steps,
        refresh_slots=refresh_slots,
        matmul_dtype=jnp.dtype(matmul_dtype),
        mesh=mesh,
        partition_spec=partition_spec,
    )
    return official(settings) if mode == "official" else fast(settings)
