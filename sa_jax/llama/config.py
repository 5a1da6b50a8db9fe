"""The architecture of a Llama, or of a family with the same layers, from and to Hugging Face's
`config.json`. `FAMILIES` is the one list of what is read."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sa_jax.buckets import as_path
from sa_jax.errors import UserError
from sa_jax.files import parse_json


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family of models differs from Llama."""

    architecture: str  # transformers' class
    qkv_bias: bool = False  # the query, key and value projections have biases
    qk_norm: bool = False  # RMS norms over each head's queries and keys, before rope
    # Transformers' values of fields that a config.json leaves out, where not Llama's.
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Fields that must have this value if a config.json has them.
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_LLAMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WHOLE_HEADS = {"partial_rotary_factor": 1}  # rope turns all of a head
_QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", only={"attention_bias": False, "mlp_bias": False}),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131_072,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, defaults=_QWEN_DEFAULTS),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        qk_norm=True,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        only={"attention_bias": False},
    ),
}


# Field of `LlamaConfig` -> its name in config.json, where they differ.
_HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3's frequency-dependent rope scaling (`rope_type: llama3`)."""

    factor: float  # by how much the lowest frequencies are slowed (8 for 3.1 and 3.3, 32 for 3.2)
    # Bounds, in wavelengths per original context, between which the two regimes are blended.
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int  # context length before scaling, in tokens


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Everything that determines the parameters' shapes and the function that they compute.

    Fields of `Llama` say how it is executed (dtypes, attention backend, remat, adapters).
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
    family: str = "llama"  # a key of `FAMILIES`

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
        layer += self._attention_vectors
        heads = 1 if self.tie_word_embeddings else 2
        return self.num_layers * layer + d + heads * self.vocab_size * d

    @property
    def qkv_bias(self) -> bool:
        return FAMILIES[self.family].qkv_bias

    @property
    def qk_norm(self) -> bool:
        return FAMILIES[self.family].qk_norm

    @property
    def _attention_vectors(self) -> int:
        """Parameters of a layer's attention that are in no matrix."""
        biases = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        return biases * self.qkv_bias + 2 * self.head_dim * self.qk_norm

    def flops_per_token(self, sequence_length: int, trainable: float = math.inf) -> float:
        """Floating-point operations of one training step per token slot, causal attention.

        Each matrix parameter costs 2 in the forward pass, 2 for input gradients, and 2 for its own
        gradient if it trains; `trainable` is how many parameters do. Attention counts only the
        lower triangle. Recomputation by remat is not counted (this gives MFU, not HFU).
        """
        embedding = self.vocab_size * self.hidden_size
        norms = (2 * self.num_layers + 1) * self.hidden_size
        norms += self.num_layers * self._attention_vectors
        matrices = self.num_parameters - norms - (0 if self.tie_word_embeddings else embedding)
        attention = self.num_layers * self.num_heads * self.head_dim * sequence_length
        share = min(1.0, trainable / self.num_parameters)
        return matrices * (4 + 2 * share) + 6 * attention

    @classmethod
    def from_hf(cls, hf: dict[str, Any], source: str = "config.json") -> "LlamaConfig":
        """Reads the fields of a Hugging Face config of one of `FAMILIES`; `source` is for messages.

        The fields of rope are read as transformers 5 reads them: `rope_scaling`, if it is not
        empty, replaces `rope_parameters`, and both may contain `rope_theta`. Missing optional
        fields get transformers' defaults.

        Raises:
          UserError: a field is missing or has another type, or asks for something that this model
            does not support.
        """
        fields = _Fields(hf, source)
        kind = hf.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise UserError(f"{source}: model_type is {kind!r}; known: {', '.join(FAMILIES)}")
        family = FAMILIES[kind]
        fields.defaults = {**_LLAMA_DEFAULTS, **family.defaults}
        only = {**family.only, "hidden_act": "silu", "quantization_config": None, **_WHOLE_HEADS}
        fields.check_only(only)
        num_heads = fields.size("num_attention_heads")
        hidden_size = fields.size("hidden_size")
        context = fields.size("max_position_embeddings")
        _check_window(fields, kind, context)
        name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
        rope = _Fields(fields.get(name, dict, "an object", null=True) or {}, f"{source}: {name}")
        rope.defaults = {"original_max_position_embeddings": context}
        rope.check_only(_WHOLE_HEADS)
        theta = rope if "rope_theta" in rope.values else fields
        theta.defaults = {**theta.defaults, "rope_theta": 10_000.0}
        eos = hf.get("eos_token_id", fields.defaults["eos_token_id"])
        eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
        bos = hf.get("bos_token_id", fields.defaults["bos_token_id"])
        if not all(type(token) is int for token in [*eos, *([] if bos is None else [bos])]):
            raise UserError(f"{source}: bos_token_id and eos_token_id must be token numbers")
        return cls(
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=fields.size("intermediate_size"),
            num_layers=fields.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=fields.size("num_key_value_heads", num_heads),
            head_dim=fields.size("head_dim", hidden_size // num_heads),
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope_theta=theta.number("rope_theta"),
            rope_scaling=_rope_scaling(rope),
            max_position_embeddings=context,
            tie_word_embeddings=fields.get("tie_word_embeddings", bool, "true or false"),
            bos_token_id=bos,
            eos_token_ids=tuple(eos),
            family=kind,
        )

    @classmethod
    def load(cls, folder: str | Path) -> "LlamaConfig":
        """Reads `folder/config.json`; UserError if it is not there or not JSON."""
        path = as_path(folder, "config.json")
        try:
            return cls.from_hf(parse_json(path.read_bytes()), str(path))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{path} not found: a Hugging Face model folder is needed (a model on the Hub must "
                "be downloaded first: hf download NAME --local-dir DIR)"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as JSON: {error}") from None

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers 4 and 5 both read back to the same model."""
        values = dataclasses.asdict(self)
        if self.rope_scaling is not None:
            values["rope_scaling"] = {"rope_type": "llama3", **values["rope_scaling"]}
        bos, eos = values.pop("bos_token_id"), list(values.pop("eos_token_ids"))
        family = FAMILIES[values.pop("family")]
        return {
            "architectures": [family.architecture],
            "model_type": self.family,
            **{_HF_NAMES.get(name, name): value for name, value in values.items()},
            "hidden_act": "silu",
            **family.only,
            **({} if self.family == "llama" else {"sliding_window": None}),
            "bos_token_id": bos,
            "eos_token_id": eos[0] if len(eos) == 1 else (eos or None),
        }


class _Fields:
    """Fields of a JSON object, read with their types checked; `defaults` are of those left out."""

    def __init__(self, values: Any, source: str):
        if not isinstance(values, dict):
            raise UserError(f"{source} must hold a JSON object, not {type(values).__name__}")
        self.values, self.source = values, source
        self.defaults: dict[str, Any] = {}

    def check_only(self, only: Mapping[str, Any]) -> None:
        """UserError if a field asks for something else than the one value that is computed."""
        for name, value in only.items():
            if self.values.get(name, value) not in (value, None):
                given = str(self.values[name])[:60]
                raise UserError(
                    f"{self.source}: {name}={given!r} is not supported (only {value!r})"
                )

    def get(self, name: str, kind: Any, words: str, *, null: bool = False) -> Any:
        """The value of a field, or its default if it is left out; with `null` it may be None."""
        if not null and name not in self.values and name not in self.defaults:
            raise UserError(f"{self.source}: field {name!r} is missing")
        value = self.values.get(name, self.defaults.get(name))
        bad = isinstance(value, bool) and kind is not bool
        if not (null and value is None) and (bad or not isinstance(value, kind)):
            raise UserError(f"{self.source}: {name}={str(value)[:60]!r} must be {words}")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """`default` stands in for null and for a field that is left out."""
        return self._positive(name, int, "a whole number above 0", 2**31, default)

    def number(self, name: str) -> float:
        return self._positive(name, int | float, "a number above 0", math.inf)

    def _positive(self, name: str, kind: Any, words: str, end: float, default: Any = None) -> Any:
        given = self.get(name, kind, words, null=default is not None)
        value = default if given is None else given
        if not 0 < value < end:
            raise UserError(f"{self.source}: {name}={value} must be {words}")
        return value


def _check_window(fields: _Fields, family: str, context: int) -> None:
    """UserError if the model's sliding window would hide earlier tokens."""
    layers = fields.get("layer_types", list, "a list", null=True) or []
    window = fields.get("sliding_window", int, "a whole number", null=True)
    if family.startswith("qwen"):
        slides = fields.values.get("use_sliding_window") and "full_attention" not in layers
        window = window or 4096 if slides else None
    if any(layer != "full_attention" for layer in layers) or (window and window < context):
        raise UserError(
            f"{fields.source}: sliding-window attention is not supported (sliding_window="
            f"{window}, max_position_embeddings={context}); use a model whose window is null, or "
            "at least as long as its context"
        )


def _rope_scaling(rope: _Fields) -> RopeScaling | None:
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(f"{rope.source}: rope_type {kind!r} is not supported (only 'llama3')")
    return RopeScaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.size("original_max_position_embeddings"),
    )
