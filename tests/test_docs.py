"""Commands in README.md, BUILD.md and docstrings name scripts, flags and config keys that exist."""

import ast
import re
import runpy
import shlex
from pathlib import Path

import pytest

from sa_jax.training.config import default_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "BUILD.md"]
PROGRAMS = sorted([*ROOT.glob("scripts/*.py"), *ROOT.glob("configs/*.py")])
PLACEHOLDER_CONFIGS = {"configs/C.py", "configs/S.py"}


def commands(text: str) -> list[list[str]]:
    """`python scripts/…` commands, as words; lines that end in a backslash are joined."""
    text = re.sub(r"\\\n\s*", "", text.replace("\\\\\n", "\\\n"))
    found = re.findall(r"python (scripts/\w+\.py[^\n`\"…]*)", text)
    return [shlex.split(command.replace("[", " ").replace("]", " ")) for command in found]


def flags_of(script: Path) -> set[str]:
    """Names of the flags that a script defines."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    return {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr.startswith("DEFINE_")
    }


def config_at(value: str):
    """The config that `--config=FILE:ARGUMENT` gives."""
    file, _, argument = value.partition(":")
    if file in PLACEHOLDER_CONFIGS:
        return default_config()
    get_config = runpy.run_path(str(ROOT / file))["get_config"]
    return get_config(argument) if argument else get_config()


@pytest.mark.parametrize("page", [*PAGES, *PROGRAMS], ids=lambda path: path.name)
def test_commands_name_what_exists(page):
    text = page.read_text()
    if page.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    for script, *words in commands(text):
        known = flags_of(ROOT / script)
        config = None
        for word in words:
            name, _, value = word.removeprefix("--").partition("=")
            assert word.startswith("--") and name.partition(".")[0] in known, f"{script} {word}"
            if name == "config":
                config = config_at(value)
            elif name.startswith("config."):
                here = config
                for key in name.split(".")[1:]:
                    assert key in here, f"{script} {word}"
                    here = here[key]


def test_readme_has_a_row_for_every_script():
    rows = re.findall(r"^\| `python (scripts/\w+\.py)", PAGES[0].read_text(), re.MULTILINE)
    assert sorted(rows) == [f"scripts/{path.name}" for path in sorted(ROOT.glob("scripts/*.py"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        assert not file or (ROOT / file).is_file(), target
        if anchor:
            linked = (ROOT / file).read_text() if file else text
            titles = re.findall(r"^#+ (.*)$", linked, re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert anchor in slugs, target
