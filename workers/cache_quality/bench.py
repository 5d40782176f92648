"""One table of all formats on one model: the same windows, the same positions, one process."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from stillhouse.errors import ModelError
from stillhouse.kernels.turboquant import NotFiniteError
from stillhouse.workers.batching import pad_right
from stillhouse.workers.cache_quality.caches import CacheSource, MakeCache, SizedCache
from stillhouse.workers.cache_quality.formats import QualityFormat
from stillhouse.workers.cache_quality.job import Progress, QualityJob
from stillhouse.workers.cache_quality.needle import LENGTHS, Haystack, haystack, retrieved
from stillhouse.workers.cache_quality.report import QualityFigures, QualityReport, QualityRow
from stillhouse.workers.cache_quality.tally import Tally, compare
from stillhouse.workers.calibrator import Calibration, calibrate, calibration_rows
from stillhouse.workers.models.language_model import LanguageModel
from stillhouse.workers.projection import core, hidden_states
from stillhouse.workers.token_windows import windows

KNOWN = 0.5  # a length counts where full precision retrieves this share


@dataclass(slots=True)
class _Trial:
    """A format with a seed, on its way through the windows; `note` says why it left."""

    form: QualityFormat
    seed: int
    make: MakeCache | None = None
    note: str | None = None
    tally: Tally = field(default_factory=Tally)
    found: list[bool] = field(default_factory=list)


def bench(lm: LanguageModel, job: QualityJob, progress: Progress) -> QualityReport:
    """Measure every format; one that cannot be measured has a row that says why.

    progress: hears (what, done, of how many). ModelError when there is no text to measure on.
    """
    window = min(job.window, lm.context)
    rows = windows(lm, job.heldout, window, job.tokens)
    if not rows:
        raise ModelError("expected held-out text of 2 tokens at least, found none")
    calibrations, note = _calibrations(lm, job, window, progress)
    trials = _trials(lm, job, calibrations, note)
    logp = _diverge(lm, rows, trials, progress)
    known = _seek(lm, rows, trials, job.seeds, progress)
    tokens = sum(len(row) - 1 for row in rows)
    perplexity = math.exp(-logp / tokens)
    return QualityReport(
        rows=tuple(_row(form, trials, perplexity) for form in job.formats),
        windows=len(rows),
        tokens=tokens,
        calibration_tokens=max((found.tokens for found in calibrations), default=0),
        perplexity=perplexity,
        needle_full=known,
    )


def _calibrations(
    lm: LanguageModel, job: QualityJob, window: int, progress: Progress
) -> tuple[list[Calibration], str | None]:
    """One a seed where a format needs them; none, and why, where the texts do not do."""
    if not any(form.calibrated for form in job.formats):
        return [], None
    made = []
    rows = calibration_rows(lm, job.calibration, job.calibration_tokens)
    try:
        for seed in range(job.seeds):
            progress("calibrate", seed, job.seeds)
            sinks, recent = job.sinks, job.recent
            made.append(calibrate(lm, rows, sinks=sinks, recent=recent, context=window, seed=seed))
    except ModelError as error:
        return [], _short(error)
    return made, None


def _trials(
    lm: LanguageModel, job: QualityJob, calibrations: Sequence[Calibration], note: str | None
) -> list[_Trial]:
    trials = []
    for seed in range(job.seeds):
        calibration = calibrations[seed] if calibrations else None
        source = CacheSource(core(lm).config, job.sinks, job.recent, seed, calibration)
        for form in job.formats:
            if form.seeded or not seed:
                lacks = form.calibrated and calibration is None
                trials.append(_Trial(form, seed, note=note) if lacks else _trial(source, form))
    return trials


def _trial(source: CacheSource, form: QualityFormat) -> _Trial:
    try:
        return _Trial(form, source.seed, source.maker(form))
    except ImportError:
        return _Trial(form, source.seed, note="not installed: pip install 'stillhouse[bench]'")
    except ValueError as error:
        return _Trial(form, source.seed, note=_short(error))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@torch.inference_mode()
def _read(lm: LanguageModel, ids: Sequence[int], cache: Cache) -> Tensor:
    return hidden_states(lm, pad_right([ids], lm.pad, core(lm).device), cache)[0]


def _diverge(
    lm: LanguageModel, rows: Sequence[Sequence[int]], trials: Sequence[_Trial], progress: Progress
) -> float:
    """Fill the tallies; full precision's sum of log-probabilities."""
    logp = 0.0
    total, done = len(rows) * len(trials), 0
    for row in rows:
        read = row[:-1]  # the last token is only predicted
        full_TD = _read(lm, read, DynamicCache(config=core(lm).config))
        hidden: dict[int, Tensor] = {}
        for index, trial in enumerate(trials):
            progress(f"read {trial.form.name}", done, total)
            done += 1
            if trial.make is not None:
                state_TD = _stored(lm, read, trial, trial.make())
                if state_TD is not None:
                    hidden[index] = state_TD
        progress("compare with full precision", done, total)
        target_T = torch.tensor(row[1:], device=full_TD.device)
        tallies = {index: trials[index].tally for index in hidden}
        logp += compare(lm, full_TD, hidden, target_T, tallies)
    return logp


