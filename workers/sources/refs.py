"""Data references: what they mean, the files behind them, and a fingerprint of what they hold.

    jsonl:path   csv:path   parquet:path        files, relative ones from the working directory
    package:<dist>/<file>                       a file of an installed distribution, by its suffix
    hf:dataset@revision?split=train&config=…    a data set of the Hugging Face hub
    builtin:icd10cm?split=pool&categories=40&…  made from installed packages or the user's files

Standard library only: a finished run asks for fingerprints and must load neither pyarrow nor torch.
"""

import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args
from urllib.parse import parse_qsl

from stillhouse.errors import SourceError
from stillhouse.workers.models.cache_folder import file_digest
from stillhouse.workers.models.packages import SourceFile, package_file
from stillhouse.workers.sources.builtins import files_of, package_version, require_builtin

Format = Literal["jsonl", "csv", "parquet"]
Scheme = Literal["jsonl", "csv", "parquet", "package", "hf", "builtin"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
BUILDER = 2  # raise it when a builtin makes other rows from the same package and parameters


@dataclass(frozen=True, slots=True)
class DataRef:
    """A parsed reference; `revision` belongs to `hf:`, `options` to `hf:` and `builtin:`."""

    scheme: Scheme
    body: str
    revision: str | None = None
    options: tuple[tuple[str, str], ...] = ()


def parse(ref: str) -> DataRef:
    """Take a reference apart; raises SourceError naming the nearest right one."""
    scheme, colon, body = ref.partition(":")
    known = list(get_args(Scheme))
    if not colon or scheme not in known:
        raise SourceError(
            f"data reference {ref!r}: expected one of {', '.join(name + ':' for name in known)} "
            f"found {scheme + colon!r}{_hint(scheme, ref, known)}"
        )
    if not body:
        raise SourceError(f"data reference {ref!r}: nothing follows {scheme + ':'!r}")
    if scheme not in {"hf", "builtin"}:
        return DataRef(cast(Scheme, scheme), body)
    name, _, query = body.partition("?")
    options = _options(ref, query)
    if scheme == "builtin":
        require_builtin(name)
        return DataRef("builtin", name, None, options)
    name, _, revision = name.partition("@")
    if not _COMMIT.fullmatch(revision):
        raise SourceError(
            f"data reference {ref!r}: expected a 40-digit commit, because a branch may hold other "
            f"rows tomorrow; found {revision or 'none'}. Write hf:{name}@<commit>?split=train"
        )
    return DataRef("hf", name, revision, options)


def _hint(scheme: str, ref: str, known: list[str]) -> str:
    suffix = Path(ref).suffix.removeprefix(".")
    if suffix in get_args(Format):
        return f"; did you mean {suffix}:{ref.rpartition(':')[2]}?"
    near = difflib.get_close_matches(scheme, known, n=1)
    return f"; did you mean {near[0]}:?" if near else ""


def _options(ref: str, query: str) -> tuple[tuple[str, str], ...]:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise SourceError(
            f"data reference {ref!r}: expected name=value&…, found {query!r}"
        ) from error
    names = [name for name, _ in pairs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise SourceError(f"data reference {ref!r}: {twice[0]!r} is given twice")
    return tuple(sorted(pairs))


def data_file(ref: DataRef, base_dir: Path) -> tuple[SourceFile, Format]:
    """The file behind a `jsonl:`, `csv:`, `parquet:` or `package:` reference, and its format."""
    if ref.scheme == "package":
        file = package_file(ref.body, SourceError)
        suffix = Path(file.name).suffix.removeprefix(".")
        if suffix not in get_args(Format) or len(file.pieces) != 1:
            raise SourceError(
                f"package:{ref.body}: expected a .jsonl, .csv or .parquet file, found {file.name}"
            )
        return file, cast(Format, suffix)
    path = base_dir / Path(ref.body).expanduser()
    if not path.is_file():
        raise SourceError(_missing(ref, path))
    return SourceFile(path.name, (path,)), cast(Format, ref.scheme)


def _missing(ref: DataRef, path: Path) -> str:
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{ref.scheme}:{ref.body}: expected a file at {path}, found none{hint}"


def fingerprint(ref: str, cache_root: Path, base_dir: Path) -> str:
    """A hash of what a reference holds: contents of files, the hub's revision, or parameters."""
    parsed = parse(ref)
    if parsed.scheme == "hf":
        return _hash(["hf", parsed.body, parsed.revision, parsed.options])
    if parsed.scheme == "builtin":
        return _builtin_fingerprint(parsed, cache_root, base_dir)
    file, form = data_file(parsed, base_dir)
    return _hash([form, file_digest(file.pieces, cache_root)])


def _builtin_fingerprint(ref: DataRef, cache_root: Path, base_dir: Path) -> str:
    options = dict(ref.options)
    made_from = [package_version(ref.body)]
    made_from += [
        file_digest((file,), cache_root) for file in files_of(ref.body, options, base_dir)
    ]
    options.pop("folder", None)  # where the files lie changes no row
    return _hash(["builtin", ref.body, BUILDER, made_from, sorted(options.items())])


def _hash(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
