"""Copying with this machine's own shell and files in the place of a guest's."""

import io
import os
import random
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netorch.errors import NetorchError, UsageError
from netorch.system import copying
from netorch.system.copying import PIECE, copy_in, copy_out
from netorch.system.qmp import Completed

SIZE = 3 * PIECE + 17


class Here:
    """A `Remote`. `fault` is called before each piece, with the number of it."""

    guest = "vm1"

    def __init__(self, fault: Callable[[int], object] = lambda number: None) -> None:
        self.fault = fault

    def run(self, script: str, *words: str) -> Completed:
        done = subprocess.run(["sh", "-c", script, "sh", *words], capture_output=True, check=False)
        return Completed(done.returncode, done.stdout, done.stderr)

    def write(self, path: str, pieces: Iterator[bytes]) -> None:
        with open(path, "wb") as file:
            for number, piece in enumerate(pieces):
                file.write(piece[:100] if self.fault(number) == "cut" else piece)

    def read(self, path: str) -> Iterator[bytes]:
        with open(path, "rb") as file:
            number = 0
            while piece := file.read(PIECE):
                yield piece[:100] if self.fault(number) == "cut" else piece
                number += 1


def fails(error: BaseException) -> Callable[[int], None]:
    def fault(number: int) -> None:
        if number == 2:
            raise error

    return fault


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    return tmp_path / "here"


@pytest.fixture
def there(here: Path) -> Path:
    return here.parent / "there"


def big(path: Path, mode: int = 0o640) -> bytes:
    data = random.Random(7).randbytes(SIZE)
    path.write_bytes(data)
    path.chmod(mode)
    return data


def test_a_file_there_and_back(here: Path, there: Path) -> None:
    data = big(here / "it's a file", 0o4751)
    copy_in(Here(), here / "it's a file", f"{there}/")
    made = there / "it's a file"
    assert made.read_bytes() == data
    assert made.stat().st_mode & 0o7777 == 0o751
    copy_in(Here(), here / "it's a file", f"{there}/b c")
    copy_out(Here(), f"{there}/b c", f"{here}")
    copy_out(Here(), f"{there}/b c", f"{here}/d")
    assert (here / "b c").read_bytes() == (here / "d").read_bytes() == data
    assert (here / "d").stat().st_mode & 0o7777 == 0o751
    (there / "link").symlink_to("b c")
    (here / "new").write_text("new")
    copy_in(Here(), here / "new", f"{there}/link")
    assert (there / "link").is_symlink()
    assert (there / "b c").read_text() == "new"
    (there / "empty").touch()
    copy_out(Here(), f"{there}/empty", f"{here}/e")
    assert (here / "e").read_bytes() == b""


FAULTS: list[tuple[Callable[[int], object], str]] = [
    (fails(NetorchError("no space")), "failed to copy .* to .*: no space"),
    (fails(OSError(5, "Input/output error")), "failed to copy .* to .*: Input/output error"),
    (lambda number: "cut" if number == 1 else "", "failed to copy .*bytes arrived, of"),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=["error", "os", "cut"])
def test_what_fails_half_way_leaves_what_was_there(
    fault: Callable[[int], object], message: str, here: Path, there: Path
) -> None:
    big(here / "a")
    (there / "a").write_text("old")
    with pytest.raises(NetorchError, match=message):
        copy_in(Here(fault), here / "a", f"{there}")
    assert {path.name: path.read_bytes() for path in there.iterdir()} == {"a": b"old"}
    big(there / "a")
    (here / "a").write_text("old")
    with pytest.raises(NetorchError, match=message):
        copy_out(Here(fault), f"{there}/a", f"{here}")
    assert {path.name: path.read_bytes() for path in here.iterdir()} == {"a": b"old"}


def test_an_interruption_leaves_nothing(here: Path, there: Path) -> None:
    (here / "d").mkdir()
    big(here / "d" / "a")
    for source in ("d", "d/a"):
        with pytest.raises(KeyboardInterrupt):
            copy_in(Here(fails(KeyboardInterrupt())), here / source, f"{there}/x", recursive=True)
    assert not list(there.iterdir())
    with pytest.raises(KeyboardInterrupt):
        copy_out(Here(fails(KeyboardInterrupt())), f"{here}/d", f"{there}/x", recursive=True)
    assert not list(there.iterdir())


