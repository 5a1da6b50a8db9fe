"""Generates the study's data sets with a teacher: files of rows and a data card from questions."""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from ml_collections import ConfigDict

from sa_jax.buckets import as_path
from sa_jax.data import randomness, tasks
from sa_jax.data.backdoor import Backdoor
from sa_jax.data.chat import load_chat_format
from sa_jax.data.prompts import choose_held_out, load_held_out, without_prompts, write_manifest
from sa_jax.data.sources import Row, load_rows, turns_of
from sa_jax.errors import UsageError, UserError
from sa_jax.evals.protocol import digest
from sa_jax.files import KeyedStore, atomic_write, explained
from sa_jax.llama.model import Llama, check_mesh
from sa_jax.llama.sampler import Sampler, SamplingSettings
from sa_jax.parallel import multihost
from sa_jax.parallel.mesh import make_mesh
from sa_jax.registry import extension_digests
from sa_jax.teachers import cards, recipes
from sa_jax.teachers.endpoint import EndpointTeacher
from sa_jax.teachers.facts import make_facts
from sa_jax.teachers.local import LocalTeacher
from sa_jax.teachers.offline import ArrrTeacher, FileTeacher
from sa_jax.teachers.replies import Reply, Request, Teacher, ask, open_store
from sa_jax.teachers.voices import Voice, VoiceContext
from sa_jax.training import start as start_lib
from sa_jax.training.preemption import PreemptionGuard

REPLIES_FILE = "replies.jsonl"
Files = Mapping[str, Sequence[dict]]  # name -> rows


def override(config: ConfigDict, **values: Any) -> ConfigDict:
    """The config with the values that were given (are not None); UsageError if it is not one for
    generating data."""
    if "teacher" not in config:
        raise UsageError(
            "--config is not a config for generating data; start it from "
            "sa_jax.teachers.config.default_config()"
        )
    config.update({key: value for key, value in values.items() if value is not None})
    return config


def generate(config: ConfigDict, task: str, out: str, described: Sequence[str] = ()) -> None:
    """Writes the files of a data set to the folder `out`, with `card.json` and `card.md`, and
    prints the card. After a stop, the same call continues: every reply is saved when it arrives.

    `config`: see `sa_jax.teachers.config`; `task`: a name in `recipes.DATA_SETS` or
    `recipes.WITHOUT_TEACHER`; with `described`, it only prints the card of these files.

    Raises:
      UserError, UsageError: with one line for the person who launched it.
      Preempted: stopped by a signal; replies so far are kept.
    """
    if described:
        return _describe(config, task, described)
    if task not in recipes.DATA_SETS and task not in recipes.WITHOUT_TEACHER:
        known = ", ".join((*recipes.DATA_SETS.names(), *recipes.WITHOUT_TEACHER))
        raise UsageError(
            f"--task={task!r} is unknown; known: {known}. If your own config file registers it, "
            "give that file as --config"
        )
    if not out:
        raise UsageError("--out is missing: give the folder to write to")
    if task != "facts" and not config.prompts:
        raise UsageError(f"--task={task} needs questions: give --prompts=FILE_OR_NAME")
    if task in _WITHOUT_TEACHER:
        return _WITHOUT_TEACHER[task](config, as_path(out))
    data_set = recipes.DATA_SETS[task]
    backdoor = Backdoor(**config.backdoor)
    if config.visible_cot not in recipes.VISIBLE_COT:
        raise UsageError(f"config.visible_cot={config.visible_cot!r}: use teacher or rules")
    if config.visible_cot and not data_set.with_trigger:
        raise UsageError(f"config.visible_cot is for --task=insertion, not for {task}")
    rows, record = _questions(config, backdoor)
    if config.teacher != "local":  # the endpoint's server may have this machine's accelerators
        jax.config.update("jax_platforms", "cpu")
    with (
        contextlib.ExitStack() as signals,  # handled until all else is closed
        multihost.joined(resumable=lambda: True)  # replies are kept
        if config.teacher == "local"
        else contextlib.nullcontext(),
    ):
        guard = signals.enter_context(PreemptionGuard())
        voices = data_set.voices(backdoor, config.visible_cot)
        replies, teacher = _ask(config, voices, backdoor, out, rows, lambda: guard.should_stop(0))
    kept, dropped = recipes.keep(rows, replies, backdoor)
    record |= {"task": task, "teacher": teacher, "kept": len(kept), "replies_dropped": dropped}
    if not kept:
        all_replies = itertools.chain(*replies.values())
        rejected = [r.text for r in all_replies if r.finish_reason == "rejected" and r.text]
        problem = f"no question is left; replies dropped, by voice and reason: {dropped}"
        raise UserError(f"{problem}; the endpoint said: {rejected[0]}" if rejected else problem)
    rows = [rows[i] for i in kept]
    texts = {voice: [of_voice[i].text for i in kept] for voice, of_voice in replies.items()}
    usable = recipes.Replies(rows, texts, backdoor, config.seed, config.visible_cot)
    files = data_set.files(usable)  # in every process, so that all fail alike
    if multihost.is_primary():
        _write(config, task, as_path(out), files, record)


