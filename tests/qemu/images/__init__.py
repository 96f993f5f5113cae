"""Images that the tests make, once for a machine: found in a cache by the digest of their scripts.

Root's cache is for everybody, so that who comes after root need not make them again.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

_HERE = Path(__file__).parent
_ROOTS = Path("/var/cache/netorch-tests")
_SECONDS = 900  # for 150 MB of packages and dpkg on a busy machine


class Image(NamedTuple):
    """A qcow2 disk whose root file system is labelled `root`, and its kernel and initramfs."""

    disk: Path
    kernel: Path
    initrd: Path


def debian() -> Image:
    """Debian with cloud-init, systemd-networkd, sshd and the guest agent (debian.sh)."""
    scripts = b"".join(path.read_bytes() for path in sorted(_HERE.glob("debian*.sh")))
    name = f"debian-{hashlib.sha256(scripts).hexdigest()[:16]}"
    shared = _ROOTS / name
    if shared.is_dir() and shared.stat().st_uid == 0:
        return _in(shared)
    if not shutil.which("mmdebstrap"):
        pytest.skip("mmdebstrap is not installed")
    cache = _ROOTS if os.geteuid() == 0 else _own_cache()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (cache / name).is_dir():
            for old in cache.glob("debian-*"):
                shutil.rmtree(old)
            _make(cache / name)
    return _in(cache / name)


def _own_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "netorch-tests"


def _in(directory: Path) -> Image:
    return Image(directory / "disk.qcow2", directory / "vmlinuz", directory / "initrd")


def _make(directory: Path) -> None:
    # Not below a home: root of mmdebstrap's user namespace is another user, who has to come by.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        os.chmod(scratch, 0o755)
        made = subprocess.run(
            [_HERE / "debian.sh", scratch],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
        if "newuidmap" in made.stdout or "subuid" in made.stdout:
            pytest.skip(f"this user can't make a Debian: {made.stdout.strip()}")
        assert made.returncode == 0, made.stdout
        new = Path(tempfile.mkdtemp(prefix=".new-", dir=directory.parent))
        os.chmod(new, 0o755)
        for name in ("vmlinuz", "initrd"):
            shutil.copyfile(Path(scratch, name), new / name)
        convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"]
        subprocess.run([*convert, Path(scratch, "disk.raw"), new / "disk.qcow2"], check=True)
        new.rename(directory)
