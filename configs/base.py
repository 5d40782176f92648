"""Strict building blocks of the configuration tree."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Config(BaseModel):
    """A frozen section of a recipe; unknown keys are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # a value that is refused may be a password in a wrong place
    )


def knob(default: Any, **constraints: Any) -> Any:
    """Declare a field that changes how fast a stage runs and not what it writes.

    Knobs (batch sizes, thread counts, checkpoint intervals) stay out of the stage's key, so
    changing one reruns nothing. A different batch shape may move the last bits of a
    log-probability; docs/decisions/0004-stage-keys.md says why that is accepted.
    """
    return Field(default, json_schema_extra={"knob": True}, **constraints)


def keyed_values(config: Config) -> dict[str, Any]:
    """Return the part of a section that decides what is written: all but its knobs."""
    values: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("knob"):
            continue
        value = getattr(config, name)
        values[name] = _keyed(value)
    return values


def _keyed(value: Any) -> Any:
    if isinstance(value, Config):
        return keyed_values(value)
    if isinstance(value, tuple | list):
        return [_keyed(item) for item in value]
    if isinstance(value, dict):
        return {name: _keyed(item) for name, item in value.items()}
    return value