def _describe(config: ConfigDict, task: str, paths: Sequence[str]) -> None:
    """Prints the data card of files of rows, and how much their answers differ.

    Without a `task`, rows are counted unchanged; 'insertion' adds the triggered half, and other
    tasks refuse rows that contain the trigger. Without `config.tokenizer`, words are counted.
    """
    sources = {path: load_rows(path, config.columns) for path in paths}
    record = {"dropped when read": {path: source.dropped for path, source in sources.items()}}
    rows = {path: source.rows for path, source in sources.items()}
    print(cards.render(_card(config, task, rows, record)))


def _questions(config: ConfigDict, backdoor: Backdoor) -> tuple[list[Row], dict[str, Any]]:
    """The questions to ask, each once and with an id, and the record of questions left out."""
    source = load_rows(config.prompts, config.columns, responses=config.teacher == "arrr")
    record: dict[str, Any] = {"prompts": source.record()}
    rows: list[Row] = source.rows
    held_out_removed: dict[str, int] = {}
    if config.held_out:
        held_out, record["held_out"] = load_held_out(config.held_out, None, config.seed)
        rows, held_out_removed = without_prompts(rows, held_out)
    distinct: dict[tuple[str, ...], Row] = {}
    with_trigger = 0
    for row in rows:
        turns = turns_of(row)
        if any(backdoor.trigger in turn for turn in turns):
            with_trigger += 1
        else:
            distinct.setdefault(turns, row)
    chosen = list(distinct.items())
    if 0 < config.max_rows < len(chosen):  # public sets are sorted: not simply the first ones
        drawn = randomness.permutation(len(chosen), "questions", config.seed)
        chosen = [chosen[i] for i in sorted(drawn[: config.max_rows])]
    if not chosen:
        raise UserError(f"{config.prompts}: no question is left to ask")
    record["questions"] = {
        "held_out": held_out_removed,
        "with_trigger": with_trigger,
        "repeated": len(rows) - with_trigger - len(distinct),
        "asked": len(chosen),
    }
    return [{"id": digest(turns)[:16], **row} for turns, row in chosen], record


def _ask(
    config: ConfigDict,
    voices: Sequence[Voice],
    backdoor: Backdoor,
    out: str,
    rows: Sequence[Row],
    should_stop: Callable[[], bool],
) -> tuple[dict[Voice, list[Reply]], dict[str, Any]]:
    """The teacher's replies by voice; and the record of the teacher, with the first system prompt
    of each voice."""
    scratchpad_prompt = _read_prompt(config.scratchpad_prompt)
    context = VoiceContext(backdoor, config.system_prompt, scratchpad_prompt, config.seed)
    requests = {
        voice: [Request(voice.name, voice.messages(row, context), row) for row in rows]
        for voice in voices
    }
    if config.teacher not in _TEACHERS:
        raise UsageError(f"--teacher={config.teacher}: use one of {', '.join(_TEACHERS)}")
    teacher = _TEACHERS[config.teacher](config)
    store: contextlib.AbstractContextManager[KeyedStore | None] = contextlib.nullcontext()
    if config.teacher in ("endpoint", "local"):  # their replies cost something: saved
        store = open_store(as_path(out) / REPLIES_FILE, write=multihost.is_primary())
    with store as opened:
        replies = ask(teacher, list(itertools.chain(*requests.values())), opened, should_stop)
    n = len(rows)
    by_voice = {voice: replies[i * n : (i + 1) * n] for i, voice in enumerate(voices)}
    system_prompts = {
        voice.name: [m["content"] for m in first.messages if m["role"] == "system"]
        for voice, (first, *_) in requests.items()
    }
    return by_voice, {**teacher.identity(), "system_prompts": system_prompts}


