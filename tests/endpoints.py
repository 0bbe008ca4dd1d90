"""A real HTTP server on this machine that answers chat completions, well or badly, as a test wants it."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """A request at a time."""

    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(body)
            self.server.headers.append(dict(self.headers))
        with suppress(BrokenPipeError, ConnectionResetError):  # whoever asked did not wait
            self.server.answer(self, body)

    def log_message(self, *_: Any) -> None:
        pass

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def say(self, text: str, logprobs: Any = None) -> None:
        """A chat completion."""
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": logprobs}
        self.send(200, json.dumps({"choices": [choice]}).encode())


Answer = Callable[[Handler, dict[str, Any]], None]


class Server(ThreadingHTTPServer):
    """What it saw is in `seen`, in the order in which it came."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Answer, port: int):
        super().__init__(("127.0.0.1", port), Handler)
        self.answer, self.lock = answer, threading.Lock()
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def serving(answer: Answer, port: int = 0) -> Iterator[Server]:
    """A server for as long as the block runs, at any port that is free."""
    server = Server(answer, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def asked(body: dict[str, Any]) -> list[str]:
    """What stands between the marks of the question: the request, and the answers."""
    return re.findall(r"<<< .*?\n(.*?)\n>>>", body["messages"][1]["content"], re.DOTALL)


def longer(handler: Handler, body: dict[str, Any]) -> None:
    """A judge that likes length, with reasons."""
    _, a, b, *_ = asked(body)
    verdict = "A" if len(a) > len(b) else "B" if len(b) > len(a) else "C"
    handler.say(f"A has {len(a)} letters and B {len(b)}.\nVerdict: {verdict}")
