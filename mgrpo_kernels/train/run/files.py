"""Files that are complete or absent: written beside their place, brought to the disk, and renamed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        put(new, path)
    except OSError:
        discard(new)
        raise
    sync_directory(path.parent)


def put(new: Path, path: Path) -> None:
    """Rename a file, link or directory to `path`. What is there is replaced, and removed only after the new one is in place.

    Raises:
        OSError: it could not be renamed; what was there is there again.
    """
    if not is_directory(path):
        try:
            new.replace(path)
            return
        except FileNotFoundError:
            raise
        except OSError:  # a file system that does not rename over a file
            if not (path.exists() or path.is_symlink()):
                raise
    old = path.with_name(f".{path.name}.old")
    discard(old)
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise
    discard(old)


def discard(path: Path) -> bool:
    """Delete a file, link or directory, if there is one; return whether it is gone."""
    try:
        if is_directory(path):
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def is_directory(path: Path) -> bool:
    """Return whether `path` is a directory itself, and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def sync_directory(directory: Path) -> None:
    """Bring a directory's entries to the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Bring everything below a directory to the disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            sync_directory(Path(folder, name))  # a file is brought to the disk in the same way
        sync_directory(Path(folder))


def replace_directory(new: Path, path: Path) -> None:
    """Bring a finished directory to the disk, and put it in another's place."""
    sync_tree(new)
    put(new, path)
    sync_directory(path.parent)


def reason(error: BaseException) -> str:
    """Return what went wrong in one line: the operating system's words where it was the cause."""
    root: BaseException | None = error
    while root is not None and not isinstance(root, OSError):  # torch adds errors of its own
        root = root.__cause__ or root.__context__
    root = error if root is None else root
    return f"{type(root).__name__}: {root}".split("\n")[0]
