"""An OpenAI-compatible endpoint: where it is, how it is asked, what it may cost."""

import re
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from stillhouse.configs.base import Config, knob

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_ROUTES = ("/chat/completions", "/completions")


class EndpointConfig(Config):
    """A server that speaks OpenAI's API. Prices are per million tokens, in the unit of `max_cost`.

    How fast and how stubbornly it is asked are knobs: an answer is the same under any of them, and
    a row that is lost to them is lost to the network's luck. So is the account that pays
    (`key_env`). `url` is no knob, since two servers may give one name to two models; nor are the
    budgets and prices: they decide which rows are written as `over_budget`.
    """

    url: str  # up to the version, such as https://api.example.org/v1
    model: str = Field(min_length=1)
    key_env: str | None = knob(None)  # the NAME of the variable; the key is never in a recipe
    api: Literal["chat", "completions"] = "chat"
    concurrency: int = knob(8, ge=1, le=256)  # requests at a time
    requests_per_minute: int | None = knob(None, ge=1)
    retries: int = knob(5, ge=0)  # of one row
    timeout: float = knob(120.0, gt=0, le=86_400)  # seconds, of one request
    max_tokens_spent: int | None = Field(None, ge=1)  # prompts and answers, all runs of the journal
    max_cost: float | None = Field(None, gt=0)
    price_per_million_prompt_tokens: float | None = Field(None, ge=0)
    price_per_million_completion_tokens: float | None = Field(None, ge=0)

    @field_validator("url")
    @classmethod
    def _is_a_base_without_credentials(cls, url: str) -> str:
        """Refuse without repeating: what is wrong with a URL is often a secret in it."""
        if "@" in url:  # anywhere: a password may hold a slash
            raise ValueError(
                "endpoint.url: expected no user and no password in it, because recipes are stored "
                "and logged; put the key into an environment variable and name that in key_env"
            )
        if not _is_base(url):
            raise ValueError(
                "endpoint.url: expected http(s)://host[:port]/path, with no query, fragment or "
                "blank, such as https://api.example.org/v1; found something else, not repeated "
                "here because it may hold a key"
            )
        base = url.rstrip("/")
        if base.endswith(_ROUTES):
            raise ValueError(
                "endpoint.url: expected the base of the API, which mostly ends in /v1, found a "
                f"route under it; leave {_ROUTES[0]} or {_ROUTES[1]} out, `api` chooses between "
                "them"
            )
        return base

    @field_validator("key_env")
    @classmethod
    def _is_a_name_and_no_key(cls, name: str | None) -> str | None:
        if name is not None and not _VARIABLE.fullmatch(name):
            raise ValueError(
                "endpoint.key_env: expected the name of an environment variable in capitals, such "
                "as OPENAI_API_KEY, and never the key itself; what was found is not repeated here, "
                "because it may be one"
            )
        return name

    @model_validator(mode="after")
    def _a_cost_has_prices(self) -> Self:
        names = ("price_per_million_prompt_tokens", "price_per_million_completion_tokens")
        missing = [name for name in names if getattr(self, name) is None]
        if self.max_cost is not None and missing:
            raise ValueError(
                f"endpoint.max_cost: a cost is computed from tokens and prices; {missing} "
                "are missing. Give them in the unit of max_cost, or bound max_tokens_spent instead"
            )
        return self


def _is_base(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is no number up to 65535
    except ValueError:
        return False
    plain = url.isascii() and url.isprintable() and not set(url) & set(" ?#\\")
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname)
