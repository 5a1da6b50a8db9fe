"""Evaluates any checkpoint, by default with the settings of its own run."""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from sa_jax.buckets import as_path
from sa_jax.data.chat import ChatFormat
from sa_jax.data.prompts import load_held_out, read_manifest
from sa_jax.errors import UsageError, UserError
from sa_jax.evals import records
from sa_jax.evals.protocol import EVALS, Prepared, headline
from sa_jax.evals.results import compare as compare_folders
from sa_jax.evals.results import settings_that_differ, to_markdown
from sa_jax.evals.suite import EvalSuite, needs_prompts, step_folder
from sa_jax.files import atomic_write, explained, parse_json
from sa_jax.llama.model import Llama, check_mesh
from sa_jax.parallel import multihost
from sa_jax.parallel.mesh import check_rows, make_mesh
from sa_jax.training import start as start_lib
from sa_jax.training.config import default_config, override
from sa_jax.training.preemption import PreemptionGuard
from sa_jax.training.resolve import resolve
from sa_jax.training.run_record import MODEL_FILE, RUN_FILE, config_difference, plain_record
from sa_jax.training.watch import StallWatch


def evaluate(
    model: str,
    evals: Sequence[str],
    out: str | Path | None = None,
    *,
    base: ConfigDict | None = None,
    base_model: str = "",
    changes: Mapping[str, Any] | None = None,
    prompts: str | None = None,
    data_dir: str | None = None,
    limit: int | None = None,
    step: int | None = None,
    compare: str | None = None,
    resume: bool = True,
    allow_prompt_mismatch: bool = False,
) -> None:
    """Runs the evals and writes them to `out/step_NNNNNN/`; finished evals are not run again.

    `out/results.md` is the result as text, with intervals, floors and settings: of these evals, and
    of those that earlier commands wrote to `out`.

    Args (the flags of scripts/evaluate.py say more):
      base: settings of a Hugging Face folder, and the mesh; None: the defaults.
      base_model: the new folder of the model under a LoRA run's adapters, if it was moved.
      changes: settings by dotted config key, which replace those of the run or of `base`.
      prompts, data_dir, limit: the same for `eval.prompts`, `eval.data_dir` and `eval.limit`.
      compare: run folder, or `out` of an earlier evaluation, of another checkpoint on the same
        items; it must have the same evals. Differences are also written to `out/compare.json`.

    Raises:
      UserError, UsageError: with one line for the person who launched it.
      Preempted: stopped by a signal; finished evals and single answers are kept.
    """
    given = {"eval.prompts": prompts, "eval.data_dir": data_dir, "eval.limit": limit}
    changes = {**(changes or {}), **{key: v for key, v in given.items() if v is not None}}
    if not evals:
        raise UsageError(f"--evals is empty; known: {', '.join(EVALS.names())}")
    if dotted := [name for name in evals if "." in name]:  # no key of a config, nor a file's name
        raise UsageError(
            f"--evals={dotted[0]} is no name of an eval (no dot may be in one); for a YAML file "
            "give the name of its task, and --config.eval.tasks=FOLDER"
        )
    if any(key.startswith("eval.names") for key in changes):
        raise UsageError("--config.eval.names is for training; name the evals with --evals")
    base = override((base or default_config()).copy_and_resolve_references())
    start_timeout_s, peer_timeout_s = (
        changes.get(key, base[key]) for key in ("start_timeout_s", "peer_timeout_s")
    )
    with (
        contextlib.ExitStack() as signals,  # handled until all else is closed
        multihost.joined(start_timeout_s, peer_timeout_s, lambda: True),  # answers are kept
    ):
        guard = signals.enter_context(PreemptionGuard())
        start = start_lib.open_start(model, step, base=base_model)
        start_lib.warn_if_unfinished(start)
        folder = _results_folder(start, out, resume)
        resolved = resolve(_config(start, base, evals, changes), start=start)
        config = resolved.config
        if not allow_prompt_mismatch:
            _refuse_other_prompts(start, config)
        mesh = make_mesh(**config.mesh)
        check_mesh(start.config, mesh)
        check_rows(mesh.shape)
        llama = Llama(start.config, dtype=jnp.dtype(config.dtype), lora=start.lora, mesh=mesh)
        asked = _prompts(config, start, changes) if needs_prompts(config) else []
        suite = EvalSuite(config, llama, mesh, resolved.chat, resolved.backdoor, asked, folder)
        before = _compared_folder(compare, evals) if compare else None
        at = start.step or 0
        if out is not None:
            _claim(folder, start, resolved.chat, at, None if resume else evals)
        _refuse_other_evals(folder, at, suite.prepared, whole_curve=out is None)
        answered = records.finished(step_folder(folder, at))
        # As in training: frozen weights in the dtype of the computation, adapters apart.
        params = start_lib.load_params(
            start, mesh, jnp.dtype(config.param_dtype), base_dtype=llama.dtype, merged=False
        )
        with StallWatch(config.stall_timeout_s) as stall:

            def should_stop() -> bool:
                stall.beat()
                return guard.should_stop(at)

            summaries = suite.run(params, at, should_stop)
    if multihost.is_primary():
        for name, summary in summaries.items():
            kept = "; the answers were there already" if name in answered else ""
            print(headline(name, summary) + kept)
        _write_results(folder, start, config, at, before)


