"""A local server of the OpenAI chat protocol that answers, or fails, as a test says."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What goes back: status, body and headers; or nothing, after a reset or until the server is released."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    instead: str | None = None  # "reset" or "hang"


@dataclass(frozen=True)
class Asked:
    """A request: its path, the JSON of its body, its headers by lower-case name, when it came."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    time_s: float

    @property
    def user(self) -> str:
        return self.body["messages"][-1]["content"]


def says(text: str | None) -> Reply:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    reply = {"id": "x", "object": "chat.completion", "created": 1, "model": "stub", "choices": [choice]}
    return Reply(json.dumps(reply).encode())


def fails(status: int, message: str = "stub", **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(json.dumps({"error": {"message": message}}).encode(), status, named)


RESET, HANG = Reply(instead="reset"), Reply(instead="hang")


class JudgeServer:
    """Serves on a free local port inside `with`. answer: the reply to each request; may be replaced."""

    def __init__(self, answer: Callable[[Asked], Reply]) -> None:
        self.answer = answer
        self.asked: list[Asked] = []
        self.at_once = self.most_at_once = 0
        self.released = threading.Event()
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


def _handler(stub: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            asked = Asked(self.path, body, headers, time.monotonic())
            with stub.lock:
                stub.asked.append(asked)
                stub.at_once += 1
                stub.most_at_once = max(stub.most_at_once, stub.at_once)
            try:
                self._send(stub.answer(asked))
            finally:
                with stub.lock:
                    stub.at_once -= 1

        def _send(self, reply: Reply) -> None:
            if reply.instead == "hang":
                stub.released.wait(60)
            if reply.instead is not None:
                # linger of 0 s: closing sends a reset in the place of an orderly end
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.rfile.close()
                self.wfile.close()
                self.connection.close()
                return
            self.send_response(reply.status)
            for name, value in {"content-type": "application/json", **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)

        def log_message(self, *_words: object) -> None:
            pass

    return Handler
