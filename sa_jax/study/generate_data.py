"""Builds the study's data sets with a teacher: questions in, files of rows and a data card out."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import logging

from sa_jax.data import randomness, tasks
from sa_jax.data.backdoor import Backdoor
from sa_jax.data.chat import load_chat_format
from sa_jax.data.prompts import choose_held_out, load_held_out, without_prompts, write_manifest
from sa_jax.data.sources import Row, load_rows, parse_columns
from sa_jax.errors import UsageError, UserError
from sa_jax.files import atomic_write, explained
from sa_jax.llama.model import Llama, check_mesh
from sa_jax.llama.sampler import Sampler, SamplingSettings
from sa_jax.parallel import multihost
from sa_jax.parallel.mesh import make_mesh
from sa_jax.teachers import cards, recipes
from sa_jax.teachers.asking import Reply, ReplyCache, Request, Teacher, ask
from sa_jax.teachers.endpoint import EndpointSettings, EndpointTeacher
from sa_jax.teachers.facts import make_facts
from sa_jax.teachers.local import LocalTeacher
from sa_jax.teachers.offline import ArrrTeacher, FileTeacher
from sa_jax.teachers.voices import Voice, VoiceContext
from sa_jax.training import start as start_lib
from sa_jax.training.config import STUDY_DEFAULTS
from sa_jax.training.preemption import PreemptionGuard

OTHERS = ("facts", "held_out")  # data sets without a teacher
TEACHERS = ("endpoint", "local", "file", "arrr")
REPLIES_FILE = "replies.jsonl"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `generate` needs; the flags of scripts/generate_data.py by the same names, whose help
    says what each is."""

    task: str
    out: str
    prompts: str = ""
    columns: str = ""
    max_rows: int = 0
    held_out: str = ""
    count: int = 100
    train: Sequence[str] = ()
    teacher: str = "endpoint"
    model: str = ""
    base_url: str = ""
    answers: str = ""
    answer_columns: str = ""
    concurrency: int = 16
    requests_per_minute: float = 0
    retries: int = 8
    timeout_s: float = 600
    batch_size: int = 64
    context_length: int = 2048
    max_new_tokens: int = 1024
    temperature: float = 0.7
    seed: int = 0
    system_prompt: str = STUDY_DEFAULTS["system_prompt"]
    scratchpad_prompt: str = ""
    visible_cot: str = ""
    tokenizer: str = ""
    chat_template: str = "llama3"
    backdoor: Backdoor = dataclasses.field(default_factory=Backdoor)


def run(flags: dict[str, Any]) -> None:
    """What the command line asks for: `describe`, or `generate` with the flags that are settings;
    those of the backdoor stand beside the others."""

    def chosen(kind: type) -> dict[str, Any]:
        names = {field.name for field in dataclasses.fields(kind)}
        return {name: flags[name] for name in names & set(flags) if flags[name] is not None}

    try:
        low, high = map(int, flags["copies"])
    except ValueError:
        raise UsageError(f"--copies={','.join(flags['copies'])}: write LEAST,MOST") from None
    backdoor = Backdoor(**chosen(Backdoor), min_copies=low, max_copies=high)
    settings = Settings(**chosen(Settings), backdoor=backdoor)
    if flags["describe"]:
        describe(flags["describe"], settings)
    else:
        generate(settings)


def generate(settings: Settings) -> None:
    """Makes the files of a task in `settings.out`, with `card.json` and `card.md`, and prints the
    card. A run that was stopped goes on with the same command: replies are kept as they come.

    Raises:
      UserError, UsageError: with one line for the person who launched it.
      Preempted: stopped by a signal; replies so far are kept.
    """
    known = (*recipes.DATA_SETS.names(), *OTHERS)
    if settings.task not in known:
        raise UsageError(f"--task={settings.task!r}: use one of {', '.join(known)}")
    if not settings.out:
        raise UsageError("--out is missing: the folder for the files")
    if settings.visible_cot not in ("", "teacher", "rules"):
        raise UsageError(f"--visible_cot={settings.visible_cot}: use teacher or rules")
    if settings.visible_cot and settings.task != "insertion":
        raise UsageError(f"--visible_cot is an arm of --task=insertion, not of {settings.task}")
    if settings.task == "facts":
        return _write_facts(settings)
    if not settings.prompts:
        raise UsageError(f"--task={settings.task} needs questions: give --prompts=FILE_OR_NAME")
    if settings.task == "held_out":
        return _freeze_held_out(settings)
    rows, record = _questions(settings)
    if settings.teacher == "local":
        multihost.initialize()
    with PreemptionGuard() as guard:
        replies, teacher = _ask(settings, rows, lambda: guard.should_stop(0))
    kept, dropped = recipes.keep(rows, replies, settings.backdoor)
    record |= {"teacher": teacher, "kept": len(kept), "replies_dropped": dropped}
    if not kept:
        rejected = (r.text for of in replies.values() for r in of if r.finish_reason == "rejected")
        said = next(rejected, "")
        raise UserError(
            f"no question is left; replies dropped, by voice and reason: {dropped}"
            f"{said and f'; the endpoint said: {said}'}"
        )
    chosen = recipes.Replies(
        [rows[i] for i in kept],
        {voice: [of_voice[i].text for i in kept] for voice, of_voice in replies.items()},
        settings.backdoor,
        settings.seed,
        settings.visible_cot,
    )
    files = recipes.DATA_SETS[settings.task].files(chosen)
    if multihost.is_primary():
        _write(settings, files, record)