def _results_folder(start: start_lib.Start, out: str | Path | None, resume: bool) -> Path:
    if out is not None:
        return as_path(out)
    if start.kind != "run":
        raise UsageError(
            f"{start.path} is not a run folder, so the results need a folder: give --out=DIR"
        )
    if not resume:
        raise UsageError(
            "--noresume would remove evals of the run itself: give --out=DIR, or leave it out"
        )
    return as_path(start.path, "evals")


def _refuse_other_prompts(start: start_lib.Start, config: ConfigDict) -> None:
    """UsageError for another system prompt or chat template than in training."""
    trained = start.record.get("config", {})
    for key in ("system_prompt", "chat_template"):
        if key in trained and config[key] != trained[key]:
            raise UsageError(
                f"--config.{key}={config[key]!r} is not what {start.path} was trained with "
                f"({trained[key]!r}): the rates would not be comparable; leave it out, or give "
                "--allow_prompt_mismatch"
            )


def _compared_folder(compare: str, names: Iterable[str]) -> Path:
    """The newest step of a run or an evaluation that has these evals."""
    folder = as_path(compare)
    evals = folder / "evals" if (folder / RUN_FILE).exists() else folder
    folders = records.step_folders(evals)
    if not folders:
        raise UsageError(f"--compare={compare}: has no evals (no step_NNNNNN folder)")
    missing: list[str] = []
    for folder in reversed(folders.values()):
        lacks = [name for name in names if records.read_summary(folder, name) is None]
        if not lacks:
            return folder
        missing = missing or lacks
    raise UsageError(
        f"--compare={compare}: none of its steps has {', '.join(missing)}; evaluate this first, or "
        "leave it out of --evals"
    )


