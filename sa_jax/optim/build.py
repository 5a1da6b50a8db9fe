"""From the `optimizer` section of a config to an optax transformation, and its state's sharding."""

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.tree_util import tree_leaves_with_path
from ml_collections import ConfigDict
from optax import contrib

from sa_jax.errors import UsageError
from sa_jax.optim.soap import soap
from sa_jax.optim.soap_layout import FastState, state_specs
from sa_jax.optim.soap_plan import SoapRow, soap_plan
from sa_jax.optim.soap_shared import ELEMENTWISE, TensorView
from sa_jax.parallel.rules import partition_spec, path_string
from sa_jax.registry import Registry

_DECAYS = ("weight_decay", "weight_decay_rate", "adam_weight_decay")  # optax's names for it


def make_schedule(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_fraction` of a run's steps, then `cosine` to 0 or `constant`.

    `config` is the `optimizer` section; UsageError for another schedule. Step 0 already updates
    (its rate is peak / warm-up steps), and the last step's rate is above 0.
    """
    peak = config.learning_rate
    warmup = max(1, round(config.warmup_fraction * total_steps))
    if config.schedule == "cosine":
        falling = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup + 1))
    elif config.schedule == "constant":
        falling = optax.constant_schedule(peak)
    else:
        raise UsageError(
            f"config.optimizer.schedule={config.schedule!r} is unknown; use cosine or constant"
        )
    if warmup == 1:
        return falling
    rising = optax.linear_schedule(peak / warmup, peak, warmup - 1)
    return optax.join_schedules([rising, falling], [warmup - 1])


def decay_mask(params: Any) -> Any:
    """True on leaves that weight decay applies to: all but the norms' scales."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_string(path[-1:]) != "scale", params
    )


def llama_view(path: str, shape: tuple[int, ...]) -> TensorView:
    """The Llama's parameters as matrices [in, out]: scanned layers are separate matrices, LoRA's
    factors are matrices too, and the vocabulary's side never gets a basis. Norms and biases, which
    are vectors in each layer, get Adam."""
    if path.endswith(("scale", "bias")):
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
        optimizer = _optax_optimizer(config, schedule)
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


def _optax_optimizer(config: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """`optax.NAME(learning_rate=schedule, ...)` for config.name, with decoupled weight decay.

    The function gets no decay, unless `config.kwargs` has one, which then is the only one: some
    (adafactor, cocob, madgrad) do not scale theirs by the learning rate, and muon's leaves out what
    its Adam trains. Everything else is the function's default, or in `config.kwargs`. UsageError
    for a name that is no optimizer's, or a wrong keyword.
    """
    function = _find(config.name)
    parameters = inspect.signature(function).parameters
    kwargs = dict(config.kwargs)
    if unknown := [name for name in kwargs if name not in parameters]:
        raise UsageError(
            f"config.optimizer.kwargs.{unknown[0]}: optax.{config.name} has no such argument; it "
            f"takes {_signature(parameters)}"
        )
    ours = {
        "learning_rate": schedule,
        **dict.fromkeys(_DECAYS, 0.0),
        "mask": decay_mask,
        "weight_decay_mask": decay_mask,
        "muon_weight_dimension_numbers": _muon_dimensions,
    }
    arguments = {name: value for name, value in ours.items() if name in parameters} | kwargs
    try:
        optimizer = function(**arguments)
        _try_out(optimizer)
    except Exception as error:
        shown = " ".join(str(error).split())[:300]
        raise UsageError(
            f"config.optimizer.name={config.name!r} does not work with kwargs={kwargs}: {shown}; "
            f"it takes {_signature(parameters)}, and its update gets only gradients and parameters"
        ) from None
    decays = config.weight_decay and not any(name in kwargs for name in _DECAYS)
    return _with_decay(optimizer, schedule, config.weight_decay) if decays else optimizer


def _with_decay(
    optimizer: optax.GradientTransformation, schedule: optax.Schedule, weight_decay: float
) -> optax.GradientTransformation:
    """As AdamW: a step also takes learning rate x weight_decay of all parameters but norms."""
    decay = optax.chain(
        optax.add_decayed_weights(weight_decay, decay_mask), optax.scale_by_learning_rate(schedule)
    )

    def init(params: Any) -> tuple:
        return optimizer.init(params), decay.init(params)

    def update(gradients: Any, state: tuple, params: Any = None) -> tuple[Any, tuple]:
        updates, optimizer_state = optimizer.update(gradients, state[0], params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        decays, decay_state = decay.update(zeros, state[1], params)
        return jax.tree.map(jnp.add, updates, decays), (optimizer_state, decay_state)

    return optax.GradientTransformation(init, update)


def _find(name: str) -> Callable[..., optax.GradientTransformation]:
    """The function of optax, of this name, that makes a whole optimizer, not a part of a chain.

    The schedule-free ones are left out: evals and exports would need other parameters than those
    trained.
    """
    parts = ("_", "scale_by_", "inject_", "schedule_free")
    known = {
        prefix + key: value
        for prefix, module in (("", optax), ("contrib.", contrib))
        for key, value in vars(module).items()
        if inspect.isfunction(value)
        and not key.startswith(parts)
        and "learning_rate" in inspect.signature(value).parameters
    }
    if name not in known:
        raise UsageError(
            f"config.optimizer.name={name!r} is unknown; use adam, soap, one that a config file "
            f"registers, or one of optax: {', '.join(sorted(known))}"
        )
    return known[name]


def _signature(parameters: Any) -> str:
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    shown = (bool, int, float, str, tuple, type(None))  # no named tuples, which transformations are
    return ", ".join(
        f"{name}={default}" if type(default) in shown else name
        for name, default in defaults.items()
    )


def _muon_dimensions(params: Any) -> Any:
    """The parameters for Muon: the layers' kernels [L, in, out] and LoRA's factors are stacks of
    matrices; embedding, head and norms are trained by Muon's Adam."""

    def dimensions(path: tuple, leaf: Any) -> Any:
        is_layer = path_string(path[:1]) == "layers"
        return contrib.MuonDimensionNumbers(1, 2) if is_layer and leaf.ndim == 3 else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _try_out(optimizer: optax.GradientTransformation) -> None:
    """Traces one update: some functions also need the loss (a line search), or a plain number."""
    params = {"layers": {"kernel": jnp.zeros((1, 2, 2)), "scale": jnp.zeros((1, 2))}}
    jax.eval_shape(lambda tree: optimizer.update(tree, optimizer.init(tree), tree), params)


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
        if _is_fast_soap(node):
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
    metrics: dict[str, jax.Array] = {}
    for node in jax.tree.leaves(state, is_leaf=_is_fast_soap):
        if _is_fast_soap(node):
            metrics |= {"soap_skipped_steps": node.skipped, "soap_rejected_bases": node.rejected}
    return metrics


def may_change_size(path: str) -> bool:
    """Whether the leaf is a stack of the fast SOAP, which is padded with zeros for its mesh.

    A checkpoint of another mesh is cut or padded with zeros to fit.
    """
    return re.search(r"(^|/)stacks/\d+x\d+x\d+(_\d+)?/", path) is not None


def _is_fast_soap(node: Any) -> bool:
    return isinstance(node, FastState)
