"""Credentials are hidden, and nothing else is."""

import pytest

from stillhouse.storage.redaction import redact_uris


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://u:p@host/x", "http://[redacted]@host/x"),
        ("postgresql://u:a/b@host/db", "postgresql://[redacted]@host/db"),
        ("http://u:p@ss@host", "http://[redacted]@host"),
        (
            "http://host/x?user=u&password=s3cret",
            "http://host/x?user=[redacted]&password=[redacted]",
        ),
        ("http://host?token=t&page=2", "http://host?token=[redacted]&page=2"),
        (
            "run demo tracking.uri=http://u:p@host a=1",
            "run demo tracking.uri=http://[redacted]@host a=1",
        ),
        ("builtin:icd10cm?split=pool&seed=1", "builtin:icd10cm?split=pool&seed=1"),
        ("hf:org/data@0123", "hf:org/data@0123"),
        ("sqlite:////srv/runs/mlflow.db", "sqlite:////srv/runs/mlflow.db"),
        ("a question? x=1 mail me@home", "a question? x=1 mail me@home"),
    ],
)
def test_redact_uris(text: str, expected: str) -> None:
    assert redact_uris(text) == expected
