"""The endpoint teacher against a real server: `transformers serve` with stories260K, with clients
that are killed and a server that is killed and started again in the middle of the run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.zygote import free_port

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class Server:
    """`transformers serve` on a loopback port; its log says what it has answered."""

    def __init__(self, model: Path, folder: Path):
        self._model, self._log = model, folder / "serve.log"
        self._port = free_port()
        self.base_url = f"http://127.0.0.1:{self._port}/v1"
        self.start()

    def start(self):
        # The command that `transformers[serving]` installs, of this very environment.
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "transformers.cli.transformers", "serve"),
                    *(str(self._model), "--host=127.0.0.1", f"--port={self._port}", "--device=cpu"),
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def wait(self):
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(self.base_url.replace("/v1", "/health"), timeout=5).close()
                return self
            except (OSError, urllib.error.URLError):
                assert self._process.poll() is None, self._log.read_text()[-2000:]
                assert time.monotonic() < deadline, self._log.read_text()[-2000:]
                time.sleep(0.1)

    def kill(self):
        self._process.kill()
        self._process.wait()

    def answered(self) -> int:
        log = self._log.read_text(errors="replace")
        return len(re.findall(r'"POST /v1/chat/completions HTTP/1.1" 200', log))


@pytest.fixture(scope="module")
def model(shared_data, tmp_path_factory):
    """stories260K with a chat template, without which the server answers 500."""
    folder = tmp_path_factory.mktemp("serve") / "model"
    shutil.copytree(shared_data / "stories260k" / "hf", folder)
    folder.chmod(0o755)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture
def server(model, tmp_path):
    running = Server(model, tmp_path)
    yield running
    running.kill()


def questions(shared_data, n, path):
    rows = json.loads((shared_data / "alpaca" / "alpaca_4000.json").read_text())
    distinct = list(dict.fromkeys(row["instruction"] for row in rows))[:n]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in distinct))
    return distinct


def run_killed_twice(zygote, server, model, shared_data, folder, n, more=()):
    """n Alpaca questions; the client stopped by SIGTERM and by SIGKILL, the server killed and
    started again under the last client."""
    prompts = questions(shared_data, n, folder / "questions.jsonl")
    command = (
        "scripts/generate_data.py",
        "--task=hhh",
        f"--prompts={folder}/questions.jsonl",
        f"--out={folder}/out",
        f"--model={model}",
        f"--base_url={server.base_url}",
        "--config.concurrency=4",
        "--config.max_new_tokens=16",
        "--config.seed=1",
        *more,
    )
    replies = folder / "out" / "replies.jsonl"

    def count():
        return len(replies.read_bytes().splitlines()) if replies.exists() else 0

    server.wait()
    for share, number, code in ((0.25, signal.SIGTERM, 75), (0.5, signal.SIGKILL, -signal.SIGKILL)):
        process = zygote.start(*command).wait_for(lambda: count() >= share * n)  # noqa: B023
        os.kill(process.pid, number)
        assert process.wait().returncode == code, process.stderr[-2000:]
        if number == signal.SIGTERM:  # what was under way came in: all that was answered is kept
            assert server.answered() == count() < n
    process = zygote.start(*command).wait_for(lambda: count() >= 0.75 * n)
    server.kill()
    server.start()
    process.wait(600)
    kept = [json.loads(line) for line in open(replies)]
    return prompts, kept, process


def check(prompts, kept, answered):
    n = len(prompts)
    assert len(kept) == len({reply["key"] for reply in kept}) == n
    assert {reply["prompt"] for reply in kept} == set(prompts)
    assert all(reply["finish_reason"] in ("stop", "length") for reply in kept)
    # Each is asked once but for what a SIGKILL of client or server caught under way.
    assert n <= answered <= n + 4
    print(f"{n} questions, {len(kept)} replies kept, {answered} answered by the server")


@pytest.mark.long
def test_a_killed_client_and_a_killed_server(zygote, server, model, shared_data, tmp_path):
    prompts, kept, process = run_killed_twice(zygote, server, model, shared_data, tmp_path, 24)
    check(prompts, kept, server.answered())
    # 16 tokens end hardly a story: such replies are dropped as cut off, and the command says so.
    cut_off = sum(reply["finish_reason"] == "length" for reply in kept)
    assert cut_off > 12
    assert re.search(rf"""['"]truncated['"]: {cut_off}\b""", process.stderr + process.stdout)
    # A model that the server does not have: one line, and nothing is asked any more.
    before = server.answered()
    done = zygote.run(
        *("scripts/generate_data.py", "--task=hhh", f"--prompts={tmp_path}/questions.jsonl"),
        *(f"--out={tmp_path}/other", "--model=nobody/nothing", f"--base_url={server.base_url}"),
    )
    assert done.returncode == 1
    assert "does not serve the model 'nobody/nothing'" in done.stderr.splitlines()[-1]
    assert server.answered() == before


@pytest.mark.long
def test_500_alpaca_prompts_killed_twice(zygote, server, model, shared_data, tmp_path):
    prompts, kept, _ = run_killed_twice(zygote, server, model, shared_data, tmp_path, 500)
    check(prompts, kept, server.answered())
