"""Llama in flax.linen: parameters are a plain dict, layers are scanned and may be rematerialised.

Parameters (kernels are [in, out]; layers stacked on a leading L axis):

    embed/embedding                    [V, D]
    layers/attention_norm/scale        [L, D]
    layers/attention/{q,k,v}/kernel    [L, D, heads * head_dim]
    layers/attention/{q,k,v}/bias      [L, heads * head_dim], in families with `qkv_bias`
    layers/attention/{q,k}_norm/scale  [L, head_dim], in families with `qk_norm`
    layers/attention/o/kernel          [L, heads * head_dim, D]
    layers/mlp_norm/scale              [L, D]
    layers/mlp/{gate,up}/kernel        [L, D, F]
    layers/mlp/down/kernel             [L, F, D]
    final_norm/scale                   [D]
    lm_head/kernel                     [D, V], absent when the embedding is tied

With `layers_apart`, layer i is `layer_i` instead of a part of `layers`, without the L axis.
An adapted kernel has lora_a [L, in, r] and lora_b [L, r, out] beside it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sa_jax.errors import UsageError
from sa_jax.llama.attention import attention, cached_attention
from sa_jax.llama.cache import KVCache, write
from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.kernels import ATTENTION_RESIDUALS
from sa_jax.llama.lora import LoraConfig, is_adapter_path, merge
from sa_jax.llama.rope import apply_rope, rope_angles
from sa_jax.parallel.mesh import check_divisible
from sa_jax.parallel.rules import BATCH_SPEC

_policies = jax.checkpoint_policies
_keep_attention = _policies.save_only_these_names(ATTENTION_RESIDUALS)


def _keep_products(prim: Any, *operands: Any, **params: Any) -> bool:
    """Keeps products with weights (attention scores are not such products), except an adapter's
    (x·A)·B: it is as large as x·W, but costs only a few hundredths of its work to compute again."""
    if not _policies.checkpoint_dots_with_no_batch_dims(prim, *operands, **params):
        return False
    weights = operands[1]
    summed = math.prod(weights.shape[axis] for axis in params["dimension_numbers"][0][1])
    return 8 * summed > weights.size // summed  # of a product's features


# What the backward pass keeps of a layer's forward pass; the rest is computed again.
REMAT_POLICIES = {
    "none": None,
    # The layer's input; "offload" parks it in the host's memory.
    "full": _policies.nothing_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    # The products: all of them, or the dear ones.
    "dots": _policies.save_from_both_policies(_policies.checkpoint_dots, _keep_attention),
    "minimal": _policies.save_from_both_policies(_keep_products, _keep_attention),
}


def remat_policies(platform: str) -> list[str]:
    """The names of the policies that are right on this platform ('cpu', 'gpu' or 'tpu').

    On GPUs, XLA before jax 0.11.1 reads an offloaded input of layer i as that of layer n - 1 - i in
    the backward pass. https://github.com/openxla/xla/pull/46231
    """
    wrong = platform == "gpu" and jax.__version_info__ < (0, 11, 1)
    return [name for name in REMAT_POLICIES if not (wrong and name == "offload")]


# An optional leaf beside a layer's kernel, added to it after its cast to the dtype of the
# computation: a gradient with respect to zeros there is the kernel's, in that dtype.
KERNEL_CHANGE = "kernel_change"

# With `apply(..., mutable=[STREAMS])` the residual stream is returned too: kept[STREAMS] holds
# (stream [B, S, D],) as EMBEDDINGS, before the layers, and (stream [L, B, S, D],) as layers/STREAM,
# after each. `apply({..., PERTURBATIONS: {EMBEDDINGS: [B, S, D]}})` adds that to the embeddings.
STREAMS, STREAM = "intermediates", "stream"
EMBEDDINGS, PERTURBATIONS = "embeddings", "perturbations"

_dot_general_f32 = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), float32 inside, over the last axis."""

    epsilon: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(jnp.float32)).astype(self.dtype)


