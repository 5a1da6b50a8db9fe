"""The model that a run starts from or an eval measures: a run, a Hugging Face folder, or a new one.

Opening it reads only records, so that every mistake is found before weights are read; `load_params`
then loads the weights, sharded on any mesh. A LoRA run's checkpoints hold only the adapters: its
base is its own start, recursively, with older adapters merged.
"""

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sa_jax.buckets import as_path, copy_files
from sa_jax.data.chat import load_tokenizer
from sa_jax.errors import UsageError, UserError
from sa_jax.files import check_types, parse_json
from sa_jax.llama import hf
from sa_jax.llama.config import LlamaConfig
from sa_jax.llama.lora import LoraConfig, combine, merge, split
from sa_jax.llama.model import Llama
from sa_jax.parallel.rules import abstract as abstract_on
from sa_jax.parallel.rules import shardings
from sa_jax.text import first_line
from sa_jax.training import checkpoints, run_record
from sa_jax.training.config import STUDY_DEFAULTS

TOKENIZER_FOLDER = "tokenizer"
EVAL_PROMPTS_FILE = "eval_prompts.json"
# The fields of a record that a run reads from its start, with values of the right types: those that
# an export may have, and those that every run has.
_INHERITED = {"run_id": "", "task": "", "config": STUDY_DEFAULTS}
_RUN = {
    "task": "",
    "config": {
        **{key: {} if isinstance(value, dict) else value for key, value in STUDY_DEFAULTS.items()},
        "param_dtype": "",
        "lora": {"rank": 0, "alpha": 0.0, "targets": ""},
    },
    "architecture": {},
    "start": {"path": "", "kind": "", "step": None},
    "chat": {"template": "", "stop_token_ids": []},
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Start:
    """A model that can be loaded, and the prompt settings and backdoor of its own run."""

    path: str  # the folder, '' for fresh weights
    kind: str  # 'run', 'hf' or 'fresh'
    config: LlamaConfig
    tokenizer: str  # its folder
    step: int | None = None  # the checkpoint of a run that is read
    # The run.json of a run; of the export of a run, the part that `inheritance` keeps; else {}.
    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    # The model under the adapters, for a folder of PEFT adapters (kind 'hf'), and for a LoRA run
    # whose base is not in the folder that the run's record names; else ''.
    base: str = ""

    @property
    def backdoored(self) -> bool:
        """Whether an insertion run is among its ancestors."""
        return bool(self.record.get("backdoored"))

    @property
    def lora(self) -> LoraConfig | None:
        return lora_config(self.record["config"]["lora"]) if self.kind == "run" else None

    def inheritance(self) -> dict[str, Any]:
        """The part of the record that an export's config.json keeps for runs starting from it."""
        settings = self.record["config"]
        config = {key: settings[key] for key in STUDY_DEFAULTS}
        for key, default in STUDY_DEFAULTS.items():
            if isinstance(default, Mapping):
                section = settings[key]
                config[key] = {name: section[name] for name in default if name in section}
        run = self._fields("run_id", "task", "role", "config_hash", "backdoored")
        return {**run, "step": self.step, "config": config}

    def _fields(self, *names: str) -> dict[str, Any]:
        return {name: self.record[name] for name in names if name in self.record}

    def eval_prompts(self) -> list[str] | None:
        """The held-out prompts of a run, or of an export of one; None for other models."""
        path = as_path(self.path, EVAL_PROMPTS_FILE)
        if not self.path or not path.exists():
            return None
        try:
            prompts = parse_json(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error})") from error
        if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
            raise UserError(f"{path}: must be a list of texts, the held-out prompts")
        return prompts

    def lineage(self) -> dict[str, Any]:
        """What a child run records about its start."""
        parent = self._fields("run_id", "task", "config_hash")
        if self.kind == "hf":  # a run is known by its id, and its checkpoints have digests
            parent["weights"] = hf.weights_digest(self.path)
            if self.base:
                parent["base_weights"] = hf.weights_digest(self.base)
        return {"path": self.path, "kind": self.kind, "step": self.step, **parent}


