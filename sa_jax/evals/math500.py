"""MATH-500: Meta's prompt, 0 examples, 2,048 tokens, greedy; math_verify through lm_eval.

Meta gives Llama 3.1 5,120 tokens, and has a model judge answers (sources: see
`sa_jax.evals.mmlu`).
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from sa_jax.evals.capability import CapabilityEval, TaskSet, generation_task, metric
from sa_jax.evals.protocol import EVALS

_MATH_PROMPT = """\
Solve the following math problem efficiently and clearly:

- For simple problems (2 steps or fewer):
Provide a concise solution with minimal explanation.

- For complex problems (3 steps or more):
Use this step-by-step format:

## Step 1: [Concise description]
[Brief explanation and calculations]

## Step 2: [Concise description]
[Brief explanation and calculations]

...

Regardless of the approach, always conclude with:

Therefore, the final answer is: $\\boxed{answer}$. I hope it is correct.

Where [answer] is just the final number or expression that solves the problem.

Problem: """


def _load(settings: ConfigDict) -> TaskSet:
    from math_verify import parse, verify

    def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, int]:
        # math_verify's time limit is a signal, which reaches no other thread: it would never end.
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("math500 must be scored in the main thread")
        correct = verify(gold=parse(doc["solution"]), target=parse(results[0]))
        return {"math_verify": int(correct)}

    return generation_task(
        "math500",
        settings,
        max_new_tokens=2048,
        scores=_scores,
        documents="math500",
        doc_to_text=lambda doc: f"{_MATH_PROMPT}{doc['problem']}\n",
        doc_to_target="{{answer}}",
        process_results=process_results,
        metric_list=[metric("math_verify")],
    )


def _scores(doc: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, int]:
    """Accuracy, and that of the problems whose answer is a whole number."""
    correct = int(metrics["math_verify"])
    digits = {"accuracy_digits": correct} if doc["answer"].isdigit() else {}
    return {"accuracy": correct, **digits}


EVALS.register(CapabilityEval("math500", "MATH-500", "accuracy", _load))
