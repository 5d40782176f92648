"""One row of cache_cpu.py: a process of its own, so that the peak of its memory is its own.

    python benchmarks/cache_step.py plan|measure --text FILE --model REF --plans FOLDER
        --context N --steps N --sinks N --formats NAME …

`plan` fits a cache for each fitted format; `measure` prints its row as JSON.
"""

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PEERS = ("float32", "float16")
PACKED = "-packed"  # generated tokens read the packed vectors
CHUNK = 128
CALIBRATION = 4096  # tokens; what is stored and how long that takes do not depend on the fit


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

    def clear(self) -> None:
        """Forget what was counted."""
        for clock in (self.cache, self.encode, self.decode):
            clock.now = 0.0


def main() -> None:
    """Fit, or measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=("plan", "measure"))
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--plans", type=Path, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--formats", nargs="+", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--sinks", type=int, required=True)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    if asked.task == "plan":
        calibrated(asked)
        return
    [form] = asked.formats
    print(json.dumps(measure(asked, form, asked.context)))


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
    found = calibrate(lm, rows, sinks=asked.sinks, recent=0, context=asked.context)
    for form in {form.removesuffix(PACKED) for form in asked.formats}:
        if form.startswith("fitted"):
            found.plan_of_bits(int(form[-1])).save(asked.plans / form)


def measure(asked: argparse.Namespace, form: str, context: int) -> dict[str, Any]:
    """Read the text into a cache, then generate; see the module's text."""
    import torch

    lm = loaded(asked)
    ids = lm.encode_prompt(asked.text.read_text()[: 8 * (context + asked.steps) + 1000])
    if len(ids) < context + asked.steps or lm.context < context + asked.steps:
        found = min(len(ids), lm.context)
        raise SystemExit(f"expected a text and a context of {context + asked.steps}, found {found}")
    tokens = torch.tensor([ids[: context + asked.steps]])
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
        clocks.clear()
        for at in range(context, context + asked.steps):
            began = time.perf_counter()
            lm.model(tokens[:, at : at + 1], past_key_values=cache)
            times.append(time.perf_counter() - began)
            clocks.step()
    stored, tables = allocated(cache)
    return {
        "format": form,
        "context": context,
        "step_seconds": statistics.median(times),
        "cache_seconds": clocks.cache.median,
        "encode_seconds": clocks.encode.median,
        "decode_seconds": clocks.decode.median,
        "cache_bytes": stored,
        "table_bytes": tables,
        "peak_bytes": resident("VmHWM") - before,
    }


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
    return ObliviousScheme(CacheFormat(int(form[1]), int(form[3]), sinks=asked.sinks))


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


if __name__ == "__main__":
    main()
