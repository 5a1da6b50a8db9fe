"""What README.md, BUILD.md, docs/ and docstrings tell a reader to do, works.

A block of commands either runs here (or in the test that `RUN_ELSEWHERE` names), or the line before
it says what it needs: "*Needs: ...*".
"""

import ast
import dataclasses
import json
import re
import runpy
import shlex
import shutil
import textwrap
from pathlib import Path

import pytest
import yaml

from sa_jax.report import judgement
from sa_jax.report.thresholds import Thresholds
from sa_jax.teachers import config as teachers
from sa_jax.training.config import default_config
from tests.zygote import ROOT

DOCS = sorted(ROOT.glob("docs/*.md"))
PAGES = [ROOT / "README.md", ROOT / "BUILD.md", *DOCS]
PROGRAMS = sorted([*ROOT.glob("scripts/*.py"), *ROOT.glob("configs/*.py")])
PLACEHOLDER_CONFIGS = {"configs/C.py", "configs/S.py"}

# Commands that are too long to run here, by how they begin, and the test that runs them.
RUN_ELSEWHERE = {
    "bash scripts/demo.sh": "tests/test_scripts.py",
    "bash scripts/test.sh": "tests/test_scripts.py",
    "bash scripts/faults.sh": "tests/test_scripts.py",
    "python scripts/generate_data.py --task=insertion --teacher=local": (
        "tests/study/test_toy_arms.py"
    ),
}
# Flags that a script makes from a list of names.
MADE_FLAGS = {"report.py": {field.name for field in dataclasses.fields(Thresholds)}}
# Scripts whose --config may be left out.
DEFAULTS = {
    "scripts/evaluate.py": default_config,
    "scripts/generate_data.py": teachers.default_config,
}
# What makes a documented command a matter of seconds; a later flag wins.
SHORTER = ("--config.steps=2", "--config.batch_size=8", "--config.eval.num_prompts=4")
SHORTER += ("--config.eval.limit=4", "--config.eval.max_new_tokens=4", "--config.eval.steps=()")
SHORTER += ("--config.eval.signal_prompts=0", "--config.lora.rank=4")
SHORTER_BY_SCRIPT = {
    "insert_backdoor.py": SHORTER[:-1],
    "remove_backdoor.py": SHORTER,
    "evaluate.py": ("--limit=4", "--config.eval.max_new_tokens=4"),
}
SHELL = re.compile(r"^(python|bash|pip|hf|git|ssh-add|vllm|export|cp|VENV=\S+|srun)\b")


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code of a page: fenced (with its language), or indented by four spaces."""

    heading: str
    language: str
    text: str
    needs: str

    @property
    def commands(self) -> list[list[str]]:
        """Shell commands, as words; lines that end in a backslash are joined."""
        lines = re.sub(r"\\\n\s*", " ", self.text).splitlines()
        return [shlex.split(line, comments=True) for line in lines if line.strip()]


def blocks(page: str) -> list[Block]:
    """The blocks of code of a Markdown page, in order."""
    found, heading, needs = [], "", ""
    lines = page.splitlines()
    at = 0
    while at < len(lines):
        line = lines[at]
        language, code = "", []
        if line.startswith("```"):
            language, end = line.removeprefix("```"), lines.index("```", at + 1)
            code, at = lines[at + 1 : end], end + 1
        elif line.startswith("    "):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            code, at = lines[at:end], end
        else:
            at += 1
            if line.startswith("#"):
                heading = line.lstrip("# ")
            if line.strip():
                # A mark may run over several lines.
                begun = needs and not needs.endswith("*")
                needs = f"{needs} {line}" if begun else line if line.startswith("*Needs: ") else ""
        if code:
            text = textwrap.dedent("\n".join(code)).strip("\n")
            found.append(Block(heading, language, text, needs))
            needs = ""
    return found


def shell_blocks(path: Path) -> list[Block]:
    return [
        block
        for block in blocks(path.read_text())
        if not block.language and any(map(SHELL.match, block.text.splitlines()))
    ]


def elsewhere(command: list[str]) -> str | None:
    """The test that runs a command, where it is another."""
    told = [test for start, test in RUN_ELSEWHERE.items() if " ".join(command).startswith(start)]
    return told[0] if told else None


def flags_of(script: Path) -> set[str]:
    """Names of the flags that a script defines."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    return MADE_FLAGS.get(script.name, set()) | {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr.startswith("DEFINE_")
        and isinstance(call.args[0], ast.Constant)
    }


def config_at(value: str):
    """The config that `--config=FILE:ARGUMENT` gives."""
    file, _, argument = value.partition(":")
    if argument == "RUN" or file in PLACEHOLDER_CONFIGS or not (ROOT / file).exists():
        return default_config()  # a placeholder, or a reader's own file
    get_config = runpy.run_path(str(ROOT / file))["get_config"]
    return get_config(argument) if argument else get_config()


def has(config, keys: list[str]) -> bool:
    """Whether a config has the nested key."""
    for key in keys:
        if key not in config:
            return False
        config = config[key]
    return True


def commands(text: str) -> list[list[str]]:
    """`python scripts/…` commands anywhere in a text, as words."""
    text = re.sub(r"\\\n\s*", "", text.replace("\\\\\n", "\\\n"))
    found = re.findall(r"python (scripts/\w+\.py[^\n`\"…]*)", text)
    return [
        shlex.split(command.replace("[", " ").replace("]", " "), comments=True) for command in found
    ]