class Projection(nn.Module):
    """`x·W (+ b)`, plus `x·A·B·scale` when an adapter sits on it. x is [rows, in], rows = B·S.

    The caller merges the batch and sequence axes: XLA's CPU backend runs a plain matrix product
    about 1.4x faster than the same product with batch axes; for other backends it is the same.
    """

    features: int
    dtype: Any
    param_dtype: Any
    lora: LoraConfig | None = None
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, self.param_dtype)
        kernel = kernel.astype(self.dtype)
        if self.has_variable("params", KERNEL_CHANGE):
            kernel += self.get_variable("params", KERNEL_CHANGE)
        y = x @ kernel
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            # Cast after it is spread over the rows: its gradient, a sum over them, is then summed
            # in float32. In bfloat16 it was 0.4 to 1.2 % off.
            y += jnp.broadcast_to(bias.astype(jnp.float32), y.shape).astype(self.dtype)
        # The path in a stack of layers, also for layers apart.
        path = "/".join(("layers", *self.path[-2:]))
        if self.lora is None or not re.search(self.lora.targets, path):
            return y
        # U(-1/√in, 1/√in) and zeros, as PEFT: at the start the adapter adds exactly nothing.
        init_a = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        rank, zeros = self.lora.rank, nn.initializers.zeros
        a = self.param("lora_a", init_a, (shape[0], rank), self.param_dtype)
        b = self.param("lora_b", zeros, (rank, shape[1]), self.param_dtype)
        return y + (x @ a.astype(self.dtype)) @ b.astype(self.dtype) * self.lora.scale


@dataclasses.dataclass(frozen=True)
class _Shared:
    """The fields of `Llama` that the modules of a layer need, and the parts that they build."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any
    attention: str
    lora: LoraConfig | None
    mesh: Mesh | None
    decode_kernel: bool

    def projection(self, features: int, name: str, use_bias: bool = False) -> Projection:
        return Projection(features, self.dtype, self.param_dtype, self.lora, use_bias, name=name)

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.config.rms_norm_eps, self.dtype, self.param_dtype, name=name)


class Attention(nn.Module):
    """Rotary grouped-query attention, with or without a cache of past keys and values."""

    shared: _Shared

    @nn.compact
    def __call__(self, x_bsd, rope, segment_ids_bs, cache, layer, positions_bs):
        shared, config = self.shared, self.shared.config
        b, s, d = x_bsd.shape
        x_nd = x_bsd.reshape(b * s, d)

        def heads(name: str, count: int) -> jax.Array:
            project = shared.projection(count * config.head_dim, name, config.qkv_bias)
            return project(x_nd).reshape(b, s, count, config.head_dim)

        q_bskh = heads("q", config.num_heads)
        k_bsgh, v_bsgh = heads("k", config.num_kv_heads), heads("v", config.num_kv_heads)
        if config.qk_norm:
            q_bskh, k_bsgh = shared.norm("q_norm")(q_bskh), shared.norm("k_norm")(k_bsgh)
        q_bskh, k_bsgh = apply_rope(q_bskh, *rope), apply_rope(k_bsgh, *rope)
        arrays = q_bskh, k_bsgh, v_bsgh
        if segment_ids_bs is not None:  # all that a token may see is here
            out_bskh = attention(
                *arrays, segment_ids_bs, implementation=shared.attention, mesh=shared.mesh
            )
        else:
            kernel_mesh = shared.mesh if shared.decode_kernel else None
            out_bskh = cached_attention(*arrays, cache, layer, positions_bs[:, 0], kernel_mesh)
        out_nd = shared.projection(d, "o")(out_bskh.reshape(b * s, -1))
        return out_nd.reshape(b, s, d), None if cache is None else (k_bsgh, v_bsgh)


@jax.custom_vjp
def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up (arXiv 2002.05202), elementwise, for two arrays of one shape and dtype.

    The backward pass keeps these two and nothing else, and computes in float32.
    """
    return nn.silu(gate) * up


