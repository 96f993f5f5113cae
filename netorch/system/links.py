"""The lab's links: bridges, taps and veth pairs, and their rates, as one adapter.

What is the lab's own is what carries its alias; a link's name or kind is no evidence. Every call
starts from a fresh look at the kernel (some 20 ms for a thousand links), so that nothing rests on
what was true before. What an interrupted run has left half made is brought to what it should be by
the code that updates, or, where it can't become that, made again.
"""

import errno
from collections.abc import Callable, Sequence

from netorch.errors import KernelError
from netorch.planner import Update
from netorch.resources import Bridge, Rate, Resource, Tap, Veth
from netorch.system import bridges, rates, removal, taps, veths
from netorch.system.changes import bridge_index
from netorch.system.look import Look
from netorch.system.netlink import Netlink
from netorch.system.refusals import refusal
from netorch.system.scope import Scope
from netorch.system.snapshot import Link, Snapshot

Done = Callable[[Resource], None]
Failures = dict[str, KernelError]  # by key
_KINDS = ("bridge:", "tap:", "veth:", "rate:")


class Links:
    """The adapter for Bridge, Tap, Veth and Rate."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    @property
    def kinds(self) -> tuple[type[Resource], ...]:
        return (Bridge, Tap, Veth, Rate)

    def observe(self, look: Look | None = None) -> list[Resource]:
        snapshot = (look or Look(self._scope)).snapshot
        return self._observe(snapshot, self._own(snapshot))

    def check(self, wanted: Sequence[Resource]) -> list[str]:
        from netorch.system.conflicts import find  # ipaddress, only before a change

        return find(wanted, self._scope)

    def create(self, wanted: Sequence[Resource], done: Done) -> None:
        with Netlink() as netlink:
            snapshot = Snapshot(netlink)
            own = self._own(snapshot)
            if any(resource.key in own for resource in wanted):
                snapshot, own = self._clear(netlink, snapshot, own, wanted)
            left = [resource for resource in wanted if resource.key in own]
            failures = self._update(netlink, snapshot, own, left)
            fresh = [resource for resource in wanted if resource.key not in own]
            failures |= self._create(netlink, snapshot, own, fresh)
        _settle("create", wanted, failures, done)

    def update(self, wanted: Sequence[Update], done: Done) -> None:
        new = [update.new for update in wanted]
        with Netlink() as netlink:
            snapshot = Snapshot(netlink)
            failures = self._update(netlink, snapshot, self._own(snapshot), new)
        _settle("update", new, failures, done)

    def delete(self, unwanted: Sequence[Resource], done: Done) -> None:
        keys = {resource.key for resource in unwanted}
        with Netlink() as netlink:
            snapshot = Snapshot(netlink)
            own = self._own(snapshot)
            rates.release(netlink, own, [r for r in unwanted if isinstance(r, Rate)])
            doomed = [link.index for key, link in own.items() if key in keys]
            error = removal.delete(netlink, snapshot, doomed)
            left = self._own(Snapshot(netlink)) if error else {}
        failures = {key: error for key in keys if key in left and error is not None}
        _settle("delete", unwanted, failures, done)

    def _own(self, snapshot: Snapshot) -> dict[str, Link]:
        """The lab's links in this namespace by key."""
        prefix = self._scope.alias("")
        return {
            link.alias.removeprefix(prefix): link
            for link in snapshot.links.values()
            if link.alias.startswith(tuple(prefix + kind for kind in _KINDS))
        }

    def _observe(self, snapshot: Snapshot, own: dict[str, Link]) -> list[Resource]:
        hosts = [veths.host_of(key[5:]) for key in own if key.startswith("veth:")]
        far = veths.look(self._scope, hosts)
        networks = {own[key].index: key[7:] for key in own if key.startswith("bridge:")}
        observed: list[Resource] = [*rates.observe(own)]
        for key, link in own.items():
            kind, _, id = key.partition(":")
            master = snapshot.links.get(link.master)
            bridge = master.name if master else ""
            network = networks.get(link.master, "")
            if kind == "bridge":
                observed.append(bridges.observe(link, id, snapshot))
            elif kind == "tap":
                observed.append(taps.observe(link, id, network, bridge))
            elif kind == "veth":
                end = far.get(veths.host_of(id))
                observed.append(veths.observe(link, id, network, bridge, end))
        return observed

    def _clear(
        self,
        netlink: Netlink,
        snapshot: Snapshot,
        own: dict[str, Link],
        wanted: Sequence[Resource],
    ) -> tuple[Snapshot, dict[str, Link]]:
        """Delete what is in the way of `wanted` under its own mark and can't become it."""
        new = {resource.key: resource for resource in wanted}
        stale = [
            own[old.key].index
            for old in self._observe(snapshot, own)
            if old.key in new and not old.can_become(new[old.key])
        ]
        if stale:
            if error := removal.delete(netlink, snapshot, stale):
                raise KernelError(
                    f"failed to delete what an earlier run left: {error}", error.errno
                ) from error
            snapshot = Snapshot(netlink)
        return snapshot, self._own(snapshot)

    def _create(
        self,
        netlink: Netlink,
        snapshot: Snapshot,
        own: dict[str, Link],
        fresh: Sequence[Resource],
    ) -> Failures:
        of_bridges = [resource for resource in fresh if isinstance(resource, Bridge)]
        made = bridges.create(netlink, snapshot, of_bridges, self._scope)
        failures = {b.key: e for b, e in zip(of_bridges, made, strict=True) if e}
        if of_bridges:
            snapshot = Snapshot(netlink)
        masters = _masters(snapshot, fresh, self._scope, failures)
        of_taps = [(r, masters[r.key]) for r in fresh if isinstance(r, Tap) and r.key in masters]
        made = taps.create(netlink, of_taps, snapshot, self._scope)
        failures |= {tap.key: e for (tap, _), e in zip(of_taps, made, strict=True) if e}
        of_veths = [(r, masters[r.key]) for r in fresh if isinstance(r, Veth) and r.key in masters]
        made = veths.create(netlink, snapshot, of_veths, self._scope)
        limits = [r for r in fresh if isinstance(r, Rate)]
        limited = rates.create(netlink, snapshot, own, limits, self._scope)
        failures |= {rate.key: e for rate, e in zip(limits, limited, strict=True) if e}
        return failures | {veth.key: e for (veth, _), e in zip(of_veths, made, strict=True) if e}

    def _update(
        self,
        netlink: Netlink,
        snapshot: Snapshot,
        own: dict[str, Link],
        wanted: Sequence[Resource],
    ) -> Failures:
        failures = {
            r.key: KernelError("it is gone", errno.ENODEV) for r in wanted if r.key not in own
        }
        there = [(resource, own[resource.key]) for resource in wanted if resource.key in own]
        masters = _masters(snapshot, [r for r, _ in there], self._scope, failures)
        keys, groups, pairs = [], [], []
        for resource, link in there:
            if isinstance(resource, Bridge):
                keys.append(resource.key)
                groups.append(bridges.update(link, resource, snapshot, self._scope))
            elif isinstance(resource, Tap) and resource.key in masters:
                keys.append(resource.key)
                groups.append(taps.update(link, resource, masters[resource.key], self._scope))
            elif isinstance(resource, Veth) and resource.key in masters:
                pairs.append((resource, link, masters[resource.key]))
        failures |= {key: e for key, e in zip(keys, netlink.send(groups), strict=True) if e}
        limits = [r for r, _ in there if isinstance(r, Rate)]
        made = rates.update(netlink, own, limits, self._scope)
        failures |= {rate.key: e for rate, e in zip(limits, made, strict=True) if e}
        made = veths.update(netlink, pairs, self._scope)
        return failures | {veth.key: e for (veth, *_), e in zip(pairs, made, strict=True) if e}


def _masters(
    snapshot: Snapshot, resources: Sequence[Resource], scope: Scope, failures: Failures
) -> dict[str, int]:
    """The index of each port's bridge by key; ports without theirs go to `failures`."""
    masters = {}
    for resource in resources:
        if isinstance(resource, Tap | Veth):
            index = bridge_index(snapshot, resource.bridge, scope, not resource.network)
            if isinstance(index, int):
                masters[resource.key] = index
            else:
                failures[resource.key] = index
    return masters


def _settle(verb: str, resources: Sequence[Resource], failures: Failures, done: Done) -> None:
    """Report what was done, then raise for the first that failed."""
    for resource in resources:
        if resource.key not in failures:
            done(resource)
    for resource in resources:
        if error := failures.get(resource.key):
            raise refusal(verb, resource, error) from error
