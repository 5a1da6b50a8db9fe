"""The architecture of a Llama model, read from and written to a Hugging Face `config.json`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from sa_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency-dependent rope scaling (`rope_type: llama3`).

    Attributes:
      factor: by how much the lowest frequencies are slowed (8 for 3.1 and 3.3, 32 for 3.2).
      low_freq_factor, high_freq_factor: bounds, in wavelengths per original context, between
        which the two regimes are blended.
      original_max_position_embeddings: context length before scaling, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Everything that fixes the parameters' shapes and the function they compute.

    How it is executed (dtypes, attention backend, remat, adapters) are fields of `Llama`.
    Axis letters: V vocab_size, D hidden_size, F intermediate_size, L num_layers, H num_heads,
    G num_kv_heads, K head_dim.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}; fix the model's config.json"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd: rope needs an even head size")

    @property
    def num_parameters(self) -> int:
        """Number of parameters, embeddings included."""
        d, kv = self.hidden_size, self.num_kv_heads * self.head_dim
        q = self.num_heads * self.head_dim
        layer = d * (2 * q + 2 * kv) + 3 * d * self.intermediate_size + 2 * d
        heads = 1 if self.tie_word_embeddings else 2
        return self.num_layers * layer + d + heads * self.vocab_size * d

    def flops_per_token(self, sequence_length: int, *, trainable_fraction: float = 1.0) -> float:
        """Floating-point operations of one training step per token slot, causal attention.

        Forward 2 and input gradients 2 a matrix parameter, plus 2 for the gradients of those
        that train (`trainable_fraction`: 1 for full weights, about 0 for LoRA). Attention counts
        the lower triangle only. Recomputation by remat is not counted (so MFU, not HFU).
        """
        embedding = self.vocab_size * self.hidden_size
        norms = (2 * self.num_layers + 1) * self.hidden_size
        matrices = self.num_parameters - norms - (0 if self.tie_word_embeddings else embedding)
        attention = self.num_layers * self.num_heads * self.head_dim * sequence_length
        return matrices * (4 + 2 * trainable_fraction) + 6 * attention

    @classmethod
    def from_hf(cls, hf: dict[str, Any], source: str = "config.json") -> "LlamaConfig":
        """Reads the fields of a Hugging Face Llama config.

        Both spellings of rope are understood: `rope_theta` + `rope_scaling`, and the
        `rope_parameters` of transformers 5. Missing optional fields take transformers' defaults.

        Raises:
          UserError: a field is missing, or asks for something this model does not compute.
        """
        if hf.get("model_type") != "llama":
            raise UserError(f"{source}: model_type is {hf.get('model_type')!r}, not 'llama'")
        for field, only in (
            ("attention_bias", False),
            ("mlp_bias", False),
            ("hidden_act", "silu"),
        ):
            if hf.get(field, only) not in (only, None):
                raise UserError(f"{source}: {field}={hf[field]!r} is not supported (only {only!r})")
        try:
            num_heads = hf["num_attention_heads"]
            rope = hf.get("rope_parameters") or {}
            scaling = rope or hf.get("rope_scaling") or {}
            eos = hf.get("eos_token_id", 2)
            return cls(
                vocab_size=hf["vocab_size"],
                hidden_size=hf["hidden_size"],
                intermediate_size=hf["intermediate_size"],
                num_layers=hf["num_hidden_layers"],
                num_heads=num_heads,
                num_kv_heads=hf.get("num_key_value_heads") or num_heads,
                head_dim=hf.get("head_dim") or hf["hidden_size"] // num_heads,
                rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
                rope_theta=rope.get("rope_theta") or hf.get("rope_theta", 10_000.0),
                rope_scaling=_rope_scaling(scaling, source),
                max_position_embeddings=hf.get("max_position_embeddings", 2048),
                tie_word_embeddings=hf.get("tie_word_embeddings", False),
                bos_token_id=hf.get("bos_token_id", 1),
                eos_token_ids=() if eos is None else tuple([eos] if isinstance(eos, int) else eos),
            )
        except KeyError as error:
            raise UserError(f"{source}: field {error} is missing") from None

    @classmethod
    def load(cls, folder: str | Path) -> "LlamaConfig":
        """Reads `folder/config.json`; UserError if it is not there or not JSON."""
        path = Path(folder) / "config.json"
        try:
            return cls.from_hf(json.loads(path.read_text()), str(path))
        except FileNotFoundError:
            raise UserError(f"{path} not found: --model wants a Hugging Face folder") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as JSON: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers 4 and 5 both read back to the same model."""
        scaling = None
        if self.rope_scaling is not None:
            scaling = {"rope_type": "llama3", **dataclasses.asdict(self.rope_scaling)}
        eos = list(self.eos_token_ids)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        }


def _rope_scaling(scaling: dict[str, Any], source: str) -> RopeScaling | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{source}: rope_type {kind!r} is not supported (only 'llama3')")
    return RopeScaling(
        factor=scaling["factor"],
        low_freq_factor=scaling["low_freq_factor"],
        high_freq_factor=scaling["high_freq_factor"],
        original_max_position_embeddings=scaling["original_max_position_embeddings"],
    )
