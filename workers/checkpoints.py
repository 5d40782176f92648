"""Checkpoints of a training: tensors as safetensors, the rest as JSON, no pickle."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from stillhouse.workers.folders import atomic_folder, is_sealed, write_json
from stillhouse.workers.protocols import TrainStep
from stillhouse.workers.training_record import refuse_other_job, steps_from_json, steps_to_json


@dataclass(frozen=True, slots=True)
class TrainState:
    """All that a later step depends on and that cannot be derived.

    The order of the examples and the learning rate follow from the step (`workers.schedule`);
    nothing draws random numbers after the adapter is initialised, so there is no stream to store.
    """

    history: tuple[TrainStep, ...]  # every step so far; their count is the step reached
    adapter: dict[str, Tensor]  # by parameter name
    optimizer: dict[str, Tensor]  # by parameter name / moment


class CheckpointStore:
    """The checkpoints of one training, `step_N` under `root`; `key` says which training."""

    def __init__(self, root: Path, key: str, keep: int, notify: Callable[[str], None]):
        self._root = root
        self._key = key
        self._keep = keep
        self._notify = notify

    def save(self, state: TrainState) -> Path:
        """Commit a state; of the older ones only the newest `keep - 1` stay."""
        step = len(state.history)
        target = self._root / f"step_{step}"
        with atomic_folder(target) as folder:
            save_file(state.adapter, folder / "adapter.safetensors")
            save_file(state.optimizer, folder / "optimizer.safetensors")
            # The RNG's whole state: the seed is in the key, the position is the step.
            state_json = {"key": self._key, "step": step, "history": steps_to_json(state.history)}
            write_json(folder / "state.json", state_json)
        for old in list(self._newest_first())[self._keep :]:
            shutil.rmtree(old)
        return target

    def load_last_good(self) -> TrainState | None:
        """The newest state that is whole, or None; each torn one is named and removed.

        Removed, because `save` counts what it keeps.
        """
        for folder in self._newest_first():
            if not is_sealed(folder):
                self._notify(f"checkpoint {folder.name} is torn or was changed: passed over")
                shutil.rmtree(folder)
                continue
            stored = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            refuse_other_job(stored["key"], self._key, folder)
            return TrainState(
                history=steps_from_json(stored["history"]),
                adapter=load_file(folder / "adapter.safetensors"),
                optimizer=load_file(folder / "optimizer.safetensors"),
            )
        return None

    def last_good(self) -> Path | None:
        """The folder of the newest whole checkpoint."""
        return next((folder for folder in self._newest_first() if is_sealed(folder)), None)

    def _newest_first(self) -> Iterator[Path]:
        folders = {
            int(folder.name.removeprefix("step_")): folder
            for folder in self._root.glob("step_*")
            if folder.name.removeprefix("step_").isdecimal()
        }
        return (folders[step] for step in sorted(folders, reverse=True))
