"""How much quality each cache format costs a model: asks, measures, writes the table."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from stillhouse.errors import ConfigError
from stillhouse.storage.catalog import Catalog
from stillhouse.storage.durable import replace_file
from stillhouse.workers.cache_quality.formats import DEFAULT_FORMATS, parse_format
from stillhouse.workers.cache_quality.job import Progress, QualityJob
from stillhouse.workers.cache_quality.report import QualityReport, QualityRow
from stillhouse.workers.local import LocalWorkers
from stillhouse.workers.models.cache_folder import default_cache_root
from stillhouse.workers.protocols import ModelSpec

__all__ = [
    "QualityJob",
    "QualityReport",
    "QualityRow",
    "QualitySource",
    "ask_quality",
    "bench_cache_quality",
    "check_destination",
    "corpus_source",
    "text_source",
    "write_quality",
]
_PACKAGES = ("stillhouse", "torch", "transformers", "optimum-quanto", "hqq")
_TEXTS = """
SELECT prompt || response FROM corpus WHERE status = 'kept' AND split = ? ORDER BY example_id
"""


@dataclass(frozen=True, slots=True)
class QualitySource:
    """Texts to measure on and texts to calibrate on; `name` and `sha256` say which."""

    name: str
    sha256: str
    heldout: tuple[str, ...]
    calibration: tuple[str, ...]


def text_source(path: Path) -> QualitySource:
    """A UTF-8 file: calibrated on its first half, measured on its second.

    ConfigError when it cannot be read or holds no two lines.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text: expected a text file in UTF-8, found {error}") from error
    middle = text.find("\n", len(text) // 2) + 1 or len(text)
    if not text[middle:].strip():
        middle = text.rstrip().rfind("\n") + 1
    halves = (text[:middle], text[middle:])
    if not all(half.strip() for half in halves):
        raise ConfigError(f"--text: expected lines in both halves of {path}, found none in one")
    return QualitySource(path.name, hashlib.sha256(data).hexdigest(), halves[1:], halves[:1])


def corpus_source(name: str, catalog: Catalog) -> QualitySource:
    """A run's corpus: calibrated on what trains the target, measured on what is held out."""
    train, heldout = (
        tuple(text for (text,) in catalog.rows(_TEXTS, (split,))) for split in ("train", "heldout")
    )
    if not heldout or not train:
        raise ConfigError(
            f"--corpus: expected examples of both splits in run {name!r}, found {len(train)} to "
            f"train on and {len(heldout)} held out; run it to the end of `curate`, or give --text"
        )
    hashed = hashlib.sha256()
    for text in (*train, *heldout):
        hashed.update(hashlib.sha256(text.encode()).digest())
    return QualitySource(name, hashed.hexdigest(), heldout, train)


def ask_quality(
    source: QualitySource,
    formats: tuple[str, ...],
    seeds: int,
    tokens: int,
    calibration_tokens: int,
    window: int,
) -> QualityJob:
    """The job of a command line; no formats mean all of them. ConfigError for an unknown one."""
    forms = tuple(parse_format(name) for name in dict.fromkeys(formats or DEFAULT_FORMATS))
    return QualityJob(
        source.heldout, source.calibration, forms, seeds, window, tokens, calibration_tokens
    )


def bench_cache_quality(
    model: str, job: QualityJob, progress: Progress, notify: Callable[[str], None]
) -> QualityReport:
    """Load the model and measure every format."""
    return LocalWorkers(default_cache_root(), notify=notify).bench_cache(
        ModelSpec(model), job, progress
    )


def check_destination(path: Path) -> None:
    """Make its folder; ConfigError where `write_quality` could not write, before all the work."""
    if path.suffix == ".svg":
        raise ConfigError(f"--json: expected a name for the table, found that of a picture, {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--json: expected a file that can be written, found {error}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--json: expected a file that can be written, found {path}")


def write_quality(
    model: str, source: QualitySource, job: QualityJob, report: QualityReport, path: Path
) -> Path:
    """Write the table as JSON and, beside it, the picture; its path.

    ConfigError where they cannot be written.
    """
    from stillhouse.pipelines.cache_picture import draw_quality

    picture = path.with_suffix(".svg")
    head = {
        "model": model,
        "text": {"name": source.name, "sha256": source.sha256},
        "window": job.window,
        "seeds": job.seeds,
        "sinks": job.sinks,
        "recent": job.recent,
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "versions": dict(_versions()),
    }
    found: dict[str, Any] = head | report.as_json()
    try:
        replace_file(path, (json.dumps(found, indent=1) + "\n").encode())
        replace_file(picture, draw_quality(report, f"{model}: {report.tokens:,} tokens").encode())
    except OSError as error:
        raise ConfigError(
            f"--json: expected a file that can be written, found {error}. Name another"
        ) from error
    return picture


def _versions() -> Iterator[tuple[str, str | None]]:
    for package in _PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, None
