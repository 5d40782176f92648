"""A training of eight steps, its listeners, and what it writes."""

from pathlib import Path

from stillhouse.configs.stages import LoraConfig, TrainConfig
from stillhouse.workers.protocols import TrainExample
from tests.killed import Killed

CONFIG = TrainConfig(
    lora=LoraConfig(rank=2, alpha=4),
    learning_rate=1e-2,
    epochs=2,
    batch_size=3,
    max_tokens=48,
    checkpoint_steps=2,
    keep_checkpoints=2,
)
EXAMPLES = [
    TrainExample(f"e{index}", f"Q{'.' * (index * 5 % 7)} {index}:", f" A{index % 3}")
    for index in range(11)
]
TOTAL = 8  # 2 epochs of ceil(11 / 3) steps


def ignore(step, total):
    """Listen to nobody."""


def stop_after(last):
    def on_step(step, total):
        if step.step == last:
            raise Killed

    return on_step


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
