"""The cache of templates, with a maker that writes two small files instead of booting a guest; and
which guests can be copied.
"""

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from netorch import model
from netorch.guests import Descriptors
from netorch.system import template_birth, templates
from netorch.system.templates import (
    Template,
    Unfit,
    nics_in_template,
    refusal,
    shape,
    template,
)
from netorch.system.tiny import TinyImage
from tests.guest_shapes import guest, nic

VM = guest(ports=4)


class Maker:
    """Stands in for template_birth.give_birth."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.failure: Exception | None = None

    def give_birth(
        self, words: Callable[[Descriptors, Path], list[str]], into: Path, scratch: Path
    ) -> None:
        assert words(Descriptors(3, 4, 5), into / "ram")[0] == "/bin/true"
        (into / "ram").write_bytes(b"memory")
        (scratch / "qemu.log").touch()
        if self.failure:
            raise self.failure
        (into / "state").write_bytes(b"devices")

    def template(self, nics_in_it: int = 0, **changes: object) -> Template:
        vm = msgspec.structs.replace(VM, **changes)
        return template("/bin/true", vm, nics_in_it, "tcg", self.lines.append)

    def calls(self) -> int:
        return len([line for line in self.lines if line.startswith("making")])


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Maker:
    fake = Maker()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(template_birth, "give_birth", fake.give_birth)
    image = TinyImage(Path("/kernel"), Path("/vmlinuz"), Path("/initrd"), "quiet")
    monkeypatch.setattr(templates, "tiny_image", lambda _progress: image)
    return fake


def test_guests_of_one_shape_share_a_template(maker: Maker) -> None:
    first = maker.template()
    assert maker.template(name="vm2", nics=(nic(7), nic(8))) == first
    assert maker.calls() == 1
    assert (first.ram.read_bytes(), first.state.read_bytes()) == (b"memory", b"devices")
    others = [maker.template(memory=129), maker.template(cpus=2), maker.template(ports=5)]
    assert len({first, *others}) == 4
    assert len({maker.template(number).directory for number in range(3)}) == 3


def test_a_copy_gets_its_own_macs_in_the_state(maker: Maker) -> None:
    made = maker.template(2)
    macs = ("52:54:00:00:00:01", "52:54:00:00:00:02")
    made.state.write_bytes(b"<\2ntor\0><\2ntor\1><\2ntor\0>")
    state = made.state_for(macs)
    assert state == b"<RT\0\0\0\1><RT\0\0\0\2><RT\0\0\0\1>"
    made.state.write_bytes(b"<\2ntor\0>")
    with pytest.raises(Unfit, match="02:6e:74:6f:72:01"):
        made.state_for(macs)


def test_a_template_has_plain_nics_or_none() -> None:
    plain = ("virtio-net-pci", 1)
    assert nics_in_template([]) == 0
    assert nics_in_template([plain, plain]) == 2
    assert nics_in_template([plain, ("e1000", 1)]) == 0
    assert nics_in_template([("virtio-net-pci", 2)]) == 0


@pytest.mark.parametrize("name", ["ram", "state", "manifest"])
def test_one_that_was_touched_is_made_again(maker: Maker, name: str) -> None:
    made = maker.template()
    (made.directory / name).write_bytes(b"changed")
    assert maker.template() == made
    assert maker.calls() == 2
    os.unlink(made.directory / name)
    maker.template()
    assert maker.calls() == 3


def test_what_a_killed_maker_left_is_removed_by_the_next(maker: Maker, tmp_path: Path) -> None:
    (tmp_path / "netorch/.warm-killed/template").mkdir(parents=True)
    made = maker.template()
    left = {path.name for path in (tmp_path / "netorch").iterdir()}
    assert left == {"warm.lock", made.directory.name}


def test_one_that_fails_leaves_nothing_and_is_not_tried_twice(maker: Maker, tmp_path: Path) -> None:
    maker.failure = Unfit("its kernel has no driver vmgenid")
    for _ in range(2):
        with pytest.raises(Unfit, match="vmgenid"):
            maker.template()
    assert maker.calls() == 1
    assert [path.name for path in (tmp_path / "netorch").iterdir()] == ["warm.lock"]


def test_a_full_disk_is_a_reason(maker: Maker) -> None:
    maker.failure = OSError(28, "No space left on device")
    with pytest.raises(Unfit, match="No space left"):
        maker.template()


def test_the_most_recently_used_ones_are_kept(maker: Maker) -> None:
    made = []
    for number in range(9):
        made.append(maker.template(memory=64 + number))
        os.utime(made[-1].directory, (number, number))  # the clock of files has ticks
    assert [one.directory.exists() for one in made] == [False] + 8 * [True]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image": "/images/a.qcow2"}, "its image is its own"),
        ({"machine": "pc", "ports": 0}, "it is a pc"),
        ({"nics": tuple(nic(number) for number in range(5))}, "5 NICs, and ports for 4"),
        ({"vnc": "socket"}, "none of what it has: vnc"),
    ],
)
def test_what_a_template_can_not_be(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(Unfit, match=reason):
        shape(msgspec.structs.replace(VM, **changes))


def test_what_the_file_rules_out() -> None:
    assert refusal(model.Guest()) == ""
    assert "its file" in refusal(model.Guest(start="cold"))
    assert "console" in refusal(model.Guest(ready="console:login"))
