"""What a lab finds around it: Facts beyond those that the kernel tells."""

import contextlib
from pathlib import Path

import msgspec

from netorch.addresses import uplink_subnet
from netorch.errors import ConflictError, ImageError, UsageError, dotted
from netorch.facts import Facts, Uplink
from netorch.guest_disks import disks_of, files_of
from netorch.model import Topology
from netorch.resources import Bridge, Forwarding, Guest
from netorch.state import State
from netorch.system.scope import Scope


def with_names(facts: Facts, topology: Topology) -> Facts:
    """Add what the file's own words refer to: users' ids and images' formats."""
    formats: dict[str, str] = {}
    for file in dict.fromkeys(f for guest in topology.guests.values() for f in files_of(guest)):
        from netorch.system.images import image_format

        with contextlib.suppress(ImageError):  # the guests' adapter names all that can't be read
            formats[file] = image_format(Path(file))
    owners = {t.owner: name for name, t in topology.taps.items() if isinstance(t.owner, str)}
    users = {owner: _uid_of(owner, name) for owner, name in owners.items()}
    return msgspec.structs.replace(facts, users=users, formats=formats)


def refuse_held(topology: Topology) -> None:
    """Raise ConflictError if somebody else has an image that the lab needs for itself: before it
    moves into a place from where he can't be seen.
    """
    found: dict[str, None] = {}
    for disk in (disk for guest in topology.guests.values() for disk in disks_of(guest, {})):
        from netorch.system.image_locks import conflict

        for index, layer in enumerate(disk.layers):
            with contextlib.suppress(ImageError):  # as above
                writing = disk.use == "write" and index == 0
                found[conflict(topology.name, Path(layer.file), writing)] = None
    found.pop("", None)
    if found:
        raise ConflictError("\n".join(found))


def _uid_of(user: str, taps: str) -> int:
    import pwd

    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError as error:
        raise UsageError(
            f"{dotted(('taps', taps, 'owner'))}: there is no user {user!r}", "a number does as well"
        ) from error


def fresh_facts(topology: Topology) -> Facts:
    """What a private place looks like before it is made."""
    from netorch.system.uplinks import INTERFACE, choose

    has_uplink = choose(topology.lab.uplink) != "none"
    facts = Facts(
        taken=(uplink_subnet(topology),) if has_uplink else (),
        uplinks=(Uplink(name=INTERFACE, mtu=1500),) if has_uplink else (),
    )
    return with_names(facts, topology)


def refuse_before_place(scope: Scope, desired: State) -> None:
    """Raise ConflictError with the reasons against a lab that can be told before its private place
    is made: what is wrong with the files of its guests, and the machine's interfaces, which it
    won't have there.
    """
    from netorch.system.uplinks import INTERFACE

    there = {"lo", INTERFACE, *(bridge.name for bridge in desired.of(Bridge))}
    found = [out.no_interface() for out in desired.of(Forwarding) if out.name not in there]
    if guests := list(desired.of(Guest)):
        from netorch.system import boots, disk_checks

        found += [reason for guest in guests for reason in boots.reasons(guest)]
        found += disk_checks.reasons(scope, guests)
    if found:
        raise ConflictError("\n".join(found))
