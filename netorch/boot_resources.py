"""The resources of how a guest boots: cloud-init's seed, UEFI's variables, the guest's own part.

See `netorch.resources`.
"""

import msgspec

from netorch.resource import Resource


class GuestBoot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a guest boots other than a disk. `kernel` and `initrd` are absolute paths or "".

    `nics` are the numbers of those that it boots from, in this order; `seed`: it has one.
    """

    kernel: str = ""
    initrd: str = ""
    cmdline: str = ""
    nics: tuple[int, ...] = ()
    uefi: bool = False
    seed: bool = False

    def __str__(self) -> str:
        words = [f"kernel {self.kernel}"] if self.kernel else []
        words += [f"initrd {self.initrd}"] if self.initrd else []
        words += [f"cmdline {self.cmdline}"] if self.cmdline else []
        words += ["network"] if self.nics else []
        words += ["uefi"] if self.uefi else []
        words += ["cloud-init"] if self.seed else []
        return ", ".join(words) or "disk"


class Seed(Resource, frozen=True):
    """What cloud-init in a guest reads first (its datasource NoCloud): files by name, as text."""

    guest: str
    files: dict[str, str]

    @property
    def key(self) -> str:
        return f"seed:{self.guest}"

    def describe(self) -> str:
        return f"cloud-init seed of {self.guest}"

    def changes(self, new: Resource) -> list[str]:
        assert isinstance(new, Seed)
        names = sorted(self.files.keys() | new.files.keys())
        return [name for name in names if self.files.get(name) != new.files.get(name)]


class Variables(Resource, frozen=True):
    """The flash memory in which a guest's UEFI firmware keeps its variables, a file."""

    guest: str
    machine: str

    @property
    def key(self) -> str:
        return f"variables:{self.guest}"

    def describe(self) -> str:
        return f"UEFI variables of {self.guest}"
