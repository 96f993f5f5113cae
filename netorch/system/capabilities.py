"""Capabilities of a process that is about to execute another program."""

import ctypes
import os
import struct
from collections.abc import Sequence

# <linux/capability.h>
NET_BIND_SERVICE = 10
NET_ADMIN = 12
NET_RAW = 13
_SETPCAP = 8
_VERSION_3 = 0x20080522

# <linux/prctl.h>
_PR_CAPBSET_DROP = 24
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_PR_CAP_AMBIENT_CLEAR_ALL = 4

_libc = ctypes.CDLL(None, use_errno=True)


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
