"""UEFI firmware by the descriptors that packages install, in directories of the test's own."""

import json
from pathlib import Path

import pytest

from netorch.errors import MissingError
from netorch.system import firmware
from netorch.system.firmware import uefi


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(firmware, "_PACKAGES", tmp_path / "packages")
    monkeypatch.setattr(firmware, "_ADMINISTRATOR", tmp_path / "administrator")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for directory in ("packages", "administrator", "config/qemu/firmware"):
        (tmp_path / directory).mkdir(parents=True)
    return tmp_path / "packages"


def descriptor(name: str, *features: str, machine: str = "pc-q35-*", **mapping: str) -> str:
    return json.dumps(
        {
            "interface-types": ["uefi"],
            "mapping": {
                "device": "flash",
                "executable": {"filename": f"/{name}.code", "format": "qcow2"},
                "nvram-template": {"filename": f"/{name}.vars", "format": "raw"},
                **mapping,
            },
            "targets": [{"architecture": "x86_64", "machines": [machine]}],
            "features": list(features),
        }
    )


def test_the_first_that_fits_is_taken(packages: Path) -> None:
    (packages / "10-signed.json").write_text(descriptor("signed", "enrolled-keys"))
    (packages / "20-smm.json").write_text(descriptor("smm", "requires-smm"))
    (packages / "30-rom.json").write_text(descriptor("rom", device="memory"))
    (packages / "40-pc.json").write_text(descriptor("pc", machine="pc-i440fx-*"))
    (packages / "50-stateless.json").write_text(descriptor("stateless", mode="stateless"))
    (packages / "60-plain.json").write_text(descriptor("plain", "acpi-s3"))
    (packages / "70-later.json").write_text(descriptor("later"))
    found = uefi("q35")
    assert found.code == (Path("/plain.code"), "qcow2")
    assert found.template == (Path("/plain.vars"), "raw")
    assert uefi("pc").code.path == Path("/pc.code")


def test_a_file_of_the_same_name_hides_the_packages(packages: Path) -> None:
    (packages / "10-a.json").write_text(descriptor("a"))
    (packages / "20-b.json").write_text(descriptor("b"))
    (packages.parent / "administrator" / "10-a.json").write_text("")
    assert uefi("q35").code.path == Path("/b.code")
    (packages.parent / "config/qemu/firmware/10-a.json").write_text(descriptor("mine"))
    assert uefi("q35").code.path == Path("/mine.code")


def test_none_is_an_error_that_names_the_package(packages: Path) -> None:
    with pytest.raises(MissingError, match="no UEFI firmware for machine q35") as caught:
        uefi("q35")
    assert "install ovmf" in caught.value.hint
    (packages / "10-a.json").write_text("{}")
    with pytest.raises(MissingError, match=r"firmware descriptor .*10-a.json: KeyError"):
        uefi("q35")
