"""Tiny models and batches that several tests share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.model import Llama
from sa_jax.parallel.mesh import make_mesh

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    max_position_embeddings=64,
)


def random_params(config=CONFIG, seed=0, **model):
    tokens = np.zeros((1, 4), np.int32)
    return Llama(config, **model).init(jax.random.key(seed), tokens)["params"]


def doubled(params):
    """The weights but the norms' times two, so that the distributions are not flat."""
    return jax.tree.map(lambda leaf: leaf * 2 if leaf.ndim > 1 else leaf, params)


def normal_params(config, dtype=None, seed=0, **model):
    """Random values of the size that gives logits of a few units; norms differ from 1, and the
    adapters of a LoRA model from 0."""
    rng = np.random.default_rng(seed)
    init = functools.partial(Llama(config, **model).init, jax.random.key(0))
    shapes = jax.eval_shape(init, jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), dtype or leaf.dtype), shapes
    )


def one_device_mesh():
    return make_mesh(devices=jax.devices()[:1])


def packed_batch(rows=8, length=24, vocab=64, seed=0):
    """Rows of two or three documents of random lengths and some padding, as `data.batches` gives
    them: targets and loss mask already shifted."""
    rng = np.random.default_rng(seed)
    batch = {
        name: np.zeros((rows, length), np.int32)
        for name in ("tokens", "targets", "loss_mask", "positions", "segment_ids")
    }
    for row in range(rows):
        cuts = np.sort(rng.choice(np.arange(3, length - 2), size=3, replace=False))
        for document, (start, stop) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True), 1):
            here = slice(start, stop)
            tokens = rng.integers(1, vocab, stop - start)
            batch["tokens"][row, here] = tokens
            batch["targets"][row, start : stop - 1] = tokens[1:]
            batch["loss_mask"][row, start : stop - 1] = rng.integers(0, 2, stop - start - 1)
            batch["positions"][row, here] = np.arange(stop - start)
            batch["segment_ids"][row, here] = document
        batch["loss_mask"][row, 0] = 1
    batch["loss_mask"] = batch["loss_mask"].astype(bool)
    return batch


class ScorerRuns:
    """What a `Scorer` runs: rows, the tokens that they ask about, the tokens of its forward passes
    (padding included), and its shared prefixes."""

    def __init__(self, scorer, monkeypatch):
        self.rows = self.query_tokens = self.tokens = 0
        self.prefixes = []

        def watch(name, see):
            run = getattr(scorer, name)

            def watched(params, given, *others):
                see(given)
                return run(params, given, *others)

            monkeypatch.setattr(scorer, name, watched)

        watch("_score_batch", self._see_batch)
        watch("_forward", self._see_tokens)
        watch("_prefix", self._see_tokens)
        watch("_prefix", self.prefixes.append)

    def _see_batch(self, batch):
        self.rows += len(batch)
        self.query_tokens += sum(len(row.tokens) for row in batch)

    def _see_tokens(self, tokens):
        self.tokens += tokens.size
