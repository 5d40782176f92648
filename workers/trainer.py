"""Supervised LoRA training on the answers' tokens, resumable to the bit.

Shape letters: N target positions of a batch.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from peft import PeftModel
from torch import Tensor, nn

from stillhouse.configs.stages import DistillConfig, TrainConfig
from stillhouse.errors import ModelError, SourceError, TrainingError
from stillhouse.workers.adapter_training import adapter_parameters, put_adapter, write_adapter
from stillhouse.workers.checkpoints import CheckpointStore, TrainState
from stillhouse.workers.folders import atomic_folder
from stillhouse.workers.linear_mode import fast_linears
from stillhouse.workers.models.language_model import LanguageModel
from stillhouse.workers.models.store import silent
from stillhouse.workers.projection import TargetRow, core, target_logps
from stillhouse.workers.protocols import TrainExample, TrainJob, TrainOutcome, TrainStep
from stillhouse.workers.schedule import epoch_batches, learning_rate, steps_per_epoch
from stillhouse.workers.token_mask import excess_of, top_share
from stillhouse.workers.training_record import finished_outcome, job_key, write_record

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def train(
    lm: LanguageModel,
    job: TrainJob,
    on_step: Callable[[TrainStep, int], None],
    notify: Callable[[str], None] = silent,
) -> TrainOutcome:
    """Train an adapter on `lm` (its layers are wrapped in place: do not use `lm` afterwards).

    Goes on from the last good checkpoint in `job.folder`; the losses and the adapter of a resumed
    run are those of an uninterrupted one, to the bit on CPU with the same number of threads.
    Raises `TrainingError` when a loss or a gradient is not finite.
    """
    if (done := finished_outcome(job)) is not None:
        return done
    key, config = job_key(job), job.config
    rows = _Rows.of(lm, job)
    store = CheckpointStore(job.folder / "checkpoints", key, config.keep_checkpoints, notify)
    adapted = put_adapter(core(lm), config.lora, job.model.ref, config.seed)
    loop = _Loop(replace(lm, model=adapted), config, rows, store)
    loop.resume()
    for step in loop.steps():
        on_step(step, loop.total)
    outcome = TrainOutcome(
        adapter=job.folder / "adapter",
        steps=tuple(loop.history),
        tokens=rows.tokens,
        rejected=rows.rejected,
    )
    _write_outcome(adapted, key, outcome)
    return outcome


def _write_outcome(adapted: PeftModel, key: str, outcome: TrainOutcome) -> None:
    with atomic_folder(outcome.adapter) as folder:
        write_adapter(adapted, folder)
        write_record(folder, key, outcome)


@dataclass(frozen=True, slots=True)
class _Row:
    """An example as tokens; `learnt` says which of its targets count, the end always does."""

    target: TargetRow
    learnt: list[bool]


@dataclass(frozen=True, slots=True)
class _Rows:
    """The examples as tokens, and those left out."""

    rows: list[_Row]
    tokens: dict[str, int]
    rejected: dict[str, str]

    @classmethod
    def of(cls, lm: LanguageModel, job: TrainJob) -> "_Rows":
        if job.model.adapter is not None:
            raise ModelError(
                f"training: expected a model without an adapter, found {job.model.adapter} on "
                f"{job.model.ref}; export the adapted model first and train on the copy"
            )
        limit = min(job.config.max_tokens, lm.context)
        made = cls([], {}, {})
        for example in job.examples:
            made._add(lm, example, limit, _token_share(job.config))
        if not made.rows:
            reasons = sorted(set(made.rejected.values()))
            raise SourceError(
                "training: expected at least one example, found none fit among "
                f"{len(job.examples)} (rejected: {reasons}); raise max_tokens or bring more data"
            )
        return made

    def _add(self, lm: LanguageModel, example: TrainExample, limit: int, share: float) -> None:
        prompt, response = lm.encode_prompt(example.prompt), lm.encode_response(example.response)
        ids = [*prompt, *response, *lm.eos_ids[:1]]
        self.tokens[example.example_id] = len(ids)
        if not response:
            self.rejected[example.example_id] = "empty_response"
        elif len(ids) > limit:
            self.rejected[example.example_id] = "too_long"
        elif not prompt:
            self.rejected[example.example_id] = "empty_prompt"
        else:
            learnt = _learnt(lm, example, share) + [True] * (len(ids) - len(prompt) - len(response))
            self.rows.append(_Row(TargetRow(ids, len(ids) - len(prompt)), learnt))


def _token_share(config: TrainConfig) -> float:
    """The share of an answer's tokens to train on."""
    return config.token_share if isinstance(config, DistillConfig) else 1.0


