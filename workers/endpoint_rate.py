"""When the next request may go: evenly spaced, and never while the server asks for a pause."""

import threading
from collections.abc import Callable


class RequestRate:
    """Gives turns to threads, at least 60 / `per_minute` seconds apart; None: no spacing.

    There are no bursts after a pause: a turn is taken when it comes, not booked ahead.
    `clock` is monotonic, in seconds; `halt` ends all waiting.
    """

    def __init__(
        self,
        per_minute: int | None,
        halt: threading.Event,
        clock: Callable[[], float],
        sleep: Callable[[float], object],
    ) -> None:
        self._interval = 0.0 if per_minute is None else 60 / per_minute
        self._halt, self._clock, self._sleep = halt, clock, sleep
        self._lock = threading.Lock()
        self._ready = clock()  # when the next turn may be taken

    def turn(self) -> None:
        """Wait for a turn and take it; returns at once when halted."""
        while not self._halt.is_set():
            with self._lock:
                now = self._clock()
                left = self._ready - now
                if left <= 0:
                    self._ready = now + self._interval
                    return
            self._sleep(left)

    def hold(self, seconds: float) -> None:
        """Give no turn to any thread before `seconds` from now."""
        with self._lock:
            self._ready = max(self._ready, self._clock() + seconds)