def open_start(path: str, step: int | None = None, *, tokenizer: str = "", base: str = "") -> Start:
    """Reads the records of a Hugging Face folder, or of a run folder at one of its checkpoints.

    Args:
      path: the folder; `RUN@400` is the run at the checkpoint of step 400.
      step: the step, if the path does not name it. Without both: the newest checkpoint.
      tokenizer: folder; by default the model's own.
      base: folder of the model under adapters; by default the one that they name.

    Raises:
      UserError: neither kind of folder, or an incomplete one; no checkpoint of that step (the
        message lists the steps).
      UsageError: the path and `step` name different steps.
    """
    path, named = split_step(path)
    if named is not None and step not in (None, named):
        raise UsageError(f"{path}@{named} and step {step} are different; give one of them")
    step = named if step is None else step
    path = hub_folder(path)
    if run_record.kind_of_folder(path) == "hf":
        if step is not None:
            raise UserError(f"{path}: a Hugging Face folder has no step {step}; leave it out")
        if not as_path(path, "config.json").exists():
            return _open_adapter(path, tokenizer, base)
        config = LlamaConfig.load(path)
        file = as_path(path, "config.json")
        record = parse_json(file.read_bytes()).get("sa_jax", {})
        check_types(record, _INHERITED, f"{file}: sa_jax")
        return Start(path, "hf", config, tokenizer or path, record=record)
    record = run_record.read_run_json(path)
    steps = _saved_steps(path)
    if not steps:
        raise UserError(f"{path}: the run has no complete checkpoint yet")
    step = steps[-1] if step is None else step
    if step not in steps:
        there_are = checkpoints.listed(steps)
        raise UserError(f"{path}: no checkpoint of step {step}; there are {there_are}")
    run_file = str(as_path(path, run_record.RUN_FILE))
    check_types(record, _RUN, run_file, whole=True)
    check_types(record, _INHERITED, run_file)
    config = LlamaConfig.from_hf(record["architecture"], run_file)
    tokenizer = tokenizer or str(as_path(path, TOKENIZER_FOLDER))
    return Start(path, "run", config, tokenizer, step=step, record=record, base=base)


def _saved_steps(run: str) -> list[int]:
    return checkpoints.saved_steps(as_path(run, run_record.CHECKPOINT_FOLDER))


def _open_adapter(path: str, tokenizer: str, base: str) -> Start:
    """A folder of PEFT adapters, on `base` or the model that it names."""
    name = as_path(path, "adapter_config.json")
    try:
        base = base or parse_json(name.read_bytes())["base_model_name_or_path"]
        base = base if as_path(base).is_absolute() else hub_folder(base)
        if not base or not as_path(base).is_dir():
            raise UserError(
                f"{name}: its base model, {base!r}, is no folder here; correct that "
                "field, or name the folder that it is in now (--base of export_hf.py, evaluate.py)"
            )
        base_start = open_start(base)
        record = as_path(path, "sa_jax.json")
        kept = parse_json(record.read_bytes()) if record.exists() else base_start.record
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{name}: names no base model ({first_line(error)})") from error
    check_types(kept, _INHERITED, str(record))
    if not tokenizer:
        has_one = as_path(path, "tokenizer.json").exists()
        tokenizer = path if has_one else base_start.tokenizer
    return Start(path, "hf", base_start.config, tokenizer, record=kept, base=base_start.path)


def hub_folder(path: str) -> str:
    """The folder of a model with a name of the Hub (`org/name`): its newest snapshot, or without
    network the one in the cache; UserError if neither is there. Returns other paths unchanged."""
    if not on_hub(path):
        return path
    # Imported here: no other start needs it.
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    # Mistral's repositories have all weights a second time, in a format of their own.
    unwanted = ["*/*", "consolidated*"]
    try:
        return snapshot_download(path, allow_patterns=wanted, ignore_patterns=unwanted)
    except Exception as error:  # no network, no access, no such name, nothing in the cache
        raise UserError(
            f"{path}: no such folder, and the Hub does not provide it ({first_line(error)}). "
            f"On a machine with network: hf download {path} --local-dir DIR; then give DIR"
        ) from error


