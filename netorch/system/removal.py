"""Taking links away.

Deleting one link makes the kernel wait 16 ms for all CPUs, deleting a whole group in one message
hardly more. So what is to go is gathered in one group: the largest of which all is to go, or else
a new one.
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
    if len(doomed) < 2:
        return _first(netlink.send([[messages.delete_link(index)] for index in doomed]))
    gone = set(doomed)
    groups: dict[int, set[int]] = {}
    for link in snapshot.links.values():
        groups.setdefault(link.group, set()).add(link.index)
    whole = [group for group, members in groups.items() if members <= gone]
    group = max(whole, key=lambda one: len(groups[one]), default=0) or _unused_group(snapshot)
    strays = gone - groups.get(group, set())
    moves = [[messages.link(index, attributes=(("IFLA_GROUP", group),))] for index in strays]
    return _first(netlink.send(moves)) or _first(netlink.send([[messages.delete_group(group)]]))


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
