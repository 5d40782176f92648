"""Texts as token rows of a bounded length, each with BOS where the model has one."""

from collections.abc import Iterable

from stillhouse.workers.models.language_model import LanguageModel


def windows(lm: LanguageModel, texts: Iterable[str], window: int, tokens: int) -> list[list[int]]:
    """Token rows with BOS where the model has one, until `tokens` of them are read.

    Of a row all tokens but the last are read, at most `window`; the last is only predicted. The
    rest of a text that was cut counts only where it fills half a window.
    """
    rows: list[list[int]] = []
    start = [] if lm.bos is None else [lm.bos]
    step = window - len(start)
    read = 0
    for text in texts:
        body = lm.encode_prompt(text)[len(start) :]
        for begin in range(0, len(body), step):
            row = [*start, *body[begin : begin + step + 1]]
            if len(row) > (window // 2 if begin else 1):
                rows.append(row)
                read += len(row) - 1
            if read >= tokens:
                return rows
    return rows
