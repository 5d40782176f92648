"""From a run or a model to a server: what is served, in which cache, behind which key."""

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.configs.stages import CompressConfig
from stillhouse.errors import ConfigError
from stillhouse.pipelines.evaluated_cache import evaluated_cache
from stillhouse.storage.layout import RunFolder
from stillhouse.workers.cache import PLAN_FOLDER
from stillhouse.workers.models.cache_folder import default_cache_root
from stillhouse.workers.models.model_folder import MANIFEST, read_json
from stillhouse.workers.models.store import ModelStore
from stillhouse.workers.serving.serve_job import ServeJob as ServeJob
from stillhouse.workers.serving.serve_job import server_url as server_url
from stillhouse.workers.serving.served_cache import HALF, PLAN, ServedCache
from stillhouse.workers.serving.server import ServerProcess

RunningServer = ServerProcess  # for the command line, which speaks to pipelines alone
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A folder that an engine can load, and the name that requests give it."""

    folder: Path
    name: str

    @property
    def plan(self) -> Path | None:
        """The folder of its cache plan; None where it has none."""
        found = self.folder / PLAN_FOLDER
        return found if found.is_dir() else None

    def manifest(self) -> dict[str, Any] | None:
        """What it was evaluated as; None of a model that no run exported."""
        path = self.folder / MANIFEST
        return read_json(path, self.name) if path.exists() else None


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """As the command line gives them. key_file: read, or made with a new key; None for no key."""

    host: str = "127.0.0.1"
    port: int = 8000
    key_file: Path | None = None
    cache: str | None = None
    context: int | None = None
    dtype: str | None = None
    pool_gib: float | None = None
    drain: int = 30
    log_prompts: bool = False
    eager: bool = False


def served_run(folder: RunFolder) -> ServedModel:
    """The student that a finished run exported; ConfigError for none that was let in."""
    try:
        report: dict[str, Any] = json.loads(folder.report.read_text(encoding="utf-8"))
        deployed = report["deployment"]
        model, refused = folder.root / deployed["model"], deployed["refused"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"serve: expected a run with a deployed student in {folder.root}, found none "
            f"({error!r}); finish the run first"
        ) from error
    if refused:
        raise ConfigError(
            f"serve: expected a student that its run let in, found one that it refused: {refused}; "
            f"to serve it all the same, name its folder: {model}"
        )
    return ServedModel(model, deployed["name"])


def served_model(ref: str, notify: Callable[[str], None]) -> ServedModel:
    """A model by its reference, converted where it has to be; ModelError when there is none."""
    folder = ModelStore(notify=notify).folder(ref)
    name = ref.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    return ServedModel(folder.absolute(), name)


def ask_server(model: ServedModel, options: ServeOptions) -> ServeJob:
    """What to start, as it was evaluated unless the options say otherwise.

    ConfigError for options that do not go together.
    """
    manifest = model.manifest()
    return ServeJob(
        folder=model.folder,
        name=model.name,
        cache=_cache(model, manifest, options.cache),
        port=options.port,
        host=options.host,
        key=None if options.key_file is None else read_or_make_key(options.key_file),
        context=options.context,
        dtype=options.dtype or (manifest or {}).get("dtype") or "bfloat16",
        pool=None if options.pool_gib is None else round(options.pool_gib * GIB),
        drain=options.drain,
        log_prompts=options.log_prompts,
        eager=options.eager,
    )


def _cache(model: ServedModel, manifest: dict[str, Any] | None, asked: str | None) -> ServedCache:
    """The one that is asked for; else the one that the model was evaluated with, or 16 bits."""
    config = None if manifest is None else _compressed(model, manifest)
    wanted = asked
    if wanted is None:
        plain = PLAN if model.plan else HALF
        wanted = plain if config is None else evaluated_cache(config, model.plan is not None)
    if wanted == PLAN and model.plan is None:
        raise ConfigError(
            f"serve: expected a cache plan in {model.folder / PLAN_FOLDER}, found none; serve a "
            "run that has a compressed cache, or with --cache k4v4 or bf16"
        )
    folder = model.plan if wanted == PLAN else None
    sinks = 0 if config is None or wanted in (PLAN, HALF) else config.sinks
    return ServedCache(wanted, folder, sinks)


def _compressed(model: ServedModel, manifest: dict[str, Any]) -> CompressConfig:
    try:
        return CompressConfig(**manifest["cache"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{model.folder / MANIFEST}: expected the settings of a cache, found none that are "
            f"({error}); deploy again"
        ) from error


def default_key_file(port: int) -> Path:
    """Where a server's generated key lies, readable by its owner alone."""
    return default_cache_root() / "serve" / f"{port}.key"


def log_file(port: int) -> Path:
    """Where a server's output goes."""
    return default_cache_root() / "serve" / f"{port}.log"


def read_or_make_key(path: Path) -> str:
    """The key in a file, which is made with a random one where there is none."""
    if path.exists():
        return read_key(path)
    key = f"sk-{secrets.token_urlsafe(32)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(key + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--api-key-file {path}: expected a place for a new key, found {error}"
        ) from error
    return key


def read_key(path: Path) -> str:
    """The key in a file; ConfigError where there is none."""
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--api-key-file {path}: expected a readable key, found {error}"
        ) from error
    if not key or any(letter.isspace() for letter in key):
        raise ConfigError(f"--api-key-file {path}: expected one key without spaces, found none")
    return key


def roll_back_champion(name: str, uri: str | None, runs_root: Path) -> tuple[str, str]:
    """The versions that leave and take the alias `champion`; TrackingError as `roll_back`."""
    from stillhouse.storage.tracking.champions import roll_back
    from stillhouse.storage.tracking.database import default_uri

    return roll_back(uri or default_uri(runs_root), name)


def start_server(job: ServeJob) -> RunningServer:
    """Refuses what cannot be served, then starts; wait for it with `wait_until_ready`."""
    return ServerProcess(job, log_file(job.port))
