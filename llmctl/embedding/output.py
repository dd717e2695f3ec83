"""Where vectors go: JSON Lines, a NumPy array, or an Arrow stream."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import numpy as np

from llmctl.errors import CalledWrongly
from llmctl.files import staged_file

Write = Callable[[dict[str, Any], np.ndarray], None]
_ROWS_PER_BATCH = 1024


@contextlib.contextmanager
def opened(path: str, width: int, overwrite: bool) -> Iterator[Write]:
    """A function that takes a row's other keys and its vector; the file appears when the block ends well.

    The name's ending tells the form: .jsonl (all keys), .npy (float32 [n, width]) or .arrow (`index` and `embedding`).
    """
    with staged_file(path, overwrite) as file, _FORMS[_ending(path)](file, width) as write:
        yield write


def check_name(path: str) -> None:
    """Raise CalledWrongly for a name whose ending is none of the forms."""
    _ending(path)


def json_line(rest: dict[str, Any], vector: np.ndarray) -> str:
    """Numbers with the nine digits that tell float32 values apart."""
    numbers = ", ".join(f"{value:.9g}" for value in vector.tolist())
    keys = "".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}, " for key, value in rest.items())
    return f'{{{keys}"embedding": [{numbers}]}}'


def _ending(path: str) -> str:
    ending = path.rpartition(".")[2]
    if ending not in _FORMS:
        raise CalledWrongly(f"{path}: the name ends in none of .jsonl, .npy, .arrow", "the ending chooses the form")
    return ending


@contextlib.contextmanager
def _jsonl(file: BinaryIO, width: int) -> Iterator[Write]:
    yield lambda rest, vector: file.write(json_line(rest, vector).encode() + b"\n")


@contextlib.contextmanager
def _npy(file: BinaryIO, width: int) -> Iterator[Write]:
    """The number of rows is known at the end only, so the header gets a fixed size and is written again."""
    n_rows = 0

    def write(rest: dict[str, Any], vector: np.ndarray) -> None:
        nonlocal n_rows
        n_rows += 1
        file.write(vector.astype("<f4").tobytes())

    file.write(_npy_header(0, width))
    yield write
    file.seek(0)
    file.write(_npy_header(n_rows, width))


def _npy_header(n_rows: int, width: int) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({n_rows}, {width}), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


@contextlib.contextmanager
def _arrow(file: BinaryIO, width: int) -> Iterator[Write]:
    import pyarrow as pa

    schema = pa.schema([("index", pa.int64()), ("embedding", pa.list_(pa.float32(), width))])
    waiting: list[np.ndarray] = []
    n_written = 0
    with pa.ipc.new_stream(file, schema) as sink:

        def flush() -> None:
            nonlocal n_written
            index = pa.array(range(n_written, n_written + len(waiting)), pa.int64())
            values = pa.array(np.concatenate(waiting))
            sink.write_batch(pa.record_batch([index, pa.FixedSizeListArray.from_arrays(values, width)], schema=schema))
            n_written += len(waiting)
            waiting.clear()

        def write(rest: dict[str, Any], vector: np.ndarray) -> None:
            waiting.append(vector)
            if len(waiting) == _ROWS_PER_BATCH:
                flush()

        yield write
        if waiting:
            flush()


_FORMS = {"jsonl": _jsonl, "npy": _npy, "arrow": _arrow}
