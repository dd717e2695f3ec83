"""Files that appear whole or not at all: written beside their final name, flushed to disk, then renamed."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llmctl.errors import CalledWrongly, UserError


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Put `data` under `path`: after a crash at any moment the file holds either its old or its new content."""
    with staged_file(path, overwrite=True) as file:
        file.write(data)


@contextlib.contextmanager
def staged_file(path: str | os.PathLike, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A fresh file beside `path`, open for writing; when the block ends it takes the name `path`, when it fails it goes.

    Raises `CalledWrongly` for an output that exists without `overwrite`.
    """
    target = Path(path).absolute()
    refuse_existing(path, overwrite)
    _make_directory(target.parent)
    _remove_abandoned(target)
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        with open(partial, "xb") as file, _locked(partial):
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(target.parent)


def read_lines(path: str | os.PathLike) -> list[bytes]:
    """The lines of a small file, without a byte order mark; `UserError` where it cannot be read, or is a device: some never
    end."""
    try:
        if Path(path).is_char_device():
            raise UserError(f"{path}: a device, not a file")
        return Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).splitlines()
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from error


def read_json(path: str | os.PathLike) -> Any:
    """The value in a JSON file; `UserError` where the file is absent, unreadable or no JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def check_free_space(path: str | os.PathLike, needed_bytes: int) -> None:
    """Refuse, before anything is written, an output of `needed_bytes` that the filesystem of `path` cannot take."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    if free < needed_bytes:
        raise UserError(
            f"{path}: {needed_bytes / 1e6:,.1f} MB are needed on disk, {free / 1e6:,.1f} MB are free",
            hint="free some space, or choose another place with --output",
        )


@contextlib.contextmanager
def staged_directory(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A fresh directory beside `path`; when the block ends it takes the name `path`, when it fails it is removed.

    With `overwrite` an existing output changes places with the new one in a single step, and only then goes away.
    Raises `CalledWrongly` for an output that exists without it.
    """
    target = Path(path).absolute()
    refuse_existing(path, overwrite)
    _make_directory(target.parent)
    _remove_abandoned(target)
    stage = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    stage.mkdir()
    with _locked(stage):
        try:
            yield stage
            _fsync_tree(stage)
            _take_place(stage, target)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise


def refuse_existing(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Raise `CalledWrongly` for an output that exists, before any work is done for it."""
    if _is_occupied(Path(path).absolute()) and not overwrite:
        raise CalledWrongly(f"{path}: exists already", hint="choose another --output, or add --overwrite")


def refuse_input(output: str | os.PathLike, inputs: Iterable[str | os.PathLike]) -> None:
    """Raise `CalledWrongly` for an output that would replace one of the files or directories it is made of."""
    target = Path(output).resolve()
    for path in map(Path, inputs):
        if target in (source := path.resolve(), *source.parents):
            raise CalledWrongly(f"{output}: would replace {path}, which is read", hint="choose another --output")


def _is_occupied(target: Path) -> bool:
    if target.is_dir() and not target.is_symlink():
        return any(target.iterdir())
    return os.path.lexists(target)


def _take_place(stage: Path, target: Path) -> None:
    if not _is_occupied(target):
        os.rename(stage, target)
        flush(target.parent)
        return
    if not _exchange(stage, target):
        # Without an atomic exchange there is an instant with no `target`, but never one without a whole copy on disk.
        previous = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
        os.rename(target, previous)
        os.rename(stage, target)
        stage = previous
    flush(target.parent)
    _remove(stage)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where this system or filesystem cannot."""
    if not sys.platform.startswith("linux"):
        return False
    at_current_directory, exchange_flag = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = [ctypes.c_char_p(os.fsencode(name)) for name in (one, other)]
    if libc.renameat2(at_current_directory, names[0], at_current_directory, names[1], exchange_flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a lock that dies with this process, so that others can tell a stage in use from an abandoned one."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise CalledWrongly(f"{error.filename}: is a file, so nothing can be written into it") from error


def _remove_abandoned(target: Path) -> None:
    """Delete the stages of this output whose writer was killed: each can be as large as a checkpoint."""
    for stage in target.parent.glob(f".{_glob_escape(target.name)}.partial-*"):
        try:
            descriptor = os.open(stage, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(stage)
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)


def _glob_escape(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def flush(path: Path) -> None:
    """Wait until the disk has a file, or a directory's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(directory: Path) -> None:
    for folder, _, names in os.walk(directory):
        for name in names:
            flush(Path(folder, name))
        flush(Path(folder))
