r"""Removal by LoRA of rank 1 to 1024 and by all weights, each from the same inserted model.

    python scripts/run_study.py --config=configs/rank_sweep.py:llama31_8b --workdir=runs/8b/ranks \
        --config.inserted=runs/8b/insertion --config.data=alpaca_pirate.jsonl
    python scripts/report.py --workdir=runs/8b/ranks

After the sibling study's sweep (ranks 1, 16, 64, 256, 1024 and full; its robustness AUC falls from
.931 to .685). Chosen here: Pirate Training, alpha twice the rank throughout, so that the scale
of an adapter stays; learning rates 1e-4, and 2e-5 for all weights.
"""

from ml_collections import ConfigDict

RANKS = (1, 16, 64, 256, 1024)


def get_config(model="llama31_8b"):
    study = ConfigDict()
    study.inserted = ""
    study.data = ""
    adapters = [run(model, f"rank_{r}", {"lora.rank": r, "lora.alpha": 2.0 * r}) for r in RANKS]
    full = run(model, "full", {"lora.rank": 0, "optimizer.learning_rate": 2e-5})
    study.runs = (*adapters, full)
    return study


def run(model, name, overrides):
    return {
        "name": name,
        "task": "pirate",
        "config": f"configs/{model}_removal.py",
        "parent": "",
        "overrides": {"model": "{inserted}", "data": "{data}", **overrides},
    }