def test_another_checksum_of_the_same_size(here: Path, there: Path) -> None:
    big(there / "a")

    def change(number: int) -> None:
        if number == 3:
            with (there / "a").open("r+b") as file:
                file.write(b"changed")

    with pytest.raises(NetorchError, match="has another checksum"):
        copy_out(Here(change), f"{there}/a", f"{here}")
    assert not list(here.iterdir())


def test_refusals(here: Path, there: Path) -> None:
    (here / "a").touch()
    (there / "d").mkdir()
    (there / "d" / "a").mkdir()
    os.mkfifo(there / "fifo")

    def refused(message: str, copy: Callable[..., None], *arguments: object) -> None:
        with pytest.raises(NetorchError, match=message):
            copy(Here(), *arguments)

    refused("No such file", copy_in, here / "none", f"{there}")
    refused("there is no directory .*/none", copy_in, here / "a", f"{there}/none/a")
    refused("there is no directory .*/none", copy_in, here / "a", f"{there}/none/")
    refused("a is a directory", copy_in, here / "a", f"{there}/d")
    refused("fifo is not a file", copy_in, here / "a", f"{there}/fifo")
    refused("it is a directory", copy_in, here, f"{there}")
    refused("No such file", copy_out, f"{there}/none", f"{here}")
    refused("neither a file nor a directory", copy_out, f"{there}/fifo", f"{here}")
    refused("it is a directory", copy_out, f"{there}/d", f"{here}")
    refused("there is no directory .*/none", copy_out, f"{here}/a", f"{here}/none/")
    refused("there is no directory .*/none", copy_out, f"{here}/a", f"{here}/none/a")
    refused("/dev/null is not a file", copy_out, f"{here}/a", "/dev/null")
    refused("here exists", copy_out, f"{here}", f"{here.parent}", True)
    assert [path.name for path in here.iterdir()] == ["a"]


def test_directories(here: Path, there: Path) -> None:
    tree = here / "tree"
    (tree / "sub").mkdir(parents=True)
    data = big(tree / "sub" / "big", 0o600)
    (tree / "run").write_text("#!/bin/sh\n")
    (tree / "run").chmod(0o755)
    (tree / "link").symlink_to("sub/big")
    (tree / "hard").hardlink_to(tree / "run")
    (tree / "sub").chmod(0o555)
    copy_in(Here(), tree, f"{there}", recursive=True)
    copy_out(Here(), f"{there}/tree", f"{here}/back", recursive=True)
    back = here / "back"
    assert sorted(str(p.relative_to(back)) for p in back.rglob("*")) == sorted(
        str(p.relative_to(tree)) for p in tree.rglob("*")
    )
    assert (back / "sub" / "big").read_bytes() == data
    assert (back / "sub").stat().st_mode & 0o777 == 0o555
    assert (back / "run").stat().st_mode & 0o777 == 0o755
    assert os.readlink(back / "link") == "sub/big"
    assert (back / "hard").samefile(back / "run")
    with pytest.raises(NetorchError, match="is a directory"):
        copy_in(Here(), tree, f"{there}", recursive=True)
    for path in (tree, there / "tree", back):
        (path / "sub").chmod(0o755)


def tar(*members: tuple[str, bytes, str]) -> io.BytesIO:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, link, 0 if link else 1
            archive.addfile(info, io.BytesIO(b"x"))
    file.seek(0)
    return file


FILE, LINK, HARD, FIFO = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE


@pytest.mark.parametrize(
    "members",
    [
        [("../out", FILE, "")],
        [("/tmp/netorch-out", FILE, "")],
        [("a", LINK, ".."), ("a/out", FILE, "")],
        [("a", LINK, ".."), ("a/out", LINK, "x")],
        [("a", LINK, "../secret"), ("b", HARD, "a")],
        [("b", HARD, "../secret")],
        [("pipe", FIFO, "")],
    ],
)
def test_a_guest_can_not_write_elsewhere(
    members: list[tuple[str, bytes, str]], tmp_path: Path
) -> None:
    into = tmp_path / "into"
    into.mkdir()
    (tmp_path / "secret").write_text("secret")
    with pytest.raises((NetorchError, OSError)):
        copying._unpack(tar(*members), into)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["into", "secret"]
    assert (tmp_path / "secret").stat().st_nlink == 1


def test_it_is_a_matter_of_usage(here: Path) -> None:
    with pytest.raises(UsageError):
        copy_in(Here(), here, "/tmp")
