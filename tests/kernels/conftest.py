"""What tests of Triton kernels share: `pytest -m gpu` compiles them, else they are interpreted."""

from collections.abc import Iterator

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def numpy_may_overflow() -> Iterator[None]:
    # The interpreter computes with NumPy, which warns where a GPU gives an infinity.
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where Triton's kernels run: interpreted, or compiled."""
    return str(request.param)


@pytest.fixture
def debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    # Imported here: this file is read before tests/conftest.py asks for the interpreter.
    from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

    # The interpreter's own way to what `debug` compiles: assertions and integers that overflow.
    monkeypatch.setattr(interpreter_builder, "options", InterpreterOptions(debug=True))
