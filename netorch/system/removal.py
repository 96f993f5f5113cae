"""Taking links away.

Deleting one link makes the kernel wait 16 ms for all CPUs, deleting a whole group in one message
hardly more. So what is to go is gathered in a group: the one that it has, if all of that group is
to go, else a new one.
"""

import errno
import os
from collections.abc import Collection, Sequence

from netorch.errors import KernelError
from netorch.system import messages
from netorch.system.netlink import Netlink, Outcomes
from netorch.system.snapshot import Snapshot


def delete(netlink: Netlink, snapshot: Snapshot, doomed: Collection[int]) -> KernelError | None:
    """Delete the links of these indexes, just seen to be ours; the first error.

    That one is gone already is no error.
    """
    if len(doomed) == 1:
        return _first(netlink.send([[messages.delete_link(index)] for index in doomed]))
    groups: dict[int, list[int]] = {}
    for link in snapshot.links.values():
        groups.setdefault(link.group, []).append(link.index)
    whole = {group for group, members in groups.items() if set(members) <= set(doomed)}
    strays = [index for index in doomed if snapshot.links[index].group not in whole]
    error = None
    if strays:
        fresh = _unused_group(snapshot)
        moves = [[messages.link(index, attributes=(("IFLA_GROUP", fresh),))] for index in strays]
        error = _first(netlink.send(moves))
        whole.add(fresh)
    return error or _first(
        netlink.send([[messages.delete_group(group)] for group in sorted(whole)])
    )


def take_back(netlink: Netlink, indexes: Sequence[int], outcomes: Outcomes) -> None:
    """Delete those of the links just made, under indexes of our choice, that failed half-way."""
    failed = [index for index, error in zip(indexes, outcomes, strict=True) if error is not None]
    error = _first(netlink.send([[messages.delete_link(index)] for index in failed]))
    if error is not None:
        raise KernelError(f"failed to delete a link that was half made: {error}", error.errno)


def _first(outcomes: Outcomes) -> KernelError | None:
    errors = (error for error in outcomes if error is not None and error.errno != errno.ENODEV)
    return next(errors, None)


def _unused_group(snapshot: Snapshot) -> int:
    used = {link.group for link in snapshot.links.values()}
    while True:
        group = int.from_bytes(os.urandom(4), "big") >> 1
        if group not in used and group:
            return group
