"""The run directory: its lock, the record of what was applied, and its end.

Goal: one command at a time works on a lab, and after teardown neither directory nor lock file is
left. So the lock is a flock on the directory itself. Whoever waited for it looks again whether the
path still leads to the directory that was locked, since the one before may have removed it.

Whoever sets NETORCH_RUN_DIR or NETORCH_DISK_DIR may choose a directory that has more in it than
labs. So a lab's directories carry a mark, from the beginning to the end: what has none and isn't
empty is never taken for a lab's, filled or removed.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from netorch.errors import ConflictError, MissingError, NetorchError
from netorch.model import Topology
from netorch.planner import Update
from netorch.resources import Record, Resource
from netorch.system.namespaces import MNT_DETACH, unmount
from netorch.system.scope import Scope

RECORD = "record.json"
MARK = ".netorch"  # no name of a guest, all of which have a directory beside it


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
                mark(run, "NETORCH_RUN_DIR")
                yield run
                return
        finally:
            os.close(descriptor)


def mark(directory: Path, variable: str) -> None:
    """Say that a directory is a lab's. Raises ConflictError for one that is something else."""
    if not is_ours(directory):
        raise ConflictError(
            foreign(directory),
            f"give the lab another name, or set {variable} to a directory of its own",
        )
    if (directory / MARK).exists():
        return
    try:
        (directory / MARK).touch(mode=0o600)
    except OSError as error:
        with contextlib.suppress(OSError):  # somebody is faster
            directory.rmdir()
        raise NetorchError(f"failed to write into {directory}: {error.strerror}") from error


def foreign(directory: Path) -> str:
    return f"{directory} is there already, and not netorch's"


def is_ours(directory: Path) -> bool:
    """Whether it is this user's, and has the mark, or nothing yet, as a killed netorch left it."""
    try:
        names = os.listdir(directory)
        owner = os.stat(directory).st_uid
    except (PermissionError, FileNotFoundError, NotADirectoryError):
        return False  # somebody else's, or gone meanwhile
    return owner == os.geteuid() and (MARK in names or not names)


def make_disks(scope: Scope) -> None:
    """Make the directory of what the lab's guests write, where it is missing."""
    scope.disks.mkdir(mode=0o700, parents=True, exist_ok=True)
    mark(scope.disks, "NETORCH_DISK_DIR")


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
    for directory in (scope.disks, scope.run):
        if is_ours(directory):
            _empty(directory)
            directory.rmdir()
        with contextlib.suppress(OSError):  # not empty: other labs live there
            directory.parent.rmdir()


def _empty(directory: Path) -> None:
    """Remove what is in it, the mark after all else: whoever is killed meanwhile leaves it."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name == MARK):
        if entry.is_dir(follow_symlinks=False):
            import shutil  # the archives that it knows take a while to import

            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def all_of(base: Path) -> list[Path]:
    """The labs' directories below `base`. An empty base is what a killed teardown left: it goes.

    Raises NetorchError for a base that can't be read.
    """
    try:
        there = sorted(base.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise NetorchError(
            f"failed to read {base}: {error.strerror}",
            "set NETORCH_RUN_DIR and NETORCH_DISK_DIR to directories of your own",
        ) from error
    found = [path for path in there if is_ours(path)]
    if not there:
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
    """Write a file in one step: a reader, or a crash, finds the old text or the new one.

    Raises NetorchError where it can't be written.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise NetorchError(f"failed to write {path}: {error.strerror}") from error


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
