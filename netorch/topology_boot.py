"""What types can't say about how guests boot: kernels, the network, firmware, cloud-init."""

import re
from collections.abc import Iterator

from netorch.errors import Key, quoted
from netorch.model import Dhcp, Guest, Network, Topology

Doubt = tuple[Key, str, str, tuple[Key, ...]]
"""A Finding and the places of the values that it rests on."""

# What OpenSSH calls the types of its public keys (sshd(8), AUTHORIZED_KEYS FILE FORMAT).
_PUBLIC_KEY = r"(sk-)?(ssh|ecdsa)-[a-z0-9@.-]+ +AAAA[A-Za-z0-9+/]+=*( .*)?"
_HOME = "write the directory out: whose home ~ is depends on who runs netorch"


def is_public_key(line: str) -> bool:
    """Is it a line of an authorized_keys file, without options?"""
    return re.fullmatch(_PUBLIC_KEY, line) is not None


def is_user_data(text: str) -> bool:
    """Is it user data itself, rather than the path of a file?"""
    return "\n" in text


def image_of(guest: Guest) -> str:
    """The image as it is meant: with a kernel, or from the network, `tiny` has no part in it."""
    another = guest.kernel is not None or guest.boot == "network"
    return "none" if another and guest.image == "tiny" else guest.image


def boots(topology: Topology) -> Iterator[Doubt]:
    """Everything that is wrong with what the guests boot, and with what networks serve for it."""
    for name, network in topology.networks.items():
        yield from _served(("networks", name), network)
    for name, guest in topology.guests.items():
        yield from _paths(("guests", name), guest)
        yield from _source(("guests", name), guest)
        yield from _cloud_init(("guests", name), guest)


def _served(path: Key, network: Network) -> Iterator[Doubt]:
    where: Key = (*path, "tftp")
    if network.tftp is not None:
        yield from _path(where, network.tftp, "a directory, relative to the file")
        if network.mode == "bridge" and network.address is None and not network.external:
            hint = 'write address = "..." (this machine\'s own on that LAN)'
            because: tuple[Key, ...] = ((*path, "address"), (*path, "mode"))
            yield where, "TFTP needs an address to serve from", hint, because
    if isinstance(network.dhcp, Dhcp) and network.dhcp.boot is not None:
        file = network.dhcp.boot
        if network.tftp is None and "://" not in file:
            message = f"nothing serves {quoted(file)}"
            hint = 'write tftp = "DIRECTORY" for the network, or the URL of the file'
            yield (*path, "dhcp", "boot"), message, hint, (where,)


def _paths(path: Key, guest: Guest) -> Iterator[Doubt]:
    for key in ("kernel", "initrd"):
        value = getattr(guest, key)
        if value is not None:
            yield from _path((*path, key), value, "the path of a file, relative to this one")


def _path(where: Key, value: str, hint: str) -> Iterator[Doubt]:
    if not value or "\0" in value or value.startswith("~"):
        yield where, f"{quoted(value)} is not a path", _HOME if value[:1] == "~" else hint, ()


def _source(path: Key, guest: Guest) -> Iterator[Doubt]:
    """From where it boots: exactly one of a kernel, the network, a disk."""
    kernel, boot = (*path, "kernel"), (*path, "boot")
    if guest.kernel is None:
        for key in ("initrd", "cmdline"):
            if getattr(guest, key) is not None:
                yield (
                    (*path, key),
                    "belongs to a kernel, and there is none",
                    'kernel = "..."',
                    (kernel,),
                )
    if guest.boot == "network":
        if guest.kernel is not None:
            yield boot, "the kernel is booted already", "leave one of the two out", (kernel,)
        if not guest.nics:
            hint = 'nics = [{ network = "..." }]'
            yield boot, "there is no NIC to boot from", hint, ((*path, "nics"),)
    bootable = guest.kernel is not None or guest.boot == "network" or guest.disks
    if image_of(guest) == "none" and not bootable:
        hint = 'an image, a disk, a kernel, or boot = "network"'
        yield (*path, "image"), "there is nothing to boot from", hint, (boot, kernel)


def _cloud_init(path: Key, guest: Guest) -> Iterator[Doubt]:
    for key in ("user_data", "ssh_keys"):
        if getattr(guest, key) and image_of(guest) == "tiny":
            message = "is for cloud-init, which tiny doesn't have"
            hint = 'name an image that has it; in tiny, use "netorch exec" or the console'
            yield (*path, key), message, hint, ((*path, "image"), (*path, "kernel"))
    if guest.user_data is not None and not is_user_data(guest.user_data):
        hint = 'the path of a file, or the text of several lines: """#cloud-config..."""'
        yield from _path((*path, "user_data"), guest.user_data, hint)
    for index, key_or_path in enumerate(guest.ssh_keys):
        if not key_or_path.strip() or "\0" in key_or_path or "\n" in key_or_path:
            hint = '"ssh-ed25519 AAAA... name", or the path of a file of such lines'
            message = f"{quoted(key_or_path)} is neither a public key nor a path"
            yield (*path, "ssh_keys", index), message, hint, ()