def hub_name(lineage: Mapping[str, Any]) -> str:
    """The name on the Hub of the model at the root of a run's ancestors, if the records of these
    are there and it was read from the Hub's cache; else ''."""
    with contextlib.suppress(UserError):
        while lineage.get("kind") == "run":
            lineage = run_record.read_run_json(lineage.get("path", ""))["start"]
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", lineage.get("path", ""))
    return f"{cached[1]}/{cached[2]}" if cached else ""


def on_hub(path: str) -> bool:
    """Whether it is the name of a model on the Hub, as it is not a place here."""
    place = as_path(path)
    return bool(_HUB_ID.fullmatch(path)) and not place.exists() and not place.parent.exists()


def split_step(path: str) -> tuple[str, int | None]:
    """('RUN', 400) of 'RUN@400'; (path, None) of other paths, and of a folder with such a name."""
    match = re.fullmatch(r"(.+)@(\d+)", path)
    if match is None or as_path(path).is_dir():
        return path, None
    return match[1], int(match[2])


def fresh_start(config: ConfigDict) -> Start:
    """A new model, to be initialised from `config.architecture` and `config.seed`."""
    if not config.architecture:
        raise UsageError(
            "nothing to start from: give --model=HF_DIR (to a study --config.model=HF_DIR), or set "
            "config.architecture and config.tokenizer to train from scratch"
        )
    if not config.tokenizer:
        raise UsageError(
            "without --model=HF_DIR a new model is trained, which needs a tokenizer: set "
            "--config.tokenizer=FOLDER"
        )
    return Start("", "fresh", fresh_architecture(config), config.tokenizer)


def fresh_architecture(config: ConfigDict) -> LlamaConfig:
    """`config.architecture`, fields of a Hugging Face config.json, as a LlamaConfig."""
    hf_config = {"model_type": "llama", **config.architecture.to_dict()}
    return LlamaConfig.from_hf(hf_config, "config.architecture")


def lora_config(section: Any) -> LoraConfig | None:
    """The `lora` section of a config as a LoraConfig; None for rank 0."""
    if not section["rank"]:
        return None
    return LoraConfig(section["rank"], float(section["alpha"]), section["targets"])


def abstract_params(model: Llama) -> Any:
    """The parameter tree's shapes and dtypes; nothing is computed."""
    shapes = hf.parameter_shapes(model.config, model.param_dtype, model.lora)
    return unflatten_dict(shapes, sep="/")


def load_params(
    start: Start, mesh: Mesh, dtype: Any, *, base_dtype: Any = None, merged: bool = True
) -> Any:
    """Loads the whole parameter tree onto the mesh, laid out by `parallel.rules`.

    `dtype` is that of the parameters; `base_dtype` that of the weights under the adapters, by
    default `dtype`. With `merged`, a LoRA run's adapters are added into the weights; else they stay
    leaves beside these.
    """
    if start.kind == "hf":
        if not start.base:
            return hf.load_params(start.path, start.config, mesh, dtype)
        lora, adapter = hf.load_peft(start.path, start.config, mesh, dtype)
        base = load_params(open_start(start.base), mesh, base_dtype or dtype)
        return merge(combine(adapter, base), lora)
    model = Llama(start.config, param_dtype=dtype, lora=start.lora)
    trainable, _ = split_trainable(abstract_on(mesh, abstract_params(model)), start.lora)
    folder = as_path(start.path, run_record.CHECKPOINT_FOLDER)
    assert start.step is not None  # of a run
    params = checkpoints.load_subtree(folder, start.step, "params", trainable)
    if start.lora is None:
        return params
    params = combine(params, load_params(open_base(start), mesh, base_dtype or dtype))
    return merge(params, start.lora) if merged else params


def warn_if_unfinished(start: Start) -> None:
    """A warning in the log if the model is of a run without the mark that training sets last."""
    total = start.record.get("total_steps")
    if start.kind == "run" and total and not start.record.get("finished"):
        newest = _saved_steps(start.path)[-1]
        logging.warning("%s: this run stopped at step %d of %d", start.path, newest, total)


