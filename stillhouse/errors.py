"""The one error tree. Every message says what was expected, what was found, what to do.

    StillhouseError
    ├── ConfigError        a recipe that cannot be run              exit 2
    ├── SourceError        data that cannot be read                 exit 3
    ├── ModelError         a model, adapter or tokenizer that does not fit   exit 4
    ├── IntegrityError     a committed file that is no longer what was committed   exit 5
    ├── AccountingError    in != kept + rejected + failed           exit 6
    ├── TrainingError      a loss that is not a number              exit 7
    ├── StorageFullError   no space left on the device              exit 8
    ├── TrackingError      the tracking server refused what it was told   exit 9
    └── LockedError        another process runs this run            exit 75

This module imports nothing, so every room may import it.
"""


class StillhouseError(Exception):
    """Anything this software refuses to do, with the cure in the message."""

    exit_code = 1


class ConfigError(StillhouseError):
    """A recipe that cannot be run as written."""

    exit_code = 2


class SourceError(StillhouseError):
    """Data that is missing, empty or unreadable."""

    exit_code = 3


class ModelError(StillhouseError):
    """A model, adapter or tokenizer that is missing or does not fit."""

    exit_code = 4


class IntegrityError(StillhouseError):
    """A committed file whose content is no longer what its manifest line says."""

    exit_code = 5


class AccountingError(StillhouseError):
    """Rows that were neither kept, nor rejected, nor failed."""

    exit_code = 6


class TrainingError(StillhouseError):
    """Training that cannot go on, such as a loss that is not a number."""

    exit_code = 7


class StorageFullError(StillhouseError):
    """The device that holds the run has no space left."""

    exit_code = 8


class TrackingError(StillhouseError):
    """The tracking server answered, and refused."""

    exit_code = 9


class LockedError(StillhouseError):
    """Another process holds this run."""

    exit_code = 75
