"""The queues of a guest's taps, opened for its QEMU."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator

from netorch.errors import KernelError
from netorch.resources import GuestNic
from netorch.system.bridge_helper import open_tap
from netorch.system.scope import Scope
from netorch.system.taps import (
    DEVICE,
    IFF_MULTI_QUEUE,
    IFF_NO_PI,
    IFF_TAP,
    IFF_VNET_HDR,
    IFREQ,
    TUNSETIFF,
)

_RTMGRP_LINK = 1
_BUSY_SECONDS = 3.0  # the kernel tells of a lost carrier within one second


def open_queues(
    scope: Scope, nic: GuestNic, guest: str, opened: contextlib.ExitStack
) -> Iterator[int]:
    """A descriptor for each queue of the tap. Raises KernelError."""
    if nic.bridge:
        fd = open_tap(scope, nic.bridge, scope.run / "bridge-helper.log")
        opened.callback(os.close, fd)
        yield fd
        return
    # All flags but IFF_MULTI_QUEUE are taken over from who opens the tap (drivers/net/tun.c,
    # tun_set_iff).
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if nic.queues > 1 else 0)
    if nic.tap not in (name for _index, name in socket.if_nameindex()):  # TUNSETIFF would make one
        reason = os.strerror(errno.ENODEV)
        raise KernelError(f"failed to open tap {nic.tap} for guest {guest}: {reason}", errno.ENODEV)
    try:
        for _queue in range(nic.queues):
            fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
            opened.callback(os.close, fd)
            _attach(fd, IFREQ.pack(nic.tap.encode(), flags))
            yield fd
    except OSError as error:
        raise KernelError(
            f"failed to open tap {nic.tap} for guest {guest}: {error.strerror}", error.errno or 0
        ) from error


def _attach(fd: int, request: bytes) -> None:
    """TUNSETIFF; while the tap is busy, wait for news of links and try again.

    A QEMU that was killed lets go of its taps only after it has ceased to be seen (kernel/exit.c,
    do_exit: exit_mm comes before exit_files).
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as events:
        events.bind((0, _RTMGRP_LINK))
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                fcntl.ioctl(fd, TUNSETIFF, request)
                return
            except OSError as error:
                left = deadline - time.monotonic()
                if error.errno != errno.EBUSY or left <= 0:
                    raise
            events.settimeout(left)
            with contextlib.suppress(TimeoutError):
                events.recv(65536)
