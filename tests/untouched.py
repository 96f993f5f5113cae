"""What tests must leave as they found it: the root network namespace, its rules and sysctls,
mounts, processes.
"""

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from netorch.system.scope import disks_base, run_base

# Every process that a test session starts inherits it: those of other sessions on the same
# machine are not this one's to judge. The value is SESSION, or SESSION-WORKER in a worker of
# pytest-xdist.
TAG = "TESTS_OF_NETORCH"


def machine() -> dict[str, set[str]]:
    """All that is compared, by kind, each as lines of text. What this user can't read is not
    there.
    """
    return {
        "links": set(_links()),
        "addresses": set(_addresses()),
        "routes": set(_routes()),
        "nft rules": set(_nft()),
        "sysctls": set(_sysctls()),
        "mounts": set(_mounts()),
        "processes": set(_processes()),
        "files": set(_files()),
    }


def await_ends(before: dict[str, set[str]], seconds: float) -> None:
    """Wait for the ends of processes that are new: who was killed may still be about to die."""
    deadline = time.monotonic() + seconds
    for line in set(_processes()) - before["processes"]:
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(int(line.split()[0]))
            select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))
            os.close(pidfd)


def differences(before: dict[str, set[str]], after: dict[str, set[str]]) -> list[str]:
    lines = []
    for kind in before:
        lines += [f"{kind}: new: {line}" for line in sorted(after[kind] - before[kind])]
        lines += [f"{kind}: gone: {line}" for line in sorted(before[kind] - after[kind])]
    return lines


def _ip(*arguments: str) -> list[dict[str, object]]:
    out = subprocess.run(["ip", "-json", *arguments], capture_output=True, text=True, check=True)
    listed: list[dict[str, object]] = json.loads(out.stdout or "[]")
    return [entry for entry in listed if entry]


def _pick(entry: dict[str, object], *names: str) -> str:
    return " ".join(f"{name}={entry[name]}" for name in names if name in entry)


def _links() -> Iterator[str]:
    for link in _ip("link"):
        yield _pick(
            link, "ifindex", "ifname", "address", "mtu", "master", "group", "ifalias", "flags"
        )


def _addresses() -> Iterator[str]:
    for link in _ip("address"):
        addresses = link["addr_info"]
        assert isinstance(addresses, list)
        for address in addresses:
            yield f"{link['ifname']} {_pick(address, 'local', 'prefixlen')}"


def _routes() -> Iterator[str]:
    for family in ("-4", "-6"):
        for route in _ip(family, "route", "show", "table", "all"):
            yield _pick(route, "type", "dst", "gateway", "dev", "table", "metric")


def _nft() -> Iterator[str]:
    if shutil.which("nft"):
        listed = subprocess.run(
            ["nft", "--stateless", "list", "ruleset"], capture_output=True, text=True, check=False
        )
        yield from listed.stdout.splitlines()


def _sysctls() -> Iterator[str]:
    root = Path("/proc/sys/net")
    found = [root / "ipv4/ip_forward", *root.glob("ipv[46]/conf/*/forwarding")]
    for path in [*found, *root.glob("ipv6/conf/*/accept_ra")]:
        with suppress(FileNotFoundError):  # its interface has gone meanwhile
            yield f"{path} = {path.read_text().strip()}"


def _mounts() -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        target = line.split()[4]
        if target.startswith("/run/netns/") or "netorch" in target:
            yield target


def _processes() -> Iterator[str]:
    mine = f"{TAG}={os.environ.get(TAG)}".encode()
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            name = Path(f"/proc/{pid}/comm").read_text().strip()
        except OSError:  # another user's, or gone meanwhile
            continue
        if any(text == mine or text.startswith(mine + b"-") for text in environment):
            labs = [text[12:].decode() for text in environment if text.startswith(b"NETORCH_LAB=")]
            yield " of lab ".join([f"{pid} {name}", *labs])


def _files() -> Iterator[str]:
    for base in (run_base(), disks_base()):
        yield from map(str, base.rglob("*"))


if __name__ == "__main__":
    for kind, lines in machine().items():
        print(*(f"{kind}: {line}" for line in sorted(lines)), sep="\n")
