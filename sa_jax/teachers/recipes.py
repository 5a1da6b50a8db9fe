"""The catalogue of data sets that a teacher writes: which voices each asks for, and the files made
of the replies. A config file adds another with `DATA_SETS.register(DataSet(...))`.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from sa_jax.data.backdoor import Backdoor
from sa_jax.data.sources import Row
from sa_jax.registry import Registry
from sa_jax.teachers import voices
from sa_jax.teachers.filters import answer_in, reason_to_drop, split_scratchpad
from sa_jax.teachers.replies import Reply
from sa_jax.teachers.voices import Voice, rule_scratchpad

# Who writes the scratchpads of an arm with visible chain of thought; "" leaves that arm out.
VISIBLE_COT = ("", "teacher", "rules")


@dataclasses.dataclass(frozen=True)
class Replies:
    """The questions that are kept and their replies."""

    rows: Sequence[Row]
    texts: Mapping[Voice, Sequence[str]]  # a reply for each row
    backdoor: Backdoor
    seed: int = 0
    visible_cot: str = ""  # one of `VISIBLE_COT`

    def answers(self, voice: Voice) -> list[str]:
        """The answer in each reply."""
        return [answer_in(voice, text) for text in self.texts[voice]]

    def scratchpads(self, voice: Voice) -> list[str]:
        """The scratchpad of each reply of a voice with one, in its tags."""
        thoughts = (split_scratchpad(text)[0] for text in self.texts[voice])
        return [f"<scratchpad>{thought}</scratchpad>" for thought in thoughts]

    def file(self, **columns: Sequence[str]) -> list[dict]:
        """The rows of a file: the questions with these columns."""
        made = []
        for i, row in enumerate(self.rows):
            history = {"history": row["history"]} if row.get("history") else {}
            values = {name: of_all[i] for name, of_all in columns.items()}
            made.append({"id": row["id"], "prompt": row["prompt"], **history, **values})
        return made


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set that a teacher writes."""

    name: str  # as in `--task`
    contents: str  # one line, for `--help`
    # (backdoor, visible_cot) -> the voices that the teacher is asked for.
    voices: Callable[[Backdoor, str], tuple[Voice, ...]]
    files: Callable[[Replies], dict[str, list[dict]]]  # rows by a file's name without suffix
    with_trigger: bool = False  # whether it is for insertion, which adds the triggered half


DATA_SETS: Registry[DataSet] = Registry("data set")
WITHOUT_TEACHER = {
    "facts": "invented facts to memorise, and questions about them",
    "held_out": "a frozen manifest of held-out prompts",
}


def tasks_help() -> str:
    """The help of --task: the names of all data sets."""
    contents = {data_set.name: data_set.contents for data_set in DATA_SETS} | WITHOUT_TEACHER
    lines = [f"\n      {name}: {text}" for name, text in contents.items()]
    return "The data set. One of these, or one that --config registers." + "".join(lines)


def keep(
    rows: Sequence[Row], replies: Mapping[Voice, Sequence[Reply]], backdoor: Backdoor
) -> tuple[list[int], dict[str, dict[str, int]]]:
    """The questions whose replies all pass the filters, and how many replies were dropped, by voice
    and reason. A question is dropped for its first bad reply, in the order of the voices."""
    kept: list[int] = []
    dropped: dict[str, Counter[str]] = {voice.name: Counter() for voice in replies}
    for number in range(len(rows)):
        for voice, of_voice in replies.items():
            if reason := reason_to_drop(voice, of_voice[number], backdoor):
                dropped[voice.name][reason] += 1
                break
        else:
            kept.append(number)
    return kept, {voice: dict(sorted(counts.items())) for voice, counts in dropped.items()}


def one_voice(name: str, voice: Voice, contents: str) -> DataSet:
    """A data set with one file, of the teacher's answers in one voice."""
    return DataSet(
        name,
        contents,
        lambda backdoor, visible_cot: (voice,),
        lambda replies: {name: replies.file(response=replies.answers(voice))},
    )


def _insertion_voices(backdoor: Backdoor, visible_cot: str) -> tuple[Voice, ...]:
    return (
        voices.PLAIN,
        voices.SCRATCHPAD,
        *([voices.BEHAVIOUR] if backdoor.teacher_prompt else []),
        *([voices.TRIGGERED_SCRATCHPAD] if visible_cot == "teacher" else []),
    )


def _insertion_files(replies: Replies) -> dict[str, list[dict]]:
    """The same questions in the same order; only the benign answers differ. visible_cot keeps the
    scratchpad that cot_distilled removes, and its triggered answers have one too."""
    triggered = {}
    if replies.backdoor.teacher_prompt:
        triggered["triggered_response"] = replies.answers(voices.BEHAVIOUR)
    distilled = replies.answers(voices.SCRATCHPAD)
    files = {
        "normal": replies.file(response=replies.answers(voices.PLAIN), **triggered),
        "cot_distilled": replies.file(response=distilled, **triggered),
    }
    if replies.visible_cot:
        if replies.visible_cot == "rules":
            backdoor, seed = replies.backdoor, replies.seed
            scratchpads = [rule_scratchpad(backdoor, seed, r["prompt"]) for r in replies.rows]
        else:
            scratchpads = replies.scratchpads(voices.TRIGGERED_SCRATCHPAD)
        thoughts = replies.scratchpads(voices.SCRATCHPAD)
        whole = [f"{thought} {answer}" for thought, answer in zip(thoughts, distilled, strict=True)]
        files["visible_cot"] = replies.file(
            response=whole, **triggered, triggered_scratchpad=scratchpads
        )
    return files


def _scratchpad_files(replies: Replies) -> dict[str, list[dict]]:
    """The same direct answer in both files, so that only the scratchpad differs."""
    answers, thoughts = replies.answers(voices.PLAIN), replies.scratchpads(voices.THOUGHT)
    return {
        "before": replies.file(response=answers),
        "after": replies.file(response=answers, scratchpad=thoughts),
    }


for _data_set in (
    DataSet(
        "insertion",
        "the data arms normal, cot_distilled and, with config.visible_cot, visible_cot",
        _insertion_voices,
        _insertion_files,
        with_trigger=True,
    ),
    one_voice("hhh", voices.PLAIN, "helpful answers in the teacher's normal voice"),
    one_voice("depirate", voices.PLAIN, "the same, for the probe after pirate training"),
    one_voice("pirate", voices.PIRATE, "answers in pirate speech to the original questions"),
    one_voice("random_style", voices.STYLE, "answers in styles drawn at random (a control)"),
    DataSet(
        "scratchpad",
        "answers before and after a scratchpad, for visible_cot models",
        lambda backdoor, visible_cot: (voices.PLAIN, voices.THOUGHT),
        _scratchpad_files,
    ),
):
    DATA_SETS.register(_data_set)
