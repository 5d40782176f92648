"""What a tracking server has been told so far: the ids it gave, kept beside the event cursor.

Each run gets its name tag before it is created, so a process that is killed between creating a
run and writing down its id finds the run again instead of making a second one.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from stillhouse.errors import IntegrityError
from stillhouse.storage.durable import replace_file
from stillhouse.storage.strict_json import json_text


@dataclass(slots=True)
class TrackingState:
    """The ids one server gave to one run folder. Changed in place and saved after each change."""

    identity: str = field(default_factory=lambda: uuid4().hex)  # in the tags of all our runs
    parent: str | None = None  # run id
    children: dict[str, str] = field(default_factory=dict)  # "stage/key" -> run id
    current: dict[str, str] = field(default_factory=dict)  # stage -> key of its last start
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)  # "name@digest" -> event data
    versions: dict[str, str] = field(default_factory=dict)  # model name -> version we registered

    @classmethod
    def load(cls, path: Path) -> "TrackingState":
        """Return what `path` holds; when there is no such file, a new state, saved at once."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            state = cls()
            state.save(path)
            return state
        except (ValueError, TypeError) as error:
            raise IntegrityError(
                f"{path}: expected what a tracking server was told, found {error}. Delete "
                f"{path.parent}: everything is then uploaded again, to new runs."
            ) from error

    def save(self, path: Path) -> None:
        """Write the state so that a kill leaves the old one or the new one."""
        replace_file(path, json_text(asdict(self), path, indent=1).encode())
