"""Turns are apart by the rate, and nobody has one during a pause."""

import threading
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.workers.endpoint_rate import RequestRate


class FakeTime:
    def __init__(self) -> None:
        self.now = 0.0
        self._lock = threading.Lock()

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.now += seconds


@settings(max_examples=50)
@given(st.integers(1, 600), st.lists(st.floats(0, 100), min_size=1, max_size=20))
def test_turns_are_apart_and_outlast_pauses(per_minute: int, pauses: list[float]) -> None:
    time = FakeTime()
    rate = RequestRate(per_minute, threading.Event(), time.clock, time.sleep)
    last = -60 / per_minute
    for pause in pauses:
        rate.hold(pause)
        earliest = max(time.now + pause, last + 60 / per_minute)
        rate.turn()
        assert earliest - 1e-6 <= time.now <= earliest + 1e-6
        last = time.now


def test_threads_share_the_rate() -> None:
    time = FakeTime()
    rate = RequestRate(60, threading.Event(), time.clock, time.sleep)
    with ThreadPoolExecutor(8) as pool:
        for turn in [pool.submit(rate.turn) for _ in range(40)]:
            turn.result()
    assert time.now >= 39


def test_without_a_rate_nobody_waits() -> None:
    time = FakeTime()
    rate = RequestRate(None, threading.Event(), time.clock, time.sleep)
    for _ in range(5):
        rate.turn()
    assert time.now == 0


def test_halting_ends_the_waiting() -> None:
    halt = threading.Event()
    rate = RequestRate(1, halt, lambda: 0.0, lambda seconds: halt.set())
    rate.turn()
    rate.turn()  # returns
    assert halt.is_set()
