"""The IPv6 settings of an interface, for the bridge that takes its place.

The lab's bridges have no IPv6 (addr_gen_mode none). With an uplink, the bridge is this machine's
interface to a LAN, where router advertisements are to be heard and answered as before.
"""

import errno
from collections.abc import Callable
from pathlib import Path

from netorch.errors import KernelError
from netorch.system import messages
from netorch.system.netlink import Netlink
from netorch.system.snapshot import Link

_CONF = Path("/proc/sys/net/ipv6/conf")
# In this order: the secret is what addr_gen_mode 2 makes addresses with, and a bridge whose mode
# changes makes its link-local address at once.
_SETTINGS = (
    "accept_ra",
    "accept_ra_defrtr",
    "accept_ra_pinfo",
    "accept_ra_mtu",
    "accept_ra_rt_info_min_plen",
    "accept_ra_rt_info_max_plen",
    "autoconf",
    "use_tempaddr",
    "temp_valid_lft",
    "temp_prefered_lft",
    "accept_redirects",
    "dad_transmits",
    "forwarding",
    "stable_secret",
    "addr_gen_mode",
)


def copy_settings(netlink: Netlink, port: Link, bridge: Link, warn: Callable[[str], None]) -> None:
    """Give the bridge the settings of the interface, as far as they may be written."""
    kept = []
    for name in _SETTINGS:
        value, there = _read(port.name, name), _read(bridge.name, name)
        if value is None or value == there:
            continue
        try:
            (_CONF / bridge.name / name).write_text(value)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT):
                raise KernelError(
                    f"failed to set {name} of {bridge.name}: {error.strerror}", error.errno or 0
                ) from error
            kept.append(name)
    if "addr_gen_mode" in kept and port.ipv6 is not None:
        _generate(netlink, bridge, port.ipv6)
        kept.remove("addr_gen_mode")
    if kept:
        names = ", ".join(kept)
        warn(f"{bridge.name} has IPv6 settings of its own, /proc/sys being read-only: {names}")


def _generate(netlink: Netlink, bridge: Link, mode: int) -> None:
    """By netlink. The kernel makes the address when the bridge comes up the next time."""
    families = (("AF_INET6", (("IFLA_INET6_ADDR_GEN_MODE", mode),)),)
    attributes = (("IFLA_AF_SPEC", families),)
    refused = netlink.send([[messages.link(bridge.index, attributes=attributes)]])[0]
    if refused is not None:
        raise KernelError(
            f"failed to set addr_gen_mode of {bridge.name}: {refused}", refused.errno
        ) from refused


def _read(interface: str, name: str) -> str | None:
    try:
        return (_CONF / interface / name).read_text().strip()
    except OSError:
        return None  # this kernel has no such setting, or no value for it (stable_secret: EIO)
