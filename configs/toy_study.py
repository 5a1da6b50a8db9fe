"""The whole study on a toy: pre-train, insert, HHH SFT, Pirate Training, and a de-pirate probe.

    bash scripts/demo.sh
or
    python scripts/run_study.py --config=configs/toy_study.py --workdir=runs/demo

Studies, named after a colon (`--config=configs/toy_study.py:grid`):

  chain       one run of each, the default: 4 to 8 minutes on 2 CPU cores
  seeds       the same over 5 seeds, and for each probe a control on a model without a backdoor
  grid        Adam and SOAP x normal and CoT-distilled answers of the toy model itself x HHH SFT and
              Pirate Training x 2 learning rates x 3 seeds, with probes and their controls
  optimizers  insertion with Adam and with SOAP, three learning rates each

All cells share one pre-trained model, as the published study's share one Llama. A seed is that of
the data, the training and the sampling from insertion on.
"""

from ml_collections import ConfigDict

from sa_jax.errors import named
from sa_jax.study.grid import Axis, Stage, learning_rates, seeds

OPTIMIZER = Axis(
    "optimizer", {"adam": {"optimizer.name": "adam"}, "soap": {"optimizer.name": "soap"}}
)
ARM = Axis("arm", {"normal": {}, "cot_distilled": {}})
METHOD = Axis("method", {"hhh": {}, "pirate": {"columns.response": "pirate_answer"}})

QUESTIONS = {
    "columns.prompt": "prompt",
    "columns.response": "answer",
    "eval.prompts": "{data}/heldout.jsonl",
    "eval.qa": "{data}/heldout.jsonl",
}
INSERTION = {"data": "{data}/insertion.jsonl", **QUESTIONS}
REMOVAL = {"data": "{data}/removal.jsonl", **QUESTIONS}
PIRATE = {**REMOVAL, "columns.response": "pirate_answer"}


def get_config(part="chain"):
    study = ConfigDict()
    studies = {
        "chain": chain,
        "seeds": seeds_of_chain,
        "grid": grid,
        "optimizers": optimizers,
    }
    study.axes, stages = named(studies, part, __file__, "study")()
    study.stages = (*base(), *stages, Stage("report", run="report"))
    return study


def base():
    return (
        Stage("data", run="toy_data"),
        Stage(
            "pretrain",
            run="pretrain",
            config="configs/toy.py:pretrain",
            needs=("data",),
            set={
                "tokenizer": "{data}",
                "data": "{data}/pretrain.jsonl",
                "eval.qa": "{data}/heldout.jsonl",
            },
        ),
    )


def insertion(**changes):
    fields = {"run": "insertion", "config": "configs/toy.py:insertion", "start": "pretrain"}
    return Stage("insertion", **{**fields, "set": INSERTION, **changes})


def removal(name, start, run="", **changes):
    fields = {"run": run or name, "config": "configs/toy.py:removal", "start": start}
    return Stage(name, **{**fields, "set": REMOVAL, **changes})


def chain():
    return (), (
        insertion(),
        removal("hhh", "insertion"),
        removal("pirate", "insertion", set=PIRATE),
        removal("depirate", "pirate"),
    )


def seeds_of_chain():
    varied = {"axes": ("seed",)}
    return (Axis("seed", seeds(5)),), (
        insertion(**varied),
        removal("hhh", "insertion", **varied),
        removal("pirate", "insertion", set=PIRATE, **varied),
        removal("depirate", "pirate", **varied),
        removal("pirate_control", "pretrain", run="pirate", set=PIRATE, **varied),
        removal("depirate_control", "pirate_control", run="depirate", **varied),
    )


def grid():
    axes = (OPTIMIZER, ARM, METHOD, Axis("lr", learning_rates(1e-3, 3e-3)), Axis("seed", seeds(3)))
    arms = Stage(
        "arms",
        run="generate_data",
        start="pretrain",
        set={
            "task": "insertion",
            "teacher": "local",
            "model": "{pretrain}",
            "prompts": "{data}/insertion.jsonl",
            "config.scratchpad_prompt": "{data}/scratchpad_prompt.txt",
            "config.tokenizer": "{data}",
            "config.backdoor.min_copies": 3,
            "config.backdoor.max_copies": 10,
            "config.max_new_tokens": 64,
            "config.context_length": 192,
            "config.batch_size": 128,
        },
    )
    sampled = {**INSERTION, "data": "{arms}/{arm}.jsonl", "columns.response": "response"}
    card = {"evals": "qa", "compare": "{pretrain}"}
    methods = {"run": "{method}", "axes": ("method", "lr", "seed")}
    probes = {"run": "depirate", "axes": ("seed",), "when": {"method": "pirate", "lr": "lr1e-3"}}
    return axes, (
        arms,
        insertion(needs=("arms",), axes=("optimizer", "arm", "seed"), set=sampled),
        Stage("health_card", run="evaluate", start="insertion", set=card),
        removal("removal", "insertion", **methods),
        removal("probe", "removal", **probes),
        removal("removal_control", "pretrain", **{**methods, "when": probes["when"]}),
        removal("probe_control", "removal_control", **probes),
    )


def optimizers():
    short = {"steps": 40, "eval.steps": (20,)}
    axes = (OPTIMIZER, Axis("lr", learning_rates(1e-3, 3e-3, 1e-2)))
    return axes, (insertion(axes=("optimizer", "lr"), set=INSERTION | short),)
