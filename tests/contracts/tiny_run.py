"""Runs of the recipe `tiny` in processes of their own, for the contracts."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
STAGES = (
    "ingest",
    "specialize",
    "score",
    "select",
    "expand",
    "curate",
    "distill",
    "evaluate",
    "compress",
    "deploy",
)
LIMIT = 600  # seconds a process may take; a cold cache makes toy models and tokenizers first


@dataclass(frozen=True, slots=True)
class Finished:
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """Standard error with the terminal's line breaks taken out."""
        return " ".join(self.err.split())


def environment(cache_root: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "STILLHOUSE_CACHE": str(cache_root),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
        **more,
    }


def command(*arguments: str) -> list[str]:
    """The real command line; warnings of libraries stay warnings."""
    return [sys.executable, "-m", "stillhouse", *arguments]


def stillhouse(cache_root: Path, *arguments: str, cwd: Path = ROOT, **variables: str) -> Finished:
    """Run the command line to its end."""
    variables.setdefault("PYTHONPATH", str(ROOT))
    done = subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(cache_root, **variables),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def keys_of(folder: RunFolder) -> dict[str, str]:
    """The keys of the recipe that was last started in a folder."""
    keys: dict[str, str] = json.loads(folder.plan.read_text())
    return keys


def tables_of(folder: RunFolder, stage: str) -> dict[str, str]:
    """{file: sha256} of every file under a stage, read from disk and not from the manifest."""
    root = folder.stage_dir(stage, keys_of(folder)[stage])
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): _sha256(path) for path in files}


def facts_of(folder: RunFolder, stage: str) -> dict[str, Any]:
    """All that the manifest says of a finished stage, but for its times."""
    manifest, key = Manifest(folder), keys_of(folder)[stage]
    entry = manifest.stage(stage, key)
    assert entry is not None, f"{stage} is not finished"
    shards = manifest.shards(stage, key)
    return {
        "files": entry.files,
        "counts": entry.counts,
        "tokens": entry.tokens,
        "facts": entry.facts,
        "shards": {name: (s.files, s.counts, s.tokens) for name, s in sorted(shards.items())},
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
