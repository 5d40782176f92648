"""The runner of one machine: local workers, data read from here."""

import os
from importlib.util import find_spec
from pathlib import Path

from stillhouse.configs.recipe import RecipeConfig
from stillhouse.errors import ConfigError
from stillhouse.pipelines.observer import Observer
from stillhouse.pipelines.runner import Runner
from stillhouse.workers.local import LocalWorkers
from stillhouse.workers.models.cache_folder import default_cache_root
from stillhouse.workers.sources import reader


def _missing_keys(recipe: RecipeConfig) -> list[str]:
    """Environment variables that should hold an endpoint's key and do not."""
    endpoints = (generator.endpoint for generator in recipe.expand.generators)
    names = (endpoint.key_env for endpoint in endpoints if endpoint is not None)
    return [name for name in names if name is not None and not os.environ.get(name)]


def local_runner(recipe: RecipeConfig, observer: Observer | None = None) -> Runner:
    """Return a runner whose models run in this process; nothing heavy is imported yet.

    ConfigError for an engine that is not installed: the last stage would find out.
    """
    observer = observer or Observer()
    if recipe.deploy.engine == "vllm" and find_spec("vllm") is None:
        raise ConfigError(
            "deploy.engine: expected vLLM, found none; run `make setup-serving` and use "
            ".venv-serving, install stillhouse[vllm], or deploy with engine: transformers"
        )
    for name in _missing_keys(recipe):  # no error: what is finished needs no key
        observer.note(f"expand asks an endpoint with the key in ${name}, which is not set")
    cache_root = default_cache_root()
    workers = LocalWorkers(cache_root, recipe.execution.threads, observer.note)

    def fingerprint(ref: str) -> str:
        return reader.fingerprint(ref, cache_root, Path.cwd())

    return Runner(recipe, workers, fingerprint, observer)
