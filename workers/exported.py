"""An exported student with the cache that was evaluated: loaded once, it answers many callers."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stillhouse.configs.stages import CompressConfig
from stillhouse.errors import ModelError
from stillhouse.workers.cache import PLAN_FOLDER
from stillhouse.workers.device import prepare_device
from stillhouse.workers.divergence import compressed_cache_factory
from stillhouse.workers.generator import generate
from stillhouse.workers.intact import require_intact
from stillhouse.workers.models.language_model import load
from stillhouse.workers.models.model_folder import MANIFEST, read_json
from stillhouse.workers.models.store import ModelStore
from stillhouse.workers.protocols import CacheSpec, Completion, Decoding, Failed, ModelSpec


class ExportedModel:
    """Weights in float32 and the codecs of its cache; threads take turns."""

    def __init__(self, folder: Path) -> None:
        """Load a folder that `export` wrote; ModelError where it is not whole, or not the same."""
        cache = exported_cache(folder)
        require_intact(folder)
        self._lm = load(ModelStore(), ModelSpec(str(folder)), prepare_device())
        self._cache_factory = compressed_cache_factory(self._lm, cache.config, cache.plan)
        self._turn = threading.Lock()

    def answer(self, prompts: Sequence[str], how: Decoding) -> list[Completion | Failed]:
        """Answers in the order of the prompts, each on a compressed cache."""
        with self._turn:
            return generate(self._lm, prompts, how, self._cache_factory)


def exported_cache(folder: Path) -> CacheSpec:
    """The folder's plan where it has one, else the format of its manifest.

    ModelError for a folder without a manifest that says so.
    """
    settings: Any = read_json(folder / MANIFEST, folder.name).get("cache")
    plan = folder / PLAN_FOLDER
    try:
        return CacheSpec(CompressConfig(**settings), plan if plan.is_dir() else None)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{folder / MANIFEST}: expected the settings of a cache, found {settings!r:.200} "
            f"({error}); export the student again"
        ) from error