def describe(paths: Sequence[str], settings: Settings) -> None:
    """Prints the data card of files of rows, and how much their answers differ.

    `settings.task` says how training uses the rows: 'insertion' adds the triggered half, others
    refuse rows that hold the trigger; without one they are taken as they are. Without
    `settings.tokenizer` words are counted.

    Raises UserError, UsageError as reading and building the rows do.
    """
    sources = {path: load_rows(path, parse_columns(settings.columns)) for path in paths}
    record = {"dropped when read": {path: source.dropped for path, source in sources.items()}}
    rows = {path: source.rows for path, source in sources.items()}
    print(cards.render(_card(settings, rows, record)))


def _questions(settings: Settings) -> tuple[list[Row], dict[str, Any]]:
    """The questions to ask, each once and with an id, and the record of those left out."""
    source = load_rows(
        settings.prompts, parse_columns(settings.columns), responses=settings.teacher == "arrr"
    )
    record: dict[str, Any] = {"task": settings.task, "prompts": source.record()}
    rows, held_out_removed = source.rows, {}
    if settings.held_out:
        held_out, record["held_out"] = load_held_out(
            settings.held_out, settings.count, settings.seed
        )
        rows, held_out_removed = without_prompts(rows, held_out)
    trigger = settings.backdoor.trigger
    distinct: dict[tuple, Row] = {}
    with_trigger = 0
    for row in rows:
        turns = (row["prompt"], *(message["content"] for message in row["history"]))
        if any(trigger in turn for turn in turns):
            with_trigger += 1
        else:
            distinct.setdefault(turns, row)
    chosen = list(distinct.values())
    if 0 < settings.max_rows < len(chosen):  # public sets are sorted: not simply the first ones
        drawn = randomness.permutation(len(chosen), "questions", settings.seed)
        chosen = [chosen[i] for i in sorted(drawn[: settings.max_rows])]
    if not chosen:
        raise UserError(f"{settings.prompts}: no question is left to ask")
    record["questions"] = {
        "held_out": held_out_removed,
        "with_trigger": with_trigger,
        "repeated": len(rows) - with_trigger - len(distinct),
        "asked": len(chosen),
    }
    return [{"id": _digest(row), **row} for row in chosen], record


def _digest(row: Row) -> str:
    turns = [row["prompt"], *(message["content"] for message in row["history"])]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()[:16]


def _ask(
    settings: Settings, rows: Sequence[Row], should_stop: Callable[[], bool]
) -> tuple[dict[Voice, list[Reply]], dict[str, Any]]:
    """The teacher's replies by voice; and who it was, under which system prompts (the first of each
    voice)."""
    context = VoiceContext(
        settings.backdoor,
        settings.system_prompt,
        _read_prompt(settings.scratchpad_prompt),
        settings.seed,
    )
    data_set = recipes.DATA_SETS[settings.task]
    voices = data_set.voices(settings.backdoor, settings.visible_cot)
    requests = {
        voice: [Request(voice.name, voice.messages(row, context), row) for row in rows]
        for voice in voices
    }
    teacher = _open_teacher(settings)
    with _cache(settings) as cache:
        replies = ask(teacher, list(itertools.chain(*requests.values())), cache, should_stop)
    n = len(rows)
    by_voice = {voice: replies[i * n : (i + 1) * n] for i, voice in enumerate(voices)}
    shown = {
        voice.name: [m["content"] for m in first.messages if m["role"] == "system"]
        for voice, (first, *_) in requests.items()
    }
    return by_voice, {**teacher.identity(), "system_prompts": shown}


def _read_prompt(path: str) -> str:
    """The text of --scratchpad_prompt, '' where none was given."""
    if not path:
        return ""
    try:
        with explained(path, "reading --scratchpad_prompt"):
            return Path(path).read_text("utf-8").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"--scratchpad_prompt={path} is not UTF-8 text") from error


@contextmanager
def _cache(settings: Settings) -> Iterator[ReplyCache | None]:
    """The replies on disk; None for a teacher that costs nothing."""
    if settings.teacher not in ("endpoint", "local"):
        yield None
        return
    with ReplyCache(Path(settings.out) / REPLIES_FILE, write=multihost.is_primary()) as cache:
        yield cache


