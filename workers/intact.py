"""Whether an exported model is still what was evaluated: its weights, its tokenizer, its plan."""

from pathlib import Path, PurePosixPath
from typing import Any

from stillhouse.errors import ModelError
from stillhouse.storage.integrity import sha256_of
from stillhouse.workers.models.model_folder import MANIFEST, read_json

# What engines and transformers look for in a model's folder, whatever its name.
_READ = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json", ".jinja", ".model",
         ".txt", ".py"}  # fmt: skip


def require_intact(folder: Path) -> None:
    """ModelError, with the hashes, for a file that is not the manifest's, such as the cache plan of
    another model, and for one more that an engine would read. A folder without a manifest is
    nobody's promise."""
    if not (folder / MANIFEST).exists():
        return
    wanted = _files(folder)
    for name, digest in wanted.items():
        found = sha256_of(folder / name) if (folder / name).is_file() else "no such file"
        if found != digest:
            raise ModelError(
                f"{folder / name}: expected sha256 {digest}, as {MANIFEST} has it, found {found}; "
                "it is not what was evaluated: deploy again"
            )
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.suffix in _READ and name not in {*wanted, MANIFEST}:
            raise ModelError(
                f"{path}: expected no file that {MANIFEST} does not list, found one of sha256 "
                f"{sha256_of(path)}; it was not evaluated: take it away, or deploy again"
            )


def _files(folder: Path) -> dict[str, str]:
    """The manifest's hashes; every name stays within the folder."""
    found: Any = read_json(folder / MANIFEST, folder.name).get("files")
    fits = isinstance(found, dict) and all(
        isinstance(digest, str) and ".." not in PurePosixPath(name).parts and name[:1] != "/"
        for name, digest in found.items()
    )
    if not fits:
        raise ModelError(
            f"{folder / MANIFEST}: expected a manifest with `files` and their hashes, found "
            f"{found!r:.200}; deploy again"
        )
    files: dict[str, str] = found
    return files
