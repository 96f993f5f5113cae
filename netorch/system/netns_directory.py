"""The directory that hosts' namespaces are mounted in. In the current place: /run/netns.

There, where `ip netns` has its own too, it is made when it is missing, as a shared tmpfs with
"netorch" as its source: that is how a later run knows that the directory is ours to remove once it
is empty. A lock on its parent keeps labs that come and go at the same time from pulling it away
under each other.

In a private place it is a tmpfs of the place's own from the start (place_birth.py), unless the run
directory was deleted: then a plain directory does as well.
"""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from netorch.errors import KernelError
from netorch.system import namespaces
from netorch.system.namespaces import MS_REC, MS_SHARED
from netorch.system.scope import Scope

_TMPFS = "netorch"
# What a SIGKILL before the mount leaves is known by the sticky bit: `ip netns` makes it with 0755.
_MODE = 0o1755


@contextmanager
def directory_of(scope: Scope) -> Iterator[None]:
    """Make the directory if need be, and keep others from removing it during the block."""
    directory = scope.namespaces
    if scope.private:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield
        return
    with _locked(directory.parent):
        if not directory.exists():
            _make(directory)
        yield


def _make(directory: Path) -> None:
    try:
        directory.mkdir(mode=_MODE)
        namespaces.mount(_TMPFS, directory, "tmpfs", data="mode=0755")
        namespaces.mount(None, directory, flags=MS_SHARED | MS_REC)
    except OSError as error:
        raise KernelError(
            f"failed to create {directory}: {error.strerror}", error.errno or 0
        ) from error


def remove_directory(directory: Path) -> None:
    """Remove the directory if it is empty, and ours by its mount or, before that, by its mode."""
    with _locked(directory.parent):
        if not directory.is_dir() or os.listdir(directory):
            return
        if _is_own_tmpfs(directory):
            namespaces.unmount(directory)
        if stat.S_IMODE(directory.stat().st_mode) == _MODE:
            directory.rmdir()


def _is_own_tmpfs(directory: Path) -> bool:
    # proc(5): ... mount point (5th) ... - type source options
    with open("/proc/self/mountinfo") as mounts:
        fields = [line.split() for line in mounts]
    return any(
        line[4] == str(directory) and line[line.index("-") + 1 :][:2] == ["tmpfs", _TMPFS]
        for line in fields
    )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
