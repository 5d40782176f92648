"""A server that writes prompts: anything that speaks OpenAI's completion or chat protocol."""

from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from stillhouse.configs.base import Config, knob


class EndpointConfig(Config):
    """Where it is, how it is asked, and what may be spent on it.

    `key_env` names the environment variable that holds the key; the key itself stands nowhere else.
    Budgets are of the stage, over every start of the run; what they leave unasked has another
    reason in its row, so they are no knobs.
    """

    url: str  # up to /v1
    model: str = Field(min_length=1)
    key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    api: Literal["chat", "completions"] = "chat"
    max_tokens_spent: int | None = Field(None, ge=1)  # of prompts and answers, as the server counts
    max_cost: float | None = Field(None, gt=0)  # in the currency of the prices
    price_per_million_prompt_tokens: float | None = Field(None, ge=0)
    price_per_million_completion_tokens: float | None = Field(None, ge=0)
    concurrency: int = knob(8, ge=1, le=256)
    requests_per_minute: int | None = knob(None, ge=1)
    retries: int = knob(5, ge=0, le=20)  # of one request, each after a longer wait
    timeout: float = knob(60.0, gt=0)  # seconds without a byte

    @field_validator("url")
    @classmethod
    def _is_a_server_without_a_key(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "expand.generators.endpoint.url: expected no user, password or query in it, "
                "because recipes are stored and logged; name a variable that holds the key as "
                "key_env"
            )
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(
                f"expand.generators.endpoint.url: expected http(s)://host[:port]/v1, found {url!r}"
            )
        return url.rstrip("/")

    @model_validator(mode="after")
    def _money_has_prices(self) -> Self:
        prices = (self.price_per_million_prompt_tokens, self.price_per_million_completion_tokens)
        if self.max_cost is not None and None in prices:
            raise ValueError(
                "expand.generators.endpoint.max_cost: expected price_per_million_prompt_tokens and "
                "price_per_million_completion_tokens beside it, because servers tell tokens only"
            )
        return self

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What so many tokens cost; 0 without prices."""
        prompt = self.price_per_million_prompt_tokens or 0.0
        completion = self.price_per_million_completion_tokens or 0.0
        return (prompt * prompt_tokens + completion * completion_tokens) / 1e6
