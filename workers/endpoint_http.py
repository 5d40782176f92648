"""Requests to an endpoint: the key goes to one host, and no error text holds it."""

import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import requests
from requests.auth import AuthBase

from stillhouse.configs.endpoint import EndpointConfig
from stillhouse.errors import ConfigError
from stillhouse.storage.redaction import HIDDEN, redact_uris

_ROUTES = {"chat": "/chat/completions", "completions": "/completions"}
_LONGEST_CONNECT = 30.0  # seconds
_LONGEST_REASON = 300  # characters
_LARGEST_BODY = 1 << 24  # bytes


@dataclass(frozen=True, slots=True)
class HttpReply:
    """A whole reply, as it came."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class NoReply:
    """No whole reply came. `was_sent`: whether the request may have reached the model."""

    reason: str
    was_sent: bool


class EndpointClient:
    """Posts to one endpoint, from threads of its own. Redirects are not followed."""

    def __init__(self, config: EndpointConfig) -> None:
        """Read the key; raises ConfigError where the environment holds no usable one."""
        self._config = config
        self._key = _key(config.key_env)
        self._auth = _KeyAuth(self._key)
        self._sessions: SimpleQueue[requests.Session] = SimpleQueue()

    @contextmanager
    def threads(self, count: int) -> Iterator[Executor]:
        """So many threads that may post; a session is used by one at a time."""
        with ExitStack() as stack:
            self._sessions = SimpleQueue()
            for _ in range(count):
                self._sessions.put(stack.enter_context(requests.Session()))
            yield stack.enter_context(ThreadPoolExecutor(count, "endpoint"))

    def post(self, body: bytes) -> HttpReply | NoReply:
        """Send one request; `timeout` bounds all of it, an answer that trickles too."""
        session = self._sessions.get()
        try:
            return self._post(session, body)
        except requests.RequestException as error:
            return NoReply(f"{type(error).__name__}: {_root(error)}", _was_sent(error))
        finally:
            self._sessions.put(session)

    def _post(self, session: requests.Session, body: bytes) -> HttpReply:
        limit = self._config.timeout
        until = time.monotonic() + limit
        with session.post(
            self._config.url + _ROUTES[self._config.api],
            data=body,
            headers={"Content-Type": "application/json"},
            auth=self._auth,
            timeout=(min(limit, _LONGEST_CONNECT), limit),
            allow_redirects=False,
            stream=True,
        ) as response:
            return HttpReply(response.status_code, response.headers, _read(response, until))

    def told(self, reason: str) -> str:
        """A reason in one short line, without the key: servers repeat what they were sent."""
        if self._key is not None:
            reason = _any_form(self._key).sub(HIDDEN, reason)
        line = " ".join(redact_uris(reason).split())  # hidden first: half a key is a key, too
        return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}…"


class _KeyAuth(AuthBase):
    """The key as a header. Without a key, too: else one for the host in ~/.netrc would be sent."""

    def __init__(self, key: str | None) -> None:
        self._key = key

    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            r.headers["Authorization"] = f"Bearer {self._key}"
        return r


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if re.fullmatch(r"[!-~]+", key):
        return key
    found = "characters that no header holds" if key else "nothing"
    raise ConfigError(
        f"endpoint.key_env: expected a key in the environment variable {name}, found {found}; "
        f"export {name} before the run, or leave key_env out for an endpoint without keys"
    )


def _any_form(key: str) -> re.Pattern[str]:
    """Matches a key as it is, and as JSON and URLs may write each of its characters."""
    signs = ((re.escape(sign), ord(sign)) for sign in key)
    forms = (rf"(?:\\?{plain}|%{code:02x}|\\u{code:04x})" for plain, code in signs)
    return re.compile("".join(forms), re.IGNORECASE)


def _read(response: requests.Response, until: float) -> bytes:
    """Read a body that may trickle. Raises requests.Timeout after `until`, a monotonic time."""
    parts, size = [], 0
    for part in response.iter_content(1 << 12):
        parts.append(part)
        size += len(part)
        if time.monotonic() > until:
            raise requests.Timeout("the answer was not whole in time")
        if size > _LARGEST_BODY:
            raise requests.ConnectionError(f"the answer has more than {_LARGEST_BODY} bytes")
    return b"".join(parts)


def _was_sent(error: requests.RequestException) -> bool:
    """Whether there was a connection; where there was none, what urllib3 raised has a `reason`."""
    if isinstance(error, requests.ConnectTimeout):
        return False
    return not error.args or getattr(error.args[0], "reason", None) is None


def _root(error: BaseException) -> BaseException:
    """The first cause; what wraps it names objects by their address."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error