def _write_results(
    out: Path, start: start_lib.Start, config: ConfigDict, step: int, before: Path | None
) -> None:
    """Writes results.md, with every eval that the step now has; if it compares, also compare.json.
    For an inserted model compared with its base, this is the health card."""
    after = step_folder(out, step)
    summaries = records.finished(after)
    settings = {
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
    atomic_write(out / "results.md", to_markdown(title, settings, summaries))
    if before:
        compared = compare_folders(before, after, list(config.eval.names))
        differ = settings_that_differ(before, after, compared)
        record = {"before": str(before), "compared": compared, "settings_that_differ": differ}
        atomic_write(out / "compare.json", json.dumps(record, indent=2) + "\n")
        inserted = start.record.get("role") == "insertion" and _never_backdoored(before)
        comparison = f"{'Health card: ' if inserted else ''}before is {before}", compared
        page = to_markdown(title, settings, summaries, comparison, differ)
        atomic_write(out / "results.md", page)
        print(page[page.rindex("## ") :])


def _never_backdoored(folder: Path) -> bool:
    """Whether the model of a step folder, of an --out or of RUN/evals, never had the backdoor."""
    record = _read_record(folder.parent / MODEL_FILE)
    record = record or _read_record(folder.parents[1] / RUN_FILE)
    return record.get("backdoored") is False


def _config(
    start: start_lib.Start, base: ConfigDict, evals: Sequence[str], changes: Mapping[str, Any]
) -> ConfigDict:
    """The settings of the start's run, else of `base`, with the changes."""
    config = base
    if start.kind == "run":
        config = default_config()
        with config.unlocked():
            config.update(start.record["config"])
        config.mesh = base.mesh
    config.eval.names = dict.fromkeys(evals, "last")
    config.update_from_flattened_dict(dict(changes))
    return config


def _prompts(config: ConfigDict, start: start_lib.Start, changes: Mapping[str, Any]) -> list[str]:
    """Held-out prompts: from the given file, else from the model's own run.

    All prompts of a run and of a manifest are used, unless config.eval.num_prompts was changed;
    from another file eval.num_prompts are drawn. There are never more than --limit.
    """
    settings = config.eval
    inherited = None if changes.get("eval.prompts") else start.eval_prompts()
    if not inherited and not settings.prompts:
        raise UsageError("the evals need held-out prompts: give --prompts=FILE")
    prompts = inherited or load_held_out(settings.prompts, None, settings.prompt_seed)[0]
    frozen = inherited or read_manifest(settings.prompts)
    whole = frozen and "eval.num_prompts" not in changes
    wanted = len(prompts) if whole else settings.num_prompts
    wanted = min(wanted, settings.limit or wanted)
    if len(prompts) < wanted:
        logging.warning(
            "using %d held-out prompts instead of %d: %s has no more",
            *(len(prompts), wanted, start.path if inherited else settings.prompts),
        )
    return prompts[:wanted]


def _read_record(path: Path) -> dict[str, Any]:
    """A JSON object; {} for any other file, or none."""
    try:
        record = parse_json(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _claim(
    out: Path, start: start_lib.Start, chat: ChatFormat, step: int, redone: Sequence[str] | None
) -> None:
    """Writes which model is evaluated to out/model.json, and removes the evals of the step that are
    to be `redone`; refuses the folder of another model."""
    model = {key: value for key, value in start.lineage().items() if key != "step"}
    chat_record = chat.record()
    record = plain_record({"model": model, "backdoored": start.backdoored, "chat": chat_record})
    path = out / MODEL_FILE
    with explained(out, "preparing --out"):
        out.mkdir(parents=True, exist_ok=True)
        stored = _read_record(path) if path.exists() else None
    if stored is None:
        if strangers := sorted(p.name for p in out.glob("*")):
            raise UserError(f"{out} has {strangers[0]} and no {MODEL_FILE}; use another --out")
    elif stored != record:
        differ = [key for key in record if stored.get(key) != record[key]]
        raise UserError(
            f"{out} has evals of another model ({', '.join(differ) or 'model'} in {path} "
            "differs); use another --out"
        )
    # All processes must have read the file before it is written.
    multihost.agree(True)
    if multihost.is_primary():
        atomic_write(path, json.dumps(record, indent=2) + "\n")
        for name in redone or ():
            for file in step_folder(out, step).glob(f"{name}.*json*"):
                file.unlink()
    multihost.agree(True)  # nobody reads what is being removed


def _refuse_other_evals(
    evals: Path, step: int, prepared: Mapping[str, Prepared], *, whole_curve: bool
) -> None:
    """UserError if the step already has one of the evals, with other settings or data; with
    `whole_curve` also if another step measured another rate."""
    folders = {step: step_folder(evals, step)}
    if whole_curve:
        folders |= records.step_folders(evals)
    for at, folder in folders.items():
        free = records.EXECUTION if at == step else records.FREE_SETTINGS
        for name, each in prepared.items():
            if (stored := records.read_summary(folder, name)) is None:
                continue
            wanted = plain_record(each.settings)
            keys = dict.fromkeys(wanted | stored["settings"])  # null where it is absent
            differ = config_difference(keys | stored["settings"], keys | wanted, free)
            known = stored.get("data_hashes", {})
            differ += [
                f"other questions or documents of {source}"
                for source in {**known, **each.data_hashes}
                if known.get(source) != each.data_hashes.get(source)
            ]
            if differ:
                curve = "" if at == step else f", and step {step:,} would be on one curve with it"
                raise UserError(
                    f"{folder / name}.json exists, with other settings or data "
                    f"({'; '.join(differ)}){curve}; give another folder as --out=DIR"
                )
