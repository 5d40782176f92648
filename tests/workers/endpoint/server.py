"""A real HTTP server that answers as an endpoint would, or as one should not, by a script."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


@dataclass(frozen=True)
class Request:
    """What came in."""

    path: str
    key: str | None  # the Authorization header
    body: dict[str, Any]

    @property
    def prompt(self) -> str:
        """Of either API."""
        return (
            self.body["messages"][0]["content"] if "messages" in self.body else self.body["prompt"]
        )


class Handler(BaseHTTPRequestHandler):
    """Hands each POST to the server's script."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # a reply is one packet; in two, the second waits for the first's receipt
    server: "ScriptedServer"

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        request = Request(self.path, self.headers["Authorization"], json.loads(data))
        self.server.take(request)(self, request)

    def send(self, status: int, body: str | bytes, **headers: str) -> None:
        """A reply; underscores of header names stand for dashes."""
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


Behaviour = Callable[[Handler, Request], None]


class ScriptedServer(ThreadingHTTPServer):
    """Answers its first requests by `script`, the others by `then`; counts all."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, script: Sequence[Behaviour], then: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[Request] = []
        self.gone = threading.Event()  # ends behaviours that wait
        self._script, self._then = list(script), then
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    @property
    def url(self) -> str:
        """The base of the API."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def take(self, request: Request) -> Behaviour:
        """Note a request and say how it is answered."""
        with self._lock:
            self.requests.append(request)
            return self._script.pop(0) if self._script else self._then

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.gone.set()
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


def answer_text(request: Request, text: str | None, finish: str, usage: Any) -> str:
    """The body of an answer in the API that was asked."""
    content: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
    if "prompt" in request.body:
        content = {"text": text}
    answer = {"choices": [content | {"index": 0, "finish_reason": finish}]}
    return json.dumps(answer if usage is None else answer | {"usage": usage})


def says(text: str | None, finish: str = "stop", usage: Any = (10, 5)) -> Behaviour:
    """An answer; `{}` in it stands for the prompt. usage: tokens of prompt and completion."""
    if isinstance(usage, tuple):
        usage = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}

    def behave(handler: Handler, request: Request) -> None:
        said = None if text is None else text.replace("{}", request.prompt)
        handler.send(200, answer_text(request, said, finish, usage))

    return behave


def status(code: int, body: str = "no", **headers: str) -> Behaviour:
    """A bare reply."""
    return lambda handler, request: handler.send(code, body, **headers)


def echoes(code: int, before: str = "you sent ") -> Behaviour:
    """A reply that repeats the key."""
    return lambda handler, request: handler.send(code, f"{before}{request.key}")


def hangs(handler: Handler, request: Request) -> None:
    """No reply, ever."""
    handler.server.gone.wait(2)
    handler.close_connection = True


def trickles(handler: Handler, request: Request) -> None:
    """White space in small pieces, as servers keep a connection alive with."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b"1\r\n\n\r\n")
        handler.wfile.flush()
        time.sleep(0.02)
    handler.close_connection = True


def resets(handler: Handler, request: Request) -> None:
    """The connection breaks, by RST."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def truncated(handler: Handler, request: Request) -> None:
    """A whole reply with half an answer in it."""
    handler.send(200, answer_text(request, "half", "stop", None)[:-20])


def breaks_off(handler: Handler, request: Request) -> None:
    """A reply that is shorter than it said."""
    handler.send(200, '{"choices"', Content_Length="500")
    handler.close_connection = True
