"""Low-rank adapters (LoRA, arXiv 2106.09685): which kernels carry one, splitting and merging."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """A rank-r adapter `x·A·B·(alpha/rank)` beside every kernel whose module path matches `targets`.

    Attributes:
      rank: width r of the adapter.
      alpha: numerator of the scale alpha/rank.
      targets: regex, searched in module paths such as `attention/q` or `mlp/down`.
    """

    rank: int
    alpha: float
    targets: str = r"attention/(q|k|v|o)|mlp/(gate|up|down)"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank
