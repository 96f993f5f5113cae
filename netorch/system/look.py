"""One look at the machine: what several adapters read of it is read once, and used by all of them.

A pass over /proc costs 5 µs a process, a dump of links 20 µs a link. A Look lasts for one
observation and goes with it: whoever changes something afterwards takes a new one.
"""

from functools import cached_property
from typing import TYPE_CHECKING

from netorch.system.netlink import Netlink
from netorch.system.scope import Scope
from netorch.system.snapshot import Route, Snapshot, routes

if TYPE_CHECKING:
    from netorch.system.processes import Marked


class Look:
    """What there is, each part from the moment when it was first asked for."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    @cached_property
    def processes(self) -> "dict[str, list[Marked]]":
        """The lab's processes by the key of their resource, without children."""
        from netorch.system.processes import leaders, marked  # ctypes

        return leaders(marked(self._scope))

    def has_process(self, kind: str) -> bool:
        """Is there a process of the kind (`guest`) that keys begin with?"""
        return any(key.startswith(f"{kind}:") for key in self.processes)

    @cached_property
    def snapshot(self) -> Snapshot:
        """The links of the lab's place, with their addresses."""
        with Netlink() as netlink:
            return Snapshot(netlink)

    @cached_property
    def routes(self) -> list[Route]:
        with Netlink() as netlink:
            return list(routes(netlink))