def open_base(start: Start) -> Start:
    """The model under a LoRA run's adapters: its start, or the start's base if the run continued
    to train the start's adapters."""
    parent = open_start_of(start.record["start"], base=start.base)
    goes_on = start.record["config"]["lora"].get("continued") and parent.lora is not None
    return open_base(parent) if goes_on else parent


def open_start_of(lineage: Mapping[str, Any], *, tokenizer: str = "", base: str = "") -> Start:
    """The start that a run's record names; it must still exist, and be the same model.

    `lineage` is that of `Start.lineage`; `base` the new Hugging Face folder of the model itself, or
    of the model under its adapters; `tokenizer` as for `open_start`.
    """
    path = lineage["path"]
    if base and lineage["kind"] == "hf" and not as_path(path, "adapter_config.json").exists():
        path, base = base, ""
    start = open_start(path, lineage["step"], tokenizer=tokenizer, base=base)
    if start.record.get("run_id") != lineage.get("run_id"):
        raise UserError(
            f"{path} holds run {start.record.get('run_id')}, but this run was started "
            f"from run {lineage.get('run_id')}; put that run's folder back"
        )
    for key, folder in (("weights", start.path), ("base_weights", start.base)):
        if key in lineage and hf.weights_digest(folder) != lineage[key]:
            raise UserError(
                f"{folder} has other weights than those that this run was started from "
                f"({lineage[key]}); put these back, or name the folder that they are in now "
                "(--base of export_hf.py and evaluate.py)"
            )
    return start


def split_trainable(params: Any, lora: LoraConfig | None) -> tuple[Any, Any]:
    """(trainable, frozen) parameters: the adapters and the rest, or everything and nothing."""
    return (params, {}) if lora is None else split(params)


def check_continued(start: Start, lora: LoraConfig | None) -> None:
    """UsageError unless the start has adapters that fit `config.lora`, to continue training."""
    if lora is None or start.lora != lora:
        raise UsageError(
            f"config.lora.continued: the adapters of {start.path or 'fresh weights'} are "
            f"{start.lora or 'none'}; set config.lora's rank, alpha and targets to theirs, or "
            "continued=False to merge them"
        )


def load_trainable(
    model: Llama, start: Start, mesh: Mesh, seed: int, *, continued: bool = False
) -> tuple[Any, Any]:
    """The start's weights as (trainable, frozen); a new model is initialised from `seed`.

    Frozen weights are never updated, so they have the dtype of the computation. With `continued`
    the start's own adapters continue training, unmerged; see `check_continued`.
    """
    tokens = jnp.zeros((1, 8), jnp.int32)
    # A kernel or a mesh might refuse the one short row.
    plain = model.clone(attention="reference", mesh=None)

    def draw(key):
        return split_trainable(plain.init(key, tokens)["params"], model.lora)[0]

    # Only trainable parameters leave the jit, so with adapters the compiler drops the base's draws.
    shape, _ = split_trainable(abstract_params(model), model.lora)
    init = jax.jit(draw, out_shardings=shardings(mesh, shape))
    if start.kind == "fresh":
        if model.lora is not None:
            raise UsageError("config.lora.rank: a new model has no adapters; set it to 0")
        return init(jax.random.key(seed)), {}
    if model.lora is None:
        return load_params(start, mesh, model.param_dtype), {}
    if continued:
        params = load_params(start, mesh, model.param_dtype, base_dtype=model.dtype, merged=False)
        return split(params)
    return init(jax.random.key(seed)), load_params(start, mesh, model.dtype)


def copy_tokenizer(source: str | Path, destination: str | Path) -> None:
    """Saves a tokenizer (a folder or a hub name), so that a run can be read without its start."""
    with tempfile.TemporaryDirectory(prefix="sa_jax-") as folder:
        load_tokenizer(source).save_pretrained(folder)
        files = [*Path(folder).iterdir()]
        generation = as_path(source, "generation_config.json")  # a 'model' template's stop tokens
        copy_files(files + [generation] * generation.exists(), as_path(destination))
