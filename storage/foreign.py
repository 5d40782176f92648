"""Parquet files that others wrote: read row by row, for data sources."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stillhouse.errors import SourceError

_BATCH_ROWS = 1024


def read_parquet_rows(path: Path) -> Iterator[dict[str, object]]:
    """Yield the rows of a Parquet file as plain values, holding one batch at a time.

    Raises SourceError when the file is not Parquet or was cut short.
    """
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(
            f"{path}: expected a whole Parquet file, found {error}. Write it again"
        ) from error
