"""Who makes new prompts, and for how long."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from stillhouse.configs.base import Config, knob
from stillhouse.configs.endpoint import EndpointConfig


class GeneratorConfig(Config):
    """One generator of prompts; a bare `few_shot` or `mutate` in a recipe is one of that kind.

    `mutate` recombines the parts of selected prompts. `few_shot` has a model continue a list of
    them: `base`, `target` or `specialist` of the run, another model's reference, or an endpoint.
    """

    kind: Literal["few_shot", "mutate"]
    model: str = "base"
    endpoint: EndpointConfig | None = None
    share: float = Field(1.0, gt=0)  # of a round, beside the shares of the others

    @property
    def name(self) -> str:
        """What the prompts' origin says."""
        if self.kind == "mutate":
            return self.kind
        if self.endpoint is not None:
            return f"{self.kind}:{self.endpoint.model}"
        return self.kind if self.model == "base" else f"{self.kind}:{self.model}"

    @model_validator(mode="after")
    def _who_writes_is_clear(self) -> Self:
        writes = self.kind == "few_shot"
        if not writes and (self.model != "base" or self.endpoint is not None):
            raise ValueError(
                "expand.generators: mutate asks no model: leave model and endpoint out"
            )
        if self.endpoint is not None and self.model != "base":
            raise ValueError("expand.generators: expected model or endpoint, found both")
        return self


def _named(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class ExpandConfig(Config):
    """New prompts in the likeness of the selected ones, in rounds."""

    rounds: int = Field(2, ge=0, le=99)  # two digits in the names of shards, which sort by them
    prompts_per_round: int = Field(64, ge=1)  # shared by the generators
    enough: int | None = Field(None, ge=1)  # stop once so many new prompts were kept
    min_yield: float = Field(0.0, ge=0, le=1)  # stop after a round that keeps a smaller share
    generators: tuple[Annotated[GeneratorConfig, BeforeValidator(_named)], ...] = Field(
        (GeneratorConfig(kind="few_shot"), GeneratorConfig(kind="mutate")), min_length=1
    )
    shots: int = Field(6, ge=1)
    temperature: float = Field(0.9, gt=0)
    max_new_tokens: int = Field(32, ge=1)
    seed: int = 0
    batch_size: int = knob(32, ge=1)
