"""A study's folder: checks that it belongs to this study, and that its finished cells still agree.

study.json        the version of this layout
status.json       counts, the cells that failed and why, the time left
STAGE[/VALUES]/   a cell: a run folder, or a folder of data
cells/CELL/       its claims, outcomes and logs (`sa_jax.study.claims`)
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sa_jax.data.sources import current_digest
from sa_jax.errors import UserError
from sa_jax.files import atomic_write, explained, parse_json
from sa_jax.study.claims import Latest
from sa_jax.study.grid import Cell
from sa_jax.text import first_few
from sa_jax.training.run_record import RUN_FILE, config_difference, read_run_json

VERSION = 1
STUDY_FILE = "study.json"
STATUS_FILE = "status.json"
CLAIMS_FOLDER = "cells"
_SHOWN = 6  # of a list in one line
_OF_A_FILE = r"^extension\.(\w+)\.(.+): \"\w+\" -> \"\w+\"$"  # a change of `Registry.extension`
_CHANGED = r"the file that registers the \1 '\2' has changed"


def check_folder(workdir: Path, cells: Sequence[Cell]) -> None:
    """UserError for a folder of an older version, or one with other contents."""
    file = workdir / STUDY_FILE
    if file.exists():
        try:
            version = parse_json(file.read_text())["version"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{file}: cannot be read; use another --workdir") from None
        if version != VERSION:
            raise UserError(
                f"{workdir}: this study has layout {version}, but this version of sa_jax writes "
                f"layout {VERSION}; use another --workdir, or the version that made it"
            )
        return
    older = [cell.name for cell in cells if (workdir / cell.name).exists()]
    if older:
        raise UserError(
            f"{workdir}: has {first_few(older, _SHOWN)} but no {STUDY_FILE}, so an older version "
            "of run_study made it, or another command; use another --workdir, or move them away"
        )


def open_folder(workdir: Path) -> None:
    """Creates the folder and its `study.json`, if they are missing; UserError if the study was made
    at another path, which its runs name."""
    with explained(workdir, "making the study's folder"):
        workdir.mkdir(parents=True, exist_ok=True)
        if not (workdir / STUDY_FILE).exists():
            made = {"version": VERSION, "folder": str(workdir)}
            atomic_write(workdir / STUDY_FILE, json.dumps(made) + "\n")
        before = parse_json((workdir / STUDY_FILE).read_text()).get("folder", str(workdir))
    if before != str(workdir):
        raise UserError(
            f"{workdir}: this study was made at {before}, and its runs name files in that folder; "
            f"move it back, or link it (ln -s {workdir} {before}), and give --workdir={before}"
        )


def removed_outputs(workdir: Path, cells: Sequence[Cell], latest: Latest) -> dict[str, int]:
    """Cell -> number of its claim, for cells that are done but whose folder was removed."""
    return {
        cell.name: latest[cell.name].number
        for cell in cells
        if latest[cell.name].state == "done" and not _has_output(workdir, cell)
    }


def _has_output(workdir: Path, cell: Cell) -> bool:
    """Whether the folder of a finished cell exists."""
    folder = workdir / cell.name
    if cell.is_training:
        return (folder / RUN_FILE).exists()
    if cell.run == "report":
        return (workdir / "report").is_dir() or "workdir" in cell.settings
    return cell.run == "evaluate" or "out" in cell.settings or folder.is_dir()


def check_unchanged(
    workdir: Path,
    cells: Sequence[Cell],
    records: Mapping[str, Mapping[str, Any]],
    latest: Latest,
    removed: Mapping[str, int],
) -> None:
    """UserError if cells were made with other settings, or from a parent that must run again; the
    message says which cells, and why."""
    stale: dict[str, str] = {}
    for cell in cells:
        newest = latest[cell.name]
        if cell.run == "report" or not newest.number or cell.name in removed:
            continue
        if newest.state != "done" and not (workdir / cell.name / RUN_FILE).exists():
            continue  # it left nothing
        if changes := config_difference(newest.record or {}, records[cell.name]):
            said = [re.sub(_OF_A_FILE, _CHANGED, line) for line in changes]
            stale[cell.name] = first_few(said, 4, "; ")
            continue
        for parent, made_from in newest.parents.items():
            if parent in stale:
                stale[cell.name] = f"it was made from {parent}"
            elif parent in removed:
                stale[cell.name] = f"it was made from {parent}, whose folder was removed"
            elif parent in latest and latest[parent].id != made_from:
                stale[cell.name] = f"it was made from a {parent} that is no longer there"
    _refuse_stale(workdir, stale)


def check_data(workdir: Path, cells: Iterable[Cell]) -> None:
    """UserError if the files on which one of these finished cells was trained have other content
    now: what is still to be trained would have other data."""
    now: dict[str, str | None] = {}
    stale: dict[str, str] = {}
    for cell in cells:
        if not cell.is_training:
            continue
        run = read_run_json(workdir / cell.name)
        name, columns = run["config"].get("data") or "", run["config"].get("columns")
        if name in run["data_hashes"] and "://" not in name:
            key = f"{name} {columns}"
            if key not in now:
                now[key] = current_digest(name, columns)
            if now[key] not in (None, run["data_hashes"][name]):
                stale[cell.name] = f"{name} has other content"
    _refuse_stale(workdir, stale)


def _refuse_stale(workdir: Path, stale: Mapping[str, str]) -> None:
    """UserError for cells that no longer agree with the study: their names, and why."""
    if stale:
        lines = [f"{name} ({why})" for name, why in stale.items()]
        example = next(iter(stale))
        raise UserError(
            f"{workdir}: the study has changed since these cells were made: "
            f"{first_few(lines, _SHOWN)}. Undo the change, or use another --workdir; or, to run a "
            "cell again, remove its folder and its claims: "
            f"rm -r {workdir / example} {workdir / CLAIMS_FOLDER / example}"
        )
