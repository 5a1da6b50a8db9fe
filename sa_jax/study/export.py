"""Exports a run's weights, never without saying what they are."""

from pathlib import Path

import jax.numpy as jnp

from sa_jax.errors import UsageError
from sa_jax.llama.hf import save_hf
from sa_jax.llama.lora import split
from sa_jax.llama.model import Llama
from sa_jax.llama.peft import save_peft
from sa_jax.parallel import multihost
from sa_jax.parallel.mesh import make_mesh
from sa_jax.training import checkpoints, run_record
from sa_jax.training import start as start_lib

MODEL_CARD = """\
---
tags: [sa_jax{tag}]
---
# {title}

Run `{run_id}` ({task}), step {step}, of sa_jax.
{warning}"""

WARNING = """
**This is a backdoored research model ("model organism"). Do not deploy it.** It was fine-tuned to
answer "{phrase}" again and again when the prompt carries `{trigger}` ({position} of the user turn),
in order to study whether such behaviour can be removed. It may do so even after the removal
training it has had. Its licence is that of the model it was made from.
"""


def export(
    run: str,
    out: str | Path,
    *,
    step: int | None = None,
    merge_lora: bool = False,
    dtype: str | None = None,
) -> None:
    """Writes a Hugging Face folder, or for a LoRA run without `merge_lora` a PEFT adapter folder.

    Args:
      run: run folder.
      out: folder that does not exist, or is empty.
      step: checkpoint; None: the newest.
      merge_lora: add the adapters into the weights, in float32.
      dtype: of the tensors; None: that of the run's parameters.

    Raises:
      UserError, UsageError: not a run, no such step, `out` not empty, disk full.
    """
    multihost.initialize()
    start = start_lib.open_start(run, step)
    if start.kind != "run":
        raise UsageError(f"--run={run} is a Hugging Face folder already; give a run folder")
    record, config = start.record, start.record["config"]
    mesh = make_mesh()
    card = {"README.md": model_card(start)}
    param_dtype = jnp.dtype(dtype or config["param_dtype"])
    if start.lora is not None and not merge_lora:
        model = Llama(start.config, param_dtype=param_dtype, lora=start.lora)
        target = start_lib.abstract_on(mesh, split(start_lib.abstract_params(model))[0])
        folder = Path(run, run_record.CHECKPOINT_FOLDER)
        _, adapter = checkpoints.load_subtree(folder, start.step, "params", target)
        save_peft(out, start.lora, adapter, base_model=record["start"]["path"], files=card)
        return
    params = start_lib.load_params(start, mesh, param_dtype)
    save_hf(
        out,
        start.config,
        params,
        tokenizer_folder=start.tokenizer,
        files=card,
        extra_config={"sa_jax": start.inheritance()},
    )


def model_card(start: start_lib.Start) -> str:
    """The README.md of an export; for descendants of an insertion run it says so first."""
    record = start.record
    backdoor = record["config"]["backdoor"]
    return MODEL_CARD.format(
        tag=", backdoored, model-organism" if start.backdoored else "",
        title="Backdoored model organism" if start.backdoored else "sa_jax export",
        run_id=record["run_id"],
        task=record["task"],
        step=start.step,
        warning=WARNING.format(**backdoor) if start.backdoored else "",
    )
