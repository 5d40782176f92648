"""What a stage is given to work with: the recipe, the run's tables, and workers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stillhouse.configs.recipe import RecipeConfig
from stillhouse.pipelines.observer import Observer
from stillhouse.storage.layout import RunFolder
from stillhouse.storage.manifest import FileEntry, Manifest, ShardEntry
from stillhouse.storage.records import Record
from stillhouse.workers.protocols import ModelSpec, Workers

if TYPE_CHECKING:
    from stillhouse.storage.catalog import Catalog

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class StageRun:
    """One stage of one run. `keys` holds the stage itself and all it depends on."""

    stage: str
    key: str
    recipe: RecipeConfig
    folder: RunFolder
    manifest: Manifest
    keys: dict[str, str]
    workers: Workers
    observer: Observer = field(default_factory=Observer)

    @property
    def directory(self) -> Path:
        """The stage's own folder, for artifacts."""
        path = self.folder.stage_dir(self.stage, self.key)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def shards(self, stage: str) -> list[ShardEntry]:
        """A stage's committed shards, by name."""
        found = self.manifest.shards(stage, self.keys[stage])
        return [found[name] for name in sorted(found)]

    def files(self, stage: str, table: str, prefix: str = "") -> list[FileEntry]:
        """A stage's committed files of one table, of the shards whose name starts so."""
        shards = (shard for shard in self.shards(stage) if shard.shard.startswith(prefix))
        return [file for shard in shards for file in shard.files if file.table == table]

    def rows(self, files: Sequence[FileEntry], record: type[R]) -> Iterator[R]:
        """The rows of some files, in order, as records."""
        from stillhouse.storage.shards import read_rows

        for file in files:
            yield from read_rows(self.folder, file, record)

    @contextmanager
    def catalog(self) -> Iterator["Catalog"]:
        """Every table so far, for queries."""
        from stillhouse.storage.catalog import Catalog

        with Catalog(self.folder, self.manifest, self.keys) as catalog:
            yield catalog

    def facts(self, stage: str) -> dict[str, Any]:
        """What a finished stage said of itself."""
        entry = self.manifest.stage(stage, self.keys[stage])
        if entry is None:
            raise KeyError(f"{self.stage} asks for the facts of {stage}, which is not finished")
        return dict(entry.facts)

    def kept(self, stage: str) -> int:
        """How many rows a finished stage kept."""
        return sum(shard.counts.kept for shard in self.shards(stage))

    def adapter(self, stage: str) -> Path:
        """The adapter that a training stage left."""
        return self.folder.root / str(self.facts(stage)["adapter"])

    @property
    def base(self) -> ModelSpec:
        """The base model."""
        return ModelSpec(self.recipe.models.base)

    @property
    def specialist(self) -> ModelSpec:
        """The specialist: a whole model, or the base with its adapter."""
        models = self.recipe.models
        if models.specialist is not None:
            return ModelSpec(models.specialist)
        if models.adapter == "stage:specialize":
            return ModelSpec(models.base, self.adapter("specialize"))
        return ModelSpec(models.base, Path(str(models.adapter).removeprefix("peft:")).expanduser())

    @property
    def student(self) -> ModelSpec:
        """The target with what it learnt."""
        return ModelSpec(self.recipe.models.target, self.adapter("distill"))
