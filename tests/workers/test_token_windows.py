"""Texts cut into rows."""

from stillhouse.workers.token_windows import windows


def test_windows_read_what_was_asked_for(lm):
    start = [] if lm.bos is None else [lm.bos]
    step = 10 - len(start)
    rows = windows(lm, ["abcdefghij" * 5], 10, 25)
    assert [len(row) - 1 for row in rows] == [10, 10, 10]  # 25 are not reached before
    assert all(row[: len(start)] == start for row in rows)
    bodies = [row[len(start) :] for row in rows]
    assert lm.decode(bodies[0]) == ("abcdefghij" * 5)[: step + 1]
    assert bodies[1][0] == bodies[0][-1]  # what was predicted last is read next


def test_a_rest_counts_where_it_fills_half_a_window(llama):
    assert len(windows(llama, ["a" * 24], 10, 100)) == 2
    assert len(windows(llama, ["a" * 27], 10, 100)) == 3
    assert windows(llama, ["a", ""], 10, 100) == []
