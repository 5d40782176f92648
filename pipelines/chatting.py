"""A conversation with a server that speaks OpenAI's protocol, word by word."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import requests

from stillhouse.errors import ConfigError

_TIMEOUT = (5, 300)  # seconds to connect, and between two pieces of an answer


@dataclass(frozen=True, slots=True)
class ChatServer:
    """url: without `/v1`."""

    url: str
    key: str | None
    temperature: float = 0.0

    def model(self) -> str:
        """What it serves; ConfigError when it does not answer, or not us."""
        found = self._asked("GET", "models", None)
        try:
            return str(found.json()["data"][0]["id"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(
                f"chat: expected a server of OpenAI's protocol at {self.url}, found another "
                f"({found.text[:60]!r})"
            ) from error

    def chat(self, model: str, messages: Sequence[dict[str, str]], limit: int) -> Iterator[str]:
        """An answer to messages, through the model's chat template, in pieces."""
        body = {"model": model, "messages": list(messages), "max_tokens": limit}
        for choice in self._streamed("chat/completions", body):
            yield choice["delta"].get("content") or ""

    def complete(self, model: str, prompt: str, limit: int) -> Iterator[str]:
        """How a prompt goes on, in pieces."""
        body = {"model": model, "prompt": prompt, "max_tokens": limit}
        for choice in self._streamed("completions", body):
            yield choice["text"]

    def _streamed(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        how = {"stream": True, "temperature": self.temperature}
        try:
            with self._asked("POST", path, body | how) as answer:
                for line in answer.iter_lines():
                    data = line.decode().removeprefix("data:").strip()
                    if data and data != "[DONE]":
                        yield from _choices(json.loads(data))
        except (requests.RequestException, ValueError) as error:
            raise ConfigError(
                f"chat: expected the rest of an answer from {self.url}, found none "
                f"({type(error).__name__}); the server may have ended"
            ) from error

    def _asked(self, method: str, path: str, body: dict[str, Any] | None) -> requests.Response:
        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        try:
            answer = requests.request(
                method, f"{self.url}/v1/{path}", json=body, headers=headers, timeout=_TIMEOUT,
                stream=body is not None,
            )  # fmt: skip
        except requests.RequestException as error:
            raise ConfigError(
                f"chat: expected a server at {self.url}, found none ({type(error).__name__}); "
                "start one with `stillhouse serve`"
            ) from error
        if answer.status_code == 401:
            raise ConfigError(
                f"chat: expected the key of {self.url}, found another or none; name its file with "
                "--api-key-file"
            )
        if not answer.ok:
            raise ConfigError(f"chat: the server says {_message(answer)}")
        return answer


def _choices(event: dict[str, Any]) -> list[dict[str, Any]]:
    if "error" in event:
        raise ConfigError(f"chat: the server says {event['error'].get('message')}")
    found: list[dict[str, Any]] = event["choices"][:1]
    return found


def _message(answer: requests.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])[:600]
    except (ValueError, KeyError, TypeError):
        return f"{answer.status_code} {answer.reason}"
