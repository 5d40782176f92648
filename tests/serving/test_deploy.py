"""A whole run whose student is served before it is promoted."""

import json
from pathlib import Path

import pytest

from tests.contracts.tiny_run import stillhouse


@pytest.mark.timeout(900)
def test_a_run_promotes_what_its_server_reproduces(
    cache_root: Path, tmp_path: Path, environment: None
) -> None:
    done = stillhouse(
        cache_root, "run", "tiny", f"runs_root={tmp_path}", "deploy.engine=vllm", "name=served"
    )
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "served" / "report.json").read_text())
    served = report["deployment"]["served"]
    assert report["deployment"]["promoted"]
    assert served["refused"] is None
    assert served["arm"]["items"] == served["in_process"]["items"] == 18
    assert served["logp_moved"] < 0.01
