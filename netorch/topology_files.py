"""What stands in the files that a topology names, taken into the topology itself.

Paths become absolute. Of what netorch reads only to hand it on, the content takes the place of the
path: cloud-init's user data, and public keys. So the record of a lab holds what its guests were
given, and `status` of a running lab doesn't change with such a file, but `plan` of its topology
does.
"""

import os
from pathlib import Path

import msgspec

from netorch.errors import Finding, Key, quoted
from netorch.model import DISKLESS, Guest, Layer, Topology
from netorch.topology_boot import image_of, is_public_key, is_user_data


def complete(topology: Topology, base: Path) -> tuple[Topology, list[Finding]]:
    """The topology with its files, relative to `base`, and what is wrong with them."""
    findings: list[Finding] = []
    guests = {
        name: _guest(("guests", name), guest, base, findings)
        for name, guest in topology.guests.items()
    }
    networks = {
        name: msgspec.structs.replace(network, tftp=_absolute(base, network.tftp))
        for name, network in topology.networks.items()
    }
    return msgspec.structs.replace(topology, guests=guests, networks=networks), findings


def _absolute(base: Path, path: str | None) -> str | None:
    return None if path is None else os.path.abspath(base / path)


def _guest(path: Key, guest: Guest, base: Path, findings: list[Finding]) -> Guest:
    def layers(written: tuple[Layer, ...]) -> tuple[Layer, ...]:
        return tuple(
            msgspec.structs.replace(layer, file=os.path.abspath(base / layer.file))
            for layer in written
        )

    image = image_of(guest)
    return msgspec.structs.replace(
        guest,
        image=image if image in DISKLESS else os.path.abspath(base / image),
        backing=layers(guest.backing),
        disks=tuple(
            msgspec.structs.replace(
                disk, file=_absolute(base, disk.file), backing=layers(disk.backing)
            )
            for disk in guest.disks
        ),
        kernel=_absolute(base, guest.kernel),
        initrd=_absolute(base, guest.initrd),
        user_data=_user_data((*path, "user_data"), guest.user_data, base, findings),
        ssh_keys=tuple(
            key
            for index, written in enumerate(guest.ssh_keys)
            for key in _keys((*path, "ssh_keys", index), written, base, findings)
        ),
    )


def _user_data(where: Key, written: str | None, base: Path, findings: list[Finding]) -> str | None:
    if written is None or is_user_data(written):
        return written
    text = _text(where, base / written, findings)
    return text if text.endswith("\n") else f"{text}\n"


def _keys(where: Key, written: str, base: Path, findings: list[Finding]) -> list[str]:
    """The public keys that `written` is, or that the file of that name holds."""
    if is_public_key(written.strip()):
        return [written.strip()]
    try:
        file = base / Path(written).expanduser()
    except RuntimeError as error:
        findings.append((where, f"{quoted(written)} is not a path: {error}", ""))
        return []
    before = len(findings)
    lines = [line.strip() for line in _text(where, file, findings).splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if len(findings) == before and not (keys and all(map(is_public_key, keys))):
        hint = "a public key's name ends in .pub" if "PRIVATE KEY" in "".join(lines[:1]) else ""
        findings.append((where, f"{file} does not hold public keys", hint or "one on each line"))
    return keys


def _text(where: Key, file: Path, findings: list[Finding]) -> str:
    try:
        return file.read_text("utf-8")
    except OSError as error:
        findings.append((where, f"failed to read {file}: {error.strerror}", "relative to the file"))
    except UnicodeDecodeError:
        findings.append((where, f"{file} is not UTF-8 text", "save it as such"))
    return ""
