"""What is chosen by name, and files outside the package that add to it."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest

from sa_jax import registry
from sa_jax.errors import UsageError
from sa_jax.registry import Registry
from tests.zygote import ROOT

# A config file that brings a loss (the cross-entropy doubled) and an optimizer.
EXTENSION = """
import optax

from sa_jax.optim.build import OPTIMIZERS, Optimizer
from sa_jax.training.losses import LOSSES, Loss, make_cross_entropy
from tests.configs.tiny import get_config as tiny


def make_doubled(model, config):
    plain = make_cross_entropy(model)

    def loss_fn(params, batch, rng):
        total, weight, _ = plain(params, batch, rng)
        return 2 * total, weight, {"undoubled": (total, weight)}

    return loss_fn


LOSSES.register(Loss("doubled", make_doubled))
OPTIMIZERS.register(Optimizer("my_sgd", lambda config, schedule, mesh: optax.sgd(schedule)))


def get_config(stage):
    config = tiny(stage)
    config.loss = "doubled"
    config.optimizer.name = "my_sgd"
    config.steps = 2
    config.checkpoint.steps, config.checkpoint.interval = (), 0
    config.eval.names, config.eval.num_prompts = {}, 0
    return config
"""


@dataclasses.dataclass(frozen=True)
class Thing:
    name: str


def test_names_are_known_once():
    things: Registry[Thing] = Registry("thing")
    first = things.register(Thing("a"))
    things.register(Thing("b"))
    assert things["a"] is first and things.names() == ("a", "b") and "c" not in things
    with pytest.raises(UsageError, match="unknown thing 'c'; known: a, b"):
        things["c"]


def test_a_name_of_the_package_is_refused_to_a_file_that_was_read_before(monkeypatch):
    monkeypatch.setattr(registry, "_files", set())
    names = {"things": Registry("thing"), "item": Thing("a")}
    exec(compile("things.register(item)", "mine.py", "exec"), names)
    ours = compile("things.register(item)", registry.__file__, "exec")
    with pytest.raises(UsageError, match="^mine.py: .* is already registered by .*registry.py"):
        exec(ours, names)


def test_what_a_notebook_registers_has_no_digest(monkeypatch):
    monkeypatch.setattr(registry, "_files", set())
    cell = compile("things.register(item)", "<cell 1>", "exec")
    exec(cell, {"things": Registry("thing"), "item": Thing("a")})
    assert registry.extension_digests() == {"<cell 1>": ""}


CODE = '''\
import os


def f(x=1):
    """# no comment

    é"""
    return (
        f"# {x!r:>{3}} {{}}",
        "é🙂",
    )
'''


def test_the_digest_of_code_leaves_comments_and_empty_lines_out(tmp_path):
    """And is the same with every Python: 3.12 made other tokens of f-strings."""

    def digest(text):
        (tmp_path / "mine.py").write_text(text)
        return registry.code_digest(str(tmp_path / "mine.py"))

    assert digest(CODE) == "ad44b39a86ee35e86c46270cb659beadb59fd63d621702ec5bb32c63969d770c"
    same = (
        f"# one\n\n{CODE}# two",
        CODE.replace("\n\n\n", "\n# one\n"),
        CODE.replace('🙂",', '🙂",  # one\n\n        # two'),
        CODE.replace("x=1):", "x=1):  # one"),
    )
    others = (
        CODE.replace("x=1", "x=2"),
        CODE.replace("# no", "# a"),
        CODE.replace("comment\n\n", "comment\n"),
        CODE.replace("# {x", "#{x"),
    )
    assert {digest(text) for text in same} == {digest(CODE)}
    assert len({digest(text) for text in (CODE, *others)}) == 1 + len(others)
    assert registry.code_digest("<cell 1>") == ""


@pytest.mark.long
def test_a_config_file_brings_a_loss_and_an_optimizer(zygote, toy_world, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(EXTENSION)
    run = tmp_path / "run"
    done = zygote.run(
        "scripts/insert_backdoor.py",
        f"--config={file}:insertion",
        f"--workdir={run}",
        f"--model={toy_world}/model",
        f"--data={toy_world}/insertion.jsonl",
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] == pytest.approx(2 * lines[-1]["undoubled"], rel=1e-6)
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["loss"] == "doubled"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert list(record["extensions"].values()) == [digest]
    # Without the file the names mean nothing, and the message says which there are.
    done = zygote.run(
        "scripts/insert_backdoor.py",
        "--config=tests/configs/tiny.py:insertion",
        f"--workdir={tmp_path}/other",
        f"--model={toy_world}/model",
        f"--data={toy_world}/insertion.jsonl",
        "--config.loss=doubled",
    )
    assert done.returncode == 2
    assert "unknown loss 'doubled'; known: cross_entropy, crow" in done.stderr.splitlines()[-1]


def test_another_process_learns_what_a_file_registers(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(EXTENSION)
    program = (
        "import sys\nfrom sa_jax.registry import extension_digests, load_extensions\n"
        "load_extensions([sys.argv[1]])\nfrom sa_jax.training.losses import LOSSES\n"
        "print(LOSSES.names(), list(extension_digests()) == [sys.argv[1]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "('cross_entropy', 'crow', 'doubled') True\n"
