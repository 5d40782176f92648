"""Which models a stage is given."""

from pathlib import Path

from stillhouse.workers.protocols import ModelSpec
from tests.pipelines.conftest import Line


def test_an_adapter_may_lie_in_the_home_folder(line: Line) -> None:
    """The fingerprint expands `~`; what is loaded must be what was fingerprinted."""
    line.tree["models"]["adapter"] = "peft:~/adapters/mine"
    expected = ModelSpec("base", Path.home() / "adapters/mine")
    assert line.stage("ingest").specialist == expected
