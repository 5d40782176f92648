"""What is refused before a server is started: the engine would refuse it later, or serve it
differently."""

import ipaddress
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stillhouse.errors import ConfigError, ModelError
from stillhouse.workers.intact import require_intact
from stillhouse.workers.models.model_folder import read_json
from stillhouse.workers.serving.serve_job import BLOCK, ServeJob
from stillhouse.workers.serving.served_cache import HALF


def require_startable(job: ServeJob) -> None:
    """ConfigError or ModelError for what the engine would refuse later, or serve differently."""
    if find_spec("vllm") is None:
        raise ConfigError(
            "serve: expected vLLM, found none; run `make setup-serving` and use .venv-serving, or "
            "install stillhouse[vllm]"
        )
    if not is_loopback(job.host) and job.key is None:
        raise ConfigError(
            f"serve: expected an API key for {job.host}, which others reach, found none; name a "
            "file with --api-key-file, or serve on 127.0.0.1"
        )
    _require_context(job)
    _require_free(job.host, job.port)
    require_intact(job.folder)
    if job.cache.format != HALF:
        _ = job.cache.scheme  # a plan that cannot be read is said now
        _require_same_layers(job)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; names but `localhost` may be anyone's."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _config(folder: Path) -> dict[str, Any]:
    found = read_json(folder / "config.json", str(folder))
    text = found.get("text_config")
    return text if isinstance(text, dict) else found


def most_context(folder: Path) -> int | None:
    """Tokens of a sequence that a model was trained for; None where its configuration is silent."""
    most = _config(folder).get("max_position_embeddings")
    return most if isinstance(most, int) else None


def _require_context(job: ServeJob) -> None:
    most = most_context(job.folder)
    if job.context is not None and most is not None and job.context > most:
        raise ConfigError(
            f"serve: expected a context of at most {most:,} tokens, as {job.name} was trained "
            f"for, found {job.context:,}; lower --max-context"
        )


def _require_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"serve: expected a free port, found {host}:{port} in use or not ours ({error}); "
                "choose another with --port"
            ) from error


def _require_same_layers(job: ServeJob) -> None:
    config = _config(job.folder)
    try:
        queries = config["num_attention_heads"]
        heads = config.get("num_key_value_heads") or queries
        dim = config.get("head_dim") or config["hidden_size"] // queries
        count = config["num_hidden_layers"]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ModelError(
            f"{job.folder}: expected num_attention_heads, hidden_size and num_hidden_layers in "
            f"config.json, found {error!r}; serve with --cache bf16"
        ) from error
    plan = getattr(job.cache.scheme, "plan", None)
    if plan is not None and len(plan.layers) != count:
        raise ModelError(
            f"{job.cache.folder}: expected a plan for {count} layers, as {job.name} has, found one "
            f"for {len(plan.layers)}; it is of another model"
        )
    for layer in range(count):
        job.cache.layer(layer, heads, dim, BLOCK)
