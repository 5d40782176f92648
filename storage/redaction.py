"""What must not be written to logs, events or a tracking server: credentials."""

import re

HIDDEN = "[redacted]"

# A password may hold a slash or an @; what looks like a port ends the host.
_URI_CREDENTIALS = re.compile(r"(?<=://)(?:[^/\s]+|[^:/\s]+:(?!\d+/)\S+)@")
_QUERY_PARAMETER = re.compile(r"(?<=[?&])([^=&\s]+)=([^&\s]+)")
# `hf_token`, `api.key`, `db_password`; not `max_tokens`, `key_bits`, `tokenizer`.
_LAST_WORD = re.compile(r"(^|[._\-/])(key|token|credentials?)$", re.IGNORECASE)
_ANYWHERE = re.compile(r"passw(or)?d|secret|api_?key", re.IGNORECASE)
_TOKENIZER = re.compile(r"(^|[._\-/])(bos|eos|pad|unk|sep|cls|mask)_token$", re.IGNORECASE)


def redact_uris(text: str) -> str:
    """Return `text` with the user, password and secret query parameters of every URI hidden."""
    return _QUERY_PARAMETER.sub(_hidden_parameter, _URI_CREDENTIALS.sub(f"{HIDDEN}@", text))


def _hidden_parameter(found: re.Match[str]) -> str:
    name = found[1]
    return f"{name}={HIDDEN}" if is_secret(name) or name.lower() == "user" else found[0]


def is_secret(name: str) -> bool:
    """Say whether a parameter of this name is likely to hold a credential."""
    if _TOKENIZER.search(name):
        return False
    return bool(_LAST_WORD.search(name) or _ANYWHERE.search(name))


def redacted(name: str, value: object) -> object:
    """Return `value` without credentials; numbers, booleans and None are never credentials."""
    if isinstance(value, dict):
        return {str(key): redacted(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(name, inner) for inner in value]
    if isinstance(value, str) and value:
        return HIDDEN if is_secret(name) else redact_uris(value)
    return value
