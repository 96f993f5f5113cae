"""All adapters of a lab, those imported that it needs.

What a lab doesn't have is not imported to observe that it isn't there: the modules of guests alone
take as long as all of the observation of a lab without any. So some adapters are only a promise of
one, with a sign that something of their kind may be there, which costs next to nothing to read.
"""

from collections.abc import Callable, Iterable, Sequence, Set
from functools import cached_property

from netorch.planner import Action, Update
from netorch.resources import (
    BridgeUplink,
    DhcpClient,
    Dnsmasq,
    Guest,
    Namespace,
    Overlay,
    Resource,
    Seed,
    Variables,
    Volume,
)
from netorch.system import Adapter, InHalves
from netorch.system.firewall import Firewall
from netorch.system.links import Links
from netorch.system.look import Look
from netorch.system.rundir import Records, is_ours
from netorch.system.scope import SEEDS, Scope
from netorch.system.snapshot import uplink_mark

Done = Callable[[Resource], None]
Say = Callable[[str], None]


class Promised:
    """An adapter that is imported when there is something for it to do."""

    def __init__(
        self,
        kinds: tuple[type[Resource], ...],
        may_be_there: Callable[[Look], bool],
        make: Callable[[], Adapter],
    ) -> None:
        self.kinds = kinds
        self._may_be_there = may_be_there
        self._make = make

    @cached_property
    def _adapter(self) -> Adapter:
        return self._make()

    def observe(self, look: Look) -> Iterable[Resource]:
        return self._adapter.observe(look) if self._may_be_there(look) else ()

    def check(self, wanted: Sequence[Resource]) -> list[str]:
        return self._adapter.check(wanted)

    def create(self, wanted: Sequence[Resource], done: Done) -> None:
        self._adapter.create(wanted, done)

    def update(self, wanted: Sequence[Update], done: Done) -> None:
        self._adapter.update(wanted, done)

    def delete(self, unwanted: Sequence[Resource], done: Done) -> None:
        self._adapter.delete(unwanted, done)


class PromisedInHalves(Promised):
    """Such an adapter that is `InHalves`."""

    def begin(self, step: Sequence[Action]) -> None:
        assert isinstance(self._adapter, InHalves)
        self._adapter.begin(step)

    def finish(self) -> None:
        assert isinstance(self._adapter, InHalves)
        self._adapter.finish()


def adapters(
    scope: Scope, report: Say, warn: Say, only: Set[type[Resource]] | None
) -> list[Adapter]:
    """The adapters of all resources, or of `only` these."""

    def hosts() -> Adapter:
        from netorch.system.hosts import Hosts

        return Hosts(scope)

    def uplinks() -> Adapter:
        from netorch.system.bridge_uplinks import BridgeUplinks

        return BridgeUplinks(scope, warn)

    def dnsmasqs() -> Adapter:
        from netorch.system.services import Dnsmasqs

        return Dnsmasqs(scope)

    def clients() -> Adapter:
        from netorch.system.services import DhcpClients

        return DhcpClients(scope)

    def disks() -> Adapter:
        from netorch.system.disks import Disks

        return Disks(scope)

    def flash() -> Adapter:
        from netorch.system.firmware import FlashFiles

        return FlashFiles(scope)

    def seeds() -> Adapter:
        from netorch.system.seeds import Seeds

        return Seeds(scope)

    def guests() -> Adapter:
        from netorch.system.guests import Guests

        return Guests(scope, report)

    found: list[Adapter] = [
        Records(scope),
        Promised((Namespace,), lambda look: scope.namespaces.exists(), hosts),
        Links(scope),
        Promised((BridgeUplink,), lambda look: _has_uplinks(look, scope), uplinks),
        Firewall(scope),
        PromisedInHalves((Dnsmasq,), lambda look: look.has_process("dnsmasq"), dnsmasqs),
        Promised((DhcpClient,), lambda look: look.has_process("dhcp"), clients),
        Promised((Overlay, Volume), lambda look: is_ours(scope.disks), disks),
        Promised((Variables,), lambda look: is_ours(scope.disks), flash),
        Promised((Seed,), lambda look: (scope.run / SEEDS).exists(), seeds),
        Promised((Guest,), lambda look: look.has_process("guest"), guests),
    ]
    return [a for a in found if only is None or not only.isdisjoint(a.kinds)]


def _has_uplinks(look: Look, scope: Scope) -> bool:
    """A bridge with the mark of one, or the record of a move that was cut short."""
    marked = any(uplink_mark(link) for link in look.snapshot.links.values())
    return marked or any(scope.run.glob("uplink-*.json"))