def _swiglu_backward(inputs, d_out):
    gate, up, d_out = (x.astype(jnp.float32) for x in (*inputs, d_out))
    sigmoid = nn.sigmoid(gate)
    d_gate = d_out * up * sigmoid * (1 + gate * (1 - sigmoid))
    return d_gate.astype(inputs[0].dtype), (d_out * gate * sigmoid).astype(inputs[1].dtype)


swiglu.defvjp(lambda gate, up: (swiglu(gate, up), (gate, up)), _swiglu_backward)


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202)."""

    shared: _Shared

    @nn.compact
    def __call__(self, x_bsd: jax.Array) -> jax.Array:
        shared, features = self.shared, self.shared.config.intermediate_size
        x_nd = x_bsd.reshape(-1, x_bsd.shape[-1])
        gate_nf, up_nf = (shared.projection(features, name)(x_nd) for name in ("gate", "up"))
        down_nd = shared.projection(x_bsd.shape[-1], "down")(swiglu(gate_nf, up_nf))
        return down_nd.reshape(x_bsd.shape)


class Block(nn.Module):
    """One pre-norm layer; its signature is that of a scan body."""

    shared: _Shared

    @nn.compact
    def __call__(self, carry, rope, segment_ids_bs, positions_bs, cache):
        x_bsd, layer = carry
        x_bsd = checkpoint_name(x_bsd, "layer_input")
        with jax.named_scope("attention"):
            normed_bsd = self.shared.norm("attention_norm")(x_bsd)
            attend = Attention(self.shared, name="attention")
            out_bsd, new_kv = attend(normed_bsd, rope, segment_ids_bs, cache, layer, positions_bs)
            x_bsd = x_bsd + out_bsd
        with jax.named_scope("mlp"):
            x_bsd = x_bsd + MLP(self.shared, name="mlp")(self.shared.norm("mlp_norm")(x_bsd))
        x_bsd = _shard_residual(x_bsd, self.shared.mesh, cache)
        self.sow(STREAMS, STREAM, x_bsd)
        return (x_bsd, layer + 1), new_kv


def _shard_residual(x_bsd: jax.Array, mesh: Mesh | None, cache: KVCache | None) -> jax.Array:
    """Shards the residual stream: rows over data and fsdp, and in training features over tensor.

    So the activations that layers keep for the backward pass are sharded over all devices. A
    product gathers the features that it needs and scatters its sum; together these are Megatron's
    all-reduce (sequence parallelism, arXiv 2205.05198, shards tokens here instead). With a cache
    there is no backward pass, and this sharding gave wrong logits when a past that all rows share
    was extended (jax 0.10.2, 8 CPU devices).
    """
    spec = P(*BATCH_SPEC, None, "tensor") if cache is None else BATCH_SPEC
    return _constrain(x_bsd, mesh, spec)


def _constrain(x: jax.Array, mesh: Mesh | None, spec: P) -> jax.Array:
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


class Llama(nn.Module):
    """A Llama language model.

    Attributes:
      config: the architecture.
      dtype: dtype of the computation; softmax, norms, rope and logits are float32 always.
      param_dtype: dtype in which parameters are initialised.
      attention: backend, see `sa_jax.llama.attention`.
      remat: a key of `REMAT_POLICIES`.
      lora: adapters to compute (their parameters must be in the tree), or None.
      mesh: pins the residual stream's batch axis to the mesh's data and fsdp axes. With a cache,
        rows must divide over them.
      unroll: the layers are unrolled instead of run in a loop. On one CPU a training step is then a
        fifth faster (a loop copies each layer's weights out of their stack) and compiles as fast,
        but a decoding step takes half as long again.
      layers_apart: the parameters of each layer are leaves of their own, see `layers_apart`.
      decode_kernel: on GPUs, `decode` of one token a row takes `attend_to_past`; needs `mesh`.

    Example:
      config, params = load_hf("meta-llama/Llama-3.1-8B-Instruct", mesh)
      logits = Llama(config, mesh=mesh).apply({"params": params}, tokens)
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    attention: str = "reference"
    remat: str = "none"
    lora: LoraConfig | None = None
    mesh: Mesh | None = None
    unroll: bool = False
    layers_apart: bool = False
    decode_kernel: bool = False

    def setup(self):
        config = self.config
        if self.remat not in REMAT_POLICIES:
            raise UsageError(
                f"config.remat={self.remat!r} is unknown; use one of {', '.join(REMAT_POLICIES)}"
            )
        self.embed = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nn.initializers.normal(config.hidden_size**-0.5),
            param_dtype=self.param_dtype,
        )
        block = Block
        if self.remat != "none":
            # prevent_cse guards against undoing remat outside a scan; inside one it only costs.
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        fields = dataclasses.fields(_Shared)
        shared = _Shared(**{field.name: getattr(self, field.name) for field in fields})
        if self.layers_apart:
            self.layer = [block(shared) for _ in range(config.num_layers)]
        else:
            self.layers = nn.scan(
                block,
                variable_axes={"params": 0, STREAMS: 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=config.num_layers,
                unroll=config.num_layers if self.unroll else 1,
            )(shared)
        self.final_norm = RMSNorm(config.rms_norm_eps, self.dtype, self.param_dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Dense(
                config.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                dot_general=_dot_general_f32,
            )

    def __call__(
        self,
        tokens_bs: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Next-token logits, float32 [B, S, V].

        Args:
          tokens_bs: int [B, S].
          positions: int [B, S]; by default 0, 1, 2, ... in every row.
          segment_ids: int [B, S], equal inside a document; by default a row is one document.
        """
        return self.logits(self.hidden(tokens_bs, positions, segment_ids))

    def hidden(
        self,
        tokens_bs: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """The stream after the final norm, `dtype` [B, S, D]; arguments as in `__call__`."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens_bs.shape[1]), tokens_bs.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens_bs)
        return self._run(tokens_bs, positions, segment_ids, None)[0]

    def decode(
        self, tokens_bs: jax.Array, positions_bs: jax.Array, cache: KVCache, prefill: bool = False
    ) -> tuple[jax.Array, KVCache]:
        """Runs tokens whose past is in the cache, and adds them to it.

        Args:
          tokens_bs: int [B, S] (S = 1 to decode, more to prefill).
          positions_bs: int [B, S], consecutive in a row; also the cache slots they are written to.
            A query sees slots up to its own position; later slots may contain any finite values.
          cache: donate it, it is updated in place.
          prefill: no row has a past. Attention is then training's, whose memory grows linearly with
            the row.

        Returns:
          The stream after the final norm [B, S, D] (see `logits`) and the new cache.
        """
        segment_ids_bs = jnp.ones_like(tokens_bs) if prefill else None  # a row is one document
        hidden_bsd, (k_lbsgh, v_lbsgh) = self._run(tokens_bs, positions_bs, segment_ids_bs, cache)
        return hidden_bsd, write(cache, positions_bs, k_lbsgh, v_lbsgh, self.mesh)

    def extend(self, tokens_bs: jax.Array, positions_bs: jax.Array, prefix: KVCache) -> jax.Array:
        """Runs tokens after a past that all rows share; the cache does not keep them.

        Args:
          tokens_bs: int [B, S].
          positions_bs: int [B, S], consecutive in a row from the length of its past on.
          prefix: a cache of one row.

        Returns:
          The stream after the final norm [B, S, D] (see `logits`).
        """
        return self._run(tokens_bs, positions_bs, None, prefix)[0]

    def logits(self, hidden_bsd: jax.Array) -> jax.Array:
        """Projects [..., D] onto the vocabulary: float32 [..., V], accumulated in float32."""
        if not self.config.tie_word_embeddings:
            return self.lm_head(hidden_bsd)
        kernel_dv = self.embed.embedding.T.astype(self.dtype)
        return jnp.matmul(hidden_bsd, kernel_dv, preferred_element_type=jnp.float32)

    def _run(self, tokens_bs, positions_bs, segment_ids_bs, cache):
        # Looked up where the table's features are, then sent to the rows: asked for the second
        # alone, the partitioner gathers the table's features on every device.
        # Cast after the lookup: then a frequent token's gradient, a sum over its places, is summed
        # in the parameters' dtype. In bfloat16 it would stop growing: 46 % off at 4,096 places.
        x_bsd = self.embed(tokens_bs).astype(self.dtype)
        x_bsd = _constrain(x_bsd, self.mesh, P("data", None, "fsdp"))
        x_bsd = self.perturb(EMBEDDINGS, _shard_residual(x_bsd, self.mesh, cache), PERTURBATIONS)
        self.sow(STREAMS, EMBEDDINGS, x_bsd)
        rope = rope_angles(self.config, positions_bs)
        carry = (x_bsd, jnp.zeros((), jnp.int32))
        if self.layers_apart:
            each = []
            for layer in self.layer:
                carry, new_kv = layer(carry, rope, segment_ids_bs, positions_bs, cache)
                each.append(new_kv)
            new_kv = jax.tree.map(lambda *layers: jnp.stack(layers), *each)
        else:
            carry, new_kv = self.layers(carry, rope, segment_ids_bs, positions_bs, cache)
        x_bsd, _ = carry
        return self.final_norm(x_bsd), new_kv


def layers_apart(params: dict) -> dict:
    """Parameters for a model with `layers_apart`: layer i, without the leading L, is `layer_i`.

    A GPU reads them in place. Where XLA takes a layer out of a stack, it copies its kernels first,
    and moves each weight three times.
    """
    rest = {name: leaves for name, leaves in params.items() if name != "layers"}
    layers = params["layers"]
    count = jax.tree.leaves(layers)[0].shape[0]
    return rest | {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(count)}


def with_small_kernels_merged(model: Llama) -> tuple[Llama, Callable[[Any], Any]]:
    """Merges the adapters (LoRA, arXiv 2106.09685) where x·(W + A·B) takes less work than
    x·W + (x·A)·B: in models so small that their adapters are about as large as their kernels.

    Only for float32: in bfloat16 the sum W + A·B would round small changes away.

    Returns:
      A model without adapters, and the function from the parameters of `model` (not with
      `layers_apart`) to its own. Where merging does not pay: `model` itself, and the identity.
    """
    lora = model.lora
    if lora is not None and model.dtype == jnp.float32:
        shapes = parameter_shapes(model.config, jnp.float32, lora)
        adapters = [path for path in shapes if is_adapter_path(path)]
        kernels = {path.rpartition("/")[0] + "/kernel" for path in adapters}
        kernel_size = sum(shapes[path].size for path in kernels)
        adapter_size = sum(shapes[path].size for path in adapters)
        # A step takes three products with W, but two if W is frozen, and three with A and with B.
        if 3 * kernel_size < 2 * kernel_size + 3 * adapter_size:
            return model.clone(lora=None), functools.partial(merge, lora=lora)
    return model, lambda params: params


@functools.cache
def parameter_shapes(
    config: LlamaConfig, dtype: Any, lora: LoraConfig | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Path to shape of every parameter of the model."""
    model = Llama(config, param_dtype=dtype, lora=lora)
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tree = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    return flatten_dict(tree, sep="/")


def check_mesh(config: LlamaConfig, mesh: Mesh) -> None:
    """UsageError if the model's axes do not divide over the mesh, naming the sizes that would."""
    check_divisible(mesh, ("tensor",), config.num_heads, "attention heads")
    check_divisible(mesh, ("tensor",), config.num_kv_heads, "key/value heads")
    check_divisible(mesh, ("tensor",), config.intermediate_size, "MLP features")
    check_divisible(mesh, ("tensor",), config.vocab_size, "vocabulary entries")
    check_divisible(mesh, ("fsdp",), config.hidden_size, "hidden features")


def head_kernel(params: dict, config: LlamaConfig) -> jax.Array:
    """The output matrix [D, V] of a parameter tree, tied or not."""
    if config.tie_word_embeddings:
        return params["embed"]["embedding"].T
    return params["lm_head"]["kernel"]
