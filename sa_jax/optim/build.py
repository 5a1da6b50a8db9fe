"""From the `optimizer` section of a config to an optax transformation, and its state's sharding."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.tree_util import tree_leaves_with_path

from sa_jax.errors import UsageError
from sa_jax.optim.from_optax import optax_optimizer
from sa_jax.optim.schedules import decay_mask, make_schedule
from sa_jax.optim.soap import soap
from sa_jax.optim.soap_plan import SoapRow, soap_plan
from sa_jax.optim.soap_state import FastState, state_specs
from sa_jax.optim.soap_views import ELEMENTWISE, TensorView
from sa_jax.parallel.rules import partition_spec, path_string
from sa_jax.registry import Registry


def llama_view(path: str, shape: tuple[int, ...]) -> TensorView:
    """The Llama's parameters as matrices [in, out]: scanned layers are separate matrices, LoRA's
    factors are matrices too, and the vocabulary's side never gets a basis. Norms get Adam."""
    if path.endswith("scale"):
        return ELEMENTWISE
    if path.endswith("embed/embedding"):
        return TensorView(0, (1, 1), skip=(0,))
    if path.endswith("lm_head/kernel"):
        return TensorView(0, (1, 1), skip=(1,))
    return TensorView(1, (1, 1))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimizer by name."""

    name: str  # the value of `config.optimizer.name`
    # `make(config, schedule, mesh)` gives the transformation whose updates are added to the
    # parameters. config is the `optimizer` section; schedule is the learning rate by step; mesh is
    # where parameters live as `parallel.rules` says, or None.
    make: Callable[[Any, optax.Schedule, Mesh | None], optax.GradientTransformation]


OPTIMIZERS: Registry[Optimizer] = Registry("optimizer")


def make_optimizer(
    config: Any, total_steps: int, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Clipping by global norm, then the named optimizer with decoupled weight decay.

    Args:
      config: the `optimizer` section of a run's config. Its name is one of `OPTIMIZERS`, or that of
        an optax function such as 'lion' or 'contrib.muon', with more arguments in `kwargs`;
        UsageError for another name or keyword.
      total_steps: updates in the whole run, for the schedule.
      mesh: where parameters live as `parallel.rules` says; SOAP puts its state on it.
    """
    schedule = make_schedule(config, total_steps)
    if config.name in OPTIMIZERS:
        optimizer = OPTIMIZERS[config.name].make(config, schedule, mesh)
    else:
        optimizer = optax_optimizer(config, schedule)
    if config.clip_norm:
        return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return optimizer


def _make_adam(config: Any, schedule: optax.Schedule, _: Mesh | None):
    _refuse_kwargs(config)
    return optax.adamw(
        schedule,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
        mu_dtype=config.mu_dtype,
    )


def _make_soap(config: Any, schedule: optax.Schedule, mesh: Mesh | None):
    _refuse_kwargs(config)
    options = config.soap.to_dict()
    options.pop("on_nonfinite")
    try:
        return soap(
            schedule,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
            view=llama_view,
            mesh=mesh,
            partition_spec=partition_spec,
            **options,
        )
    except ValueError as error:  # it begins with the name of a setting
        raise UsageError(f"config.optimizer.soap.{error}") from None


def _refuse_kwargs(config: Any) -> None:
    if config.kwargs:
        raise UsageError(
            f"config.optimizer.kwargs: {config.name} takes none; set its settings in "
            "config.optimizer"
        )


OPTIMIZERS.register(Optimizer("adam", _make_adam))
OPTIMIZERS.register(Optimizer("soap", _make_soap))


def optimizer_rows(config: Any, params: Any) -> list[SoapRow]:
    """What the optimizer stores and computes for each parameter that trains; [] except for the fast
    SOAP. `config` is the `optimizer` section; `params` may be of ShapeDtypeStruct."""
    if config.name != "soap" or config.soap.mode != "fast":
        return []
    sizes = {key: config.soap[key] for key in ("block_size", "block_above", "max_precond_dim")}
    return soap_plan(params, view=llama_view, **sizes)


def optimizer_specs(state: Any, params: Any) -> Any:
    """How an optimizer's state is sharded: the same tree, of PartitionSpec.

    A leaf whose path ends in a parameter's path, and which has its shape, is sharded like that
    parameter. Other leaves (counts, coefficients, sums over rows, the official SOAP's factors) are
    replicated, except those of the fast SOAP, which shards its own. `state` (of `make_optimizer`)
    and `params`, the tree that trains, may be of ShapeDtypeStruct.
    """
    shapes = {path_string(path): leaf.shape for path, leaf in tree_leaves_with_path(params)}

    def specs(path: tuple, node: Any) -> Any:
        if isinstance(node, FastState):
            return state_specs(node, partition_spec)
        parts = path_string(path).split("/")
        endings = ("/".join(parts[start:]) for start in range(len(parts)))
        parameter = next((ending for ending in endings if ending in shapes), None)
        if parameter is None or shapes[parameter] != node.shape:
            return P()
        return partition_spec(parameter, node.ndim)

    return jax.tree_util.tree_map_with_path(specs, state, is_leaf=_is_fast_soap)


def optimizer_metrics(state: Any) -> dict[str, jax.Array]:
    """Counters in an optimizer's state that are logged as metrics, int32 scalars; {} for Adam."""
    nodes = jax.tree.leaves(state, is_leaf=_is_fast_soap)
    return {
        name: getattr(node, field)
        for node in nodes
        if isinstance(node, FastState)
        for name, field in (("soap_skipped_steps", "skipped"), ("soap_rejected_bases", "rejected"))
    }


def may_change_size(path: str) -> bool:
    """Whether the leaf is a stack of the fast SOAP, which is padded with zeros for its mesh.

    A checkpoint of another mesh is cut or padded with zeros to fit.
    """
    return re.search(r"(^|/)stacks/\d+x\d+x\d+(_\d+)?/", path) is not None


def _is_fast_soap(node: Any) -> bool:
    return isinstance(node, FastState)
