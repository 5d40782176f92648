"""What the reply of an OpenAI-compatible endpoint means: an answer, a refusal, or try again."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeAlias, TypeGuard
from urllib.parse import urlsplit

from stillhouse.workers.endpoint_budget import TokenUse
from stillhouse.workers.endpoint_http import HttpReply
from stillhouse.workers.protocols import Completion, Decoding, Failed

LONGEST_WAIT = 600.0  # seconds; a longer Retry-After is waited for in parts, each a retry
_GATEWAY = (502, 504)  # somebody in between gave up; the model behind may have answered
_WORTH_REPEATING = (408, 429)  # and 5xx


@dataclass(frozen=True, slots=True)
class Asked:
    """What a reply answers. `schema`: of JSON answers; `estimate`: tokens, if it does not say."""

    api: Literal["chat", "completions"]
    how: Decoding
    schema: Mapping[str, Any] | None
    estimate: TokenUse


@dataclass(frozen=True, slots=True)
class Again:
    """No answer, and worth another request. Reasons of this module are neither short nor redacted.

    redraws: how many other seeds that is worth; None where the seed is not to blame.
    wait: seconds that the server asks for, at least.
    """

    reason: str
    redraws: int | None = None
    wait: float = 0.0


@dataclass(frozen=True, slots=True)
class Refused:
    """The endpoint does not serve whoever asks: no other request can succeed."""

    reason: str


Outcome: TypeAlias = Completion | Failed | Again | Refused


def judged(reply: HttpReply, asked: Asked, now: float) -> tuple[Outcome, TokenUse]:
    """Return what a reply is worth and the tokens it took. `now`: seconds since the epoch.

    A reply without `usage` is counted by a pessimistic estimate, `asked.estimate`: a third of the
    request's bytes and all of max_new_tokens. A refusal counts nothing, as nothing is billed for
    it, unless a gateway gave up.
    """
    if not 200 <= reply.status < 300:
        used = asked.estimate if reply.status in _GATEWAY else TokenUse()
        return _refusal(reply, now), used
    try:
        answer = json.loads(reply.body)
    except (ValueError, RecursionError):
        return Again(f"malformed: expected JSON, found {_text(reply)}"), asked.estimate
    used = _used(answer, asked.estimate)
    outcome = _completion(answer, reply, asked, used)
    if isinstance(outcome, Completion) and asked.schema is not None:
        problem = schema_problem(outcome.text, asked.schema)
        if problem is not None:
            outcome = Again(f"malformed_json: {problem}", redraws=1)
    return outcome, used


def retry_after(value: str | None, now: float) -> float:
    """Return the seconds a Retry-After header asks for, as a number or an HTTP date.

    0 where there is none to read; LONGEST_WAIT at most.
    """
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - now
        except (ValueError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT) if math.isfinite(seconds) else 0.0


def schema_problem(text: str, schema: Mapping[str, Any]) -> str | None:
    """Say what a JSON object lacks of the schema's required fields; None if nothing.

    The types of strings are compared, no others: a server that knows schemas checks the rest.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return "expected JSON, found other text"
    if not isinstance(value, dict):
        return f"expected an object, found {type(value).__name__}"
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            return f"no field {name!r}"
        is_text = properties.get(name, {}).get("type") == "string"
        if is_text and not isinstance(value[name], str):
            return f"expected text in {name!r}, found {type(value[name]).__name__}"
    return None


def _refusal(reply: HttpReply, now: float) -> Failed | Again | Refused:
    status = reply.status
    if status in (401, 403):
        return Refused(f"{status} {_text(reply)}")
    if status in _WORTH_REPEATING or status >= 500:
        wait = retry_after(reply.headers.get("Retry-After"), now)
        return Again(f"endpoint: {status} {_text(reply)}", wait=wait)
    if 300 <= status < 400:
        return Failed(
            f"endpoint: {status} redirects to {_host(reply)}, which is not followed, since prompts "
            "and key are meant for one host; set endpoint.url to where the API is"
        )
    return Failed(f"endpoint: {status} {_text(reply)}")


def _completion(
    answer: Any, reply: HttpReply, asked: Asked, used: TokenUse
) -> Completion | Failed | Again:
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if asked.api == "chat" else choice["text"]
        finish = choice["finish_reason"]
    except (KeyError, IndexError, TypeError):
        return Again(f"malformed: expected a choice with text and its end, found {_text(reply)}")
    if not (text is None or _is_text(text)) or not isinstance(finish, str):
        return Again(f"malformed: expected text and its end, found {_text(reply)}")
    if finish not in ("stop", "length"):
        return Failed(f"endpoint: the answer ended with {finish!r}")
    whole = text or ""
    # Not every server knows every stop string.
    cut = min((at for mark in asked.how.stop if (at := whole.find(mark)) >= 0), default=len(whole))
    is_long = finish == "length" and cut == len(whole)
    kept = whole[:cut].strip()
    if not kept:
        told = "empty: no text within max_new_tokens" if is_long else "empty"
        return Again(told, redraws=sys.maxsize)
    return Completion(kept, "length" if is_long else "stop", used.completion, used.prompt)


def _used(answer: Any, estimate: TokenUse) -> TokenUse:
    usage = answer.get("usage") if isinstance(answer, dict) else None
    if not isinstance(usage, dict):
        return estimate
    prompt, completion, total = (
        usage.get(f"{name}_tokens") for name in ("prompt", "completion", "total")
    )
    if not (_is_count(prompt) and _is_count(completion)):
        return estimate
    # Some servers bill the tokens of reasoning and name them in the total alone.
    return TokenUse(prompt, max(completion, total - prompt if _is_count(total) else 0))


def _is_text(value: Any) -> TypeGuard[str]:
    """JSON may hold half of a surrogate pair, which no file of ours can."""
    return isinstance(value, str) and not any("\ud800" <= sign <= "\udfff" for sign in value)


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _text(reply: HttpReply) -> str:
    return reply.body.decode(errors="replace")


def _host(reply: HttpReply) -> str:
    try:
        return urlsplit(reply.headers.get("Location", "")).hostname or "another path"
    except ValueError:
        return "no URL"
