"""What labs need of a machine, found out by trying: the reasons why it can't, in words."""

from collections.abc import Callable
from functools import cache

from netorch.api import Lab
from netorch.errors import ConflictError, KernelError, MissingError, UsageError
from netorch.model import Topology

_TAP = '[networks.try]\nmode = "bridge"\n[taps.try]\nnetwork = "try"\n'
_NAT = '[networks.try]\naddress = "192.168.122.1/24"\ndhcp = false\ndns = false\n'


@cache
def missing(what: str) -> str:
    """Why this machine has no `what` (userns, tun, nft, qemu, dnsmasq, pasta, ...); "" if it has.

    A word other than the first three is a program. Raises UsageError for no word at all.
    """
    if not what:
        raise UsageError("a need has a name: userns, tun, nft, qemu, or a program's")
    trial = _TRIALS.get(what)
    return trial() if trial else _program(what)


def of(topology: Topology) -> list[str]:
    """What a private lab needs of the kernel and of QEMU."""
    needs = ["userns"]
    if topology.guests or topology.taps:
        needs.append("tun")
    if topology.guests:
        needs.append("qemu")
    return needs


def _tried(topology: str) -> str:
    """Why such a lab can't be made."""
    try:
        with Lab(topology):
            return ""
    except (ConflictError, KernelError, MissingError) as error:
        return f"{error.message} ({error.hint})" if error.hint else error.message


def _program(name: str) -> str:
    from netorch.system.starting import program

    return "" if program(name) else f"{name} is not installed"


_TRIALS: dict[str, Callable[[], str]] = {
    "userns": lambda: _tried(""),
    "tun": lambda: _tried(_TAP),
    "nft": lambda: _tried(_NAT),
    "qemu": lambda: _program("qemu-system-x86_64"),
}
