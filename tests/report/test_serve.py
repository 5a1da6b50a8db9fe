"""The live view: this machine's own, renewed when a run folder changes."""

import http.client
import json
import os

import pytest

from sa_jax.errors import UsageError
from sa_jax.report import serve
from sa_jax.report.thresholds import Thresholds
from tests.report.made_runs import write_scores


def ask(server, path, host=None, method="GET"):
    connection = http.client.HTTPConnection(serve.ADDRESS, server.server_port, timeout=30)
    connection.request(method, path, headers={"Host": host} if host else {})
    return connection.getresponse()


def get(server, path, host=None):
    answer = ask(server, path, host)
    return answer.status, answer.read().decode()


def written(server):
    """When the page was written, to the second, as it asks itself."""
    return ask(server, "/", method="HEAD").headers["Last-Modified"]


def test_pages_are_served_and_renewed_when_a_run_changes(server, tmp_path):
    assert server.server_address[0] == "127.0.0.1"
    status, page = get(server, "/")
    assert status == 200 and "not finished: step 10 of 20" in page
    assert get(server, "/runs/hhh.html")[0] == 200
    os.utime(tmp_path / "report/index.html", (0, 0))
    server.renew()
    assert written(server) == "Thu, 01 Jan 1970 00:00:00 GMT"  # nothing has changed

    record = json.loads((tmp_path / "hhh/run.json").read_text())
    (tmp_path / "hhh/run.json").write_text(json.dumps(record | {"finished": True}))
    write_scores(tmp_path / "hhh/evals/step_000020", 20, "mmlu", {"accuracy": [1] * 30 + [0] * 20})
    server.renew()
    assert written(server) != "Thu, 01 Jan 1970 00:00:00 GMT"
    _, page = get(server, "/index.html")
    assert "not finished" not in page and "MMLU" in page


def test_others_are_refused(server, tmp_path):
    (tmp_path / "secret").write_text("x")
    for method in ("GET", "HEAD"):
        assert ask(server, "/", "evil.example", method).status == 403
    assert get(server, "/", host=f"localhost:{server.server_port}")[0] == 200
    for path in ("/../secret", "/%2e%2e/secret", "/runs/", "/tables", "//etc/passwd"):
        assert get(server, path)[0] in (301, 404), path


def test_a_broken_study_keeps_its_last_report(server, tmp_path):
    (tmp_path / "hhh/run.json").write_text("{")
    server.renew()
    assert get(server, "/")[0] == 200


def test_a_folder_that_goes_while_it_is_read_does_not_end_the_updates(
    server, tmp_path, monkeypatch, caplog
):
    def gone(*_):
        raise FileNotFoundError("hhh is gone")

    monkeypatch.setattr(serve, "fingerprint", gone)
    server.renew()
    assert "the report could not be updated: hhh is gone" in caplog.text
    monkeypatch.undo()
    monkeypatch.setattr(serve, "report", gone)
    (tmp_path / "hhh/metrics.jsonl").write_text("")
    server.renew()
    assert len(caplog.records) == 2
    assert server.state == serve.fingerprint(tmp_path)


def test_a_port_that_is_taken_is_said(server, tmp_path):
    with pytest.raises(UsageError, match=rf"--port={server.server_port}: .*choose another port"):
        serve.Server(tmp_path, Thresholds(), server.server_port)


def test_wrong_flags(zygote):
    for flag, why in (("--serve=9000", "Non-boolean"), ("--port=70000", "[0, 65535]")):
        done = zygote.run("scripts/report.py", "--workdir=x", flag)
        assert done.returncode == 2 and why in done.stderr
