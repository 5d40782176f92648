"""Where an endpoint is and what it may cost: no secret in a recipe, no cost without prices."""

from typing import Any

import pytest
from pydantic import ValidationError

from stillhouse.configs.base import keyed_values
from stillhouse.configs.endpoint import EndpointConfig

URL = "https://api.example.org/v1"
PRICES = {"price_per_million_prompt_tokens": 0.5, "price_per_million_completion_tokens": 0}


def config(**options: Any) -> EndpointConfig:
    return EndpointConfig(**({"url": URL, "model": "m"} | options))


def refused(**options: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        config(**options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        (URL, URL),
        (f"{URL}/", URL),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("http://localhost:11434", "http://localhost:11434"),
    ],
)
def test_a_base(url: str, kept: str) -> None:
    assert config(url=url).url == kept


@pytest.mark.parametrize(
    "url",
    [
        "https://user:s3cret@example.org/v1",
        "https://s3cret@example.org/v1",
        "https://user:s3/cret@example.org/v1",
        "https://user:s3?cret@example.org/v1",
        "https://example.org/v1?key=s3cret",
        "https://example.org/v1#s3cret",
        "https://example.org:s3cret/v1",
        "https://example.org/v1 s3cret",
        "https://example.org/v1\ns3cret",
        "https://[s3cret/v1",
        "https:///s3cret",
        "ftp://s3cret/v1",
        "s3cret",
        "",
    ],
)
def test_what_is_no_base_is_not_repeated(url: str) -> None:
    message = refused(url=url)
    assert "endpoint.url: expected" in message
    assert "s3" not in message


@pytest.mark.parametrize("route", ["chat/completions", "completions", "completions/"])
def test_a_route_is_no_base(route: str) -> None:
    assert "found a route under it" in refused(url=f"{URL}/{route}")


@pytest.mark.parametrize("key", ["sk-abc", "hf_abc", "", "A B", "OPENAI_API_KEY\n"])
def test_a_key_in_place_of_its_name_is_not_repeated(key: str) -> None:
    message = refused(key_env=key)
    assert "expected the name of an environment variable" in message
    assert not key or key not in message


def test_a_cost_has_prices() -> None:
    assert config(max_cost=5, **PRICES).max_cost == 5
    for left_out in PRICES:
        prices = {name: price for name, price in PRICES.items() if name != left_out}
        assert f"['{left_out}'] are missing" in refused(max_cost=5, **prices)


@pytest.mark.parametrize(
    "option",
    [
        {"concurrency": 0},
        {"requests_per_minute": 0},
        {"retries": -1},
        {"timeout": 0},
        {"max_tokens_spent": 0},
        {"max_cost": 0} | PRICES,
        {"api": "responses"},
        {"model": ""},
        {"key": "sk-abc"},
    ],
)
def test_bounds(option: dict[str, Any]) -> None:
    assert "sk-abc" not in refused(**option)


def test_what_decides_the_rows() -> None:
    assert set(keyed_values(config())) == {
        "url",
        "model",
        "api",
        "max_tokens_spent",
        "max_cost",
        *PRICES,
    }
