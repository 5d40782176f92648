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
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm

from stillhouse.kernels.paged_attention.cpu_chunk_ir import emit_chunk
from stillhouse.kernels.paged_attention.cpu_chunk_rows import ChunkSpec
from stillhouse.kernels.paged_attention.cpu_ir import NAME, emit
from stillhouse.kernels.paged_attention.cpu_spec import DecodeSpec

Spec = DecodeSpec | ChunkSpec
_DIGEST = 32  # bytes of SHA-256
# What the code depends on.
_HERE = Path(__file__).parent
_SOURCES = (*sorted(_HERE.glob("cpu_*.py")), _HERE / "pages.py", _HERE / "units.py")


@dataclass(frozen=True, slots=True)
class Compiled:
    """A function of a job's address, and the engine that keeps its code in memory."""

    call: Any
    address: int
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
    llvm.initialize_native_asmparser()
    found = llvm.get_host_cpu_features()
    permute = "avx512" if found.get("avx512f") else "avx2" if found.get("avx2") else ""
    # 512 bits wherever they are: LLVM holds back on processors that clock down for them.
    features = found.flatten() + (",-prefer-256-bit" if permute == "avx512" else "")
    return Processor(permute, llvm.get_host_cpu_name(), features)


@cache
def compiled(spec: Spec) -> Compiled:
    """The function of `cpu_ir.emit`, or of `cpu_chunk_ir.emit_chunk`."""
    folder = _folder()
    path = None if folder is None else folder / f"{_key(spec)}.o"
    code = None if path is None else _kept(path)
    if code is None:
        code = _object(_text(spec))
        if path is not None:
            _keep(path, code)
    return _ready(code)


def compiled_text(text: str) -> Compiled:
    """A module of LLVM code with a function `run(int64 *job)`; not kept on disk."""
    return _ready(_object(text))


def assembly(spec: Spec) -> str:
    """What a person reads."""
    return assembly_of(_text(spec))


def assembly_of(text: str) -> str:
    """Of a module of LLVM code."""
    machine = processor().machine()
    found: str = machine.emit_assembly(_optimised(text, machine))
    return found


def _ready(code: bytes) -> Compiled:
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), processor().machine())
    engine.add_object_file(llvm.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(NAME)
    return Compiled(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address), address, engine)


def _text(spec: Spec) -> str:
    return emit_chunk(spec) if isinstance(spec, ChunkSpec) else emit(spec)


def _object(text: str) -> bytes:
    machine = processor().machine()
    code: bytes = machine.emit_object(_optimised(text, machine))
    return code


def _optimised(text: str, machine: Any) -> Any:
    module = llvm.parse_assembly(text)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=1)
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return module


def _key(spec: Spec) -> str:
    source = b"".join(path.read_bytes() for path in _SOURCES)
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
