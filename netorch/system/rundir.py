"""The run directory: its lock, the record of what was applied, and its end.

Goal: one command at a time works on a lab, and after teardown neither directory nor lock file is
left. So the lock is a flock on the directory itself. Whoever waited for it looks again whether the
path still leads to the directory that was locked, since the one before may have removed it.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from netorch.errors import MissingError, NetorchError
from netorch.model import Topology
from netorch.planner import Update
from netorch.resources import Record, Resource
from netorch.system.namespaces import MNT_DETACH, unmount
from netorch.system.scope import Scope

RECORD = "record.json"


@contextlib.contextmanager
def locked(run: Path) -> Iterator[Path]:
    """Hold the lab's lock on `run`, which the block gets; makes the directory where it is missing.

    Waits for whoever has the lock. Raises MissingError where it can't be made, NetorchError
    where it belongs to someone else.
    """
    while True:
        try:
            run.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            run.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(run, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # the one before us removed it between two of these lines
        except OSError as error:
            hint = "set NETORCH_RUN_DIR to a directory of your own"
            if error.errno == errno.EROFS:
                hint = f"start the container with `--tmpfs /run --tmpfs /var/lib`, or {hint}"
            raise MissingError(
                f"failed to make the run directory {run}: {error.strerror}", hint
            ) from error
        try:
            if os.fstat(descriptor).st_uid != os.geteuid():
                raise NetorchError(
                    f"the run directory {run} belongs to uid {os.fstat(descriptor).st_uid}",
                    "set NETORCH_RUN_DIR to a directory of your own",
                )
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, run):
                yield run
                return
        finally:
            os.close(descriptor)


def leave(run: Path) -> None:
    """Unmount the tmpfs that this process, if it has moved into a private place, still sees in
    `run`.
    """
    netns = run / "netns"
    if netns.is_mount():
        unmount(netns, MNT_DETACH)


def remove(scope: Scope) -> None:
    """Remove all that the lab has in the file system, and the directories above it that are empty
    then.
    """
    import shutil  # the archives that it knows take a while to import

    for directory in (scope.disks, scope.run):
        if directory.is_dir():
            shutil.rmtree(directory)
        with contextlib.suppress(OSError):  # not empty: other labs live there
            directory.parent.rmdir()


def all_of(base: Path) -> list[Path]:
    """The run directories below `base`. An empty base is what a killed teardown left: it goes."""
    if not base.is_dir():
        return []
    found = [path for path in base.iterdir() if path.is_dir()]
    if not found:
        with contextlib.suppress(OSError):  # not empty after all, or not ours
            base.rmdir()
    return found


def settled(run: Path) -> bool:
    """Wait until nobody holds the lab's lock; whether the lab has a record then."""
    try:
        descriptor = os.open(run, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return (run / RECORD).exists()
    finally:
        os.close(descriptor)


def recorded(run: Path) -> Record | None:
    """The record in a run directory; None where there is none. Raises NetorchError if it is not
    readable.
    """
    path = run / RECORD
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise NetorchError(f"failed to read {path}: {error}") from error


def write(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file in one step: a reader, or a crash, finds the old text or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)


def write_synced(path: Path, text: str) -> None:
    """`write`, and wait until file and directory are on the disk."""
    write(path, text)
    for written in (path, path.parent):
        descriptor = os.open(written, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def topology_of(record: Record) -> Topology:
    """The topology that a record holds."""
    return msgspec.json.decode(record.text, type=Topology)


class Records:
    """Adapter for the Record."""

    kinds: tuple[type[Resource], ...] = (Record,)

    def __init__(self, scope: Scope) -> None:
        self._run = scope.run

    def observe(self, look: object = None) -> Iterable[Resource]:
        record = recorded(self._run)
        return [record] if record else []

    def check(self, wanted: Sequence[Resource]) -> list[str]:
        return []

    def create(self, wanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        for record in wanted:
            write(self._run / RECORD, msgspec.json.encode(record).decode())
            done(record)

    def update(self, wanted: Sequence[Update], done: Callable[[Resource], None]) -> None:
        self.create([update.new for update in wanted], done)

    def delete(self, unwanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        for record in unwanted:
            (self._run / RECORD).unlink(missing_ok=True)
            done(record)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        at_path = path.lstat()
    except FileNotFoundError:
        return False
    locked = os.fstat(descriptor)
    return (at_path.st_dev, at_path.st_ino) == (locked.st_dev, locked.st_ino)
