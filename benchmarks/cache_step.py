"""One row of cache_cpu.py: a process of its own, so that the peak of its memory is its own.

    python -m benchmarks.cache_step plan|measure --text FILE --model REF --plans FOLDER
        --context N --steps N --sinks N --formats NAME … [--device cuda]

`plan` fits a cache for each fitted format; `measure` prints its row as JSON. On CUDA the model is
in bfloat16, memory is what torch's allocator counts, and a cache's own seconds are those of as many
steps more, because a clock inside of a step has to wait for the device.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.cache_clocks import Clock, Clocks, Cuda, Host, Wait

PEERS = ("float32", "float16", "bfloat16")
PACKED = "-packed"  # generated tokens read the packed vectors
CHUNK = 128
CALIBRATION = 4096  # tokens; what is stored and how long that takes do not depend on the fit


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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    if asked.task == "plan":
        calibrated(asked)
        return
    [form] = asked.formats
    print(json.dumps(measure(asked, form, asked.context)))


def loaded(asked: argparse.Namespace, dtype: str) -> Any:
    """The model on its device, on that many threads."""
    import torch

    from stillhouse.workers.models.language_model import load
    from stillhouse.workers.models.store import ModelStore
    from stillhouse.workers.protocols import ModelSpec

    torch.set_num_threads(asked.threads)
    return load(ModelStore(), ModelSpec(asked.model), asked.device, dtype)


def calibrated(asked: argparse.Namespace) -> None:
    """A plan for each fitted format, in the folder of plans; for a GPU, one that it reads."""
    from stillhouse.workers.calibrator import calibrate, calibration_rows

    lm = loaded(asked, "float32")
    rows = calibration_rows(lm, [asked.text.read_text()], CALIBRATION)
    groups: Any = 1 if asked.device == "cuda" else 3
    found = calibrate(lm, rows, sinks=asked.sinks, recent=0, context=asked.context, groups=groups)
    for form in {form.removesuffix(PACKED) for form in asked.formats}:
        if form.startswith("fitted"):
            found.plan_of_bits(int(form[-1])).save(asked.plans / form)


def measure(asked: argparse.Namespace, form: str, context: int) -> dict[str, Any]:
    """Read the text into a cache, then generate; see the module's text."""
    import torch

    from stillhouse.workers.cache.page_storage import PageStorage

    device = Cuda() if asked.device == "cuda" else Host()
    lm = loaded(asked, "bfloat16" if device.cuda else "float32")
    ids = lm.encode_prompt(asked.text.read_text()[: 8 * (context + 2 * asked.steps) + 1000])
    needed = context + asked.steps * (1 + device.cuda)
    if len(ids) < needed or lm.context < needed:
        found = min(len(ids), lm.context)
        raise SystemExit(f"expected a text and a context of {needed}, found {found}")
    tokens = torch.tensor([ids[:needed]], device=asked.device)
    clocks = Clocks()
    scheme = scheme_of(lm, asked, form)
    if scheme is not None:
        scheme = timed_scheme(scheme, clocks)
        # Pages are encoded and written in one launch.
        time_method(PageStorage, "append_both", clocks.encode)
    with torch.inference_mode():
        prefill(lm, tokens[:, : CHUNK + 1], empty_cache(lm, form, scheme, Clock()))
        device.watch()
        cache = empty_cache(lm, form, scheme, clocks.cache)
        prefill(lm, tokens[:, :context], cache)
        if device.cuda:
            times = steps(lm, tokens[:, context : context + asked.steps], cache, device.wait)
            clocks.start(device.wait)
            steps(lm, tokens[:, context + asked.steps :], cache, device.wait, clocks)
        else:
            clocks.start(device.wait)
            times = steps(lm, tokens[:, context:], cache, device.wait, clocks)
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
        "peak_bytes": device.grown(),
    }


def steps(
    lm: Any, tokens: Any, cache: Any, wait: Wait, clocks: Clocks | None = None
) -> list[float]:
    """Seconds of each generated token."""
    times = []
    for at in range(tokens.shape[1]):
        wait()
        began = time.perf_counter()
        lm.model(tokens[:, at : at + 1], past_key_values=cache)
        wait()
        times.append(time.perf_counter() - began)
        if clocks is not None:
            clocks.step()
    return times


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
        cache = half_cache(config) if form == "float16" else DynamicCache(config=config)
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


def time_method(kind: type, name: str, clock: Clock) -> None:
    """A method of every object of a class."""
    setattr(kind, name, clock.around(getattr(kind, name)))


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


if __name__ == "__main__":
    main()
