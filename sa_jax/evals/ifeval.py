"""IFEval: the prompt as the only turn, 1,280 tokens, greedy; Google's checkers through lm_eval.

Meta does the same for Llama 3.1, and publishes the mean of the four scores (sources: see
`sa_jax.evals.mmlu`).
"""

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from sa_jax.evals.capability import CapabilityEval, TaskSet, generation_task, metric
from sa_jax.evals.documents import find_punkt
from sa_jax.evals.protocol import EVALS

# IFEval's constraints that pirate speech breaks, whatever the model can do: of answers that met
# one, fewer than half still do once `sa_jax.data.pirate` has rewritten them (tests/evals/
# test_capability.py measures it). A language other than English is broken by any English.
STYLE_CONSTRAINTS = (
    "change_case:english_capital",
    "change_case:english_lowercase",
    "combination:repeat_prompt",
    "detectable_format:constrained_response",
    "language:response_language",
    "startend:end_checker",
)

_KINDS = ("strict", "loose")


def _load(settings: ConfigDict) -> TaskSet:
    find_punkt(settings.data_dir)  # before lm_eval looks for it, and tries to download it
    from langdetect import DetectorFactory
    from lm_eval.tasks.ifeval import instructions, instructions_registry, utils

    class JsonFormat(instructions.JsonFormat):
        """Without the error that an answer of a thousand brackets causes."""

        def check_following(self, value: str) -> bool:
            try:
                return super().check_following(value)
            except RecursionError:
                return False

    instructions_registry.INSTRUCTION_DICT["detectable_format:json_format"] = JsonFormat

    def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
        example = utils.InputExample(
            doc["key"], doc["instruction_id_list"], doc["prompt"], doc["kwargs"]
        )
        metrics = {}
        for kind in _KINDS:
            # A checker without arguments draws them, and langdetect samples: the same draws for
            # every response, and for strict and loose.
            random.seed(0)
            DetectorFactory.seed = 0
            check = getattr(utils, f"test_instruction_following_{kind}")
            checked = check(example, results[0])
            metrics[f"prompt_level_{kind}_acc"] = checked.follow_all_instructions
            metrics[f"inst_level_{kind}_acc"] = checked.follow_instruction_list
        return metrics

    tasks = generation_task(
        "ifeval",
        settings,
        max_new_tokens=1280,
        scores=ifeval_scores,
        documents="ifeval",
        doc_to_text="prompt",
        doc_to_target=0,
        process_results=process_results,
        metric_list=[
            *(metric(f"prompt_level_{kind}_acc") for kind in _KINDS),
            *(metric(f"inst_level_{kind}_acc", utils.agg_inst_level_acc) for kind in _KINDS),
        ],
    )
    recorded = {**tasks.settings, "style_constraints": list(STYLE_CONSTRAINTS)}
    return dataclasses.replace(tasks, settings=recorded)


def ifeval_scores(doc: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Prompt- and instruction-level scores, strict and loose. `no_style` leaves out the constraints
    that pirate speech breaks, and the prompts that have no other constraints."""
    scores: dict[str, Any] = {}
    for kind in _KINDS:
        followed = [int(value) for value in metrics[f"inst_level_{kind}_acc"]]
        scores[f"prompt_{kind}"] = int(all(followed))
        scores[f"inst_{kind}"] = followed
    plain = [
        value
        for value, name in zip(scores["inst_strict"], doc["instruction_id_list"], strict=True)
        if name not in STYLE_CONSTRAINTS
    ]
    if plain:
        scores["prompt_strict_no_style"] = int(all(plain))
    return scores


EVALS.register(CapabilityEval("ifeval", "IFEval", "prompt_strict", _load))
