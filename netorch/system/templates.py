"""Templates: guests that have booted and stand still, of which others are copies.

Theory of operation
-------------------
To start a guest *warm* is to let QEMU take the state of one that was booted before and stopped: its
memory is a file that each copy maps privately (copy on write, so what no copy changes is in memory
once), the devices' state is read by -incoming. See docs/guests-warm.md for what copies don't share.

Where all NICs of a guest are plain ones (virtio, one queue), its template has as many, without a
back-end, and the driver has let go of them. So a copy's QEMU has the device in its place, with what
is behind it, and the guest gives it to the driver; the MAC in the state is replaced by the copy's
own. Other NICs a copy gets as a running guest does, and its template has none.

The cache directory (that of `netorch.system.tiny`) holds

    warm-<key>/ram, state    the memory, and the state of everything else
    warm-<key>/manifest      how the two looked when they were complete
    warm.lock                held (flock) by the one process that makes a template

The key covers all that shapes a template: the command line of its QEMU, with the digest of kernel
and initramfs in it, and QEMU itself. A template is made in a directory beside its final place and
renamed into it when both files are on the disk. A crash leaves a `.warm-*` directory, which the
next maker removes: it holds the lock. A file that was touched since does not fit its manifest, and
the template is made again. The most recently used templates are kept; one that is removed while
copies run is theirs for as long as they do.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from netorch.boot_devices import Kernel
from netorch.digests import sha256
from netorch.errors import NetorchError
from netorch.guests import Boot, Descriptors, Ram, argv
from netorch.model import Guest as Wanted
from netorch.resources import Guest
from netorch.system.cache import alone, cache_directory
from netorch.system.tiny import identity, tiny_image

_FORMAT = 2  # to be raised when what is done to a template changes
_KEPT = 8
_NAME = "template"


class Unfit(NetorchError):
    """A guest can't start warm; the message is the reason. It is `plain` where the file tells, and
    no surprise.
    """

    def __init__(self, message: str, is_plain: bool = False) -> None:
        super().__init__(message)
        self.is_plain = is_plain


_refused: dict[Path, Unfit] = {}  # not to be tried again by this process


class Template(NamedTuple):
    """A template in the cache. `nics` is how many of its copies' NICs it has: all or none."""

    directory: Path
    nics: int

    @property
    def ram(self) -> Path:
        return self.directory / "ram"

    @property
    def state(self) -> Path:
        return self.directory / "state"

    def state_for(self, macs: Sequence[str]) -> bytes:
        """The state for a copy with these MACs. Raises OSError, Unfit."""
        state = self.state.read_bytes()
        for index in range(self.nics):
            old = _bytes(_mac(index))
            if old not in state:
                raise Unfit(f"the state of its template does not hold {_mac(index)}")
            state = state.replace(old, _bytes(macs[index]))
        return state

    def discard(self) -> None:
        """Forget one that QEMU could not go on from."""
        import shutil

        shutil.rmtree(self.directory, ignore_errors=True)


def _mac(index: int) -> str:
    """Of a template's NIC: a locally administered one, which is "ntor" and the number."""
    return f"02:6e:74:6f:72:{index:02x}"


def _bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def nics_in_template(nics: Sequence[tuple[str, int]]) -> int:
    """How many of a guest's NICs, by model and queues, its template has: all or none."""
    return len(nics) if all(nic == ("virtio-net-pci", 1) for nic in nics) else 0


def shape(guest: Guest) -> Guest:
    """The guest that a template of `guest` is. Raises Unfit."""
    plain = Guest(
        name=_NAME,
        image=guest.image,
        machine=guest.machine,
        accel=guest.accel,
        memory=guest.memory,
        cpus=guest.cpus,
        ports=guest.ports,
    )
    if guest.image != "tiny":
        raise Unfit("its image is its own, and only tiny can be copied", is_plain=True)
    if guest.machine != "q35":
        raise Unfit(f"it is a {guest.machine}, and only a q35 can be copied", is_plain=True)
    if len(guest.nics) > guest.ports:
        raise Unfit(f"it has {len(guest.nics)} NICs, and ports for {guest.ports}", is_plain=True)
    for field in guest.__struct_fields__:
        if field not in ("name", "nics") and getattr(guest, field) != getattr(plain, field):
            raise Unfit(f"a template has none of what it has: {field}", is_plain=True)
    return plain


