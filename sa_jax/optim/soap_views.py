"""SOAP's view of each parameter: a stack of tensors whose sides may have a basis."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple


class TensorView(NamedTuple):
    """A parameter as independent tensors, and the sides of each.

    Example: attention weights [L, D, heads, head_dim] are L matrices of D × heads·head_dim:
      TensorView(batch=1, sides=(1, 2)).
    """

    batch: int  # leading axes that count independent tensors (the layers of scanned weights)
    sides: tuple[int, ...]  # consecutive axes that each side merges; (): the parameter gets Adam
    skip: tuple[int, ...] = ()  # indices of sides that never get a basis (the vocabulary's)

    def batch_size(self, shape: tuple[int, ...]) -> int:
        """Number of independent tensors in a parameter of this shape."""
        return math.prod(shape[: self.batch])

    def side_sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Lengths of a tensor's sides."""
        edges = itertools.accumulate((self.batch, *self.sides))
        return tuple(math.prod(shape[start:end]) for start, end in itertools.pairwise(edges))


# From a leaf's path ("layers/attention/q/kernel") and shape to its view.
ViewRule = Callable[[str, tuple[int, ...]], TensorView]

ELEMENTWISE = TensorView(0, ())


def every_axis(path: str, shape: tuple[int, ...]) -> TensorView:
    """Every axis is a side, as in the official code; vectors and scalars get Adam."""
    return TensorView(0, (1,) * len(shape)) if len(shape) > 1 else ELEMENTWISE


def trailing_matrix(path: str, shape: tuple[int, ...]) -> TensorView:
    """The last two axes are a matrix, the axes before count matrices; vectors get Adam."""
    return TensorView(len(shape) - 2, (1, 1)) if len(shape) > 1 else ELEMENTWISE


def checked_view(rule: ViewRule, path: str, shape: tuple[int, ...]) -> TensorView:
    """The rule's view of a leaf; ValueError if it does not fit the shape."""
    view = rule(path, shape)
    fits = not view.sides or view.batch + sum(view.sides) == len(shape)
    if not fits or any(not 0 <= side < len(view.sides) for side in view.skip):
        raise ValueError(f"the view {view} does not fit {path!r} of shape {shape}")
    return view
