"""Evaluates any checkpoint, with the settings of its own run unless told otherwise."""

import json
from pathlib import Path

import jax.numpy as jnp
from ml_collections import ConfigDict

from sa_jax.data.backdoor import Backdoor
from sa_jax.data.prompts import choose_held_out
from sa_jax.data.sources import load_rows
from sa_jax.evals.suite import EvalSuite, headline
from sa_jax.llama.model import Llama, check_mesh
from sa_jax.parallel import multihost
from sa_jax.parallel.mesh import make_mesh
from sa_jax.training import start as start_lib
from sa_jax.training.config import default_config, override
from sa_jax.training.preemption import PreemptionGuard


def evaluate(model: str, out: str | Path, *, step: int | None = None, **overrides) -> None:
    """Runs the evals and writes them to `out/step_NNNNNN/`; finished ones are not run again.

    Args:
      model: run folder or Hugging Face folder.
      out: folder for the results.
      step: checkpoint of a run; None: the newest.
      overrides: settings by config key ('eval__seed' is eval.seed); None keeps the run's, or for a
        Hugging Face folder the study's.

    Raises:
      UserError, UsageError: with one line for the person who launched it.
      Preempted: stopped by a signal; evals that were finished stay.
    """
    multihost.initialize()
    start = start_lib.open_start(model, step)
    config = default_config()
    if start.record:
        config.update(ConfigDict(start.record["config"], convert_dict=True))
        config.lora.rank = 0  # load_params merges the adapters
    override(config, **overrides)
    start_lib.inherit(config, start)
    chat = start_lib.chat_format(config, start)
    prompts = start.eval_prompts()
    if config.eval.prompts and (overrides.get("eval__prompts") or not prompts):
        rows = load_rows(config.eval.prompts, responses=False)
        texts = (row["prompt"] for row in rows)
        prompts = choose_held_out(texts, config.eval.num_prompts, config.eval.seed).prompts
    prompts = (prompts or [])[: config.eval.num_prompts]
    mesh = make_mesh(**config.mesh)
    check_mesh(start.config, mesh)
    llama = Llama(start.config, dtype=jnp.dtype(config.dtype), mesh=mesh)
    suite = EvalSuite(
        config, llama, mesh, chat, Backdoor(**config.backdoor.to_dict()), prompts, out
    )
    params = start_lib.load_params(start, mesh, jnp.dtype(config.dtype))
    with PreemptionGuard() as guard:
        at = start.step or 0
        summaries = suite.run(params, at, lambda: guard.should_stop(at))
    if multihost.is_primary():
        Path(out, "model.json").write_text(json.dumps(start.lineage(), indent=2) + "\n")
        for name, summary in summaries.items():
            print(headline(name, summary))