def _stored(lm: LanguageModel, ids: Sequence[int], trial: _Trial, cache: Any) -> Tensor | None:
    """Hidden states as the trial's cache makes them; None, and a note, where it cannot."""
    try:
        state_TD = _read(lm, ids, cache)
    except (NotFiniteError, ValueError) as error:
        trial.make, trial.note = None, _short(error)
        return None
    _weigh(cache, len(ids), trial.tally)
    return state_TD


def _weigh(cache: SizedCache, tokens: int, tally: Tally) -> None:
    tally.tables = cache.table_nbytes
    tally.stored += cache.nbytes - cache.table_nbytes
    tally.cached += tokens


def _seek(
    lm: LanguageModel,
    rows: Sequence[Sequence[int]],
    trials: Sequence[_Trial],
    seeds: int,
    progress: Progress,
) -> dict[int, float]:
    """Look for needles at every length that full precision can do; its shares by length.

    There is a text a seed and length. A format that draws looks into its own seed's, another into
    all of them, so all formats are asked for the same needles.
    """
    skip = 0 if lm.bos is None else 1
    filler = [token for row in rows for token in row[skip:]]
    shares: dict[int, float] = {}
    for length in LENGTHS:
        if length > lm.context:
            continue
        made = {seed: haystack(lm, filler, length, seed) for seed in range(seeds)}
        stacks = {seed: stack for seed, stack in made.items() if stack is not None}
        if not stacks:
            continue
        full = {seed: _full(lm, stack) for seed, stack in stacks.items()}
        shares[length] = sum(map(sum, full.values())) / sum(map(len, full.values()))
        if shares[length] < KNOWN:
            continue
        for index, trial in enumerate(trials):
            progress(f"seek in {length:,} tokens: {trial.form.name}", index, len(trials))
            for seed in [trial.seed] if trial.form.seeded else stacks:
                if seed in stacks:
                    _look(lm, stacks[seed], full[seed], trial)
    return shares


def _look(lm: LanguageModel, stack: Haystack, known: Sequence[bool], trial: _Trial) -> None:
    """Note which of the needles that full precision finds the trial's cache gives back."""
    if trial.make is None:
        return
    try:
        hits = retrieved(lm, stack, trial.make())
    except (NotFiniteError, ValueError) as error:
        trial.make, trial.note = None, _short(error)
        return
    trial.found += [hit for hit, found in zip(hits, known, strict=True) if found]


def _full(lm: LanguageModel, stack: Haystack) -> list[bool]:
    return retrieved(lm, stack, DynamicCache(config=core(lm).config))


def _row(form: QualityFormat, trials: Sequence[_Trial], perplexity: float) -> QualityRow:
    mine = [trial for trial in trials if trial.form == form]
    notes = [trial.note for trial in mine if trial.note]
    if notes:
        return QualityRow(form, (), notes[0])
    return QualityRow(form, tuple(_figures(trial, perplexity) for trial in mine))


def _figures(trial: _Trial, perplexity: float) -> QualityFigures:
    tally, found = trial.tally, trial.found
    return QualityFigures(
        bytes_per_token=tally.stored / tally.cached,
        table_bytes=tally.tables,
        perplexity=tally.perplexity,
        perplexity_change=tally.perplexity / perplexity - 1,
        kl_mean=math.fsum(tally.kl) / len(tally.kl),
        kl_p99=tally.kl_p99,
        top1_agreement=tally.agreed / len(tally.kl),
        needle=sum(found) / len(found) if found else None,
    )
