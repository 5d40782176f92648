"""What stands for a kill where a process need not die for it."""


class Killed(BaseException):
    """Nobody catches it."""
