"""A server on loopback that answers completion requests with what a test tells it to."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, str] | dict[str, Any]


@dataclass
class ReplayServer:
    """Records requests and answers each with `reply(body, number)`.

    A reply is a whole response, or a status and a text; the text becomes an OpenAI response if the status is 200.
    """

    reply: Callable[[dict[str, Any], int], Reply]
    reply_headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    """The largest number of requests under way at the same time."""

    def __post_init__(self) -> None:
        self._lock, self._under_way = threading.Lock(), 0
        self._server = _Server(("127.0.0.1", 0), _handler_of(self))
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def respond(self, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, str]:
        """The status and the content of the response to a request."""
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append(headers)
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        time.sleep(self.delay_s)
        reply = self.reply(body, number)
        with self._lock:
            self._under_way -= 1
        if isinstance(reply, dict):
            return 200, json.dumps(reply)
        status, text = reply
        if status != 200:
            return status, text
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        return 200, json.dumps({"choices": [choice], "usage": {"completion_tokens": len(text.split())}})


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Some tests are about a client that stops waiting."""


def _handler_of(server: ReplayServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, text = server.respond(body, {"path": self.path, **dict(self.headers)})
            content = text.encode()
            self.send_response(status)
            for name, value in {**server.reply_headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
