"""Write files so that a kill or a full disk leaves either the old or the new ones."""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def fsync(path: str | Path) -> None:
    """fsync a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, with the suffix of `path`, that replaces it on success.

    Its name depends on `path` alone, so that a killed process leaves at most one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write text to a file atomically, creating it or replacing its contents."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value) -> None:
    """Write `value` to a file as JSON atomically, creating or replacing it."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: str | Path):
    """The value in a JSON file; ValueError names the file if it is not valid JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


@contextmanager
def atomic_dir(folder: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder` that replaces it on success.

    The temporary name depends on `folder` alone, so the next attempt removes what a
    killed process left behind. An existing folder is moved aside before the new one
    takes its name, and removed afterwards. A kill between the two renames leaves both
    under hidden names; the next attempt puts the old one back first.
    """
    folder = Path(folder).absolute()
    temporary = folder.with_name(f".tmp-{folder.name}")
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(temporary, folder)
        fsync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def atomic_rmtree(folder: str | Path) -> None:
    """Remove a folder; a kill halfway leaves nothing under its name."""
    folder = Path(folder).absolute()
    going = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(going, ignore_errors=True)
    os.replace(folder, going)
    shutil.rmtree(going, ignore_errors=True)


def reserve(path: str | Path, size: int) -> None:
    """Give a file `size` bytes of disk now, or raise OSError.

    Without this, SIGBUS kills a process that writes to a memory-mapped file on a full
    disk. Where posix_fallocate is missing (macOS), only the length of the file is set.
    """
    with open(path, "r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


@contextmanager
def lock_folder(folder: str | Path, wait: bool = False) -> Iterator[None]:
    """Lock a folder, created if missing, until the block ends or this process dies.

    If another process has locked it, `wait` waits for the lock; otherwise
    BlockingIOError names that process and its host.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    owner = folder / ".lock-owner.json"
    lock = FileLock(folder / ".lock", timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        try:
            about = read_json(owner)
        except (OSError, ValueError):  # the other process is just starting
            about = {"pid": "?", "host": "?"}
        raise BlockingIOError(
            f"{folder} is in use by process {about['pid']} on {about['host']}: wait "
            "until it ends, stop it, or choose another folder"
        ) from None
    try:
        write_json(owner, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
