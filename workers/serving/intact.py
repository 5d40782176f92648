"""Whether an exported model is still what was evaluated: its weights, its tokenizer, its plan."""

import json
from pathlib import Path
from typing import Any

from stillhouse.errors import ModelError
from stillhouse.storage.integrity import sha256_of
from stillhouse.workers.cache import PLAN_FOLDER
from stillhouse.workers.protocols import MANIFEST


def require_intact(folder: Path) -> None:
    """ModelError, with the hashes, for a file that is not the manifest's, such as the cache plan of
    another model. A folder without a manifest is nobody's promise."""
    path = folder / MANIFEST
    if not path.exists():
        return
    try:
        wanted: dict[str, Any] = json.loads(path.read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: expected a manifest with `files`, found {error!r}") from error
    for name, digest in wanted.items():
        found = sha256_of(folder / name) if (folder / name).is_file() else "no such file"
        if found != digest:
            raise ModelError(
                f"{folder / name}: expected sha256 {digest}, as {MANIFEST} has it, found {found}; "
                "it is not what was evaluated: deploy again"
            )
    for plan in sorted((folder / PLAN_FOLDER).rglob("*")):
        if plan.is_file() and plan.relative_to(folder).as_posix() not in wanted:
            raise ModelError(
                f"{plan}: expected no cache plan, as {MANIFEST} has none, found one of sha256 "
                f"{sha256_of(plan)}; it was not made for this model"
            )
