"""Capabilities: which this process has, and which a program that it executes will have."""

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path

# <linux/capability.h>
NET_BIND_SERVICE = 10
NET_ADMIN = 12
NET_RAW = 13
SETFCAP = 31
_SETPCAP = 8
_NAMES = {
    NET_BIND_SERVICE: "NET_BIND_SERVICE",
    NET_ADMIN: "NET_ADMIN",
    NET_RAW: "NET_RAW",
    SETFCAP: "SETFCAP",
}
_FIRST_FREE_PORT = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
_VERSION_3 = 0x20080522

# <linux/prctl.h>
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_PR_CAP_AMBIENT_CLEAR_ALL = 4

_libc = ctypes.CDLL(None, use_errno=True)


def missing(*capabilities: int, port: int = 0) -> list[str]:
    """Names of those of `capabilities` that this process lacks: containers have a choice of them.

    NET_BIND_SERVICE isn't missing where anyone may bind `port`, as in Docker's containers.
    """
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0))
    sets = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, sets))
    low, high = struct.unpack("=I8xI8x", sets.raw)
    effective = low | high << 32
    if port and port >= int(_FIRST_FREE_PORT.read_text()):
        effective |= 1 << NET_BIND_SERVICE
    return [_NAMES[number] for number in capabilities if not effective >> number & 1]


def confine(capabilities: Sequence[int]) -> None:
    """Cut this process down to `capabilities`, as far as it has them, over the exec and for good.

    Someone else than root keeps capabilities over an exec only through the ambient set. Dropping
    from the bounding set needs CAP_SETPCAP; without it no_new_privs and the permitted set give the
    same protection.
    """
    header = ctypes.create_string_buffer(struct.pack("=Ii", _VERSION_3, 0))
    sets = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, sets))
    low, high = struct.unpack("=4xI4x4xI4x", sets.raw[:24])
    permitted = low | high << 32
    wanted = permitted & sum(1 << number for number in capabilities)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    if permitted >> _SETPCAP & 1:
        with open("/proc/sys/kernel/cap_last_cap") as last:
            for number in range(int(last.read()) + 1):
                if number not in capabilities:
                    _prctl(_PR_CAPBSET_DROP, number)
    words = [wanted & 0xFFFFFFFF] * 3 + [wanted >> 32] * 3
    _check(_libc.capset(header, struct.pack("=6I", *words)))
    for number in capabilities:
        if os.getuid() != 0 and wanted >> number & 1:
            _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _prctl(option: int, *arguments: int) -> None:
    padded = (*arguments, 0, 0, 0, 0)[:4]
    _check(_libc.prctl(option, *map(ctypes.c_ulong, padded)))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
