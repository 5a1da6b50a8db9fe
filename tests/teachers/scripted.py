"""A small chat endpoint on a loopback port that answers as a script says, and counts."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(text: str | None, finish_reason: str = "stop") -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return json.dumps(body).encode()


class ScriptedServer:
    """`script(prompt, nth)` -> (status, headers, body, seconds to wait); `nth` counts the requests
    for that prompt from 0. `asked` holds the prompts in the order in which they came, `paid` those
    that were answered with 200."""

    def __init__(self, script):
        self.asked, self.paid, self.bodies, self.at = [], [], [], []
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self._send(200, {}, json.dumps({"object": "list", "data": [{"id": "m"}]}).encode())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                prompt = body["messages"][-1]["content"]
                with lock:
                    nth = server.asked.count(prompt)
                    server.asked.append(prompt)
                    server.bodies.append(body)
                    server.at.append(time.monotonic())
                status, headers, content, wait_s = script(prompt, nth)
                time.sleep(wait_s)
                self._send(status, headers, content)
                if status == 200:
                    with lock:
                        server.paid.append(prompt)

            def _send(self, status, headers, content):
                self.send_response(status)
                for name, value in {"content-type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_):
                pass  # a client that was killed

        self._http = Server(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.base_url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()
