"""Any optimizer of optax by the name of its function: 'lion', 'adafactor', 'contrib.muon', ..."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from sa_jax.errors import UsageError
from sa_jax.optim.schedules import decay_mask

_DECAYS = ("weight_decay", "weight_decay_rate", "adam_weight_decay")  # optax's names for it


def optax_optimizer(config: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
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
    known = {
        prefix + name: value
        for prefix, module in (("", optax), ("contrib.", contrib))
        for name, value in vars(module).items()
        if _is_optimizer(name, value)
    }
    if name not in known:
        raise UsageError(
            f"config.optimizer.name={name!r} is unknown; use adam, soap, one that a config file "
            f"registers, or one of optax: {', '.join(sorted(known))}"
        )
    return known[name]


def _is_optimizer(name: str, value: Any) -> bool:
    """Whether a function has a learning rate and makes a whole optimizer, not a part of a chain.

    Not the schedule-free ones: evals and exports would need other parameters than those trained.
    """
    if not inspect.isfunction(value) or name.startswith(
        ("_", "scale_by_", "inject_", "schedule_free")
    ):
        return False
    return "learning_rate" in inspect.signature(value).parameters


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
        is_layer = jax.tree_util.keystr(path[:1], simple=True) == "layers"
        return contrib.MuonDimensionNumbers(1, 2) if is_layer and leaf.ndim == 3 else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _try_out(optimizer: optax.GradientTransformation) -> None:
    """Traces one update: some functions also need the loss (a line search), or a plain number."""
    params = {"layers": {"kernel": jnp.zeros((1, 2, 2)), "scale": jnp.zeros((1, 2))}}
    jax.eval_shape(lambda tree: optimizer.update(tree, optimizer.init(tree), tree), params)
