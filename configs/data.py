"""Where prompts, training pairs and questions come from."""

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from stillhouse.configs.base import Config


class SourceConfig(Config):
    """One source of rows: `jsonl:`, `csv:`, `parquet:`, `hf:`, `package:` or `builtin:`."""

    ref: str
    prompt: str = "prompt"  # the column that holds the prompt
    limit: int | None = Field(None, ge=1)


class PairsConfig(SourceConfig):
    """A source of prompts with their right answers."""

    response: str = "response"  # the column that holds the answer


class PoolConfig(SourceConfig):
    """Unlabelled prompts; `origin` names them in every report (without it: seed, pool or control).

    `origin_column` takes the label from a column instead. `template: none` shows the model the
    bare text (prompts from elsewhere that never had the speciality's form).
    """

    origin: str | None = None
    origin_column: str | None = None
    template: Literal["recipe", "none"] = "recipe"


class TemplateConfig(Config):
    """How a prompt and its answer become text; `{text}` stands for either."""

    prompt: str = "{text}"
    response: str = " {text}"

    @field_validator("prompt", "response")
    @classmethod
    def _text_has_a_place(cls, template: str, info: ValidationInfo) -> str:
        if "{text}" not in template:
            raise ValueError(
                f"data.template.{info.field_name}: expected `{{text}}` in it, because without it "
                f"all texts become the same; found {template!r}"
            )
        return template


class DataConfig(Config):
    """The data of a run. `private` is read by `specialize` and the ceiling arm alone.

    `seeds` are some prompts (5 to 50) known to be of the speciality, `pool` may hold anything.
    `controls` are prompts that are not of it: they are scored so that thresholds can be
    calibrated against them, and never selected.
    """

    seeds: tuple[PoolConfig, ...] = ()
    pool: tuple[PoolConfig, ...] = ()
    controls: tuple[PoolConfig, ...] = ()
    private: PairsConfig | None = None
    questions: PairsConfig  # held-out: evaluation only
    template: TemplateConfig = TemplateConfig()
    # Of the pool, chosen by hash: never trained on; the compressed cache is measured on it.
    heldout_percent: int = Field(5, ge=0, le=50)
    max_prompt_tokens: int = Field(256, ge=1)  # longer prompts leave as `too_long`
    shard_rows: int = Field(256, ge=1)


class ModelsConfig(Config):
    """The models of a run.

    References: `hf:org/name@revision`, a local folder, `gguf:path`,
    `package:<distribution>/<file>`, `toy:<name>`; adapters `peft:path`, or `stage:specialize`
    for the adapter that this run trains. A specialist that is a whole model has
    `specialist` and no `adapter`.
    """

    base: str
    target: str
    adapter: str | None = None
    specialist: str | None = None