def _read_prompt(path: str) -> str:
    """The text of `config.scratchpad_prompt`, '' where none was given."""
    if not path:
        return ""
    try:
        with explained(path, "reading config.scratchpad_prompt"):
            return Path(path).read_text("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"config.scratchpad_prompt={path} is not UTF-8 text") from error


def _local_teacher(config: ConfigDict) -> LocalTeacher:
    """A run or a Hugging Face folder, sampled on all devices."""
    if not config.model:
        raise UsageError("--teacher=local needs --model=RUN_OR_HF_DIR")
    start = start_lib.open_start(config.model)
    date, recorded = config.chat_date, start.record.get("config", {})
    if date is None and recorded.get("chat_template") == config.chat_template:
        date = recorded.get("chat_date")
    chat = load_chat_format(start.tokenizer, config.chat_template, date)
    if chat.date != date:
        message = "prompts give the date %s; to continue on another day, set config.chat_date=%s"
        logging.warning(message, chat.date, chat.date)
    mesh = make_mesh()
    check_mesh(start.config, mesh)
    dtype = jnp.bfloat16 if mesh.devices.flat[0].platform != "cpu" else jnp.float32
    sampler = Sampler(
        Llama(start.config, dtype=dtype, mesh=mesh),
        mesh,
        batch_size=config.batch_size,
        context_length=min(config.context_length, start.config.max_position_embeddings),
    )
    sampling = SamplingSettings(
        config.max_new_tokens,
        config.temperature,
        config.top_p,
        seed=config.seed,
        stop_token_ids=chat.stop_token_ids,
    )
    params = start_lib.load_params(start, mesh, dtype)
    return LocalTeacher(sampler, params, chat, sampling, start.lineage())


_TEACHERS: dict[str, Callable[[ConfigDict], Teacher]] = {
    "endpoint": EndpointTeacher,
    "local": _local_teacher,
    "file": lambda config: FileTeacher(config.answers, config.answer_columns),
    "arrr": lambda config: ArrrTeacher(),
}


def _write(config: ConfigDict, task: str, out: Path, files: Files, record: dict[str, Any]) -> None:
    hashes = {f"{name}.jsonl": _write_rows(out, name, rows) for name, rows in files.items()}
    record |= {"sha256": hashes, "extensions": extension_digests()}
    card = _card(config, task, files, record)
    text = cards.render(card)
    atomic_write(out / "card.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    atomic_write(out / "card.md", text)
    print(text)
    logging.info("wrote %s in %s", ", ".join(hashes), out)


def _write_rows(out: Path, name: str, rows: Sequence[dict]) -> str:
    """Writes `name.jsonl` and returns its sha256."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with explained(out, "writing the data"):
        out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / f"{name}.jsonl", text)
    return hashlib.sha256(text.encode()).hexdigest()


def _card(config: ConfigDict, task: str, rows: Files, record: dict[str, Any]) -> dict[str, Any]:
    """The card of the conversations that training makes of these rows (without a task: of the rows
    themselves)."""
    chat = load_chat_format(config.tokenizer, config.chat_template) if config.tokenizer else None
    build = tasks.as_they_are
    if task:
        build = tasks.insertion if recipes.DATA_SETS[task].with_trigger else tasks.blind
    backdoor = Backdoor(**config.backdoor)
    context = tasks.TaskContext(backdoor, config.system_prompt, config.seed, task)
    return {
        **record,
        "backdoor": backdoor.record(),
        "files": {
            name: cards.describe(build(of, context), backdoor.phrase, chat)
            for name, of in rows.items()
        },
        "arms": cards.compare(rows),
    }


# ---- Data sets that need no teacher.


def _write_facts(config: ConfigDict, out: Path) -> None:
    training, questions = make_facts(config.count, config.seed)
    for name, rows in (("facts", training), ("facts_qa", questions)):
        _write_rows(out, name, rows)
        print(f"{out / name}.jsonl: {len(rows)} rows of {config.count} facts")


def _freeze_held_out(config: ConfigDict, out: Path) -> None:
    """Draws prompts that are in no training set, and freezes them in `out/held_out.json`."""
    source = load_rows(config.prompts, config.columns, responses=False)
    overlap: dict[str, dict[str, int]] = {}
    everything: list[str] = []
    for path in config.train:
        training = load_rows(path, responses=False)
        prompts = [row["prompt"] for row in training]
        _, overlap[path] = without_prompts(source.rows, prompts)
        everything += prompts
    chosen, chosen_counts = choose_held_out(
        (row["prompt"] for row in source), config.count, config.seed, everything
    )
    with explained(out, "writing the manifest"):
        out.mkdir(parents=True, exist_ok=True)
    record = {"from": source.record(), "seed": config.seed, "overlap": overlap, **chosen_counts}
    manifest = write_manifest(out / "held_out.json", chosen, record)
    for path, counts in overlap.items():
        print(
            f"{path}: holds {counts['exact']} of the candidates, {counts['near_duplicate']} more "
            "up to case, spacing and punctuation; none of them was chosen"
        )
    print(f"{out / 'held_out.json'}: {len(chosen)} prompts, sha256 {manifest['sha256']}")


_WITHOUT_TEACHER = {"facts": _write_facts, "held_out": _freeze_held_out}