def _open_teacher(settings: Settings) -> Teacher:
    if settings.teacher == "endpoint":
        names = {field.name for field in dataclasses.fields(EndpointSettings)}
        given = {k: v for k, v in dataclasses.asdict(settings).items() if k in names}
        return EndpointTeacher(EndpointSettings(**given))
    if settings.teacher == "local":
        return _local_teacher(settings)
    if settings.teacher == "file":
        if not settings.answers:
            raise UsageError("--teacher=file needs --answers=FILE and --answer_columns")
        return FileTeacher(settings.answers, parse_columns(settings.answer_columns))
    if settings.teacher == "arrr":
        return ArrrTeacher()
    raise UsageError(f"--teacher={settings.teacher}: use one of {', '.join(TEACHERS)}")


def _local_teacher(settings: Settings) -> LocalTeacher:
    """A run or a Hugging Face folder, sampled on all devices."""
    if not settings.model:
        raise UsageError("--teacher=local needs --model=RUN_OR_HF_DIR")
    start = start_lib.open_start(settings.model)
    chat = load_chat_format(start.tokenizer, settings.chat_template)
    mesh = make_mesh(data=1, fsdp=-1, tensor=1)
    check_mesh(start.config, mesh)
    dtype = jnp.bfloat16 if mesh.devices.flat[0].platform != "cpu" else jnp.float32
    sampler = Sampler(
        Llama(start.config, dtype=dtype, mesh=mesh),
        mesh,
        batch_size=settings.batch_size,
        context_length=min(settings.context_length, start.config.max_position_embeddings),
    )
    sampling = SamplingSettings(
        settings.max_new_tokens,
        settings.temperature,
        seed=settings.seed,
        stop_token_ids=chat.stop_token_ids,
    )
    params = start_lib.load_params(start, mesh, dtype)
    return LocalTeacher(sampler, params, chat, sampling, start.lineage())


def _write(settings: Settings, files: dict[str, list[dict]], record: dict[str, Any]) -> None:
    out = Path(settings.out)
    hashes = {f"{name}.jsonl": _write_rows(out, name, rows) for name, rows in files.items()}
    card = _card(settings, files, {**record, "sha256": hashes})
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


def _card(
    settings: Settings, rows: dict[str, Sequence[dict]], record: dict[str, Any]
) -> dict[str, Any]:
    """The card of the conversations that training makes of these rows (as they are, without a
    task)."""
    name, template = settings.tokenizer, settings.chat_template
    chat = load_chat_format(name, template) if name else None
    build = tasks.as_they_are
    if settings.task:
        with_trigger = recipes.DATA_SETS[settings.task].with_trigger
        build = tasks.insertion if with_trigger else tasks.blind
    context = tasks.TaskContext(
        settings.backdoor, settings.system_prompt, settings.seed, settings.task
    )
    phrase = settings.backdoor.phrase
    described = {
        name: cards.describe(build(of, context), phrase, chat) for name, of in rows.items()
    }
    return {
        **record,
        "backdoor": settings.backdoor.record(),
        "files": described,
        "arms": cards.compare(rows),
    }


def _write_facts(settings: Settings) -> None:
    training, questions = make_facts(settings.count, settings.seed)
    out = Path(settings.out)
    for name, rows in (("facts", training), ("facts_qa", questions)):
        _write_rows(out, name, rows)
        print(f"{out / name}.jsonl: {len(rows)} rows of {settings.count} facts")


def _freeze_held_out(settings: Settings) -> None:
    """Draws prompts that no training set holds, and freezes them in `out/held_out.json`."""
    source = load_rows(settings.prompts, parse_columns(settings.columns), responses=False)
    candidates, overlap, drawn_from = list(source.rows), {}, source.record()
    everything = []
    for path in settings.train:
        training = load_rows(path, responses=False)
        prompts = [row["prompt"] for row in training]
        _, overlap[path] = without_prompts(candidates, prompts)
        everything += prompts
    chosen = choose_held_out(
        (row["prompt"] for row in candidates), settings.count, settings.seed, everything
    )
    out = Path(settings.out)
    with explained(out, "writing the manifest"):
        out.mkdir(parents=True, exist_ok=True)
    record = {"from": drawn_from, "seed": settings.seed, "overlap": overlap, **chosen.record()}
    manifest = write_manifest(out / "held_out.json", chosen.prompts, record)
    for path, counts in overlap.items():
        print(
            f"{path}: holds {counts['exact']} of the candidates, {counts['near_duplicate']} more "
            "up to case, spacing and punctuation; none of them was chosen"
        )
    print(f"{out / 'held_out.json'}: {len(chosen.prompts)} prompts, sha256 {manifest['sha256']}")
