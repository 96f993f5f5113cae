"""What a lab finds around it: Facts beyond those that the kernel tells."""

import contextlib
from pathlib import Path

import msgspec

from netorch.addresses import uplink_subnet
from netorch.errors import ImageError, UsageError
from netorch.facts import Facts, Uplink
from netorch.model import DISKLESS, Topology


def with_names(facts: Facts, topology: Topology) -> Facts:
    """Add what the file's own words refer to: users' ids and images' formats."""
    from netorch.system.disks import image_format

    formats: dict[str, str] = {}
    for image in (g.image for g in topology.guests.values() if g.image not in DISKLESS):
        with contextlib.suppress(ImageError):  # the guests' adapter names all that can't be read
            formats[image] = image_format(Path(image))
    owners = {taps.owner for taps in topology.taps.values() if isinstance(taps.owner, str)}
    users = {owner: _uid_of(owner) for owner in owners}
    return msgspec.structs.replace(facts, users=users, formats=formats)


def _uid_of(user: str) -> int:
    import pwd

    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError as error:
        raise UsageError(
            f"there is no user {user!r} to own a tap", "a number does as well"
        ) from error


def fresh_facts(topology: Topology) -> Facts:
    """What a private place looks like before it is made."""
    from netorch.system.uplinks import choose

    has_uplink = choose(topology.lab.uplink) != "none"
    facts = Facts(
        taken=(uplink_subnet(topology),) if has_uplink else (),
        uplinks=(Uplink(name="uplink0", mtu=1500),) if has_uplink else (),
    )
    return with_names(facts, topology)
