"""Copying files into a guest and out of it.

Theory of operation
-------------------
Whatever carries the bytes (a `Remote`: the guest's agent, or ssh) can do three things: run a shell
script in the guest, write a stream to a file, read a file as a stream. The rest is here, the same
for all: a file is written beside its final place and renamed once its size and, where the guest
has sha256sum, its checksum have been compared. So whatever fails on the way, or is interrupted,
the final name has the old file or the new one; what was written beside it is removed. Nothing is
held in memory but a piece.

A directory travels as a tar file, which is beside the final place in the guest and unlinked on
this machine. It is unpacked when it has arrived whole, in a directory beside the final one, which
must not exist before.

A guest is not trusted: what its tar file may contain is files, directories and links, and links are
made last, so that nothing is written through one of them. Owners and setuid bits are not kept.

Limit: netorch that is killed by SIGKILL leaves a file `.NAME.netorch-...` behind.
"""

import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, NamedTuple, Protocol

from netorch.errors import NetorchError, UsageError
from netorch.system.qmp import Completed

if TYPE_CHECKING:
    from tarfile import TarInfo

PIECE = 256 << 10  # under TCG a guest's agent takes a tenth of a second for it

# What a file is, and how it may be read. $1: path.
_LOOK = """\
if [ -d "$1" ]; then kind=directory; elif [ -f "$1" ]; then kind=file
elif [ -e "$1" ]; then kind=special; else kind=none; fi
echo "$kind $(stat -L -c %a "$1" 2> /dev/null || echo 644)"
"""
# Where a copy goes: into $1, if that is a directory, under the name $2. The last line is the path.
_TARGET = """\
to=$1
if [ -d "$to" ]; then to=${to%/}/$2; fi
if [ -L "$to" ]; then to=$(readlink -f "$to"); fi
at=${to%/*}
[ -d "${at:-/}" ] || { echo "there is no directory ${at:-/}" >&2; exit 1; }
[ ! -d "$to" ] || { echo "$to is a directory" >&2; exit 1; }
[ ! -e "$to" ] || [ -f "$to" ] || { echo "$to is not a file" >&2; exit 1; }
echo "$to"
"""
_MEASURE = 'size=$(wc -c < "$1") && echo "$size $(sha256sum < "$1" 2> /dev/null)"'
_FINISH = 'chmod "$2" "$1" && mv -f "$1" "$3"'
_PACK = """\
file=$(mktemp) || exit 1
tar -C "$1" -cf "$file" . || { rm -f "$file"; exit 1; }
echo "$file"
"""
_UNPACK = """\
[ ! -e "$2" ] || { echo "$2 exists" >&2; exit 1; }
mkdir "$1.d" && tar -x -o -f "$1" -C "$1.d" && rm "$1" && mv "$1.d" "$2"
"""


class Remote(Protocol):
    """What carries bytes to a guest. All methods raise NetorchError."""

    guest: str

    def run(self, script: str, *words: str) -> Completed:
        """Run a shell script with its positional parameters."""

    def write(self, path: str, pieces: Iterator[bytes]) -> None:
        """Make a file, readable by its owner alone, of these pieces."""

    def read(self, path: str) -> Iterator[bytes]:
        """The contents of a file, in pieces."""


class _Measured(NamedTuple):
    """A file's size and SHA-256; the sum is "" where it could not be had."""

    size: int
    sum: str

    def check(self, other: "_Measured") -> None:
        if self.size != other.size or (self.sum and other.sum and self.sum != other.sum):
            raise NetorchError(
                f"{other.size} bytes arrived, of {self.size}"
                if self.size != other.size
                else "what arrived has another checksum",
                "did something write to the file meanwhile?",
            )


class _Meter:
    """Pieces of a stream, passed on and measured."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._size = 0
        self._sum = hashlib.sha256()

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self._size += len(piece)
            self._sum.update(piece)
            yield piece

    def result(self) -> _Measured:
        return _Measured(self._size, self._sum.hexdigest())


def copy_in(remote: Remote, source: Path, target: str, recursive: bool = False) -> None:
    """Copy a file, or a directory, to the path `target` in the guest, or into the directory there.

    Raises NetorchError; the message says what could not be copied, and why.
    """
    with _told(str(source), f"{remote.guest}:{target}"):
        status = source.stat()
        is_directory = stat.S_ISDIR(status.st_mode)
        _refuse(is_directory, stat.S_ISREG(status.st_mode), recursive)
        final = _said(remote, _TARGET, target, source.resolve().name).rstrip("\n")
        at, _, name = final.rpartition("/")
        beside = f"{at}/.{name}.netorch-{secrets.token_hex(4)}"
        try:
            with _opened(source, is_directory) as file:
                meter = _Meter(_pieces(file))
                remote.write(beside, iter(meter))
            meter.result().check(_measured(remote, beside))
            if is_directory:
                _said(remote, _UNPACK, beside, final)
            else:
                _said(remote, _FINISH, beside, f"{status.st_mode & 0o777:o}", final)
        except BaseException:
            with suppress(NetorchError):  # a guest that is gone keeps nothing
                remote.run('rm -rf "$1" "$1.d"', beside)
            raise


def copy_out(remote: Remote, source: str, target: str, recursive: bool = False) -> None:
    """Copy a file, or a directory, of the guest to `target`, or into the directory there.

    Raises NetorchError; the message says what could not be copied, and why.
    """
    with _told(f"{remote.guest}:{source}", target):
        kind, mode = _said(remote, _LOOK, source).split()
        if kind == "none":
            raise NetorchError("No such file or directory")
        _refuse(kind == "directory", kind == "file", recursive)
        into = Path(target)
        if target.endswith("/") and not into.is_dir():
            raise UsageError(f"there is no directory {into}")
        final = (into / PurePosixPath(source).name if into.is_dir() else into).resolve()
        if kind == "directory":
            if final.exists():
                raise NetorchError(f"{final} exists")
            _fetch_directory(remote, source, final)
        else:
            with beside(final) as file:
                _fetch(remote, source, file)
                os.fchmod(file.fileno(), int(mode, 8) & 0o777)


@contextmanager
def beside(path: Path) -> Iterator[IO[bytes]]:
    """A new file that gets the name `path` when the block has ended well. Raises OSError."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a file")
    if not path.parent.is_dir():
        raise UsageError(f"there is no directory {path.parent}")
    other = path.with_name(f".{path.name}.netorch-{secrets.token_hex(4)}")
    try:
        with other.open("xb") as file:
            yield file
        other.replace(path)
    except BaseException:
        other.unlink(missing_ok=True)
        raise


