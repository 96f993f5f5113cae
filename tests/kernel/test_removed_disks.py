"""Disks that an apply deletes: back again if it fails, gone for good if it comes through."""

from collections.abc import Callable
from pathlib import Path

import pytest

from netorch.resources import Overlay, Resource, Volume
from netorch.system.disks import Disks, disk_path, forget_removed
from netorch.system.rundir import MARK
from netorch.system.scope import Scope
from netorch.system.starting import program

VOLUME = Volume(guest="vm1", disk="data", size=1 << 20)
LARGER = Volume(guest="vm1", disk="data", size=2 << 20)


pytestmark = pytest.mark.skipif(program("qemu-img") is None, reason="qemu-img is not installed")


def written(lab: Scope, adapter: Disks, disk: Volume) -> tuple[Path, bytes]:
    """Make the disk, and write to it past its header."""
    adapter.create([disk], nothing)
    path = disk_path(lab, disk.guest, disk.disk)
    with path.open("ab") as file:
        file.write(b"precious")
    return path, path.read_bytes()


def nothing(resource: Resource) -> None:
    pass


def test_a_deleted_disk_comes_back_when_it_is_created_again(scope: Callable[..., Scope]) -> None:
    adapter = Disks(lab := scope())
    path, contents = written(lab, adapter, VOLUME)
    adapter.delete([VOLUME], nothing)
    assert list(adapter.observe()) == []
    assert not path.exists()
    adapter.create([VOLUME], nothing)
    assert path.read_bytes() == contents
    assert list(adapter.observe()) == [VOLUME]


def test_a_rollback_brings_back_the_disk_that_another_has_replaced(
    scope: Callable[..., Scope],
) -> None:
    adapter = Disks(lab := scope())
    path, contents = written(lab, adapter, VOLUME)
    image = lab.run / "base.img"
    image.write_bytes(bytes(1 << 20))
    overlay = Overlay(guest="vm1", disk="data", image=str(image), format="raw")
    adapter.delete([VOLUME], nothing)
    adapter.create([overlay], nothing)
    assert list(adapter.observe()) == [overlay]
    adapter.delete([overlay], nothing)
    adapter.create([VOLUME], nothing)
    assert path.read_bytes() == contents


def test_what_an_apply_has_deleted_is_gone_when_it_has_come_through(
    scope: Callable[..., Scope],
) -> None:
    adapter = Disks(lab := scope())
    _path, contents = written(lab, adapter, VOLUME)
    adapter.delete([VOLUME], nothing)
    forget_removed(lab)
    assert list(lab.disks.rglob("*")) == [lab.disks / MARK]
    path, _ = written(lab, adapter, LARGER)
    assert path.read_bytes() != contents
