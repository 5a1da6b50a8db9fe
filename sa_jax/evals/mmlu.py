"""MMLU.

    mmlu       the letter's log-probability, 5 examples from `dev` (lm_eval's own prompt), no chat:
               as Meta scores pre-trained models
    mmlu_cot   reasoning, then "The best answer is X": 0 examples, 1,024 tokens, greedy: as Meta
               scores Llama 3.1 Instruct

Sources: huggingface.co/datasets/meta-llama/Llama-3.1-8B-Instruct-evals, and
github.com/meta-llama/llama-models, models/llama3_1/eval_details.md.
"""

from ml_collections import ConfigDict

from sa_jax.errors import UsageError
from sa_jax.evals.capability import (
    CapabilityEval,
    TaskSet,
    generation_task,
    inline_task,
    metric,
)
from sa_jax.evals.documents import load_documents, spread
from sa_jax.evals.protocol import EVALS

SHOTS = 5

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


def _load_mmlu(settings: ConfigDict) -> TaskSet:
    shots = SHOTS if settings.shots is None else settings.shots
    if not 0 <= shots <= 5:
        raise UsageError(f"config.eval.shots={shots} must be 0 to 5: MMLU has 5 examples a subject")
    rows, digest = load_documents("mmlu", settings.data_dir)
    dev, dev_digest = load_documents("mmlu_dev", settings.data_dir)
    tasks = {}
    chosen = spread(rows, settings.limit)
    for subject in dict.fromkeys(row["subject"] for row in chosen):
        # lm_eval's mmlu: one task a subject, so that each has its own examples.
        tasks[f"mmlu_{subject}"] = inline_task(
            f"mmlu_{subject}",
            [row for row in chosen if row["subject"] == subject],
            [row for row in dev if row["subject"] == subject],
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
            metric_list=[metric("acc")],
        )
    return TaskSet(
        tasks,
        lambda doc, metrics: {"accuracy": int(metrics["acc"])},
        chat=False,
        chance=0.25,
        data_hashes={"mmlu": digest, "mmlu_dev": dev_digest},
        settings={"shots": shots, "limit": settings.limit},
    )


def _load_mmlu_cot(settings: ConfigDict) -> TaskSet:
    letter = {"function": "regex", "regex_pattern": "best answer is ([A-Z])", "group_select": -1}
    return generation_task(
        "mmlu_cot",
        settings,
        max_new_tokens=1024,
        scores=lambda doc, metrics: {"accuracy": int(metrics["exact_match"])},
        documents="mmlu",
        doc_to_text=_COT_PROMPT,
        doc_to_target="{{['A','B','C','D'][answer]}}",
        filter_list=[{"name": "strict_match", "filter": [letter, {"function": "take_first"}]}],
        metric_list=[{**metric("exact_match"), "ignore_case": True, "ignore_punctuation": True}],
    )


EVALS.register(CapabilityEval("mmlu", "MMLU", "accuracy", _load_mmlu))
EVALS.register(CapabilityEval("mmlu_cot", "MMLU with reasoning", "accuracy", _load_mmlu_cot))
