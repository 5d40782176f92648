"""The runner of one machine: local workers, data read from here."""

from importlib.util import find_spec
from pathlib import Path

from stillhouse.configs.recipe import RecipeConfig
from stillhouse.errors import ConfigError
from stillhouse.pipelines.observer import Observer
from stillhouse.pipelines.runner import Runner
from stillhouse.workers.local import LocalWorkers
from stillhouse.workers.models.cache_folder import default_cache_root
from stillhouse.workers.sources import reader


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
    cache_root = default_cache_root()
    workers = LocalWorkers(cache_root, recipe.execution.threads, observer.note)

    def fingerprint(ref: str) -> str:
        return reader.fingerprint(ref, cache_root, Path.cwd())

    return Runner(recipe, workers, fingerprint, observer)
