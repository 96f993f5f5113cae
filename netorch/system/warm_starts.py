"""Starting guests warm: which of them, from what, and what is done before such a one goes on.

Order, from a QEMU that waits for a state (-incoming defer) to a guest that runs:
1. `begin` has QEMU read the template's state, `finish` waits until it has.
2. NICs that are not in the template are plugged while the guest stands still, in their order: one
   interrupt tells it of all of them when it goes on.
3. `cont`, as after any start.
A QEMU of an apply that was killed before that is observed as paused, or without some of its NICs,
and the next apply does what is left (netorch.system.guest_changes).

A QEMU that can't go on from its template ends or says so; its guest is then started cold, and the
template is thrown away. Whether a guest is wanted warm is in the record of the lab's topology: how
a guest came to life can't be seen of it later, so it is no part of the Guest.
"""

import os
from collections.abc import Callable, Mapping

from netorch.bare_guests import bare_guest
from netorch.model import Guest as Wanted
from netorch.nic_devices import Plugged
from netorch.resources import Guest
from netorch.system import incoming, rundir
from netorch.system.accel import accelerator
from netorch.system.guest_changes import plug, set_links
from netorch.system.qmp import Qmp
from netorch.system.scope import Scope
from netorch.system.templates import Template, Unfit, nics_in_template, refusal, template
from netorch.topology_nics import model_of

_IGNORE_SHARED = "x-ignore-shared"  # as the template was written: without its memory


def make_templates(
    qemu: str, guests: Mapping[str, Wanted], progress: Callable[[str], None]
) -> None:
    """Have the templates of these guests in the cache, as far as they are fit for one."""
    for name, wanted in guests.items():
        if wanted.image != "tiny" or refusal(wanted):
            continue
        guest = bare_guest(name, wanted)
        if len(wanted.nics) <= guest.ports:
            try:
                written = [(model_of(wanted, nic), nic.queues) for nic in wanted.nics]
                nics = nics_in_template(written)
                template(qemu, guest, nics, accel_of(guest), progress)
            except Unfit:
                continue  # said by whoever starts it


def accel_of(guest: Guest) -> str:
    return accelerator() if guest.accel == "auto" else guest.accel


class WarmStarts:
    """Chooses the templates of a lab's guests. `progress` hears why a guest has none."""

    def __init__(self, scope: Scope, progress: Callable[[str], None]) -> None:
        self._progress = progress
        record = rundir.recorded(scope.run)
        self._guests: Mapping[str, Wanted] = {}
        if record is not None:
            self._guests = rundir.topology_of(record).guests

    def template_for(self, qemu: str, guest: Guest) -> Template | None:
        wanted = self._guests.get(guest.name)
        if wanted is None or wanted.start == "cold":
            return None
        reason, is_plain = refusal(wanted), True
        if not reason:
            try:
                nics = nics_in_template([(nic.model, nic.queues) for nic in guest.nics])
                return template(qemu, guest, nics, accel_of(guest), self._progress)
            except Unfit as unfit:
                reason, is_plain = unfit.message, unfit.is_plain
        # What nobody has asked for, and can't be, is not worth a word.
        if wanted.start == "warm" or not is_plain:
            self._progress(f"{guest.name} starts cold: {reason}")
        return None


def refuse(
    guest: Guest, source: Template, error: Exception, progress: Callable[[str], None]
) -> None:
    """A QEMU could not go on from its template: nobody else is to try."""
    source.discard()
    progress(f"{guest.name} starts cold: {error}")


def begin(qmp: Qmp, source: Template, guest: Guest) -> None:
    """Raises QmpError, Unfit, or OSError if the template is gone."""
    content = source.state_for([nic.mac for nic in guest.nics])
    with open(os.memfd_create("state"), "wb") as state:
        state.write(content)
        state.seek(0)
        incoming.begin(qmp, state.fileno(), [_IGNORE_SHARED])


def finish(qmp: Qmp) -> None:
    """Raises QmpError."""
    incoming.finish(qmp)
    # It stays on otherwise, and changes what `save` writes.
    incoming.set_capabilities(qmp, [_IGNORE_SHARED], on=False)


def give_nics(scope: Scope, qmp: Qmp, source: Template, guest: Guest) -> None:
    """Plug those that are not in the template, and take the links that the file has down."""
    if source.nics:
        set_links(qmp, guest)
        return
    for index, nic in enumerate(guest.nics):
        plugged = Plugged(nic=nic, index=index, port=guest.port_of(index))
        plug(scope, qmp, guest.name, plugged, accel_of(guest))
