"""What `stillhouse chat` says of servers that are none, end, or speak another language."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from stillhouse.errors import ConfigError
from stillhouse.pipelines.chatting import ChatServer

Respond = Callable[[BaseHTTPRequestHandler], None]
EVENT = b'data: {"choices": [{"text": "one"}]}\n\n'


def respond(status: int, body: bytes, promised: int = 0) -> Respond:
    """promised: bytes more than come."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) + promised))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


@pytest.fixture
def server() -> Iterator[Callable[[Respond], ChatServer]]:
    started: list[HTTPServer] = []

    def start(answer: Respond) -> ChatServer:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        found = HTTPServer(("127.0.0.1", 0), Handler)
        started.append(found)
        threading.Thread(target=found.serve_forever, daemon=True).start()
        return ChatServer(f"http://127.0.0.1:{found.server_port}", "key")

    yield start
    for one in started:
        one.shutdown()
        one.server_close()


Start = Callable[[Respond], ChatServer]


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"data": []}', b'{"data": [1]}'])
def test_another_kind_of_server_is_said(server: Start, body: bytes) -> None:
    with pytest.raises(ConfigError, match="expected a server of OpenAI's protocol"):
        server(respond(200, body)).model()


def test_no_server_is_said() -> None:
    with pytest.raises(ConfigError, match=r"expected a server at .*:9, found none"):
        ChatServer("http://127.0.0.1:9", None).model()


def test_another_key_is_said(server: Start) -> None:
    with pytest.raises(ConfigError, match="expected the key of"):
        server(respond(401, b"")).model()


def test_refusals_are_the_servers(server: Start) -> None:
    found = server(respond(400, b'{"error": {"message": "too long"}}'))
    with pytest.raises(ConfigError, match="chat: the server says too long"):
        list(found.complete("m", "p", 4))
    found = server(respond(500, b"oh"))
    with pytest.raises(ConfigError, match="chat: the server says 500"):
        list(found.complete("m", "p", 4))


def test_pieces_come_as_they_are(server: Start) -> None:
    found = server(respond(200, EVENT + EVENT + b"data: [DONE]\n\n"))
    assert list(found.complete("m", "p", 4)) == ["one", "one"]


@pytest.mark.parametrize(("rest", "promised"), [(b"", 100), (b"data: {no json\n\n", 0)])
def test_an_answer_that_breaks_off_is_said(server: Start, rest: bytes, promised: int) -> None:
    pieces = server(respond(200, EVENT + rest, promised)).complete("m", "p", 4)
    with pytest.raises(ConfigError, match="expected the rest of an answer"):
        list(pieces)


def test_an_error_in_the_stream_is_the_servers(server: Start) -> None:
    found = server(respond(200, EVENT + b'data: {"error": {"message": "gone"}}\n\n'))
    with pytest.raises(ConfigError, match="chat: the server says gone"):
        list(found.complete("m", "p", 4))
