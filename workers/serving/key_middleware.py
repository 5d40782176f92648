"""The key is asked for on every route: vLLM's own check leaves some that answer prompts open.

Named on vLLM's command line (`--middleware`); the key is in the engine's environment.
"""

import hashlib
import json
import os
import secrets
from typing import Any

_ERROR = {"message": "expected the API key, found another or none", "code": 401}
_BODY = json.dumps({"error": _ERROR}).encode()
_HEADERS = [(b"content-type", b"application/json"), (b"content-length", str(len(_BODY)).encode())]
_REFUSAL: dict[str, list[dict[str, Any]]] = {
    "http": [
        {"type": "http.response.start", "status": 401, "headers": _HEADERS},
        {"type": "http.response.body", "body": _BODY},
    ],
    "websocket": [{"type": "websocket.close", "code": 1008}],  # policy violation, RFC 6455
}
OPEN = ("/health", "/ping", "/metrics")  # what a load balancer and Prometheus ask for
KEY = "VLLM_API_KEY"


class RequireKey:
    """ASGI middleware: 401 without `Authorization: Bearer KEY`."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._digest = _digest(os.environ[KEY].encode())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Refuses, or lets the request pass."""
        asked = scope["type"] in ("http", "websocket") and scope.get("method") != "OPTIONS"
        if asked and not self._is_open(scope) and not self._fits(scope):
            for message in _REFUSAL[scope["type"]]:
                await send(message)
            return
        await self._app(scope, receive, send)

    def _is_open(self, scope: Any) -> bool:
        return str(scope["path"]).removeprefix(scope.get("root_path", "")).rstrip("/") in OPEN

    def _fits(self, scope: Any) -> bool:
        found = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (found[0] if found else b"").partition(b" ")
        same = secrets.compare_digest(_digest(key), self._digest)
        return same and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
