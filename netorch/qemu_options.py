"""QEMU's command line, read back: the guest's name, and the NICs with what is behind them.

For guests that somebody else has started (libvirt, a script), whose command line in /proc is all
that there is. Options are read in both of QEMU's forms, `key=value,...` (where `,,` is a comma and
the first value may go without its key) and JSON. What doesn't parse is passed over, since this is
anybody's text. It is what QEMU was started with: a NIC that came later is not in it.
"""

import json
from collections.abc import Iterator, Sequence

import msgspec

# The key of a first value without one (QEMU 7.2, qemu-options.hx and net/net.c).
_FIRST = {"name": "guest", "netdev": "type", "device": "driver", "nic": "type"}


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """A NIC by its tap: open descriptors, or the tap's name where QEMU opens it by itself."""

    model: str | None = None
    mac: str | None = None
    fds: tuple[int, ...] = ()
    ifname: str | None = None


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a command line says; `guest` is None for one that isn't QEMU's."""

    guest: str | None = None
    nics: tuple[Nic, ...] = ()


def read(argv: Sequence[str]) -> Options:
    """The guest and the NICs of a QEMU with this command line."""
    found: dict[str, list[dict[str, str]]] = {option: [] for option in _FIRST}
    for option, value in _options(argv):
        found[option].append(_fields(value, _FIRST[option]))
    nics = [*_pairs(found["netdev"], found["device"]), *map(_short, found["nic"])]
    if not (found["netdev"] or found["device"] or found["nic"]):
        return Options()  # anything may have a -name
    guest = next((name["guest"] for name in reversed(found["name"]) if name.get("guest")), None)
    return Options(guest=guest, nics=tuple(nic for nic in nics if nic.fds or nic.ifname))


def _options(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    words = iter(argv[1:])
    for word in words:
        option = word[2:] if word.startswith("--") else word[1:]
        if word.startswith("-") and option in _FIRST:
            yield option, next(words, "")


def _pairs(netdevs: list[dict[str, str]], devices: list[dict[str, str]]) -> Iterator[Nic]:
    """Each back-end that is a tap with its front-end, the device that names it."""
    by_netdev = {device["netdev"]: device for device in devices if "netdev" in device}
    for netdev in netdevs:
        if netdev.get("type") == "tap":
            device = by_netdev.get(netdev.get("id", ""), {})
            yield _nic(netdev, device.get("driver"), device.get("mac"))


def _short(nic: dict[str, str]) -> Nic:
    """Of `-nic tap,...`, which is both."""
    return _nic(nic, nic.get("model"), nic.get("mac")) if nic.get("type") == "tap" else Nic()


def _nic(tap: dict[str, str], model: str | None, mac: str | None) -> Nic:
    numbers = f"{tap.get('fds', '')}:{tap.get('fd', '')}".split(":")
    return Nic(
        model=model,
        mac=mac.lower() if mac else None,
        fds=tuple(int(n) for n in numbers if n.isascii() and n.isdecimal()),  # not a getfd name
        ifname=tap.get("ifname"),
    )


def _fields(text: str, first: str) -> dict[str, str]:
    if text.startswith("{"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return {}
        return {key: word for key, word in value.items() if isinstance(word, str)}
    parts = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    fields: dict[str, str] = {}
    for index, part in enumerate(parts):
        key, equals, value = part.partition("=")
        if equals:
            fields[key] = value
        elif index == 0:
            fields[first] = part
    return fields
