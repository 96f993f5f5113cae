"""The built-in guest image `tiny`: a kernel and an initramfs, built once, then found in a cache.

Theory of operation
-------------------
The cache directory ($XDG_CACHE_HOME/netorch, by default ~/.cache/netorch) holds

    tiny-<digest>/kernel, initrd,    an image; the digest covers every byte
                  vmlinuz
    tiny-current-<key>               a pointer: the name of the directory to use
    tiny.lock                        held (flock) by the one process that builds

The pointer's key is what netorch itself contributes: the format version below, the architecture
and the guest's init script. So a hit costs two small reads and no process; and a new netorch
makes a new image, while a new kernel on the host does not (remove the pointer to get one).

An image is built in a directory beside its final place and renamed into it; the pointer is
written after that, by a rename as well. A crash leaves a `.tiny-*` directory, which the next
builder removes: it holds the lock, so nobody else's can be alive. Whoever waited for the lock
looks for the pointer again before it builds.

The modules that build are imported only then.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from netorch.errors import ImageError
from netorch.system.cache import alone, cache_directory

_FORMAT = 8  # to be raised when the builder changes what it puts into an image
_INIT = Path(__file__).with_name("tiny-init.sh")

# Chosen on q35 under TCG with Linux 6.1, 6 to 8 boots each, on a machine that others used too:
# the savings are rough. Where none is given, the word's own share was within the noise.
CMDLINE = " ".join(
    (
        "console=ttyS0 quiet",
        "cryptomgr.notests",  # about 0.2 s: self-tests of the kernel's ciphers
        "rodata=off",  # about 0.15 s: the kernel's protection of its own pages
        "noreplace-smp",  # about 0.1 s: rewriting lock prefixes for a single processor
        "rootfstype=ramfs",  # the initramfs is unpacked into ramfs and not tmpfs
        # 0.2 s together: code in every indirect call and return, wake-up and page fault, which is
        # most of what a copy has to translate. The guest has nothing to defend against itself.
        "mitigations=off psi=0 cgroup_disable=memory",
        "lsm= audit=0",  # no AppArmor or TOMOYO, for which the guest has no policy
        "init_on_alloc=0",
        "random.trust_cpu=on",
        "no_timer_check",
    )
)
# Left out: nolapic_timer and tsc=reliable. In 30 boots with both, two leases took 3.8 s and 10 s;
# which of them it was, if either, is not known.


class TinyImage(NamedTuple):
    """What QEMU needs for -kernel, -initrd and, as the start of it, -append.

    `vmlinuz` is the kernel as distributions have it, for firmware (UEFI) and other boot loaders;
    `kernel` may be it unpacked. That starts earlier, but only `vmlinuz` knows the screen: Linux
    learns of its text mode on its way through the BIOS (drivers/video/console/vgacon.c).
    """

    kernel: Path
    vmlinuz: Path
    initrd: Path
    cmdline: str


def tiny_image(progress: Callable[[str], None]) -> TinyImage:
    """The image for this netorch on this machine, from the cache or else built now.

    ``progress`` gets a line for every step that takes long; it is not called on a cache hit.
    Raises ImageError, with what to install or run, where the image can't be built.
    """
    cache = cache_directory()
    try:
        init = _INIT.read_bytes()
        pointer = cache / f"tiny-current-{_FORMAT}-{os.uname().machine}-{zlib.crc32(init):08x}"
        return _read(pointer) or _build(pointer, init, progress)
    except (OSError, ValueError) as error:
        raise ImageError(f"failed to build the image tiny in {cache}: {error}") from error


def identity(guest: str, token: str = "") -> str:
    """What a QEMU tells the guest to be known by: a token, by default a new one, and its name."""
    return f"{token or os.urandom(8).hex():16} {guest:63}"


def _read(pointer: Path) -> TinyImage | None:
    """The image that a pointer names; None if there is no pointer, or it names nothing."""
    try:
        directory = pointer.with_name(pointer.read_text())
    except FileNotFoundError:
        return None
    image = _in(directory)
    parts = (image.kernel, image.vmlinuz, image.initrd)
    return image if all(part.is_file() for part in parts) else None


def _in(directory: Path) -> TinyImage:
    return TinyImage(directory / "kernel", directory / "vmlinuz", directory / "initrd", CMDLINE)


def _build(pointer: Path, init: bytes, progress: Callable[[str], None]) -> TinyImage:
    import shutil
    import tempfile

    from netorch.system.tiny_build import build

    cache = pointer.parent
    with alone(cache, "tiny", "is building the image tiny", progress):
        image = _read(pointer)
        if image is not None:
            return image
        with tempfile.TemporaryDirectory(prefix=".tiny-", dir=cache) as scratch:
            result = Path(scratch, "image")
            result.mkdir()
            digest = build(init, result, Path(scratch), progress)
            directory = cache / f"tiny-{digest}"
            if directory.exists():  # the same bytes, unless a part of them was removed
                shutil.rmtree(directory)
            result.rename(directory)
            new = Path(scratch, "pointer")
            new.write_text(directory.name)
            new.rename(pointer)
    return _in(directory)
