"""Cache formats measured beside each other: on tiny models, against values known otherwise."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from transformers.utils.import_utils import is_hqq_available

from stillhouse.configs.stages import CompressConfig
from stillhouse.errors import ConfigError, ModelError
from stillhouse.workers.cache_quality import bench as quality
from stillhouse.workers.cache_quality.bench import bench
from stillhouse.workers.cache_quality.formats import DEFAULT_FORMATS, parse_format
from stillhouse.workers.cache_quality.job import QualityJob
from stillhouse.workers.cache_quality.needle import NEEDLES, Haystack, haystack, retrieved
from stillhouse.workers.cache_quality.report import NAMES, QualityFigures, QualityRow, quantile
from stillhouse.workers.cache_quality.tally import Tally, compare
from stillhouse.workers.divergence import measure_cache
from stillhouse.workers.projection import core

ROOT = Path(__file__).resolve().parents[2]
TEXT = "The quick brown fox jumps over the lazy dog, twice. " * 3


def measured(lm, *names, heldout=(TEXT,), **changes):
    calibration = changes.pop("calibration", [TEXT.upper()])
    job = QualityJob(heldout, calibration, [parse_format(name) for name in names], **changes)
    heard = []
    report = bench(lm, job, lambda *what: heard.append(what))
    assert all(done <= total for _, done, total in heard)
    return report


def rows_of(report):
    return {row.form.name: row for row in report.rows}


# Names


def test_every_default_name_is_a_format():
    forms = [parse_format(name) for name in DEFAULT_FORMATS]
    assert [form.name for form in forms] == list(DEFAULT_FORMATS)
    assert len({form.curve for form in forms}) == 10


@pytest.mark.parametrize(
    ("name", "family", "bits", "calibrated", "seeded"),
    [
        ("bf16", "bf16", None, False, False),
        ("mse:3.5", "mse", (3.5, 3.5), False, True),
        ("k4v2", "mse", (4, 2), False, True),
        ("fitted:2.25", "fitted", (2.25, 2.25), True, True),
        ("vllm:k8v4", "vllm", None, False, False),
        ("hqq:3", "hqq", (3, 3), False, False),
    ],
)
def test_a_name_says_what_it_is(name, family, bits, calibrated, seeded):
    form = parse_format(name)
    assert (form.family, form.bits, form.calibrated, form.seeded) == (
        family, bits, calibrated, seeded,
    )  # fmt: skip


def test_a_preset_covers_all_layers_only_when_it_says_so():
    assert not parse_format("vllm:4bit_nc").all_layers
    assert parse_format("vllm:4bit_nc:all").all_layers


@pytest.mark.parametrize("name", ["mse", "mse:6", "mse:5.5", "k6v4", "vllm:5bit", "quanto:3", "x"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ConfigError, match="--formats: expected names such as bf16"):
        parse_format(name)


# Divergence


def test_equal_states_agree_and_others_do_not(lm):
    states_TD = torch.randn(9, core(lm).config.hidden_size)
    other_TD = states_TD.flip(0)
    target_T = torch.arange(9)
    tallies = {"same": Tally(), "other": Tally()}
    logp = compare(lm, states_TD, {"same": states_TD, "other": other_TD}, target_T, tallies)
    assert tallies["same"].kl == [0.0] * 9
    assert tallies["same"].logp == pytest.approx(logp)
    assert tallies["same"].agreed == 9
    logits_TV = core(lm).lm_head(states_TD.double().float()).double()
    cap = getattr(core(lm).config, "final_logit_softcapping", None)
    if cap:
        logits_TV = cap * (logits_TV / cap).tanh()
    p_TV = logits_TV.log_softmax(-1)
    q_TV = p_TV.flip(0)
    expected_T = (p_TV.exp() * (p_TV - q_TV)).sum(-1)
    assert tallies["other"].kl == pytest.approx(expected_T.tolist(), abs=1e-5)
    assert tallies["other"].agreed == int((p_TV.argmax(-1) == q_TV.argmax(-1)).sum())
    assert logp == pytest.approx(p_TV[range(9), range(9)].sum().item(), abs=1e-4)


def test_a_row_is_what_the_stage_measures(llama):
    report = measured(llama, "k4v3", window=64, sinks=2)
    [row] = report.rows
    config = CompressConfig(key_bits=4, value_bits=3, sinks=2, recent=0, calibrate=False)
    text = TEXT[:65]
    [measure], size = measure_cache(llama, [text], config)
    one = measured(llama, "k4v3", heldout=[text], window=64, sinks=2)
    [alone] = one.rows
    assert alone.mean("kl_mean") == pytest.approx(measure.kl_mean, abs=1e-5)
    assert one.perplexity == pytest.approx(math.exp(-measure.logp_full / 64), rel=1e-5)
    change = math.exp((measure.logp_full - measure.logp_compressed) / 64) - 1
    assert alone.mean("perplexity_change") == pytest.approx(change, abs=1e-5)
    assert alone.mean("bytes_per_token") == size.bytes_per_token
    assert alone.mean("table_bytes") == size.table_bytes
    assert report.windows == 2
    assert row.mean("bytes_per_token") == pytest.approx(size.bytes_per_token, rel=0.1)


def test_better_formats_are_closer(llama):
    rows = rows_of(measured(llama, "bf16", "mse:4", "mse:2", window=64))
    kl = [rows[name].mean("kl_mean") for name in ("bf16", "mse:4", "mse:2")]
    assert kl == sorted(kl)
    assert kl[0] < 1e-3 < kl[2]
    assert rows["bf16"].mean("top1_agreement") > rows["mse:2"].mean("top1_agreement")
    assert rows["mse:2"].mean("kl_p99") > rows["mse:2"].mean("kl_mean")


def test_every_format_has_a_row_with_figures_or_a_reason(lm):
    rows = rows_of(measured(lm, *DEFAULT_FORMATS, window=64))
    assert list(rows) == list(DEFAULT_FORMATS)
    notes = {name: row.note for name, row in rows.items() if row.note}
    assert set(notes) == {"quanto:4", "quanto:2", "hqq:4", "hqq:3", "hqq:2"}
    for row in rows.values():
        assert bool(row.figures) != bool(row.note)
        for figures in row.figures:
            assert all(math.isfinite(getattr(figures, name) or 0.0) for name in NAMES)


def test_formats_that_draw_run_once_a_seed(llama):
    rows = rows_of(measured(llama, "bf16", "mse:3", "fitted:3", window=64, seeds=2))
    assert [len(row.figures) for row in rows.values()] == [1, 2, 2]
    first, second = rows["mse:3"].figures
    assert first.kl_mean != second.kl_mean
    assert rows["mse:3"].mean("kl_mean") == (first.kl_mean + second.kl_mean) / 2
    spread = abs(first.kl_mean - second.kl_mean) / math.sqrt(2)
    assert rows["mse:3"].spread("kl_mean") == pytest.approx(spread)
    assert rows["bf16"].spread("kl_mean") is None


def test_nothing_to_measure_on(llama):
    with pytest.raises(ModelError, match="held-out text of 2 tokens"):
        measured(llama, "bf16", heldout=["a"])


def test_a_number_that_16_bits_cannot_hold_is_a_note(fresh):
    lm = fresh()
    with torch.no_grad():
        lm.model.model.layers[0].self_attn.v_proj.weight.mul_(1e7)
    [row] = measured(lm, "mse:4", window=64).rows
    assert row.figures == ()
    assert "65,504" in row.note


# transformers' own quantised cache


@pytest.fixture(scope="module")
def peers(model_folders):
    """What the driver prints; .venv/peers holds the packages (tools/setup.sh)."""
    folder = Path(sys.prefix) / "peers"
    assert folder.is_dir(), f"{folder} is missing: make setup"
    driver = Path(__file__).with_name("peers_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), *(str(model_folders[kind]) for kind in ("llama", "gemma"))],
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["quanto:4", "quanto:2", "hqq:4", "hqq:3", "hqq:2"])
def test_what_is_read_has_been_quantised(peers, name):
    found = peers["caches"][name]
    assert found["theirs_is_raw"]  # the reason for ReadBackCache
    assert found["ours_is_stored"]
    assert found["value_error"] == pytest.approx(found["error"], rel=0.05)
    assert found["goes_on"]
    bits = int(name[-1])
    assert 2.0 ** (-bits - 2) < found["error"] < 2.0 ** (1 - bits)


def test_bytes_are_those_allocated_with_16_bit_scales(peers):
    vectors = 2 * 2 * 64  # keys and values, heads, tokens
    assert peers["caches"]["quanto:4"]["nbytes"] == vectors * (64 // 2 + 2 + 2)
    assert peers["caches"]["quanto:2"]["nbytes"] == vectors * (64 // 4 + 2 + 2)
    assert peers["caches"]["hqq:4"]["nbytes"] == vectors * (64 // 2 + 2 + 2)
    rows = 7  # of 10 numbers in 4 bytes: 64 of a group are 70
    assert peers["caches"]["hqq:3"]["nbytes"] == vectors * (4 * rows + 2 + 2)


def test_a_cache_that_cannot_pack_says_so(peers):
    assert "can pack, found [1, 3, 31, 64]" in peers["refused"]


def test_the_peers_have_rows(peers):
    kl = {row["format"]: row["kl_mean"] for row in peers["llama"]}
    assert 0 <= kl["bf16"] < kl["quanto:4"] < kl["quanto:2"]
    assert kl["hqq:4"] < kl["hqq:2"]
    notes = [row["note"] for row in peers["gemma"]]
    assert notes[0] is None
    assert all("only full attention layers" in note for note in notes[1:])


def test_a_missing_package_is_a_note(llama):
    assert not is_hqq_available()  # as in every process but the driver's
    rows = rows_of(measured(llama, "hqq:4", "quanto:2", "bf16", window=64))
    for name in ("hqq:4", "quanto:2"):
        assert rows[name].note == "not installed: pip install 'stillhouse[bench]'"
    assert rows["bf16"].figures


# Needles


def test_a_haystack_holds_each_code_twice(lm):
    filler = lm.encode_response(TEXT)
    stack = haystack(lm, filler, 1024, 3)
    assert len(stack.ids) == 1024
    assert (stack.ids[0] == lm.bos) == (lm.bos is not None)
    text = lm.decode(list(stack.ids))
    codes = [lm.decode(list(stack.ids[where])) for where in stack.answers]
    assert len(set(codes)) == NEEDLES
    for code in codes:
        assert code[0] == " "
        assert text.count(code) == 2
    asked = [text.split(f" is{code}")[1] for code in codes]
    assert all(rest.startswith(".\n") for rest in asked)  # the fact comes first
    facts = [text.index(f" is{code}.\n") for code in codes]
    assert max(facts) < text.rindex("\nThe code of ", 0, text.index(f"is{codes[0]}\n"))
    assert haystack(lm, filler, 1024, 3) == stack
    assert haystack(lm, filler, 1024, 4) != stack


def test_no_haystack_where_there_is_no_room(lm):
    assert haystack(lm, lm.encode_response(TEXT), 128, 0) is None
    assert haystack(lm, [], 4096, 0) is None


def test_what_full_precision_finds_counts_for_every_format_alike(llama, monkeypatch):
    """Two seeds: what draws looks into its own text, what does not into both."""
    full = {0: [True, False, True], 1: [True, True, False]}
    looked: list[tuple[str, int]] = []

    def found(_lm, stack, cache):
        seed = stacks.index(stack.ids)
        if isinstance(cache, DynamicCache):
            return full[seed]
        looked.append((type(cache.scheme).__name__, seed))
        return [True, True, False]

    stacks = [[1, 0], [1, 1]]
    monkeypatch.setattr(quality, "LENGTHS", (64,))
    monkeypatch.setattr(
        quality, "haystack", lambda _lm, _text, _n, seed: Haystack(stacks[seed], [])
    )
    monkeypatch.setattr(quality, "retrieved", found)
    report = measured(llama, "bf16", "fitted:2", window=64, seeds=2)
    rows = rows_of(report)
    assert report.needle_full == {64: 4 / 6}
    assert sorted(looked) == [
        ("FittedScheme", 0), ("FittedScheme", 1), ("SameCodecScheme", 0), ("SameCodecScheme", 1),
    ]  # fmt: skip
    assert [one.needle for one in rows["fitted:2"].figures] == [0.5, 1.0]
    assert rows["bf16"].mean("needle") == 0.75


def test_a_format_that_fails_on_a_long_text_is_a_note(llama, monkeypatch):
    def refuses(_lm, _stack, cache):
        if isinstance(cache, DynamicCache):
            return [True]
        raise ValueError("an odd number of groups")

    monkeypatch.setattr(quality, "LENGTHS", (64,))
    monkeypatch.setattr(quality, "haystack", lambda *_: Haystack([1, 2], []))
    monkeypatch.setattr(quality, "retrieved", refuses)
    [row] = measured(llama, "mse:3", window=64).rows
    assert row.note == "an odd number of groups"


def test_a_text_too_short_to_calibrate_on_is_a_note(llama):
    rows = rows_of(measured(llama, "bf16", "fitted:3", window=64, calibration=["ab"]))
    assert rows["bf16"].note is None
    assert "no text was longer than 4 tokens" in rows["fitted:3"].note


@torch.no_grad()
def test_an_answer_counts_when_each_token_is_the_likeliest(lm):
    ids = lm.encode_prompt("abcdef")
    begin = len(ids)
    for _ in range(3):
        ids.append(int(core(lm)(torch.tensor([ids])).logits[0, -1].argmax()))
    whole = Haystack(ids, [slice(begin, begin + 3), slice(begin + 1, begin + 2)])
    cache = DynamicCache(config=core(lm).config)
    assert retrieved(lm, whole, cache) == [True, True]
    other = [*ids[:-1], (ids[-1] + 1) % 256]
    cache = DynamicCache(config=core(lm).config)
    assert retrieved(lm, dataclasses.replace(whole, ids=other), cache) == [False, True]


# Figures


def test_a_quantile_is_a_value_that_so_many_do_not_exceed():
    values = [float(value) for value in range(1, 201)]
    assert quantile(values, 0.99) == 198
    assert quantile(values, 1) == 200
    assert quantile([5.0], 0.99) == 5


def test_a_row_for_programs():
    figures = QualityFigures(100.0, 7, 11.0, 0.1, 0.01, 0.2, 0.9, None)
    row = QualityRow(parse_format("mse:4"), (figures, dataclasses.replace(figures, kl_mean=0.03)))
    found = row.as_json()
    assert {name: found[name] for name in ("format", "family", "calibrated", "seeds")} == {
        "format": "mse:4", "family": "mse", "calibrated": False, "seeds": 2,
    }  # fmt: skip
    assert (found["bytes_per_token"], found["kl_mean"], found["needle"]) == (100, 0.02, None)
    assert found["spread"]["kl_mean"] == pytest.approx(0.01 * math.sqrt(2))
    assert found["spread"]["needle"] is None
    assert QualityRow(parse_format("hqq:4"), (), "why").as_json()["note"] == "why"
