"""What is refused about disks before the first change, on images that qemu-img made."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from netorch.errors import ImageError
from netorch.planner import Update
from netorch.resources import DiskLayer, Guest, Overlay, Resource, Volume
from netorch.system import disks, rundir
from netorch.system.disk_checks import reasons
from netorch.system.images import Header, header, image_format, virtual_size
from netorch.system.scope import Scope
from tests.guest_shapes import disk, guest

Check = Callable[..., list[str]]


@pytest.fixture
def scope(tmp_path: Path) -> Scope:
    (tmp_path / "run").mkdir()
    return Scope(lab="t", place=0, run=tmp_path / "run", disks=tmp_path / "disks")


@pytest.fixture
def check(scope: Scope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    monkeypatch.chdir(tmp_path)

    def found(*layers: tuple[str, str], use: str = "overlay") -> list[str]:
        said = reasons(scope, [with_layers(tmp_path, *layers, use=use)])
        assert all(reason.startswith("guest vm1: ") for reason in said)
        return [r.removeprefix("guest vm1: ").replace(f"{tmp_path}/", "") for r in said]

    return found


def with_layers(directory: Path, *layers: tuple[str, str], use: str) -> Guest:
    made = tuple(DiskLayer(str(directory / name), format) for name, format in layers)
    return guest(disks=(disk("data", "virtio", use=use, layers=made),))


def qemu_img(*words: str) -> None:
    subprocess.run(["qemu-img", *words], check=True, stdout=subprocess.DEVNULL)


def test_a_chain_is_used_only_as_the_file_names_it(check: Check, tmp_path: Path) -> None:
    for name in ("base", "other"):
        Path(name).write_bytes(bytes(1 << 20))
    qemu_img("create", "-f", "qcow2", "-b", "base", "-F", "raw", "middle")
    qemu_img("create", "-f", "qcow2", "-b", str(tmp_path / "middle"), "-F", "qcow2", "top")
    chain = [("top", "qcow2"), ("middle", "qcow2"), ("base", "raw")]
    assert check(*chain) == []
    os.link("base", "the-same")
    assert check(*chain[:2], ("the-same", "raw")) == []
    (reason,) = check(chain[0])
    assert "image top is itself an overlay, of middle, which the file does not name" in reason
    assert 'backing = [{ file = "middle", format = "qcow2" }]' in reason
    (reason,) = check(*chain[:2])
    assert "image middle is itself an overlay, of base" in reason
    assert check(*chain[:2], ("other", "raw")) == [
        "image middle is an overlay of base, and not of other"
    ]
    assert check(*chain, ("other", "raw")) == [
        "image base is raw, so it can't be an overlay of other"
    ]
    qemu_img("create", "-f", "qcow2", "alone", "1M")
    assert check(("alone", "qcow2"), ("base", "raw")) == [
        "image alone stands alone: it is no overlay of base"
    ]
    qemu_img("create", "-f", "qcow2", "-b", "alone", "-F", "qcow2", "over")
    assert check(("over", "qcow2"), ("alone", "raw")) == [
        "image over has the format of alone as qcow2, and the file says raw"
    ]
    Path("base").unlink()
    assert check(*chain) == ["failed to read image base: No such file or directory"]


def test_headers_that_lead_elsewhere(check: Check) -> None:
    qemu_img("create", "-f", "qcow2", "-o", "data_file=secret,data_file_raw=on", "split", "1M")
    (reason,) = check(("split", "qcow2"))
    assert "image split has its data in another file, which can't be named" in reason
    # qemu-img makes no key on a busy machine: it fails to measure how long one takes it.
    qemu_img("create", "-f", "qcow2", "locked", "1M")
    with open("locked", "r+b") as image:
        image.seek(32)  # crypt_method (docs/interop/qcow2.txt)
        image.write(bytes([0, 0, 0, 2]))  # LUKS
    assert check(("locked", "qcow2")) == [
        "image locked is encrypted, and netorch has no key for it"
    ]
    # A guest can write any header into its raw disk: there it is data.
    qemu_img("create", "-f", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw", "planted", "1M")
    assert check(("planted", "raw"), use="write") == []
    (reason,) = check(("planted", "qcow2"), use="write")
    assert "is itself an overlay, of /etc/shadow" in reason
    qemu_img("create", "-f", "qcow2", "-u", "-b", "nbd://host/x", "-F", "raw", "network", "1M")
    for named in ([], [("planted", "raw")]):
        (reason,) = check(("network", "qcow2"), *named)
        assert "image network is an overlay of nbd://host/x, which is no file" in reason


def test_files_that_can_not_be_a_disk(check: Check, scope: Scope, tmp_path: Path) -> None:
    qemu_img("create", "-f", "vmdk", "image.vmdk", "1M")
    assert image_format(Path("image.vmdk")) == "vmdk"
    (reason,) = check(("image.vmdk", "vmdk"))
    assert "has the format vmdk, which netorch does not know" in reason
    assert check(("image.vmdk", "raw")) == [], "it may be data"
    assert check(("image.vmdk", "qcow2")) == ["image image.vmdk is not a qcow2 file"]
    os.mkfifo("fifo")
    said = ["failed to open image fifo: it is no regular file or block device"]
    assert check(("fifo", "raw")) == said, "and nobody waits for its other end"
    assert check(("/dev/null", "raw")) == [
        "failed to open image /dev/null: it is no regular file or block device"
    ]
    os.link("image.vmdk", "again")
    one = with_layers(tmp_path, ("image.vmdk", "raw"), use="write")
    two = with_layers(tmp_path, ("again", "raw"), use="overlay")
    two = msgspec.structs.replace(two, name="vm2")
    (reason,) = reasons(scope, [one, two])
    assert reason.startswith("guests vm1, vm2: image ")
    assert "is persistent, and used a second time as" in reason
    missing = [
        msgspec.structs.replace(with_layers(tmp_path, ("none", "raw"), use="overlay"), name=name)
        for name in ("a", "b", "c", "d", "e")
    ]
    assert reasons(scope, missing) == [
        f"guests a, b, c and 2 more: failed to read image {tmp_path}/none: "
        "No such file or directory"
    ]
    if os.geteuid() != 0:
        Path("again").chmod(0o400)
        assert check(("again", "raw")) == []
        assert check(("again", "raw"), use="write") == [
            "failed to write to image again: Permission denied"
        ]


def test_what_headers_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    formats = {"qcow2": "qcow2", "raw": "raw", "vdi": "vdi", "vhdx": "vhdx", "qcow": "qcow"}
    for format, expected in formats.items():
        qemu_img("create", "-f", format, format, "16M")
        assert image_format(Path(format)) == expected
    for version in ("0.10", "1.1"):
        options = ("-u", "-b", "raw", "-F", "raw", "-o", f"compat={version}")
        qemu_img("create", "-f", "qcow2", *options, "over", "24M")
        assert header(Path("over")) == Header(24 << 20, "raw", "raw", False, False)
    Path("odd").write_bytes(bytes(1000))
    assert virtual_size(Path("odd"), "raw") == 1024
    with pytest.raises(ImageError, match="image odd is not a qcow2 file"):
        header(Path("odd"))


def test_own_disks_are_seen_as_they_are_made(scope: Scope, tmp_path: Path) -> None:
    adapter = disks.Disks(scope)
    base = tmp_path / "a, b=c.img"
    base.write_bytes(bytes(1 << 20))
    overlay = Overlay(guest="vm.1", disk="a.b", image=str(base), format="raw")
    volume = Volume(guest="vm.1", disk="new", size=10 << 30)
    done: list[Resource] = []
    adapter.create([overlay, volume], done.append)
    assert done == [overlay, volume] == list(adapter.observe())
    assert disks.disk_path(scope, "vm.1", "new").stat().st_blocks * 512 < 1 << 20, "it is sparse"
    larger = Volume(guest="vm.1", disk="new", size=11 << 30)
    adapter.update([Update(volume, larger)], done.append)
    assert list(adapter.observe()) == [overlay, larger]
    with pytest.raises(ImageError, match="has 11G and can't shrink to 10G"):
        adapter.update([Update(larger, volume)], done.append)
    disks.disk_path(scope, "vm.1", "half").with_suffix(".new").touch()  # of a run that was killed
    assert list(adapter.observe()) == [overlay, larger]
    half = Volume(guest="vm.1", disk="half", size=1 << 20)
    for _again in range(2):
        adapter.delete([overlay, larger, half], done.append)
        assert list(adapter.observe()) == []
        disks.forget_removed(scope)
        assert [path.name for path in scope.disks.iterdir()] == [rundir.MARK]
    assert base.read_bytes() == bytes(1 << 20)
