"""Strings of a topology that mean a value: addresses, amounts of memory, times.

Each function raises Wrong, which says what is wrong with the string and what would be right.
"""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Interface

_UNITS = {"m": 1, "g": 1 << 10, "t": 1 << 20}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class Wrong(ValueError):
    """Not a value. `hint` is what would be right."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that looks most like `name`, or ""."""
    import difflib  # costs 8 ms, and most files have no mistake

    by_lower = {word.lower(): word for word in known}
    close = difflib.get_close_matches(name.lower()[:80], by_lower, n=1)
    return by_lower[close[0]] if close else ""


def memory_mib(value: int | str) -> int:
    """A guest's memory in MiB: a number of MiB, or "256M", "1G"."""
    if isinstance(value, int):
        return value
    number, unit = value.strip().lower().removesuffix("ib").strip(), "m"
    if number[-1:] in _UNITS:
        number, unit = number[:-1].strip(), number[-1]
    if not (number.isascii() and number.isdecimal() and len(number) <= 9):
        raise Wrong("is not an amount of memory", '"256M", "1G", or a whole number of MiB')
    return int(number) * _UNITS[unit]


def disk_bytes(text: str) -> int:
    """A disk's size in bytes: "512M", "10G"."""
    number, unit = text[:-1], text[-1:].lower()
    if unit not in _UNITS or not (number.isascii() and number.isdecimal() and len(number) <= 9):
        raise Wrong("is not the size of a disk", '"512M", "10G" or "2T"')
    return int(number) * _UNITS[unit] << 20


def lease_seconds(lease: str) -> float:
    """A lease time of the form that the model allows, in seconds."""
    if lease == "infinite":
        return float("inf")
    unit = lease[-1] if lease[-1] in _SECONDS else "s"
    return int(lease.removesuffix(unit)) * _SECONDS[unit]


def domain(text: str) -> str:
    """A DNS domain."""
    for label in text.split("."):
        letters = label.replace("-", "a")
        if not (letters.isascii() and letters.isalnum()) or "-" in (label[0], label[-1]):
            raise Wrong("is not a DNS domain", "letters, digits and `-`, parted by single dots")
    return text


def address(text: str) -> IPv4Address:
    """An IPv4 address without a prefix length."""
    try:
        return IPv4Address(text)
    except ValueError as error:
        if ":" in text:
            raise Wrong("looks like IPv6", "this version knows IPv4 only") from error
        raise Wrong("is not an IPv4 address", 'such as "192.168.122.6"') from error


def interface(text: str) -> IPv4Interface:
    """A machine's IPv4 address with its prefix length, /8 to /30."""
    number, slash, prefix = text.partition("/")
    ip = address(number)
    if not slash:
        raise Wrong("has no prefix length", f'"{ip}/24"')
    if prefix not in map(str, range(8, 31)):
        raise Wrong("has no prefix length from /8 to /30", f'"{ip}/24"')
    found = IPv4Interface(text)
    machine(ip, found)
    return found


def machine(ip: IPv4Address, subnet: IPv4Interface) -> None:
    """Can `ip` be a machine's address in the subnet?"""
    network = subnet.network
    if ip not in network:
        message = f"is outside of {network}"
    elif _is_special(ip):
        message = "can't be a machine's address"
    elif ip == network.network_address:
        message = f"is the address of the whole network {network}"
    elif ip == network.broadcast_address:
        message = f"is the broadcast address of {network}"
    else:
        return
    first, last = network[1], network[-2]
    raise Wrong(
        message, 'such as "192.168.122.1/24"' if _is_special(first) else f"{first} to {last}"
    )


def _is_special(ip: IPv4Address) -> bool:
    this_network = int(ip) < 1 << 24  # RFC 791: 0.0.0.0/8
    return this_network or ip.is_loopback or ip.is_multicast or ip.is_reserved
