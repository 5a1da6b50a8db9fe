"""The endpoint teacher against a scripted server: every way in which a server can fail."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sa_jax.errors import Preempted, UsageError, UserError
from sa_jax.teachers.config import default_config
from sa_jax.teachers.endpoint import EndpointTeacher
from sa_jax.teachers.replies import Reply, Request, ask, open_store
from tests.teachers.scripted import ScriptedServer, completion
from tests.zygote import free_port


def requests(n):
    return [
        Request("plain", ({"role": "user", "content": f"q{i}"},), {"prompt": f"q{i}"})
        for i in range(n)
    ]


def ok(prompt, wait_s=0.0):
    return 200, {}, completion(f"answer to {prompt}"), wait_s


def teacher_at(base_url, **settings):
    config = default_config()
    config.update({"model": "m", "base_url": base_url, **settings})
    return EndpointTeacher(config)


def teacher(server, **settings):
    given = {"concurrency": 4, "retries": 3, "timeout_s": 20.0, **settings}
    return teacher_at(server.base_url, **given)


def answers(n):
    return [Reply(f"answer to q{i}") for i in range(n)]


def test_order_is_kept_whatever_order_the_replies_come_in(tmp_path):
    with ScriptedServer(lambda prompt, nth: ok(prompt, 0.2 if prompt == "q0" else 0)) as server:
        with open_store(tmp_path / "replies.jsonl") as store:
            settings = dict(max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3)
            assert ask(teacher(server, **settings), requests(8), store) == answers(8)
        assert sorted(server.asked) == [f"q{i}" for i in range(8)]
        body = server.bodies[0]
        assert {
            "max_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 3,
        }.items() <= body.items()
        assert body["model"] == "m" and body["messages"][0]["role"] == "user"


FAULTS = {
    "429 that names its wait": (429, {"retry-after": "0.3"}, b'{"error": {"message": "slow"}}', 0),
    "429": (429, {}, b'{"error": {"message": "slow"}}', 0),
    "500": (500, {}, b"boom", 0),
    "503": (503, {}, b'{"error": "starting"}', 0),
    "slow": (200, {}, completion("too late"), 4.0),
    "half a JSON": (200, {}, b'{"choices": [{"mess', 0),
    "no choices": (200, {}, b'{"choices": []}', 0),
    "not an object": (200, {}, b"[1, 2]", 0),
    "a page": (200, {"content-type": "text/html"}, b"<html>busy</html>", 0),
    "a number": (200, {}, completion(7), 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_costs_a_further_try_of_that_request_alone(tmp_path, fault):
    def script(prompt, nth):
        return FAULTS[fault] if prompt == "q2" and nth == 0 else ok(prompt)

    with ScriptedServer(script) as server, open_store(tmp_path / "replies.jsonl") as store:
        asking = teacher(server, timeout_s=2 if fault == "slow" else 20)
        assert ask(asking, requests(5), store) == answers(5)
        assert sorted(server.asked) == ["q0", "q1", "q2", "q2", "q3", "q4"]
        if fault == "429 that names its wait":
            first, second = (at for at, p in zip(server.at, server.asked, strict=True) if p == "q2")
            assert second - first >= 0.3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("500", r"/v1 failed on one .*: gave up after 2 tries: .*boom.*run the same command again"),
        ("half a JSON", "gave up after 2 tries: malformed reply"),
        ("503", r"/v1: gave up after 2 tries: .*starting.*run the same command again"),
        ("slow", "gave up after 2 tries: no reply within 0.5 s"),
    ],
)
def test_a_fault_that_stays_ends_the_run_and_keeps_what_was_paid_for(tmp_path, fault, words):
    def script(prompt, nth):
        return FAULTS[fault] if prompt >= "q3" else ok(prompt)

    path = tmp_path / "replies.jsonl"
    with ScriptedServer(script) as server:
        asking = teacher(server, retries=1, timeout_s=0.5, concurrency=1)
        with open_store(path) as store, pytest.raises(UserError, match=words):
            ask(asking, requests(6), store)
        assert "q5" not in server.asked
    with ScriptedServer(lambda prompt, nth: ok(prompt)) as server, open_store(path) as store:
        assert ask(teacher(server), requests(5), store) == answers(5)
        assert sorted(server.asked) == ["q3", "q4"]


@pytest.mark.parametrize("fault", ["500", "a number", "half a JSON"])
def test_a_question_on_which_the_server_always_fails_is_dropped(tmp_path, fault):
    def script(prompt, nth):
        return FAULTS[fault] if prompt in ("q2", "q5") else ok(prompt)

    with ScriptedServer(script) as server, open_store(tmp_path / "r.jsonl") as store:
        replies = ask(teacher(server, retries=1, concurrency=1), requests(8), store)
        assert len(store) == 6  # the two may be asked for again
    assert [reply.finish_reason for reply in replies if reply not in answers(8)] == ["failed"] * 2


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (404, b'{"error": {"message": "no such model"}}', r"does not serve the model 'x'.*has m"),
        (400, b'{"detail": "pinned to m; requested x"}', r"does not serve the model 'x'"),
        (401, b'{"error": {"message": "bad key"}}', "refuses the key in OPENAI_API_KEY: .*bad key"),
        (
            429,
            b'{"error": {"message": "pay first", "code": "insufficient_quota"}}',
            "pay first",
        ),
    ],
)
def test_what_cannot_pass_is_asked_once(tmp_path, status, body, words):
    with ScriptedServer(lambda prompt, nth: (status, {}, body, 0)) as server:
        with open_store(tmp_path / "r.jsonl") as store, pytest.raises(UserError, match=words):
            ask(teacher(server, model="x", concurrency=1), requests(3), store)
        assert server.asked == ["q0"]


def message(text, **fields):
    return json.dumps({"error": {"message": text, **fields}}).encode()


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (
            402,
            message("top up your balance"),
            "has no credit: .*top up.*run the same command again",
        ),
        (400, message("API key not valid. Please pass a valid one."), "8 questions in a row"),
        (403, message("not for your region"), "refused 8 questions in a row, .*your region"),
    ],
)
def test_an_endpoint_at_fault_ends_the_run_and_keeps_what_was_paid_for(
    tmp_path, status, body, words
):
    def script(prompt, nth):
        if int(prompt[1:]) < 3:
            return ok(prompt)
        until = time.monotonic() + 20
        while len(store) < 3 and time.monotonic() < until:  # a success would start a new row
            time.sleep(0.01)
        return status, {}, body, 0

    path = tmp_path / "r.jsonl"
    with ScriptedServer(script) as server, open_store(path) as store:
        with pytest.raises(UserError, match=words):
            ask(teacher(server), requests(40), store)
        # Of 4 at once, 3 may be under way when the eighth is refused.
        assert len(server.asked) <= 3 + 8 + 3
        assert len(store) == 3


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (403, message('your input was flagged for "violence"')),
        (403, message("blocked by a guardrail")),
        (400, message("This model's maximum context length is 8 tokens; max_tokens is 7")),
        (413, b"request entity too large"),
    ],
)
def test_a_row_at_fault_is_dropped_and_the_others_go_on(tmp_path, status, body):
    def script(prompt, nth):
        return (status, {}, body, 0) if int(prompt[1:]) % 3 == 1 else ok(prompt)

    with ScriptedServer(script) as server, open_store(tmp_path / "r.jsonl") as store:
        replies = ask(teacher(server, concurrency=1), requests(30), store)
    assert [reply.finish_reason == "rejected" for reply in replies] == [False, True, False] * 10


def test_the_command_drops_a_row_at_fault_and_stops_at_an_endpoint_at_fault(zygote, tmp_path):
    rows = [{"prompt": f"q{i}"} for i in range(40)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pays = False

    def script(prompt, nth):
        if prompt == "q2":
            return 403, {}, message("your input was flagged"), 0
        return ok(prompt) if pays or int(prompt[1:]) < 5 else (402, {}, message("no credit"), 0)

    with ScriptedServer(script) as server:
        command = (
            *("scripts/generate_data.py", "--task=hhh", f"--prompts={tmp_path}/q.jsonl"),
            *(f"--out={tmp_path}/out", "--model=m", f"--base_url={server.base_url}"),
            "--config.concurrency=2",
        )
        done = zygote.run(*command)
        assert done.returncode == 1 and "has no credit" in done.stderr.splitlines()[-1]
        assert len(server.asked) <= 7
        kept = (tmp_path / "out/replies.jsonl").read_text().splitlines()
        assert {json.loads(line)["prompt"] for line in kept} == {"q0", "q1", "q3", "q4"}
        pays = True
        done = zygote.run(*command)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len((tmp_path / "out/hhh.jsonl").read_text().splitlines()) == 39
    assert "rejected" in (tmp_path / "out/card.md").read_text()


@pytest.mark.parametrize(
    ("status", "body", "remedy"),
    [
        (
            400,
            message("'max_tokens' is not supported. Use 'max_completion_tokens' instead."),
            "--config.max_tokens_field=max_completion_tokens",
        ),
        (400, message("Unsupported value", param="temperature"), "--config.omit=top_p,temperature"),
        (422, b'{"detail": [{"loc": ["body", "seed"], "type": "extra_forbidden"}]}', "=top_p,seed"),
        (400, message("max_tokens is too large: 1024"), "(1024).* a lower --config.max_new_tokens"),
    ],
)
def test_a_field_that_the_model_does_not_take_is_answered_with_the_flag(
    tmp_path, status, body, remedy
):
    with ScriptedServer(lambda prompt, nth: (status, {}, body, 0)) as server:
        with open_store(tmp_path / "r.jsonl") as store, pytest.raises(UsageError, match=remedy):
            ask(teacher(server, concurrency=1, omit="top_p"), requests(9), store)
        assert server.asked == ["q0"]


def test_the_fields_of_a_request_are_chosen(tmp_path):
    with ScriptedServer(lambda prompt, nth: ok(prompt)) as server:
        chosen = teacher(server, omit="seed,top_p", max_tokens_field="max_completion_tokens")
        with open_store(tmp_path / "r.jsonl") as store:
            ask(chosen, requests(1), store)
    sent = {"max_completion_tokens", "temperature", "model", "messages"}
    assert server.bodies[0].keys() == sent
    assert "seed" not in chosen.identity()


def with_message(**fields):
    body = json.loads(completion(None))
    body["choices"][0]["message"] |= fields
    return 200, {}, json.dumps(body).encode(), 0


def test_answers_in_parts_and_reasoning_apart(tmp_path):
    parts = [{"type": "text", "text": "Four"}, {"type": "text", "text": "."}]
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "2 + 2"}]}
    replies = {
        "q0": with_message(content=parts),
        "q1": with_message(content=[thought, *parts]),
        "q2": with_message(content="Four.", reasoning_content="2 + 2"),
        "q3": with_message(content=None, reasoning="2 + 2"),
        "q4": with_message(content=["Four", "."]),
        "q5": with_message(content={"type": "text", "text": "Four."}),
        "q6": with_message(content=None, refusal="I can't."),
        "q7": (200, {}, message("this was flagged"), 0),
    }
    path = tmp_path / "r.jsonl"
    with ScriptedServer(lambda prompt, nth: replies[prompt]) as server, open_store(path) as store:
        assert ask(teacher(server), requests(8), store) == [
            Reply("Four."),
            Reply("Four.", reasoning="2 + 2"),
            Reply("Four.", reasoning="2 + 2"),
            Reply("", reasoning="2 + 2"),
            Reply("Four."),
            Reply("Four."),
            Reply("I can't."),
            Reply("{'message': 'this was flagged'}", "rejected"),
        ]
    assert path.read_text().count('"reasoning": "2 + 2"') == 3


def test_a_date_to_wait_for(tmp_path):
    date = "Wed, 21 Oct 2015 07:28:00 GMT"

    def script(prompt, nth):
        return (429, {"retry-after": date}, message("slow"), 0) if nth == 0 else ok(prompt)

    with ScriptedServer(script) as server, open_store(tmp_path / "r.jsonl") as store:
        assert ask(teacher(server), requests(1), store) == answers(1)
    assert server.at[1] - server.at[0] < 0.35  # at once: without the date it is 0.375 s or more


def test_an_address_without_v1(tmp_path):
    with ScriptedServer(lambda prompt, nth: (404, {}, b'{"detail": "Not Found"}', 0)) as server:
        url = server.base_url.removesuffix("/v1")
        for given in (url, f"{url}/v1/chat/completions"):
            asking = teacher_at(given)
            with open_store(tmp_path / "r.jsonl") as store:
                with pytest.raises(UserError, match=rf"ends in /v1 \({url}/v1\)"):
                    ask(asking, requests(2), store)


def test_an_endpoint_that_only_streams(tmp_path):
    body = b'data: {"choices": [{"delta": {"content": "Four"}}]}\n\ndata: [DONE]\n\n'
    headers = {"content-type": "text/event-stream"}
    with ScriptedServer(lambda prompt, nth: (200, headers, body, 0)) as server:
        with open_store(tmp_path / "r.jsonl") as store:
            with pytest.raises(UserError, match="/v1 sends its replies as a stream") as error:
                ask(teacher(server, concurrency=1), requests(2), store)
        assert server.asked == ["q0"] and "end in /v1" not in str(error.value)


def test_nobody_listens(tmp_path):
    url = f"http://127.0.0.1:{free_port()}/v1"
    asking = teacher_at(url, retries=1)
    with open_store(tmp_path / "r.jsonl") as store:
        with pytest.raises(UserError, match=f"{url}: gave up after 2 tries: no connection"):
            ask(asking, requests(2), store)


def test_empty_cut_off_and_rejected_replies(tmp_path):
    replies = {
        "q0": (200, {}, completion(None), 0),
        "q1": (200, {}, completion("", "stop"), 0),
        "q2": (200, {}, completion("half", "length"), 0),
        "q3": (200, {}, completion("", "content_filter"), 0),
        "q5": (200, {}, completion("x").replace(b'"x"', b'"\\ud83d!"'), 0),
        "q4": (400, {}, b'{"error": {"message": "longer than the context"}}', 0),
    }
    path = tmp_path / "r.jsonl"
    with ScriptedServer(lambda prompt, nth: replies[prompt]) as server, open_store(path) as store:
        assert ask(teacher(server), requests(6), store) == [
            Reply(""),
            Reply(""),
            Reply("half", "length"),
            Reply("", "content_filter"),
            Reply('400 {"error": {"message": "longer than the context"}}', "rejected"),
            Reply("?!"),
        ]
    with open_store(path) as store:
        assert len(store) == 5  # what was rejected cost nothing and may be asked for again


def test_requests_per_minute(tmp_path):
    with ScriptedServer(lambda prompt, nth: ok(prompt)) as server:
        with open_store(tmp_path / "r.jsonl") as store:
            asked = teacher(server, requests_per_minute=1200)
            start = time.monotonic()
            ask(asked, requests(9), store)
        assert server.at[-1] - start >= 8 * 0.05


def test_stopped_in_the_middle_pays_for_nothing_twice(tmp_path):
    path = tmp_path / "replies.jsonl"
    with ScriptedServer(lambda prompt, nth: ok(prompt, 0.05)) as server:
        for until in (7, 15):
            with open_store(path) as store, pytest.raises(Preempted, match="are missing"):
                ask(teacher(server), requests(30), store, lambda: len(server.paid) >= until)  # noqa: B023
        with open_store(path) as store:
            assert 15 <= len(store) < 30
            assert ask(teacher(server), requests(30), store) == answers(30)
        assert sorted(server.paid) == sorted(server.asked) == sorted(f"q{i}" for i in range(30))


def test_equal_requests_are_asked_once_and_other_settings_again(tmp_path):
    with ScriptedServer(lambda prompt, nth: ok(prompt)) as server:
        with open_store(tmp_path / "r.jsonl") as store:
            twice = [*requests(2), *requests(2)]
            assert ask(teacher(server), twice, store) == [*answers(2), *answers(2)]
            assert len(server.asked) == 2
            ask(teacher(server), requests(2), store)
            assert len(server.asked) == 2
            ask(teacher(server, temperature=0.1), requests(2), store)
            assert len(server.asked) == 4


def test_a_store_that_was_cut_off_or_damaged_or_is_in_use(tmp_path):
    path = tmp_path / "replies.jsonl"
    with ScriptedServer(lambda prompt, nth: ok(prompt)) as server:
        with open_store(path) as store:
            ask(teacher(server, concurrency=1), requests(3), store)
            with pytest.raises(UserError, match="another process is writing it"):
                open_store(path)
        path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote the last line
        with open_store(path) as store:
            assert len(store) == 2
            assert ask(teacher(server), requests(3), store) == answers(3)
        assert server.asked == ["q0", "q1", "q2", "q2"]
    assert [json.loads(line)["prompt"] for line in path.read_text().splitlines()] == server.asked[
        :3
    ]
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(UserError, match=r"replies.jsonl:1: not an object with key, text, fin"):
        open_store(path)


def test_settings_without_sense():
    with pytest.raises(UsageError, match="--model and --base_url"):
        teacher_at("http://x/v1", model="")
    with pytest.raises(UsageError, match="--model and --base_url"):
        teacher_at("localhost:8000/v1")
    with pytest.raises(UsageError, match="retries=-1"):
        teacher_at("http://x/v1", retries=-1)
    with pytest.raises(UsageError, match="concurrency=0"):
        teacher_at("http://x/v1", concurrency=0)
    with pytest.raises(UsageError, match="max_tokens_field='tokens': use max_"):
        teacher_at("http://x/v1", max_tokens_field="tokens")
    with pytest.raises(UsageError, match="omit='seed,model': it can hold"):
        teacher_at("http://x/v1", omit="seed,model")


def test_killed_processes_of_the_command_pay_for_nothing_that_came_twice(zygote, tmp_path):
    """SIGTERM: what is under way comes in first, so nothing at all is asked twice. SIGKILL: what is
    under way, at most `concurrency` requests, was never received and is asked again."""
    rows = [{"prompt": f"question {i}"} for i in range(40)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ScriptedServer(lambda prompt, nth: ok(prompt, 0.1)) as server:
        command = (
            "scripts/generate_data.py",
            "--task=hhh",
            f"--prompts={tmp_path}/q.jsonl",
            f"--out={tmp_path}/out",
            "--model=m",
            f"--base_url={server.base_url}",
            "--config.concurrency=3",
        )
        process = zygote.start(*command).wait_for(lambda: len(server.paid) >= 8)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait().returncode == 75 and "are missing" in process.stderr
        assert sorted(server.asked) == sorted(server.paid) and len(set(server.asked)) < 40
        process = zygote.start(*command).wait_for(lambda: len(server.paid) >= 20)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert zygote.run(*command).returncode == 0
    replies = [json.loads(line) for line in open(tmp_path / "out/replies.jsonl")]
    assert len(replies) == len({reply["key"] for reply in replies}) == 40
    assert len(server.asked) <= 40 + 3
    made = [json.loads(line) for line in open(tmp_path / "out/hhh.jsonl")]
    assert [row["prompt"] for row in made] == [row["prompt"] for row in rows]
    assert [row["response"] for row in made] == [f"answer to {row['prompt']}" for row in rows]


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        ("stop", "stop"),
        ("eos_token", "stop"),
        (None, "stop"),
        ("model_length", "length"),
        ("MAX_TOKENS", "length"),
        ("SAFETY", "content_filter"),
        ("content_filter: RECITATION", "content_filter"),
        ("abort", "failed"),
        ("insufficient_system_resource", "failed"),
    ],
)
def test_what_servers_call_the_end_of_an_answer(tmp_path, reason, kept):
    def script(prompt, nth):
        return 200, {}, completion("The three causes were first,", reason), 0

    with ScriptedServer(script) as server, open_store(tmp_path / "r.jsonl") as store:
        (reply,) = ask(teacher(server, retries=0), requests(1), store)
        assert reply.finish_reason == kept
        assert len(store) == (kept != "failed")


def test_an_answer_that_the_server_cut_off_is_asked_for_again(tmp_path):
    def script(prompt, nth):
        return (200, {}, completion("half", "abort"), 0) if nth == 0 else ok(prompt)

    with ScriptedServer(script) as server, open_store(tmp_path / "r.jsonl") as store:
        assert ask(teacher(server), requests(2), store) == answers(2)


@pytest.mark.parametrize("status", [504, 524, 200])
def test_a_question_that_takes_too_long_every_time_is_dropped(tmp_path, status):
    def script(prompt, nth):
        return (status, {}, b"too long", 2.0) if prompt == "q2" else ok(prompt)

    with ScriptedServer(script) as server, open_store(tmp_path / "r.jsonl") as store:
        settings = {"retries": 1, "concurrency": 1, "timeout_s": 0.3 if status == 200 else 20}
        replies = ask(teacher(server, **settings), requests(6), store)
    assert [reply.finish_reason for reply in replies] == ["stop"] * 2 + ["failed"] + ["stop"] * 3


def test_a_relay_that_names_the_model_in_every_message_refuses_one_question(tmp_path):
    said = message(
        "litellm.BadRequestError: OpenAIException. Received Model Group=m\nFallbacks=None"
    )

    def script(prompt, nth):
        return (400, {}, said, 0) if prompt == "q2" else ok(prompt)

    with ScriptedServer(script) as server, open_store(tmp_path / "r.jsonl") as store:
        replies = ask(teacher(server, concurrency=1), requests(5), store)
    assert [reply.finish_reason for reply in replies].count("rejected") == 1


def test_keys_as_files_and_shells_leave_them(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-secret\n")
    with ScriptedServer(lambda prompt, nth: ok(prompt)) as server:
        with open_store(tmp_path / "r.jsonl") as store:
            assert ask(teacher(server, retries=0), requests(2), store) == answers(2)
    for key in ("sk-\u201csecret\u201d", "sk-a\nsk-secret"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UsageError, match="OPENAI_API_KEY") as error:
            teacher_at("http://x/v1")
        assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("proxy", "url"),
    [
        ("socks://127.0.0.1:1080/", "http://x/v1"),
        ("", "http://x:port/v1"),
        ("", "http://::1:8000/v1"),
    ],
)
def test_addresses_and_proxies_that_cannot_be(monkeypatch, proxy, url):
    monkeypatch.setenv("ALL_PROXY", proxy)
    with pytest.raises(UsageError, match="--base_url=.* cannot be used"):
        teacher_at(url)


def test_an_endpoint_leaves_the_accelerators_to_its_server(tmp_path):
    """It may run on this machine: no device is opened."""
    (tmp_path / "q.jsonl").write_text('{"prompt": "q0"}\n')
    with ScriptedServer(lambda prompt, nth: ok(prompt)) as server:
        done = subprocess.run(
            [
                *(sys.executable, "scripts/generate_data.py", "--task=hhh", "--model=m"),
                *(f"--prompts={tmp_path}/q.jsonl", f"--out={tmp_path}/out"),
                f"--base_url={server.base_url}",
            ],
            env={**os.environ, "JAX_PLATFORMS": "none_such"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-2000:]
