"""How much of the speciality came over, and whether that is enough."""

from collections.abc import Mapping
from typing import Any

from stillhouse.configs.stages import GateConfig
from stillhouse.pipelines.answering import Figures


def recovery(arms: Mapping[str, Figures]) -> float | None:
    """(student - target before) / (specialist - target before) in exact match.

    None where an arm is missing or the specialist is no better than the untouched target.
    """
    if not {"student", "target_before", "specialist"} <= arms.keys():
        return None
    before = arms["target_before"]["exact_match"]
    gained = arms["student"]["exact_match"] - before
    possible = arms["specialist"]["exact_match"] - before
    return gained / possible if possible > 0 else None


def gate(
    config: GateConfig, arms: Mapping[str, Figures], recovered: float | None
) -> dict[str, Any]:
    """The verdict on the student and, where it fails, the reason with its numbers."""
    if config.min_recovery is None and config.min_accuracy is None:
        unset = "no threshold is set: evaluate.gate.min_recovery or evaluate.gate.min_accuracy"
        return {"passed": False, "reasons": [unset]}
    reasons = []
    if config.min_recovery is not None and (recovered is None or recovered < config.min_recovery):
        reasons.append(f"recovery {_figure(recovered)} is under min_recovery {config.min_recovery}")
    accuracy = arms["student"]["exact_match"] if "student" in arms else None
    if config.min_accuracy is not None and (accuracy is None or accuracy < config.min_accuracy):
        reasons.append(
            f"exact match {_figure(accuracy)} is under min_accuracy {config.min_accuracy}"
        )
    return {"passed": not reasons, "reasons": reasons}


def _figure(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"
