"""IPv4 forwarding on interfaces that aren't ours, with the value that goes back in the end.

A claim is an element `"eth0" : <previous value>` of the map `forwarding` in the lab's table
`inet netorchundo_<lab>`: kept by the kernel beside the flag itself, it lives exactly as long. It is
written before the flag is set and removed after the flag is restored, so a lab that is killed
anywhere in between still knows what to undo.

Several labs may claim one interface. The last one restores the flag; a lab that finds it on because
of another's claim inherits that claim's value. Reading and writing is serialised among labs by a
lock on the network namespace itself (flock on nsfs), which leaves no file and goes with its holder.
"""

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from netorch.errors import KernelError, NetorchError
from netorch.resources import Forwarding, Resource
from netorch.system import messages
from netorch.system.netlink import Netlink
from netorch.system.nft import Nft
from netorch.system.scope import CLAIMS_PREFIX
from netorch.system.snapshot import Link, links

_ELEMENT = r'"([^"]+)" : 0x0*([01])\b'


class Claims:
    """The claims of one lab on foreign interfaces' forwarding flags."""

    def __init__(self, lab: str, nft: Nft) -> None:
        self._table = CLAIMS_PREFIX + lab
        self._nft = nft

    def observe(self, tables: Sequence[str]) -> Iterator[Forwarding]:
        """What this lab claims, with the flags as they are; `tables` are all of family inet."""
        claimed = self._claimed(self._table) if self._table in tables else {}
        present = interfaces() if claimed else {}
        for name in claimed:
            yield Forwarding(name=name, on=name in present and bool(present[name].forwarding))

    def set(self, wanted: Sequence[Forwarding], done: Callable[[Resource], None]) -> None:
        """Claim the interfaces, then give their flags the wanted value."""
        with _namespace_lock():
            present = interfaces()
            for resource in wanted:
                if resource.name not in present:
                    raise NetorchError(
                        f"failed to set forwarding on {resource.name}: no such interface"
                    )
            self._claim([present[resource.name] for resource in wanted])
            for resource in wanted:
                _set_forwarding(present[resource.name], resource.on)
                done(resource)

    def release(self, unwanted: Sequence[Forwarding], done: Callable[[Resource], None]) -> None:
        """Restore the flags that no other lab needs, then drop the claims."""
        with _namespace_lock():
            own, others = self._read()
            present = interfaces() if own else {}
            for resource in unwanted:
                name = resource.name
                turned_on = own.get(name) is False and name not in others and not _is_router()
                if turned_on and name in present:
                    _set_forwarding(present[name], False)
                if name in own:
                    self._unclaim(own, name)
                done(resource)

    def _claim(self, wanted: Sequence[Link]) -> None:
        """Note the value that each flag had, or that the lab noted which turned it on."""
        own, others = self._read()
        elements = [
            f'"{link.name}" : {int(others.get(link.name, bool(link.forwarding)))}'
            for link in wanted
            if link.name not in own
        ]
        if elements:
            self._nft.run(
                f"table inet {self._table} {{\nmap forwarding {{\ntype ifname : mark\n}}\n}}\n"
                f"add element inet {self._table} forwarding {{ {', '.join(elements)} }}",
                f"note the forwarding of {', '.join(link.name for link in wanted)}",
            )

    def _unclaim(self, own: dict[str, bool], name: str) -> None:
        del own[name]
        last = f"delete table inet {self._table}"
        one = f'delete element inet {self._table} forwarding {{ "{name}" }}'
        self._nft.run(one if own else last, f"drop the note of the forwarding of {name}")

    def _read(self) -> tuple[dict[str, bool], dict[str, bool]]:
        """The flags' previous values as this lab noted them, and as others did."""
        own: dict[str, bool] = {}
        others: dict[str, bool] = {}
        for table in self._nft.tables():
            if table == self._table:
                own = self._claimed(table)
            elif table.startswith(CLAIMS_PREFIX):
                others |= self._claimed(table)
        return own, others

    def _claimed(self, table: str) -> dict[str, bool]:
        listing = self._nft.run(f"list table inet {table}", f"list table inet {table}")
        return {name: value == "1" for name, value in re.findall(_ELEMENT, listing)}


def interfaces() -> dict[str, Link]:
    """The interfaces of this network namespace by name."""
    with Netlink() as netlink:
        return {link.name: link for link in links(netlink)}


def _set_forwarding(interface: Link, on: bool) -> None:
    if bool(interface.forwarding) == on:
        return
    conf = ("IFLA_INET_CONF", (("FORWARDING", int(on)),))
    attributes = (("IFLA_AF_SPEC", (("AF_INET", (conf,)),)),)
    with Netlink() as netlink:
        refused = netlink.send([[messages.link(index=interface.index, attributes=attributes)]])[0]
    if refused is not None:
        raise KernelError(
            f"failed to turn forwarding {'on' if on else 'off'} on {interface.name}: {refused}",
            refused.errno,
        ) from refused


@contextmanager
def _namespace_lock() -> Iterator[None]:
    namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(namespace, fcntl.LOCK_EX)
        yield
    finally:
        os.close(namespace)


def _is_router() -> bool:
    """Has someone set ip_forward since? Then every flag is on by their will."""
    return Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() == "1"
