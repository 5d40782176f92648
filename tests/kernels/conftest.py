"""What tests of Triton kernels share: `pytest -m gpu` compiles them, else they are interpreted."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _interpreted(numpy_may_overflow: None, rounding_bfloat16: None) -> None:
    """In every test."""


@pytest.fixture
def debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    # Imported here: this file is read before tests/conftest.py asks for the interpreter.
    from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

    # The interpreter's own way to what `debug` compiles: assertions and integers that overflow.
    monkeypatch.setattr(interpreter_builder, "options", InterpreterOptions(debug=True))
