"""What a model folder must hold before anything is loaded from it."""

import json
from pathlib import Path
from typing import Any

from stillhouse.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MANIFEST = "stillhouse.json"  # of an exported student
_PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


def check_model_folder(folder: Path, name: str) -> None:
    """Raise ModelError unless `folder` is a whole safetensors model that needs no foreign code."""
    config = read_json(folder / "config.json", name)
    if "auto_map" in config:
        raise ModelError(
            f"{name}: its config.json has auto_map, which runs Python code from the model's "
            f"folder ({config['auto_map']}). Stillhouse never trusts remote code: use a model "
            f"whose architecture ({config.get('model_type')}) transformers has itself"
        )
    missing = missing_weights(folder)
    if missing is not None:
        raise ModelError(f"{name}: {missing}")


def missing_weights(folder: Path) -> str | None:
    """What is missing of a folder's safetensors, in words; None when nothing is."""
    if (folder / WEIGHTS).is_file():
        return None
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX, str(folder)).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            return f"expected a weight_map of tensors to files in {INDEX}, found {weight_map!r:.60}"
        shards = set(map(str, weight_map.values()))
        absent = sorted(shard for shard in shards if not (folder / shard).is_file())
        if not absent:
            return None
        return (
            f"expected the {len(shards)} shards of {INDEX} in {folder}, found {len(absent)} "
            f"missing, the first {absent[0]}. Fetch it again"
        )
    pickles = sorted({path.name for pattern in _PICKLES for path in folder.glob(pattern)})
    if pickles:
        return (
            f"expected safetensors weights, found only {', '.join(pickles)}: pickles run code when "
            f"they are loaded. Convert them on a machine you trust: model.save_pretrained(...)"
        )
    return f"expected {WEIGHTS} in {folder}, found none. Check the path, or fetch it again"


def refuse_missing_weights(loading_info: Any, name: str) -> None:
    """ModelError where transformers made up a weight: it fills what a file lacks with noise."""
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise ModelError(
            f"{name}: expected every weight of the model, found {len(missing)} missing, the first "
            f"{missing[0]}. Fetch it again"
        )


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Read a JSON object; raises ModelError when there is none."""
    if not path.is_file():
        raise ModelError(f"{name}: expected {path.name} in {path.parent}, found none")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: expected JSON, found {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
