"""Seeds and UEFI variables as files of a lab."""

import io
from pathlib import Path

import pycdlib
import pytest

from netorch.planner import Update
from netorch.resources import Resource, Seed, Variables
from netorch.system import firmware, rundir
from netorch.system.firmware import FlashFiles, Image, Uefi, variables_path
from netorch.system.scope import Scope, current_place
from netorch.system.seeds import Seeds, seed_image

FILES = {
    "meta-data": "{}\n",
    "network-config": "version: 2\n",
    "user-data": "#cloud-config\nü: 1\n",
}


@pytest.fixture
def scope(tmp_path: Path) -> Scope:
    run = tmp_path / "run"
    run.mkdir()
    return Scope(lab="boots", place=current_place(), run=run, disks=tmp_path / "disks")


def test_a_seed_is_an_image_with_its_files_by_their_names(scope: Scope) -> None:
    seeds, seed = Seeds(scope), Seed(guest="vm.1", files=FILES)
    done: list[Resource] = []
    for _twice in range(2):
        seeds.create([seed], done.append)
        assert list(seeds.observe()) == [seed]
    assert done == [seed, seed]
    image = seed_image(scope, "vm.1")
    assert image.read_bytes()[32768 + 40 : 32768 + 72].decode().rstrip() == "cidata"
    iso = pycdlib.PyCdlib()
    iso.open(str(image))
    for way in ("rr_path", "joliet_path"):
        for name, text in FILES.items():
            read = io.BytesIO()
            iso.get_file_from_iso_fp(read, **{way: f"/{name}"})
            assert read.getvalue().decode() == text
    iso.close()
    (image.parent / "user-data").write_text("something else")
    assert list(seeds.observe()) != [seed]
    for _twice in range(2):
        seeds.delete([seed], done.append)
        assert list(seeds.observe()) == []
    assert list(scope.run.glob("seeds/*")) == []


def test_a_seed_half_made_is_none(scope: Scope) -> None:
    seeds, seed = Seeds(scope), Seed(guest="vm1", files=FILES)
    seeds.create([seed], lambda _: None)
    image = seed_image(scope, "vm1")
    image.parent.rename(image.parent.with_name("+vm1"))
    assert list(seeds.observe()) == []
    seeds.create([seed], lambda _: None)
    assert list(seeds.observe()) == [seed]


def test_variables_are_a_copy_that_stays_as_the_guest_left_it(
    scope: Scope, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "template"
    template.write_bytes(b"empty")
    template.chmod(0o444)
    image = Image(template, "raw")
    monkeypatch.setattr(firmware, "uefi", lambda machine: Uefi(image, image))
    files, variables = FlashFiles(scope), Variables(guest="vm.1", machine="q35")
    done: list[Resource] = []
    files.create([variables], done.append)
    assert list(files.observe()) == done == [variables]
    path = variables_path(scope, "vm.1", "q35")
    assert path.read_bytes() == b"empty"
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(AssertionError):
        files.update([Update(variables, variables)], done.append)
    for _twice in range(2):
        files.delete([variables], done.append)
    assert list(files.observe()) == []
    assert [path.name for path in scope.disks.iterdir()] == [rundir.MARK]
