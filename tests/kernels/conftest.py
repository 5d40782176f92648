"""What tests of Triton kernels share: `pytest -m gpu` compiles them, else they are interpreted."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _overflows(numpy_may_overflow: None) -> None:
    """In every test."""


@pytest.fixture(autouse=True, scope="module")
def _rounds_bfloat16() -> Iterator[None]:
    """As a GPU does. The interpreter cuts bfloat16 off, which is twice the error."""
    # Imported here: this file is read before tests/conftest.py asks for the interpreter.
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    cast = interpreter_builder.cast_impl

    def rounding(source: Any, kind: Any) -> Any:
        if (source.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return cast(source, kind)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter_builder, "cast_impl", rounding)
        yield


@pytest.fixture
def debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    # Imported here: this file is read before tests/conftest.py asks for the interpreter.
    from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

    # The interpreter's own way to what `debug` compiles: assertions and integers that overflow.
    monkeypatch.setattr(interpreter_builder, "options", InterpreterOptions(debug=True))
