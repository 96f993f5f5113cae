"""The scope of one lab on one machine: its name, its marks and its directories.

Marks, one for each place where the kernel lets us leave one:
    links       alias `netorch:<lab>:<key>`, and a link group derived from the lab's name
    nft         table `inet netorch_<lab>`
    processes   environment NETORCH_LAB, NETORCH_PLACE (inode of the network namespace), and
                NETORCH_RESOURCE (the resource as JSON)
    hosts       the file that the namespace is mounted on, `netorch:<lab>:<host>:<place>`
"""

import binascii
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from netorch.resources import Resource, encode

TABLE_PREFIX = "netorch_"
PLACE_FILE = "place"  # in the run directory: the place's inode, and whether it is private
SEEDS = "seeds"  # in the run directory, where guests have cloud-init seeds
CLAIMS_PREFIX = "netorchundo_"  # of the table that remembers what foreign interfaces were like


class Scope(msgspec.Struct, frozen=True, kw_only=True):
    """`place` is the inode of the network namespace that the lab lives in."""

    lab: str
    place: int
    private: bool = False
    keeper: bool = False  # the init that daemons are left to notes how they end (keeper.py)
    run: Path  # 0700: configuration, logs, sockets, leases; gone after teardown
    disks: Path  # overlays of guests' images; gone after teardown

    def alias(self, key: str) -> str:
        return f"netorch:{self.lab}:{key}"

    @property
    def group(self) -> int:
        """The link group of the lab's ports (taps and veths); the bridges' is one higher."""
        return 0x4E000000 | (binascii.crc32(self.lab.encode()) & 0x7FFFFF) << 1

    @property
    def table(self) -> str:
        return TABLE_PREFIX + self.lab

    @property
    def namespaces(self) -> Path:
        """The directory of the hosts' mounted namespaces; in a private place a tmpfs of the lab's
        own.
        """
        return self.run / "netns" if self.private else Path("/run/netns")

    def namespace(self, host: str) -> Path:
        return self.namespaces / f"netorch:{self.lab}:{host}:{self.place}"

    def environment(
        self, resource: Resource | None = None, environ: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """The environment of a process of the lab: `environ`, or this process's, with its marks."""
        environ = os.environ if environ is None else environ
        marks = {"NETORCH_LAB": self.lab, "NETORCH_PLACE": str(self.place)}
        if resource is not None:
            marks["NETORCH_RESOURCE"] = encode(resource)
        inherited = {k: v for k, v in environ.items() if not k.startswith("NETORCH_")}
        return {**inherited, **marks}


def current_place() -> int:
    """The inode of this process's network namespace."""
    return os.stat("/proc/self/ns/net").st_ino


def place_of(run: Path) -> int | None:
    """The network namespace that a run directory belongs to, by the file that says so."""
    try:
        return int((run / PLACE_FILE).read_text().split()[0])
    except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError, IndexError):
        return None  # there is no lab, or somebody else's


def run_base() -> Path:
    """Where run directories are: $NETORCH_RUN_DIR, /run/netorch for root, else below
    $XDG_RUNTIME_DIR.
    """
    if chosen := os.environ.get("NETORCH_RUN_DIR"):
        return Path(chosen).absolute()
    if _is_roots(Path("/run")):
        return Path("/run/netorch")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        return Path(runtime, "netorch")
    return Path(f"/tmp/netorch-{os.geteuid()}")


def disks_base() -> Path:
    """Where overlays are, never on a tmpfs: $NETORCH_DISK_DIR, /var/lib/netorch for root, else the
    user's state.

    The user's is below $XDG_STATE_HOME, by default ~/.local/state.
    """
    if chosen := os.environ.get("NETORCH_DISK_DIR"):
        return Path(chosen).absolute()
    if _is_roots(Path("/var/lib")):
        return Path("/var/lib/netorch")
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state, "netorch")


def _is_roots(directory: Path) -> bool:
    """Whether this is root, and may write there: someone who plays root in a user namespace may
    not, nor root of a container that is read-only in parts.
    """
    return os.geteuid() == 0 and os.access(directory, os.W_OK)
