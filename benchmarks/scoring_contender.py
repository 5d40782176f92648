"""One contender of the scoring benchmark, in a process of its own.

    python -m benchmarks.scoring_contender NAME --model FOLDER --works FILE --batch-size N
        --threads N [--dtype D] [--eager]

It loads and says so on a line of JSON; then for each line with the name of a work it scores that
and prints seconds, those of all its threads, the peak of its resident memory meanwhile, and the
log-probabilities. What libraries print goes to stderr.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

Ids = Sequence[tuple[list[int], list[int]]]
# Log-probabilities of each answer's tokens, or of whole answers where there are no others.
Found = list[list[float]] | list[float]
RANK = 16


def main() -> None:
    """Load, say so, score what is asked for until there is nothing more."""
    asked = arguments()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    works = json.loads(asked.works.read_text())
    try:
        score = CONTENDERS[asked.name](asked)
    except ImportError as error:
        reason = f"expected {PACKAGES.get(asked.name, 'stillhouse')}, found {error}"
        say(out, {"missing": f"{asked.name}: {reason}"})
        return
    say(out, {"loaded_bytes": resident("VmRSS")})
    for line in sys.stdin:
        work = works[line.strip()]
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        start, cpu = time.perf_counter(), time.process_time()
        found = score(work)
        took = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
            "peak_bytes": resident("VmHWM"),
        }
        say(out, took | {"logps": found})


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", choices=sorted(CONTENDERS))
    parser.add_argument("--model", required=True)
    parser.add_argument("--works", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true")
    return parser.parse_args()


def say(out: TextIO, what: dict[str, Any]) -> None:
    """One line for the parent."""
    out.write(json.dumps(what) + "\n")
    out.flush()


def resident(kind: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since the peak was reset."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


Score = Callable[[dict[str, Any]], Found]


def stillhouse(asked: argparse.Namespace) -> Score:
    """Our scorer, one model, from texts."""
    from stillhouse.workers.scorer import response_logps

    lm = own_model(asked)
    return lambda work: [
        scored(row).logp for row in response_logps(lm, own_pairs(work), asked.batch_size)
    ]


def stillhouse_pair(asked: argparse.Namespace) -> Score:
    """Our scorer, a random adapter on and off; answers with the base's."""
    from dataclasses import replace

    import torch

    from stillhouse.configs.stages import LoraConfig
    from stillhouse.workers.adapter_training import adapter_parameters, put_adapter
    from stillhouse.workers.scorer import pair_logps

    lm = own_model(asked)
    adapted = put_adapter(lm.model, LoraConfig(rank=RANK), "ref", seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter_parameters(adapted).values():
            parameter.normal_(std=0.01, generator=generator)
    both = replace(lm, model=adapted.requires_grad_(False))
    return lambda work: [
        scored(row).logp_base for row in pair_logps(both, both, own_pairs(work), asked.batch_size)
    ]


def own_model(asked: argparse.Namespace) -> Any:
    """As the pipelines load it."""
    from stillhouse.workers.device import prepare_device
    from stillhouse.workers.models.language_model import load
    from stillhouse.workers.models.store import ModelStore
    from stillhouse.workers.protocols import ModelSpec

    return load(ModelStore(), ModelSpec(asked.model), prepare_device(asked.threads), asked.dtype)


def own_pairs(work: dict[str, Any]) -> list[Any]:
    """Of the work's texts."""
    from stillhouse.workers.protocols import Pair

    return [Pair(*pair) for pair in work["pairs"]]


def scored(row: Any) -> Any:
    """Fails where a row could not be scored."""
    if hasattr(row, "reason"):
        raise SystemExit(f"expected every pair to be scored, found {row.reason}")
    return row


def lm_eval(asked: argparse.Namespace) -> Score:
    """lm-evaluation-harness's log-likelihoods of the same ids, in its own order of batches."""
    kind: Any = import_module("lm_eval.models.huggingface").HFLM
    lm = own_model(asked)
    harness = kind(
        pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=asked.batch_size, max_length=4096
    )

    def score(work: dict[str, Any]) -> Found:
        texts, ids = work["pairs"], work["ids"]
        asks = [(tuple(text), *both) for text, both in zip(texts, ids, strict=True)]
        found = harness._loglikelihood_tokens(asks, disable_tqdm=True)
        return [float(logp) for logp, _ in found]

    return score


def vllm(asked: argparse.Namespace) -> Score:
    """vLLM's log-probabilities of prompts, over prompt and answer."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, one peak
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    found: Any = import_module("vllm")
    engine = found.LLM(
        model=asked.model,
        dtype=asked.dtype,
        max_model_len=1024,
        max_num_seqs=asked.batch_size,
        enforce_eager=asked.eager,
    )
    how = found.SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)

    def score(work: dict[str, Any]) -> Found:
        prompts = [{"prompt_token_ids": [*prompt, *answer]} for prompt, answer in work["ids"]]
        made = engine.generate(prompts, how, use_tqdm=False)
        return [of_answer(out, *ids) for out, ids in zip(made, work["ids"], strict=True)]

    return score


def of_answer(out: Any, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
    """The answer's tokens among those of vLLM's prompt."""
    return [
        float(out.prompt_logprobs[len(prompt) + at][token].logprob)
        for at, token in enumerate(answer)
    ]


CONTENDERS: dict[str, Callable[[argparse.Namespace], Score]] = {
    "stillhouse": stillhouse,
    "stillhouse-pair": stillhouse_pair,
    "lm-eval": lm_eval,
    "vllm": vllm,
}
PACKAGES = {
    "lm-eval": "the package lm_eval (requirements/peers.txt)",
    "vllm": "the package vllm-cpu (requirements/serving-cpu.txt)",
}

if __name__ == "__main__":
    main()
