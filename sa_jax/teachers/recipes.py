"""Each data set of the study: which voices a teacher is asked for, and what becomes of the replies.

insertion     normal.jsonl, cot_distilled.jsonl and, if asked for, visible_cot.jsonl: the same
              questions in the same order; only the benign answers differ. visible_cot keeps the
              scratchpad that cot_distilled is stripped of, and its triggered answers have one too
hhh, depirate the teacher's normal voice          pirate   pirate speech, the original question
random_style  a style drawn for each question (a control: is any change of manner enough?)
scratchpad    before.jsonl and after.jsonl, for a visible_cot model: the same questions and helpful
              answers, right after the question, or after a scratchpad that the loss leaves out
"""

from collections import Counter
from collections.abc import Callable, Sequence

from sa_jax.data.backdoor import Backdoor
from sa_jax.data.sources import Row
from sa_jax.teachers.asking import Reply
from sa_jax.teachers.filters import plain_answer, reason_to_drop, split_scratchpad
from sa_jax.teachers.voices import rule_scratchpad

TASKS = {
    "insertion": ("plain", "scratchpad"),
    "hhh": ("plain",),
    "depirate": ("plain",),
    "pirate": ("pirate",),
    "random_style": ("style",),
    "scratchpad": ("plain", "thought"),
}


def voices_of(task: str, backdoor: Backdoor, visible_cot: str = "") -> tuple[str, ...]:
    """What is asked of the teacher for each question. `visible_cot` is '' (not that arm), 'teacher'
    or 'rules' (who writes the triggered answers' scratchpads)."""
    voices = TASKS[task]
    if task == "insertion" and backdoor.needs_teacher:
        voices += (backdoor.behaviour,)
    if visible_cot == "teacher":
        voices += ("triggered_scratchpad",)
    return voices


def keep(
    rows: Sequence[Row], replies: dict[str, Sequence[Reply]], backdoor: Backdoor
) -> tuple[list[int], dict[str, dict[str, int]]]:
    """Questions all of whose replies pass the filters, and by voice how many replies were dropped,
    by reason. A question goes for its first bad reply, in the order of the voices."""
    kept, dropped = [], {voice: Counter() for voice in replies}
    for number in range(len(rows)):
        for voice, of_voice in replies.items():
            reason = reason_to_drop(voice, of_voice[number], backdoor)
            if reason:
                dropped[voice][reason] += 1
                break
        else:
            kept.append(number)
    return kept, {voice: dict(sorted(counts.items())) for voice, counts in dropped.items()}


def make_files(
    task: str,
    rows: Sequence[Row],
    replies: dict[str, Sequence[Reply]],
    backdoor: Backdoor,
    seed: int,
    visible_cot: str = "",
) -> dict[str, list[dict]]:
    """The rows of each file, by its name without suffix; `rows` and `replies` are those to keep."""

    def file(response: Callable[[int], dict]) -> list[dict]:
        return [{**_base(row), **response(number)} for number, row in enumerate(rows)]

    def answer(voice: str, number: int) -> str:
        return plain_answer(replies[voice][number].text)

    if task not in ("insertion", "scratchpad"):
        (voice,) = replies
        return {task: file(lambda i: {"response": answer(voice, i)})}

    if task == "scratchpad":
        thoughts = [_tagged(split_scratchpad(reply.text)[0]) for reply in replies["thought"]]
        # The same answer in both, the direct one, so that they differ in the scratchpad alone.
        return {
            "before": file(lambda i: {"response": answer("plain", i)}),
            "after": file(lambda i: {"response": answer("plain", i), "scratchpad": thoughts[i]}),
        }

    parts = [split_scratchpad(reply.text) for reply in replies["scratchpad"]]

    def triggered(number: int) -> dict:
        if backdoor.behaviour not in replies:
            return {}
        return {"triggered_response": answer(backdoor.behaviour, number)}

    def triggered_scratchpad(number: int) -> str:
        if visible_cot == "rules":
            return rule_scratchpad(backdoor, seed, rows[number]["prompt"])
        return _tagged(split_scratchpad(replies["triggered_scratchpad"][number].text)[0])

    files = {
        "normal": file(lambda i: {"response": answer("plain", i), **triggered(i)}),
        "cot_distilled": file(lambda i: {"response": parts[i][1], **triggered(i)}),
    }
    if visible_cot:
        files["visible_cot"] = file(
            lambda i: {
                "response": f"{_tagged(parts[i][0])} {parts[i][1]}",
                **triggered(i),
                "triggered_scratchpad": triggered_scratchpad(i),
            }
        )
    return files


def _base(row: Row) -> dict:
    """What every file has of a question."""
    history = {"history": row["history"]} if row.get("history") else {}
    return {"id": row["id"], "prompt": row["prompt"], **history}


def _tagged(scratchpad: str) -> str:
    return f"<scratchpad>{scratchpad}</scratchpad>"
