"""UEFI firmware for guests, found as libvirt finds it: by the descriptors that packages install.

docs/interop/firmware.json of QEMU has their format. The three directories are /usr/share/qemu/
firmware (packages), /etc/qemu/firmware (the administrator) and $XDG_CONFIG_HOME/qemu/firmware (the
person). A file hides those of its name in the directories before its own, an empty one without
taking their place; the first that fits, in the order of their names, is taken.

Firmware that starts signed systems only, or that needs System Management Mode, is passed over.

A guest's variables are a copy of what the package has for a new machine. It is with the guests'
disks, and as these outlives a guest that is started again.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from netorch.errors import ImageError, MissingError
from netorch.planner import Update
from netorch.resources import Resource, Variables
from netorch.system import rundir
from netorch.system.scope import Scope

_PACKAGES = Path("/usr/share/qemu/firmware")
_ADMINISTRATOR = Path("/etc/qemu/firmware")
_UNWANTED = {"enrolled-keys", "secure-boot", "requires-smm"}
# The beginnings of QEMU's own names, with versions, for what it calls q35 and pc for short.
_MACHINES = {"q35": "pc-q35-", "pc": "pc-i440fx-"}
_INSTALL = "install ovmf (Fedora, Arch: edk2-ovmf)"
_SUFFIX = ".uefi-variables"


class Image(NamedTuple):
    """A file with the format, raw or qcow2, that its descriptor gives."""

    path: Path
    format: str


class Uefi(NamedTuple):
    """The firmware, and what a guest's variables are at first."""

    code: Image
    template: Image


def uefi(machine: str) -> Uefi:
    """Installed firmware for the machine type. Raises MissingError where there is none."""
    for path in _descriptors():
        try:
            found = _fitting(json.loads(path.read_bytes()), machine)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MissingError(
                f"failed to read the firmware descriptor {path}: {error!r}",
                "repair it, or hide it with an empty file of its name in ~/.config/qemu/firmware",
            ) from error
        if found:
            return found
    raise MissingError(f"no UEFI firmware for machine {machine} is installed", _INSTALL)


def _descriptors() -> Iterator[Path]:
    configured = os.environ.get("XDG_CONFIG_HOME", "")
    own = Path(configured) if os.path.isabs(configured) else Path.home() / ".config"
    found: dict[str, Path] = {}
    for directory in (_PACKAGES, _ADMINISTRATOR, own / "qemu" / "firmware"):
        try:
            found |= {path.name: path for path in directory.glob("*.json")}
        except PermissionError:
            continue  # of somebody else's home
    for _, path in sorted(found.items()):
        if path.stat().st_size:
            yield path


def _fitting(descriptor: dict[str, Any], machine: str) -> Uefi | None:
    """The firmware of a descriptor, if it is UEFI on flash for the machine and starts anything."""
    mapping = descriptor["mapping"]
    machines = [
        name
        for target in descriptor["targets"]
        if target["architecture"] == "x86_64"
        for name in target["machines"]
    ]
    if (
        "uefi" not in descriptor["interface-types"]
        or mapping["device"] != "flash"
        or mapping.get("mode", "split") != "split"
        or _UNWANTED.intersection(descriptor["features"])
        or not any(name.startswith(_MACHINES[machine]) for name in machines)
    ):
        return None
    code, template = mapping["executable"], mapping["nvram-template"]
    return Uefi(
        Image(Path(code["filename"]), code["format"]),
        Image(Path(template["filename"]), template["format"]),
    )


def variables_path(scope: Scope, guest: str, machine: str) -> Path:
    return scope.disks / f"{guest}.{machine}{_SUFFIX}"


class FlashFiles:
    """The adapter for UEFI variables: copies of what the firmware's package has for a new machine.

    They are with the guests' disks, and as them outlive a guest that is started again.
    """

    kinds: tuple[type[Resource], ...] = (Variables,)

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def observe(self, look: object = None) -> Iterable[Variables]:
        for path in sorted(self._scope.disks.glob(f"*{_SUFFIX}")):
            guest, _, machine = path.name.removesuffix(_SUFFIX).rpartition(".")
            yield Variables(guest=guest, machine=machine)

    def check(self, wanted: Sequence[Resource]) -> list[str]:
        return []

    def create(self, wanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        import shutil

        rundir.make_disks(self._scope)
        for resource in wanted:
            assert isinstance(resource, Variables)
            path = variables_path(self._scope, resource.guest, resource.machine)
            new = path.with_suffix(".new")
            try:
                shutil.copyfile(uefi(resource.machine).template.path, new)
                new.chmod(0o600)
            except OSError as error:
                raise ImageError(
                    f"failed to create {resource.describe()}: {error.strerror}"
                ) from error
            new.rename(path)
            done(resource)

    def update(self, wanted: Sequence[Update], done: Callable[[Resource], None]) -> None:
        raise AssertionError("UEFI variables have no live field")

    def delete(self, unwanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        for resource in unwanted:
            assert isinstance(resource, Variables)
            path = variables_path(self._scope, resource.guest, resource.machine)
            path.unlink(missing_ok=True)
            path.with_suffix(".new").unlink(missing_ok=True)
            done(resource)
