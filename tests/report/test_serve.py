"""The live view: this machine's own, renewed when a run folder changes."""

import http.client
import json
import threading

import pytest

from sa_jax.errors import UsageError
from sa_jax.report import serve
from sa_jax.report.report import report
from sa_jax.report.thresholds import Thresholds
from tests.report.made_runs import write_run, write_scores


@pytest.fixture
def server(tmp_path):
    write_run(
        tmp_path / "hhh", "hhh", total_steps=20, n=20, curve={0: (20, 0, 9)}, metrics_until=10
    )
    report(tmp_path)
    with serve.Server(tmp_path, Thresholds()) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def get(server, path, host=None):
    connection = http.client.HTTPConnection(serve.ADDRESS, server.server_port, timeout=30)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_pages_are_served_and_renewed_when_a_run_changes(server, tmp_path):
    assert server.server_address[0] == "127.0.0.1"
    status, page = get(server, "/")
    assert status == 200 and "not finished: step 10 of 20" in page
    assert get(server, "/runs/hhh.html")[0] == 200
    _, version = get(server, "/version")
    server.renew()
    assert get(server, "/version") == (200, version)  # nothing has changed

    record = json.loads((tmp_path / "hhh/run.json").read_text())
    (tmp_path / "hhh/run.json").write_text(json.dumps(record | {"finished": True}))
    write_scores(tmp_path / "hhh/evals/step_000020", 20, "mmlu", {"accuracy": [1] * 30 + [0] * 20})
    server.renew()
    assert get(server, "/version")[1] != version
    _, page = get(server, "/index.html")
    assert "not finished" not in page and "MMLU" in page


def test_others_are_refused(server, tmp_path):
    (tmp_path / "secret").write_text("x")
    assert get(server, "/", host="evil.example")[0] == 403
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
    assert server.version == serve.fingerprint(tmp_path)


def test_a_port_that_is_taken_is_said(server, tmp_path):
    with pytest.raises(UsageError, match=rf"--port={server.server_port}: .*choose another port"):
        serve.Server(tmp_path, Thresholds(), server.server_port)


def test_wrong_flags(zygote):
    for flag, why in (("--serve=9000", "Non-boolean"), ("--port=70000", "[0, 65535]")):
        done = zygote.run("scripts/report.py", "--workdir=x", flag)
        assert done.returncode == 2 and why in done.stderr
