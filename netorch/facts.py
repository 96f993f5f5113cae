"""What the compiler must know of the machine: pure data, observed by `netorch.system.facts`."""

import msgspec


class Uplink(msgspec.Struct, frozen=True):
    """An interface that a default route leaves by, and its MTU."""

    name: str
    mtu: int


class Interface(msgspec.Struct, frozen=True):
    """An interface that the file names: a bridge's uplink, or a bridge of somebody else's."""

    mac: str
    mtu: int
    forwarding: bool = False


class Facts(msgspec.Struct, frozen=True):
    """The machine as far as a topology depends on it; by default one with nothing on it."""

    # Every IPv4 prefix that links other than the lab's own use, sorted.
    taken: tuple[str, ...] = ()
    # In the order of the default routes' metrics, the best first.
    uplinks: tuple[Uplink, ...] = ()
    # The lab's own networks that are there: name -> a.b.c.d/len of the bridge.
    addresses: dict[str, str] = {}
    # The interfaces that the file names, as far as they are there.
    interfaces: dict[str, Interface] = {}
    # Taps can't be made here, but qemu-bridge-helper gives guests some, on bridges of others.
    helper: bool = False
    # What words of the file stand for here: a user's uid, and an image's format by its path.
    users: dict[str, int] = {}
    formats: dict[str, str] = {}
