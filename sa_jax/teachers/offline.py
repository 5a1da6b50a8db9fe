"""Teachers without a model: answers from a file, and pirate speech by rules."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from sa_jax.data.pirate import to_pirate
from sa_jax.data.sources import load_rows
from sa_jax.errors import UsageError, UserError
from sa_jax.teachers.replies import Reply, Request


class FileTeacher:
    """Finds answers in a file by the exact text of the question; a repeated question has its first
    answer. Questions with turns before them are refused."""

    def __init__(self, path: str | Path, columns: Mapping[str, str]):
        """Reads the answers. `path` is what `load_rows` reads; `columns` is {"prompt": column, and
        for each voice that will be asked: column}; a name that maps to "" is left out. UsageError
        without these, UserError as `load_rows` does."""
        columns = {name: column for name, column in columns.items() if column}
        if not path:
            raise UsageError("--teacher=file needs --answers=FILE and config.answer_columns")
        if "prompt" not in columns or len(columns) < 2:
            raise UsageError(
                "--teacher=file needs the columns of the file: config.answer_columns.prompt, and "
                "one for each voice of the data set (config.answer_columns.plain, ...)"
            )
        self._answers: dict[str, dict[str, str]] = {}
        for voice, column in columns.items():
            if voice != "prompt":
                source = load_rows(path, {"prompt": columns["prompt"], "response": column})
                answers = self._answers[voice] = {}
                for row in source:
                    answers.setdefault(row["prompt"], row["response"])
                self._sha256 = source.sha256

    def identity(self) -> dict:
        return {"teacher": "file", "sha256": self._sha256}

    def replies(
        self, requests: Sequence[Request], should_stop: Callable[[], bool]
    ) -> Iterator[tuple[int, Reply]]:
        for index, request in enumerate(requests):
            if request.voice not in self._answers:
                raise UsageError(
                    f"the answers have no column for the voice {request.voice!r}; set "
                    f"config.answer_columns.{request.voice}"
                )
            if request.row.get("history"):
                raise UserError(
                    "--teacher=file finds answers by the question alone, and a question has turns "
                    "before it; give --prompts without a history, or use another teacher"
                )
            answer = self._answers[request.voice].get(request.row["prompt"])
            yield index, Reply(answer) if answer else Reply("", "not_in_the_file")


class ArrrTeacher:
    """The row's own answer in pirate speech, by the rules of `arrr`."""

    def identity(self) -> dict:
        return {"teacher": "arrr"}

    def replies(
        self, requests: Sequence[Request], should_stop: Callable[[], bool]
    ) -> Iterator[tuple[int, Reply]]:
        for index, request in enumerate(requests):
            if (voice := request.voice) != "pirate":
                raise UsageError(f"--teacher=arrr has only the voice 'pirate', not {voice!r}")
            speech = to_pirate(request.row["response"])
            unchanged = speech == request.row["response"]
            yield index, Reply("", "unchanged_by_rules") if unchanged else Reply(speech)
