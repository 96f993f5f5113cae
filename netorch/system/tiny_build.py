"""The builder of the guest image `tiny`: from what the distribution ships to a kernel and initrd.

Theory of operation
-------------------
Three parts, each taken from this machine where it has a fitting one and else from the
distribution's packages (module debs), which works as an ordinary user:

- the kernel with its modules. The running one, where its image is readable and it has the
  drivers that netorch's NIC models need; Debian's "cloud" kernels, for one, have not. Where its
  image can be unpacked and has a PVH entry, the guest gets the unpacked vmlinux, since unpacking
  it at every start is dear under TCG.
- busybox: a static one.
- qemu-ga, the real guest agent, with its loader and the libraries that it is linked with.

The archive stays uncompressed. Copying 16.5 MB of it took the guest 0.11 s (Linux 6.1, TCG); no
compression was tried against that.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from netorch.errors import ImageError
from netorch.system import debs, initramfs
from netorch.system.initramfs import Entry, Module

Progress = Callable[[str], None]

# Without these no NIC model that netorch offers works.
_REQUIRED = ("virtio_pci", "virtio_net", "e1000", "8139cp")
# 8139too is not among them: it refuses the revision that QEMU emulates and would only cost time.
_WANTED = (
    *_REQUIRED,
    *("e1000e", "vmxnet3", "virtio_blk", "virtio_scsi", "virtio_console", "virtio_rng"),
    *("virtio_mmio", "nvme", "ahci", "ata_piix", "sd_mod", "xhci_pci", "usb_storage"),
    *("button", "evdev", "qemu_fw_cfg"),
)
_APPLETS = {
    *("sh", "init", "mount", "umount", "modprobe", "ip", "udhcpc", "mdev", "acpid"),
    *("poweroff", "reboot", "cat", "rm", "mkdir", "sync", "hwclock"),
}
_OWN_NAMES = {"init", "linuxrc", "poweroff", "halt", "reboot"}  # ours, in /sbin, not busybox's
_LIBRARIES = (
    *("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu"),
    *("/lib64", "/usr/lib64", "/lib", "/usr/lib"),
)
# A static busybox has no home directory to shorten \w to ~ with (glibc looks it up by NSS).
_PROFILE = r"""export HOME=/root
cd() {
    command cd "$@" || return
    case $PWD in
        "$HOME" | "$HOME"/*) PS1="\h:~${PWD#"$HOME"}# " ;;
        *) PS1='\h:\w# ' ;;
    esac
}
cd
"""
_FSTAB = """\
proc /proc proc
sys /sys sysfs
dev /dev devtmpfs
"""
# What is done when the kernel tells of something (busybox mdev); devtmpfs makes the nodes.
_MDEV = """\
SUBSYSTEM=net;.* 0:0 660 */lib/netorch/hotplug
SUBSYSTEM=virtio-ports;.* 0:0 660 */lib/netorch/hotplug
MODALIAS=.+;.* 0:0 660 @[ -e "/sys$DEVPATH/driver" ] || modprobe -q -b "$MODALIAS"
.* 0:0 660 !
"""
_INITTAB = """\
::once:/lib/netorch/late
ttyS0::respawn:-/bin/sh
::ctrlaltdel:/sbin/reboot
"""


@dataclass(frozen=True)
class _Kernel:
    image: Path
    release: str
    modules: dict[str, Module]


def build(init: bytes, result: Path, scratch: Path, progress: Progress) -> str:
    """Write ``kernel``, ``vmlinuz`` and ``initrd`` into ``result``; the digest of all.

    ``scratch`` is a directory for packages while they are unpacked. Raises ImageError.
    """
    if os.uname().machine != "x86_64":
        raise ImageError(
            f"the image tiny exists for x86_64 only, not for {os.uname().machine}",
            "give the guests an image of their own",
        )
    kernel = _host_kernel() or _packaged_kernel(scratch / "kernel", progress)
    busybox = _host_busybox() or _packaged_busybox(scratch / "busybox", progress)
    agent = _agent(scratch / "agent", progress)
    progress("writing the kernel and the initramfs of the image tiny")
    vmlinuz = kernel.image.read_bytes()
    image = _bootable(vmlinuz)
    initrd = initramfs.newc(
        [*_skeleton(init), *_programs(busybox), *_drivers(kernel), *_files(agent)]
    )
    (result / "kernel").write_bytes(image)
    (result / "vmlinuz").write_bytes(vmlinuz)
    (result / "initrd").write_bytes(initrd)
    return hashlib.sha256(hashlib.sha256(vmlinuz).digest() + initrd).hexdigest()[:16]


def _host_kernel() -> _Kernel | None:
    """The running kernel, where it can be read and has all required drivers."""
    release = os.uname().release
    modules = Path("/lib/modules", release)
    for image in (Path("/boot", f"vmlinuz-{release}"), modules / "vmlinuz"):
        if os.access(image, os.R_OK) and modules.is_dir():
            found, absent = _modules(modules)
            return None if absent.intersection(_REQUIRED) else _Kernel(image, release, found)
    return None


def _packaged_kernel(into: Path, progress: Progress) -> _Kernel:
    packages = _kernel_packages()
    progress(f"downloading {packages[0]} (about 70 MB, once)")
    debs.unpack(packages, into)
    directories = [path for path in sorted(into.glob("**/lib/modules/*")) if path.is_dir()]
    images = sorted(into.glob("boot/vmlinuz-*"))
    if len(directories) != 1 or len(images) != 1:
        raise ImageError(f"failed to find one kernel and its modules in {', '.join(packages)}")
    found, absent = _modules(directories[0])
    lacking = sorted(absent.intersection(_REQUIRED))
    if lacking:
        raise ImageError(f"the kernel of {packages[0]} lacks the drivers {', '.join(lacking)}")
    return _Kernel(images[0], directories[0].name, found)


def _kernel_packages() -> list[str]:
    """The packages that hold the distribution's plain kernel and its modules."""
    _need_packages()
    for name in ("linux-image-amd64", "linux-image-generic"):
        if not debs.known(name):
            continue
        for image in debs.dependencies(name):
            if image.startswith("linux-image-"):
                suffix = image.removeprefix("linux-image-").removeprefix("unsigned-")
                parts = (f"linux-modules-{suffix}", f"linux-modules-extra-{suffix}")
                return [image, *(part for part in parts if debs.known(part))]
    raise ImageError(
        "failed to find a kernel for the image tiny: the package lists have neither "
        "linux-image-amd64 (Debian) nor linux-image-generic (Ubuntu)",
        "run `sudo apt-get update`, then try again",
    )


def _need_packages() -> None:
    if not debs.available():
        raise ImageError(
            "failed to build the image tiny: this machine lacks one of its parts, and has no "
            "apt to download it with",
            "install a kernel with its modules (virtio_net, e1000, 8139cp; its image in /boot "
            "readable), a static busybox, and qemu-ga: on Fedora kernel-modules, busybox, "
            "qemu-guest-agent; on Arch linux, busybox, qemu-guest-agent",
        )


def _modules(directory: Path) -> tuple[dict[str, Module], set[str]]:
    """The wanted modules of a kernel, and the wanted names that it has in no form."""
    paths = {
        initramfs.module_name(name): Path(parent, name)
        for parent, _, names in os.walk(directory / "kernel")
        for name in names
        if ".ko" in name
    }
    built_in = {
        initramfs.module_name(line.rpartition("/")[2])
        for line in (directory / "modules.builtin").read_text().splitlines()
    }

    def load(name: str) -> Module | None:
        path = paths.get(name)
        return initramfs.read_module(name, _decompressed(path)) if path else None

    found, absent = initramfs.resolve(_WANTED, load)
    return found, absent - built_in


def _decompressed(path: Path) -> bytes:
    data = path.read_bytes()
    plain = _decompress(data) if path.suffix != ".ko" else data
    if plain is None:
        raise ImageError(f"failed to unpack {path.name}", "install zstd")
    return plain


def _decompress(data: bytes) -> bytes | None:
    """The plain bytes of xz, gzip or zstd data with anything behind it; None where it can't."""
    if data.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(data)
    if data.startswith(b"\x1f\x8b"):
        return zlib.decompressobj(wbits=31).decompress(data)
    if data.startswith(b"\x28\xb5\x2f\xfd") and shutil.which("zstd"):
        # It complains of the size that follows the stream in a kernel, after writing all of it.
        return subprocess.run(
            ["zstd", "-dc"],
            input=data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=False,
        ).stdout
    return None


def _bootable(image: bytes) -> bytes:
    """The unpacked kernel where QEMU can enter it directly, else the image as it is."""
    try:
        kernel = _decompress(initramfs.compressed_kernel(image))
        return kernel if kernel and initramfs.has_pvh_entry(kernel) else image
    except (ValueError, lzma.LZMAError, zlib.error):
        return image  # in a form that is not known here; QEMU boots what its firmware can unpack


@dataclass(frozen=True)
class _Busybox:
    program: bytes
    applets: tuple[str, ...]


def _host_busybox() -> _Busybox | None:
    path = shutil.which("busybox")
    return _busybox(Path(path)) if path else None


def _packaged_busybox(into: Path, progress: Progress) -> _Busybox:
    _need_packages()
    progress("downloading busybox-static (1 MB)")
    debs.unpack(["busybox-static"], into)
    for path in (into / "bin/busybox", into / "usr/bin/busybox"):
        found = _busybox(path) if path.exists() else None
        if found:
            return found
    raise ImageError("the busybox of busybox-static is not static, or lacks udhcpc")


def _busybox(path: Path) -> _Busybox | None:
    """A busybox, if it is static and has the applets that the guest's init calls."""
    program = path.read_bytes()
    if initramfs.interpreter(program):
        return None
    listing = subprocess.run(
        [str(path), "--list"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    return _Busybox(program, tuple(listing)) if _APPLETS.issubset(listing) else None


def _agent(into: Path, progress: Progress) -> dict[str, bytes]:
    """qemu-ga and what it loads: contents by the path inside the guest."""
    path = shutil.which("qemu-ga", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin")
    if path:
        program = Path(path).read_bytes()
    else:
        _need_packages()
        progress("downloading qemu-guest-agent (0.4 MB)")
        debs.unpack(["qemu-guest-agent"], into)
        program = next(into.glob("**/qemu-ga")).read_bytes()
    files = {"bin/qemu-ga": program}
    loader = initramfs.interpreter(program)
    if loader:
        files[loader.lstrip("/")] = Path(loader).read_bytes()
    directories = [Path(name) for name in _LIBRARIES]
    wanted = list(initramfs.needed(program))
    while wanted:
        soname = wanted.pop()
        if f"lib/{soname}" in files or soname == os.path.basename(loader or ""):
            continue
        data = _library(soname, directories)
        if data is None and directories[0] != into:
            names = debs.dependencies("qemu-guest-agent", recursive=True)
            libraries = [name for name in names if name.startswith("lib")]
            progress(f"downloading {len(libraries)} libraries of qemu-guest-agent")
            debs.unpack(libraries, into / "libraries")
            directories = [into, *(into / "libraries" / name[1:] for name in _LIBRARIES)]
            directories += [Path(name) for name in _LIBRARIES]
            data = _library(soname, directories)
        if data is None:
            raise ImageError(f"failed to find {soname}, which qemu-ga needs")
        files[f"lib/{soname}"] = data
        wanted += initramfs.needed(data)
    return files


def _library(soname: str, directories: Iterable[Path]) -> bytes | None:
    for directory in directories:
        path = directory / soname
        if path.is_file():
            return path.read_bytes()
    return None


def _skeleton(init: bytes) -> list[Entry]:
    """The directories, device nodes and texts of the guest, and its init under all its names."""
    names = (
        *("lib/netorch/late", "lib/netorch/dhcp", "lib/netorch/hotplug", "etc/acpi/PWRF/00000080"),
        *("sbin/poweroff", "sbin/halt", "sbin/reboot", "sbin/shutdown"),
    )
    return [
        *map(initramfs.directory, ("bin", "sbin", "lib", "proc", "sys", "run", "dev", "mnt")),
        initramfs.symlink("lib64", "lib"),
        initramfs.symlink("var", "."),
        initramfs.directory("root", 0o700),
        initramfs.directory("tmp", 0o1777),
        # Linux opens /dev/console for init before init can mount devtmpfs.
        Entry("dev/console", 0o020600, device=(5, 1)),
        Entry("dev/null", 0o020666, device=(1, 3)),
        initramfs.file("init", init, 0o755),
        *(initramfs.symlink(name, "/init") for name in names),
        initramfs.file("etc/profile", _PROFILE.encode()),
        initramfs.file("etc/inittab", _INITTAB.encode()),
        initramfs.file("etc/mdev.conf", _MDEV.encode()),
        initramfs.file("etc/fstab", _FSTAB.encode()),
        initramfs.file("etc/passwd", b"root::0:0:root:/root:/bin/sh\n"),
        initramfs.file("etc/group", b"root:x:0:\n"),
        initramfs.file("etc/hosts", b"127.0.0.1 localhost\n"),
        initramfs.file("etc/nsswitch.conf", b"hosts: files dns\n"),
    ]


def _programs(busybox: _Busybox) -> list[Entry]:
    applets = sorted(set(busybox.applets) - _OWN_NAMES - {"busybox"})
    return [
        initramfs.file("bin/busybox", busybox.program, 0o755),
        *(initramfs.symlink(f"bin/{name}", "busybox") for name in applets),
        initramfs.symlink("sbin/init", "../bin/busybox"),
        # qemu-ga sets the clock only where it finds this (qga/commands-posix.c).
        initramfs.symlink("sbin/hwclock", "../bin/busybox"),
    ]


def _drivers(kernel: _Kernel) -> list[Entry]:
    where = f"lib/modules/{kernel.release}"
    # The aliases of single USB products are 17 of the 58 KB that modprobe would read each time.
    modules = {
        module.name: replace(
            module, aliases=tuple(one for one in module.aliases if not one.startswith("usb:v0"))
        )
        for module in kernel.modules.values()
    }
    dependencies, aliases = initramfs.module_index(modules)
    return [
        initramfs.file(f"{where}/modules.dep", dependencies.encode()),
        initramfs.file(f"{where}/modules.alias", aliases.encode()),
        *(initramfs.file(f"{where}/{m.name}.ko", m.data) for m in kernel.modules.values()),
    ]


def _files(contents: dict[str, bytes]) -> list[Entry]:
    # The loader's /lib64 is a link to /lib in the guest.
    return [
        initramfs.file(path.replace("lib64/", "lib/", 1), data, 0o755)
        for path, data in contents.items()
    ]
