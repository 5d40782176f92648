"""LoRA adapters (Hu et al., arXiv:2106.09685): made, initialised, written in PEFT's format."""

import hashlib
import math
import re
from pathlib import Path
from typing import Any, cast

import peft
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillhouse.configs.stages import LoraConfig
from stillhouse.errors import ConfigError, ModelError
from stillhouse.workers.folders import write_json

LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(.+)$")
ATTENTION = re.compile(r"attn|attention")  # self_attn, attn; GPT-NeoX, BLOOM and Falcon: attention


def put_adapter(model: PreTrainedModel, lora: LoraConfig, ref: str, seed: int) -> PeftModel:
    """Put a fresh adapter on `model`, in place; only the adapter is trainable.

    Layers below `lora.first_layer` get none: no gradient is asked of them, so autograd records
    nothing there. Raises `ConfigError` if no layer is left, `ModelError` if none is found.
    """
    adapted = get_peft_model(model, _peft_config(model, lora, ref))
    # PEFT fills in the folder that the model was loaded from, a path of this machine.
    adapted.peft_config["default"].base_model_name_or_path = ref
    for name, parameter in adapter_parameters(adapted).items():
        _initialise(name, parameter, seed)
    adapted.eval()  # no dropout anywhere: training draws no random numbers
    return adapted


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters by name, in the order of their names."""
    found = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return dict(sorted(found.items()))


def write_adapter(model: PeftModel, folder: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`; equal adapters, equal bytes."""
    tensors: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    whole = {name: value.detach().cpu().contiguous() for name, value in sorted(tensors.items())}
    save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    values: dict[str, Any] = model.peft_config["default"].to_dict()
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in values.items()}
    write_json(folder / "adapter_config.json", plain | {"inference_mode": True})


def _peft_config(model: PreTrainedModel, lora: LoraConfig, ref: str) -> peft.LoraConfig:
    layers, names = _linear_layers(model, attention_only=lora.targets == "attention")
    if lora.first_layer >= layers:
        raise ConfigError(
            f"lora.first_layer: expected below {layers}, the number of layers of {ref}, found "
            f"{lora.first_layer}; no layer would be left to adapt"
        )
    upper = list(range(lora.first_layer, layers)) if lora.first_layer else None
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=cast("int", lora.alpha),  # PEFT types it so, and only divides it
        target_modules=names,
        layers_to_transform=upper,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _linear_layers(model: PreTrainedModel, *, attention_only: bool) -> tuple[int, list[str]]:
    """Number of layers, and the last part of the names of the linear modules inside them."""
    layers, names = 0, set()
    for name, module in model.named_modules():
        found = LAYER.search(name)
        if found is None:
            continue
        layers = max(layers, int(found[1]) + 1)
        if isinstance(module, nn.Linear) and (ATTENTION.search(found[2]) or not attention_only):
            names.add(found[2].rsplit(".", 1)[-1])
    if not names:
        raise ModelError(
            "LoRA: expected linear modules under `layers.N` or `h.N`, found none in "
            f"{type(model).__name__}; this architecture cannot be adapted"
        )
    return layers, sorted(names)


@torch.no_grad()
def _initialise(name: str, parameter: nn.Parameter, seed: int) -> None:
    """B = 0, A = Kaiming uniform as in PEFT, drawn from a stream of the parameter's own."""
    if "lora_B" in name:
        parameter.zero_()
        return
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    drawn = torch.empty(parameter.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
    parameter.copy_(drawn)