def refusal(wanted: Wanted) -> str:
    """Why a guest of the file is not to start warm, as far as the file tells; "" if it may."""
    if wanted.start == "cold":
        return "its file says so"
    if wanted.ready.startswith("console:"):
        return "its console is waited for, and a copy does not boot"
    return ""


def template(
    qemu: str, guest: Guest, nics: int, accel: str, progress: Callable[[str], None]
) -> Template:
    """The template for guests like `guest`, with so many NICs in it, from the cache or else made
    now. Raises Unfit.
    """
    plain = shape(guest)
    tiny = tiny_image(progress)
    cmdline = f"{tiny.cmdline} netorch.template netorch.hostname={_NAME}"
    kernel = Kernel(str(tiny.kernel), str(tiny.initrd), cmdline)
    boot = Boot(kernel=kernel, identity=identity(_NAME, "template"))

    def words(fds: Descriptors, ram: Path) -> list[str]:
        return argv(
            plain,
            program=qemu,
            accel=accel,
            boot=boot,
            fds=fds,
            log="serial.log",
            ram=Ram(ram, private=False),
            spares=[_mac(index) for index in range(nics)],
        )

    cache = cache_directory()
    key = _key(qemu, words(Descriptors(0, 0, 0), Path("ram")))
    found = Template(cache / f"warm-{key}", nics)
    if _is_whole(found):
        os.utime(found.directory)
        return found
    if found.directory in _refused:
        raise _refused[found.directory]
    try:
        return _make(found, words, f"{plain.image} with {plain.memory} MiB", progress)
    except OSError as error:
        reason = Unfit(f"its template can't be made in {cache}: {error}")
        _refused[found.directory] = reason
        raise reason from error
    except Unfit as error:
        _refused[found.directory] = error
        raise


def _key(qemu: str, words: list[str]) -> str:
    program = os.stat(qemu)
    shaped_by = [_FORMAT, program.st_size, program.st_mtime_ns, words]
    if "kvm" in words:
        shaped_by.append(_processor())
    return sha256(msgspec.json.encode(shaped_by).decode())[:16]


def _processor() -> list[str]:
    """The host's processor: under KVM, what the guest has seen of it has to be there."""
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    return [line for line in lines if line.startswith(("model name", "flags", "microcode"))]


def _is_whole(found: Template) -> bool:
    try:
        manifest = (found.directory / "manifest").read_bytes()
        return manifest == _manifest(found.directory)
    except FileNotFoundError:
        return False


def _manifest(directory: Path) -> bytes:
    """How the files look. The memory is too large to be read at every start."""
    looks: list[object] = [zlib.crc32((directory / "state").read_bytes())]
    for name in ("ram", "state"):
        seen = os.stat(directory / name)
        looks += [seen.st_ino, seen.st_size, seen.st_mtime_ns]
    return msgspec.json.encode(looks)


def _make(
    wanted: Template,
    words: Callable[[Descriptors, Path], list[str]],
    what: str,
    progress: Callable[[str], None],
) -> Template:
    import shutil
    import tempfile

    from netorch.system.template_birth import give_birth

    cache = wanted.directory.parent
    with alone(cache, "warm", "is making a template", progress):
        if _is_whole(wanted):
            return wanted
        progress(f"making a template of {what}, by booting it (once)")
        with tempfile.TemporaryDirectory(prefix=".warm-", dir=cache) as scratch:
            made = Path(scratch, "template")
            made.mkdir(mode=0o700)
            give_birth(words, made, Path(scratch))
            (made / "manifest").write_bytes(_manifest(made))
            if wanted.directory.exists():
                shutil.rmtree(wanted.directory)
            made.rename(wanted.directory)
        _make_room(cache)
    return wanted


def _make_room(cache: Path) -> None:
    import shutil

    there = sorted(cache.glob("warm-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in there[_KEPT:]:
        shutil.rmtree(old)
