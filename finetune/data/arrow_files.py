"""Read Parquet and Arrow files, a few rows at a time."""

from collections.abc import Iterator
from typing import Any

from finetune.data import remote
from finetune.data.places import Place, Row, list_columns, short, wrong
from finetune.errors import DataError

BYTES_AT_ONCE = 64 << 20  # of Parquet: a row may be a book
ROWS_AT_ONCE = 1_000


def read_parquet(source: str) -> Iterator[Row | DataError]:
    """Yield the rows of a Parquet file."""
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(remote.local(source))
        _require_distinct(source, file.schema_arrow.names)
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        size = sum(group.total_byte_size for group in groups) // max(1, file.metadata.num_rows)
        at_once = min(ROWS_AT_ONCE, max(1, BYTES_AT_ONCE // max(1, size)))
        yield from _rows(source, file.iter_batches(batch_size=at_once))
    except (ArrowException, UnicodeDecodeError, OverflowError, OSError, MemoryError) as exc:
        raise _damaged(source, "Parquet", exc) from exc


def read_arrow(source: str) -> Iterator[Row | DataError]:
    """Yield the rows of an Arrow file: of the file format (Feather), or of the stream format."""
    import pyarrow
    from pyarrow import ArrowException, ipc

    try:
        with pyarrow.memory_map(remote.local(source)) as file:
            try:
                opened = ipc.open_file(file)
                batches = (opened.get_batch(n) for n in range(opened.num_record_batches))
            except pyarrow.ArrowInvalid:
                file.seek(0)
                opened = ipc.open_stream(file)
                batches = iter(opened)
            _require_distinct(source, opened.schema.names)
            yield from _rows(source, batches)
    except (ArrowException, UnicodeDecodeError, OverflowError, OSError, MemoryError) as exc:
        raise _damaged(source, "Arrow", exc) from exc


def _rows(source: str, batches: Iterator[Any]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # damaged offsets would make to_pylist read anywhere
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            for values in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                number += 1
                yield Row(Place(source, number), values)


def _require_distinct(source: str, columns: list[str]) -> None:
    if len(set(columns)) < len(columns):
        raise wrong(source, f"names a column twice: {list_columns(columns)}; rename one")


def _damaged(source: str, kind: str, exc: Exception) -> Exception:
    if isinstance(exc, OSError) and exc.errno is not None:
        return exc
    return wrong(source, f"not a whole {kind} file: {short(str(exc), 200)}; create it again")
