"""Codecs compute in float32, also inside a model that runs under autocast."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from stillhouse.kernels.turboquant.contract import tensors_of

Codec = TypeVar("Codec")
Given = TypeVar("Given")
Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def in_float32(
    method: Callable[Concatenate[Codec, Given, Rest], Result],
) -> Callable[Concatenate[Codec, Given, Rest], Result]:
    """A method of a tensor or a record, with autocast off: it would round matrix products."""

    @wraps(method)
    def exact(codec: Codec, given: Given, /, *args: Rest.args, **kwargs: Rest.kwargs) -> Result:
        one = given if isinstance(given, Tensor) else tensors_of(given)[0]
        device = one.device.type
        if not torch.is_autocast_enabled(device):
            return method(codec, given, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return method(codec, given, *args, **kwargs)

    return exact