def _fetch(remote: Remote, source: str, file: IO[bytes]) -> None:
    meter = _Meter(remote.read(source))
    for piece in meter:
        file.write(piece)
    _measured(remote, source).check(meter.result())


def _fetch_directory(remote: Remote, source: str, final: Path) -> None:
    import tempfile

    packed = _said(remote, _PACK, source).rstrip("\n")
    try:
        with tempfile.TemporaryFile() as file:
            _fetch(remote, packed, file)
            file.seek(0)
            unpacked = final.with_name(f".{final.name}.netorch-{secrets.token_hex(4)}")
            try:
                unpacked.mkdir()
                _unpack(file, unpacked)
                unpacked.rename(final)
            except BaseException:
                shutil.rmtree(unpacked, ignore_errors=True)
                raise
    finally:
        with suppress(NetorchError):  # a guest that is gone keeps nothing
            remote.run('rm -f "$1"', packed)


def _unpack(file: IO[bytes], into: Path) -> None:
    """Unpack a tar file of a stranger's. Python has a filter for that only since 3.11.4."""
    import tarfile

    modes: list[tuple[Path, int]] = []
    links: list[tuple[Path, TarInfo]] = []
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            path = into.joinpath(_inside(member.name))
            if member.isdir():
                path.mkdir(exist_ok=True)
                modes.append((path, member.mode))
            elif member.isreg():
                with path.open("xb") as made:
                    contents = archive.extractfile(member)
                    assert contents is not None, "of a file"
                    shutil.copyfileobj(contents, made)
                path.chmod(member.mode & 0o777)
            elif member.issym() or member.islnk():
                links.append((path, member))
            else:
                raise NetorchError(f"{member.name} is neither a file, a directory nor a link")
    # Symbolic links last, the deepest first: none is made through another one.
    for path, member in sorted(links, key=lambda at: (at[1].issym(), -len(at[0].parts))):
        if member.issym():
            path.symlink_to(member.linkname)
        else:
            path.hardlink_to(into.joinpath(_inside(member.linkname)))
    for path, mode in reversed(modes):
        path.chmod(mode & 0o777)


def _inside(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise NetorchError(f"the guest has sent a tar file that would write to {name}")
    return path


@contextmanager
def _opened(source: Path, is_directory: bool) -> Iterator[IO[bytes]]:
    """A file, or a tar file of a directory's contents, which has no name."""
    if not is_directory:
        with source.open("rb") as file:
            yield file
        return
    import tarfile
    import tempfile

    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            archive.add(source, arcname=".")
        file.seek(0)
        yield file


def _refuse(is_directory: bool, is_file: bool, recursive: bool) -> None:
    if is_directory and not recursive:
        raise UsageError("it is a directory", "with -r directories are copied too")
    if not is_directory and not is_file:
        raise NetorchError("it is neither a file nor a directory")


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(PIECE):
        yield piece


def _measured(remote: Remote, path: str) -> _Measured:
    size, *sum = _said(remote, _MEASURE, path).split()
    return _Measured(int(size), sum[0] if sum else "")


def _said(remote: Remote, script: str, *words: str) -> str:
    """What a script in the guest says, if it ends well. Raises NetorchError."""
    done = remote.run(script, *words)
    if done.code != 0:
        cause = done.err.decode(errors="replace").strip() or f"exit status {done.code}"
        raise NetorchError(f"{remote.guest} says: {cause}")
    return done.out.decode(errors="surrogateescape")


@contextmanager
def _told(source: str, target: str) -> Iterator[None]:
    """What fails in the block is told with what was to be copied."""
    what = f"failed to copy {source} to {target}"
    try:
        yield
    except NetorchError as error:
        kind = UsageError if isinstance(error, UsageError) else NetorchError
        raise kind(f"{what}: {error.message}", error.hint) from error
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise NetorchError(f"{what}: {where}{error.strerror}") from error
