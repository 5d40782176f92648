"""From a run's name to its folder and its tables."""

from pathlib import Path
from typing import TYPE_CHECKING

from stillhouse.errors import ConfigError

if TYPE_CHECKING:
    from stillhouse.storage.catalog import Catalog
    from stillhouse.storage.layout import RunFolder


def find_run(run: str) -> "RunFolder":
    """A run by its folder, or by its name under runs/; ConfigError when there is none."""
    from stillhouse.storage.layout import RunFolder

    for root in (Path(run), Path("runs") / run):
        folder = RunFolder(root)
        if folder.plan.is_file():
            return folder
    raise ConfigError(f"no run {run!r}: expected a folder with plan.json, or its name under runs/")


def open_catalog(run: str) -> "Catalog":
    """The tables of a run's last start."""
    from stillhouse.pipelines.last_start import read_keys
    from stillhouse.storage.catalog import Catalog
    from stillhouse.storage.manifest import Manifest

    folder = find_run(run)
    return Catalog(folder, Manifest(folder), read_keys(folder))
