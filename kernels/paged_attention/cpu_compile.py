"""From a specification to machine code for this processor, kept in memory and on disk.

Compiling takes a tenth of a second to a second; a fitted cache has a format for every layer. Object
code lies in `compiled/` of `$STILLHOUSE_CACHE`, else of `stillhouse` in the XDG cache folder, under
a name that hashes all it depends on, behind its own digest. A folder that cannot be written is no
error: the next process compiles again.
"""

import contextlib
import ctypes
import hashlib
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from stillhouse.kernels.paged_attention import cpu_ir, cpu_lanes, cpu_unpack, pages
from stillhouse.kernels.paged_attention.cpu_ir import NAME, DecodeSpec, emit

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURE = (
    _POINTER, _POINTER, _LONG, _POINTER, _POINTER, _LONG, _POINTER, _LONG, _LONG, _POINTER,
    _POINTER, _POINTER, _FLOAT, _POINTER, _POINTER,
)  # fmt: skip
_DIGEST = 32  # bytes of SHA-256
_SOURCES = (cpu_ir, cpu_lanes, cpu_unpack, pages, sys.modules[__name__])  # what the code depends on


@dataclass(frozen=True, slots=True)
class Compiled:
    """A function, and the engine that keeps its code in memory."""

    call: Any
    engine: Any


@dataclass(frozen=True, slots=True)
class Processor:
    """What code is made for. permute: how a table of 16 floats is read (`DecodeSpec`)."""

    permute: str
    name: str
    features: str

    def machine(self) -> Any:
        """A new one: an engine owns its own."""
        target = llvm.Target.from_default_triple()
        return target.create_target_machine(cpu=self.name, features=self.features, opt=3)


@cache
def processor() -> Processor:
    """This one."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    found = llvm.get_host_cpu_features()
    permute = "avx512" if found.get("avx512f") else "avx2" if found.get("avx2") else ""
    # 512 bits wherever they are: LLVM holds back on processors that clock down for them.
    features = found.flatten() + (",-prefer-256-bit" if permute == "avx512" else "")
    return Processor(permute, llvm.get_host_cpu_name(), features)


@cache
def compiled(spec: DecodeSpec) -> Compiled:
    """The function of `cpu_ir.emit`."""
    folder = _folder()
    path = None if folder is None else folder / f"{_key(spec)}.o"
    code = None if path is None else _kept(path)
    if code is None:
        code = _compile(spec)
        if path is not None:
            _keep(path, code)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), processor().machine())
    engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return Compiled(ctypes.CFUNCTYPE(None, *_SIGNATURE)(engine.get_function_address(NAME)), engine)


def assembly(spec: DecodeSpec) -> str:
    """What a person reads."""
    machine = processor().machine()
    text: str = machine.emit_assembly(_optimised(spec, machine))
    return text


def _compile(spec: DecodeSpec) -> bytes:
    machine = processor().machine()
    code: bytes = machine.emit_object(_optimised(spec, machine))
    return code


def _optimised(spec: DecodeSpec, machine: Any) -> Any:
    module = llvm.parse_assembly(emit(spec))
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=1)
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return module


def _key(spec: DecodeSpec) -> str:
    source = b"".join(Path(str(module.__file__)).read_bytes() for module in _SOURCES)
    host = processor()
    triple = llvm.get_default_triple()
    parts = (repr(spec), triple, host.name, host.features, llvmlite.__version__)
    return hashlib.sha256(source + "\0".join(parts).encode()).hexdigest()


def _folder() -> Path | None:
    """As `workers.models.cache_folder` has it; None for a user without a home."""
    given = os.environ.get("STILLHOUSE_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(shared).expanduser() if shared else Path.home() / ".cache"
        return (Path(given).expanduser() if given else root / "stillhouse") / "compiled"
    except RuntimeError:
        return None


def _kept(path: Path) -> bytes | None:
    """Code that was kept; None for none, and for a file that is not whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, code = data[:_DIGEST], data[_DIGEST:]
    return code if hashlib.sha256(code).digest() == digest else None


def _keep(path: Path, code: bytes) -> None:
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        Path(partial).replace(path)
