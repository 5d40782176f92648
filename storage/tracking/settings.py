"""How MLflow is made to behave inside a run: quiet, without telemetry, with short retries."""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the next flush is the retry that matters
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # it sets its own levels when it is imported
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


@contextlib.contextmanager
def mlflow_quiet() -> Iterator[None]:
    """Import and call MLflow inside this: some of it is read when MLflow is first imported.

    What the environment already says wins.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    for name, level in (("mlflow", "WARNING"), ("alembic", "WARNING")):
        logging.getLogger(name).setLevel(level)
    logging.getLogger("mlflow.transformers").setLevel("ERROR")  # it looks for cards on the hub
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Any type hint is inferred")  # on import
        warnings.filterwarnings("ignore", "The ``noload`` loader strategy")  # of its tables
        yield
