"""The data sets behind `builtin:` references: which module makes one, and from what."""

import difflib
import importlib
import os
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_type_hints

from stillhouse.errors import ConfigError, SourceError

Row = dict[str, str]


@dataclass(frozen=True, slots=True)
class Builtin:
    """A module with `CONFIG`, a dataclass of whole numbers and texts, and `build(split, config)`.

    `files` are those of the user's own folder, the option `folder`, that it reads.
    """

    module: str
    distribution: str | None = None
    files: tuple[str, ...] = ()

    def load(self) -> types.ModuleType:
        """The module; some import what takes a second."""
        return importlib.import_module(f"stillhouse.workers.sources.{self.module}")


BUILTINS: Mapping[str, Builtin] = {
    "icd10cm": Builtin("icd10cm", "simple-icd-10-cm"),
    "iso3166": Builtin("iso3166", "pycountry"),
    "banking77": Builtin("banking77", files=("train.csv", "test.csv")),
    "handbook": Builtin("handbook"),
    "elsewhere": Builtin("elsewhere"),
}


def require_builtin(name: str) -> Builtin:
    """Raise SourceError unless there is a builtin of this name."""
    if name not in BUILTINS:
        raise SourceError(f"builtin:{name}: expected one of {', '.join(BUILTINS)}, found {name!r}")
    return BUILTINS[name]


def package_version(name: str) -> str | None:
    """Version of the distribution a builtin reads; raises SourceError when it is missing."""
    distribution = require_builtin(name).distribution
    if distribution is None:
        return None
    try:
        return version(distribution)
    except PackageNotFoundError as error:
        raise SourceError(
            f"builtin:{name}: the package {distribution} is not installed. Install it: "
            f"pip install 'stillhouse[demo]'"
        ) from error


def files_of(name: str, options: Mapping[str, str], base_dir: Path) -> list[Path]:
    """The files of the user's that a builtin reads; raises SourceError where one is missing.

    They are in the option `folder`, else in the folder of its name under `$STILLHOUSE_DATA`.
    """
    builtin = require_builtin(name)
    shared = Path(os.environ.get("STILLHOUSE_DATA", "data")) / name
    folder = base_dir / Path(options.get("folder", shared)).expanduser()
    paths = [folder / file for file in builtin.files]
    for path in paths:
        if not path.is_file():
            raise SourceError(
                f"builtin:{name}: expected {', '.join(builtin.files)} in folder=<where they are>, "
                f"or in {name}/ under $STILLHOUSE_DATA; found no {path}"
            )
    return paths


def rows_of(name: str, options: Mapping[str, str], base_dir: Path) -> Iterator[Row]:
    """The rows of one split, the option `split`."""
    package_version(name)
    files = files_of(name, options, base_dir)
    given = {option: value for option, value in options.items() if option != "split"}
    if files:
        given["folder"] = str(files[0].parent)
    module = require_builtin(name).load()
    build: Callable[[str, Any], Iterator[Row]] = module.build
    try:
        return build(options.get("split", ""), module.CONFIG(**_values(module.CONFIG, given, name)))
    except ConfigError as error:
        raise SourceError(f"builtin:{name}: {error}") from error


def _values(config: Any, options: Mapping[str, str], name: str) -> dict[str, int | str]:
    """Values for the fields of `config`; those without a default must be given."""
    known = [field.name for field in fields(config)]
    hints = get_type_hints(config)
    values: dict[str, int | str] = {}
    for option, value in options.items():
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SourceError(
                f"builtin:{name}: expected split, {', '.join(known)}; found {option!r}{hint}"
            )
        if hints[option] is int and not value.isdecimal():
            raise SourceError(f"builtin:{name}: expected a whole number, found {option}={value}")
        values[option] = int(value) if hints[option] is int else value
    needed = [f.name for f in fields(config) if f.default is MISSING and f.name not in options]
    if needed:
        raise SourceError(f"builtin:{name}: expected {needed[0]}=<number>, found none")
    return values
