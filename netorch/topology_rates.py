"""Rates of NICs: what `rate` of a file means in bit/s, and what is wrong with it."""

from collections.abc import Iterator

from netorch.errors import Finding, Key, quoted
from netorch.model import HostNic, Nic, Rates, Topology
from netorch.topology_values import Wrong

_UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}  # tc's
_LEAST, _MOST = 8 * 10**3, 32 * 10**9  # tbf counts bytes a second in 32 bits


def rate_bits(value: int | str) -> int:
    """A rate in bit/s, in whole bytes a second as the kernel has it: 10000000, "10mbit"."""
    text = str(value).strip().lower()
    number = text.rstrip("abcdefghijklmnopqrstuvwxyz")
    unit = text[len(number) :] or "bit"
    whole, _, part = number.strip().partition(".")
    digits = whole + part
    if unit not in _UNITS or not (digits.isascii() and digits.isdecimal() and len(digits) <= 15):
        raise Wrong("is not a rate", '"10mbit", "1gbit", or a number of bit/s')
    scale: int = 10 ** len(part)
    bits = int(digits) * _UNITS[unit] // scale
    if not _LEAST <= bits <= _MOST:
        raise Wrong(f"is too {'slow' if bits < _LEAST else 'fast'} for a rate", "8kbit to 32gbit")
    return bits // 8 * 8


def limits(nic: Nic | HostNic) -> tuple[int, int]:
    """What the node may receive and send by this NIC in bit/s; 0 for any amount."""
    rate = nic.rate
    into, out = (rate.in_, rate.out) if isinstance(rate, Rates) else (rate, rate)
    return (
        0 if into is None else rate_bits(into),
        0 if out is None else rate_bits(out),
    )


def rates(topology: Topology) -> Iterator[Finding]:
    """Every rate that is none."""
    for path, nic in _nics(topology):
        if nic.rate is not None and nic.network is None:
            message = "a NIC without a network has no port here that could limit it"
            yield (*path, "rate"), message, "leave it out"
    for path, value in _written(topology):
        try:
            rate_bits(value)
        except Wrong as wrong:
            said = quoted(value) if isinstance(value, str) else f"{value} bit/s"
            yield path, f"{said} {wrong.message}", wrong.hint


def _written(topology: Topology) -> Iterator[tuple[Key, int | str]]:
    for path, nic in _nics(topology):
        where: Key = (*path, "rate")
        if isinstance(nic.rate, Rates):
            written = {"in": nic.rate.in_, "out": nic.rate.out}
            yield from ((((*where, k), v)) for k, v in written.items() if v is not None)
        elif nic.rate is not None:
            yield where, nic.rate


def _nics(topology: Topology) -> Iterator[tuple[Key, Nic | HostNic]]:
    for name, guest in topology.guests.items():
        yield from ((("guests", name, "nics", i), nic) for i, nic in enumerate(guest.nics))
    for name, host in topology.hosts.items():
        yield from ((("hosts", name, "nics", i), nic) for i, nic in enumerate(host.nics))