def _learnt(lm: LanguageModel, example: TrainExample, share: float) -> list[bool]:
    """Which tokens of the response to train on; all of them where no excess was measured."""
    if share == 1 or not example.excess:
        return [True] * len(lm.encode_response(example.response))
    [ends] = lm.response_ends([example.response])
    if not ends or len(example.token_ends) != len(example.excess):
        raise ModelError(
            "distill.token_share: expected tokenizers that say where a token ends, of the target "
            "and of the specialist, found one that does not; set it to 1"
        )
    return top_share(excess_of(ends, example.token_ends, example.excess), share)


class _Loop:
    """The optimizer steps of one training; all of its state is in `_state()`."""

    def __init__(self, lm: LanguageModel, config: TrainConfig, rows: _Rows, store: CheckpointStore):
        self._lm = lm
        self._config = config
        self._rows = rows.rows
        self._store = store
        self._parameters = adapter_parameters(lm.model)
        self._optimizer = torch.optim.AdamW(
            self._parameters.values(), lr=0.0, weight_decay=config.weight_decay, fused=True
        )
        self._per_epoch = steps_per_epoch(len(self._rows), config.batch_size)
        self.total = self._per_epoch * config.epochs
        self.history: list[TrainStep] = []

    def resume(self) -> None:
        """Take up the last good checkpoint, if there is one."""
        state = self._store.load_last_good()
        if state is None:
            return
        self.history = list(state.history)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state.adapter[name])
        moments = {
            index: {moment: state.optimizer[f"{name}/{moment}"] for moment in MOMENTS}
            for index, name in enumerate(self._parameters)
        }
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def steps(self) -> Iterator[TrainStep]:
        """Do the remaining steps; each is yielded once its checkpoint, if it has one, is safe."""
        config = self._config
        lengths = [len(row.target.ids) for row in self._rows]
        while len(self.history) < self.total:
            epoch, position = divmod(len(self.history), self._per_epoch)
            batches = epoch_batches(lengths, config.batch_size, config.seed, epoch)
            for batch in batches[position:]:
                self.history.append(self._step([self._rows[index] for index in batch], epoch))
                done = len(self.history)
                if done % config.checkpoint_steps == 0 or done == self.total:
                    self._store.save(self._state())
                yield self.history[-1]

    def _step(self, rows: list[_Row], epoch: int) -> TrainStep:
        config, number = self._config, len(self.history) + 1
        rate = learning_rate(number, self.total, config.learning_rate, config.warmup_fraction)
        self._optimizer.param_groups[0]["lr"] = rate
        with fast_linears():
            logp_N = target_logps(self._lm, [row.target for row in rows])
        learnt = [mark for row in rows for mark in row.learnt]
        if not all(learnt):
            logp_N = logp_N[torch.tensor(learnt, device=logp_N.device)]
        loss = -logp_N.mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), config.max_gradient_norm)
        step = TrainStep(
            step=number,
            epoch=epoch,
            loss=loss.item(),
            learning_rate=rate,
            gradient_norm=norm.item(),
            response_tokens=len(logp_N),
            tokens=sum(len(row.target.ids) for row in rows),
        )
        self._refuse_not_finite(step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return step

    def _refuse_not_finite(self, step: TrainStep) -> None:
        if math.isfinite(step.loss) and math.isfinite(step.gradient_norm):
            return
        good = self._store.last_good()
        kept = "no checkpoint was written yet" if good is None else f"the last good one is {good}"
        raise TrainingError(
            f"step {step.step} of {self.total}: expected a finite loss and gradient, found loss "
            f"{step.loss} and gradient norm {step.gradient_norm} at learning rate "
            f"{step.learning_rate:g}; {kept}. Try a lower learning_rate, a longer "
            "warmup_fraction or a lower max_gradient_norm"
        )

    def _state(self) -> TrainState:
        optimizer: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            for moment in MOMENTS:
                optimizer[f"{name}/{moment}"] = self._optimizer.state[parameter][moment]
        adapter = {name: value.detach() for name, value in self._parameters.items()}
        return TrainState(tuple(self.history), adapter, optimizer)
