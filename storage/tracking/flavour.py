"""A student's folder as an MLflow model: transformers' flavour, and ours for what scores with it.

`mlflow.transformers` knows nothing of our cache, so a module of ours loads `python_function`. It is
named and not imported: scoring takes an installed Stillhouse.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stillhouse import __version__
from stillhouse.storage.tracking.fields import release

if TYPE_CHECKING:
    from mlflow.models import Model, ModelSignature

ErrorName = Literal["BAD_REQUEST", "INTERNAL_ERROR"]
LOADER = "stillhouse.pipelines.registered"
PROMPT = "prompt"  # the column of the prompts
_PYFUNC = "python_function"
_PACKAGES = ("torch", "transformers")


def save_model(
    path: str, mlflow_model: "Model", *, folder: Path, task: str, decoding: Mapping[str, Any]
) -> None:
    """What `Model.log` asks of a flavour: write the model to `path`, without loading its weights.

    decoding: `max_new_tokens` and `stop` where a request names none.
    """
    import mlflow.transformers
    from mlflow.models.model import MLMODEL_FILE_NAME

    mlflow.transformers.save_model(
        str(folder),
        path,
        task=task,
        mlflow_model=mlflow_model,
        signature=_signature(decoding),
        # named, because inferring them would load the model
        pip_requirements=[
            f"stillhouse=={__version__}",
            *(f"{package}=={release(package)}" for package in _PACKAGES),
        ],
    )
    ours = {"loader_module": LOADER, "data": mlflow_model.flavors["transformers"]["model_binary"]}
    mlflow_model.add_flavor(_PYFUNC, **mlflow_model.flavors[_PYFUNC] | ours)
    mlflow_model.save(str(Path(path) / MLMODEL_FILE_NAME))


def scoring_error(message: str, code: ErrorName) -> Exception:
    """What a scoring server answers with 400 or 500 and the message."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ErrorCode

    return MlflowException(message, error_code=ErrorCode.Value(code))


def _signature(decoding: Mapping[str, Any]) -> "ModelSignature":
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    params = [
        ParamSpec("max_new_tokens", "long", decoding["max_new_tokens"]),
        ParamSpec("stop", "string", list(decoding["stop"]), shape=(-1,)),
        ParamSpec("temperature", "double", 0.0),
        ParamSpec("seed", "long", 0),
    ]
    return ModelSignature(
        inputs=Schema([ColSpec("string", PROMPT)]),
        outputs=Schema([ColSpec("string")]),
        params=ParamSchema(params),
    )