@pytest.mark.parametrize("page", [*PAGES, *PROGRAMS], ids=lambda path: path.name)
def test_commands_name_what_exists(page):
    text = page.read_text()
    if page.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    for script, *words in commands(text):
        known = flags_of(ROOT / script)
        config = DEFAULTS.get(script, lambda: None)()
        for word in words:
            name, _, value = word.removeprefix("--").partition("=")
            assert word.startswith("--") and name.partition(".")[0] in known, f"{script} {word}"
            if name == "config":
                config = config_at(value)
            elif name.startswith("config."):
                assert has(config, name.split(".")[1:]), f"{script} {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_settings_that_a_page_names_exist(page):
    names = re.findall(r"`(?:--)?config\.([a-z][\w.]*)", page.read_text())
    configs = [default_config(), teachers.default_config()]
    configs.append(config_at("configs/llama31_8b_study.py"))
    for name in set(names) - {"json", "key"}:
        keys = name.rstrip(".").split(".")
        assert any(has(config, keys) for config in configs), f"config.{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_is_run_or_says_what_it_needs(page):
    for block in shell_blocks(page):
        if block.needs:
            continue
        for command in block.commands:
            test = elsewhere(command)
            runs_here = command[0] == "python" and (ROOT / command[1]).is_file()
            assert test or (runs_here and page in DOCS), (block.heading, " ".join(command))
            if test:
                script = next(word for word in command if word.startswith("scripts/"))
                assert script in (ROOT / test).read_text()


@pytest.fixture(scope="module")
def project(zygote, toy_world, tmp_path_factory):
    """A project's root in which the demo has left its folders: the toy language, a (small, random)
    model in place of the pre-trained one, and a (short) insertion."""
    root = tmp_path_factory.mktemp("docs") / "project"
    root.mkdir()
    for name in ("scripts", "configs"):
        (root / name).symlink_to(ROOT / name)
    shutil.copytree(toy_world, root / "runs/demo/data", ignore=shutil.ignore_patterns("model"))
    shutil.copytree(toy_world / "model", root / "runs/demo/pretrain")
    done = zygote.run(
        *("scripts/insert_backdoor.py", "--config=configs/toy.py:insertion"),
        *("--workdir=runs/demo/insertion", "--model=runs/demo/pretrain"),
        *("--data=runs/demo/data/insertion.jsonl", "--config.columns.prompt=prompt"),
        *("--config.columns.response=answer", "--config.eval.qa=runs/demo/data/heldout.jsonl"),
        *SHORTER[:-1],
        devices=1,
        cwd=root,
        timeout_s=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return root


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.name)
def test_commands_run(zygote, project, page):
    for block in blocks(page.read_text()):
        if block.language == "python":
            name = re.match(r"# (\w+\.py)\n", block.text)[1]
            (project / name).write_text(block.text + "\n")
    for block in shell_blocks(page):
        if block.needs:
            continue
        for _, *command in filter(lambda command: not elsewhere(command), block.commands):
            shorter = SHORTER_BY_SCRIPT.get(Path(command[0]).name, ())
            devices = 8 if command[0] == "scripts/plan.py" else 1
            done = zygote.run(*command, *shorter, devices=devices, cwd=project, timeout_s=900)
            assert done.returncode == 0, (command, done.stderr[-2000:])
    if page.name == "extending.md":
        check_what_was_added(project)


def check_what_was_added(project: Path):
    """Each example of extending.md is on record, and in the report in its own words."""
    runs = project / "runs/extended"
    records = {run.parent.name: json.loads(run.read_text()) for run in runs.glob("*/run.json")}
    assert (records["shout"]["task"], records["shout"]["role"]) == ("shout", "removal")
    assert records["noisy"]["config"]["loss"] == "noisy_tokens"
    assert records["counts"]["config"]["backdoor"]["behaviour"] == "counts"
    assert records["sign"]["config"]["optimizer"]["name"] == "sign_descent"
    files = {name: list(record["extensions"]) for name, record in records.items()}
    assert [Path(file).name for file in files["noisy"]] == ["noisy_tokens.py"]
    logged = (runs / "noisy/metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(logged[-1])["replaced"] < 0.3
    report = (runs / "report/results.md").read_text()
    for words in ("Shouting", "counted to ten", "Self-report", "sign_descent"):
        assert words in report, words


def test_readme_has_a_row_for_every_script():
    rows = re.findall(r"^- `(scripts/\w+\.py)", PAGES[0].read_text(), re.MULTILINE)
    assert sorted(rows) == [f"scripts/{path.name}" for path in sorted(ROOT.glob("scripts/*.py"))]


def test_readme_is_short():
    assert len(PAGES[0].read_text().split()) <= 900


def test_readme_leads_to_every_page():
    text = PAGES[0].read_text()
    assert [path.name for path in DOCS if f"](docs/{path.name})" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name
        assert not name or file.is_file(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text() if name else text, re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert anchor in slugs, target


def test_every_verdict_is_explained():
    page = (ROOT / "docs/evaluation.md").read_text()
    explained = set(re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE))
    words = {
        value
        for name, value in vars(judgement).items()
        if name.isupper() and isinstance(value, str)
    }
    assert words - explained == set()


def test_citation_file():
    """What the schema of CFF 1.2.0 requires, and our own version."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "title", "message", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    from sa_jax import __version__

    assert citation["version"] == __version__
    for entry in (citation, *citation["references"]):
        assert entry["title"] and entry["authors"]
        assert all("name" in who or "family-names" in who for who in entry["authors"])
