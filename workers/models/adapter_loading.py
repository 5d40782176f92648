"""LoRA adapters: checked against the base before they are attached."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillhouse.errors import ModelError
from stillhouse.workers.models.model_folder import read_json

if TYPE_CHECKING:
    from torch import nn

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."

Shape = tuple[int, ...]


def attach_adapter(model: "nn.Module", folder: Path) -> Any:
    """Return `model` inside a PEFT wrapper with the adapter of `folder` active, not trainable.

    Raises ModelError for a folder without safetensors and for an adapter of another base, naming
    the first tensor that does not fit.
    """
    from peft import PeftModel

    check_adapter(model, folder)
    with warnings.catch_warnings():
        # PEFT only warns of modules that got no weights; `_check_filled` refuses them.
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        try:
            wrapped = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise ModelError(
                f"adapter {folder}: expected a configuration that fits {ADAPTER_WEIGHTS}, found "
                f"{type(error).__name__}: {error}. Save it again with PEFT"
            ) from error
    _check_filled(wrapped, folder)
    return wrapped


def check_adapter(model: "nn.Module", folder: Path) -> None:
    """Compare every tensor of an adapter with the module it changes."""
    from torch import nn

    read_json(folder / "adapter_config.json", f"adapter {folder}")
    shapes = _adapter_shapes(folder)
    modules = dict(model.named_modules())
    for name, found in shapes.items():
        module, _, part = name.removeprefix(_PREFIX).rpartition(".lora_")
        if not part.startswith(("A.", "B.")):
            continue  # embeddings and saved modules: PEFT compares those itself
        changed = modules.get(module)
        if changed is None:
            raise ModelError(
                f"adapter {folder}: {name} changes a module {module!r} that the base "
                f"({type(model).__name__}) does not have. Name the base this adapter was trained on"
            )
        if isinstance(changed, nn.Linear):  # PEFT compares the shapes of others itself
            _check_shape(folder, name, part, tuple(changed.weight.shape), found)


def _check_shape(folder: Path, name: str, part: str, base: Shape, found: Shape) -> None:
    """A is (rank, inputs), B is (outputs, rank), the base's weight (outputs, inputs)."""
    rank = found[0] if part.startswith("A.") else found[-1]
    expected = (rank, base[1]) if part.startswith("A.") else (base[0], rank)
    if found != expected:
        raise ModelError(
            f"adapter {folder}: {name} expected shape {expected} for the base's weight of shape "
            f"{base}, found {found}. Name the base this adapter was trained on"
        )


def _adapter_shapes(folder: Path) -> dict[str, Shape]:
    from safetensors import SafetensorError, safe_open

    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        found = (
            "only adapter_model.bin, a pickle, which runs code when loaded" if pickled else "none"
        )
        raise ModelError(
            f"adapter {folder}: expected {ADAPTER_WEIGHTS}, found {found}. Save it again with "
            f"save_pretrained(..., safe_serialization=True)"
        )
    try:
        with safe_open(str(path), framework="pt") as tensors:
            names = list(tensors.keys())
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise ModelError(
            f"{path}: expected whole safetensors, found {error}. It was cut short: write it again"
        ) from error


def _check_filled(wrapped: Any, folder: Path) -> None:
    """Compare what the configuration made with what the file held."""
    from peft import get_peft_model_state_dict

    # Left at "auto", PEFT looks the base's name up on the hub, and warns when it is not there.
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    held = set(_adapter_shapes(folder))
    unused = sorted(held - set(expected))
    if unused:
        raise ModelError(
            f"adapter {folder}: {ADAPTER_WEIGHTS} holds {len(unused)} tensors that its "
            f"configuration does not ask for, the first {unused[0]}; they would be left out. Save "
            "it again"
        )
    unfilled = sorted(set(expected) - held)
    if unfilled:
        raise ModelError(
            f"adapter {folder}: its configuration asks for {len(unfilled)} tensors that "
            f"{ADAPTER_WEIGHTS} does not hold, the first {unfilled[0]}. Name the base this adapter "
            f"was trained on, or save it again"
        )
