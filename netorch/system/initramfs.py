"""What goes into an initramfs, as pure functions of bytes: the archive, kernel modules, ELF files.

Theory of operation
-------------------
An ordinary user may not make device nodes or mount anything, so the archive of a guest's first
root file system is written here, byte by byte, instead of being packed from a directory tree.
Three formats meet:

- the "newc" cpio archive (Linux: Documentation/driver-api/early-userspace/buffer-format.rst).
  ``newc`` writes it; every number in it depends on the entries only, so equal entries are equal
  bytes, and the digest of an archive identifies what it holds.
- ELF (System V gABI, 64-bit little endian only). Three questions are asked of it: which shared
  libraries and loader a program needs, what a kernel module says of itself in ``.modinfo``, and
  whether a kernel can be entered the PVH way (Xen's note 18, XEN_ELFNOTE_PHYS32_ENTRY).
- the bzImage (Linux: Documentation/arch/x86/boot.rst), of which the compressed vmlinux is cut.

Modules are resolved from ``.modinfo`` and not from ``modules.dep``: a kernel package as it is
unpacked has no ``modules.dep`` (depmod makes it on installation), and a module's own ``depends=``
and ``alias=`` are what depmod reads. ``module_index`` writes the small ``modules.dep`` and
``modules.alias`` that the guest's modprobe reads.

Nothing in this module touches the machine.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

PHYS32_ENTRY = 18  # XEN_ELFNOTE_PHYS32_ENTRY, xen/include/public/elfnote.h
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP, _PT_NOTE = 1, 2, 3, 4
_DT_NEEDED, _DT_STRTAB = 1, 5
_SIGNATURE_MARK = b"~Module signature appended~\n"  # Linux: include/linux/module_signature.h
_SIGNATURE_INFO = struct.Struct(">5B3xI")  # struct module_signature; the last is sig_len


@dataclass(frozen=True)
class Entry:
    """One name in an archive: ``path`` without a leading slash, ``mode`` with the type bits.

    ``data`` is a file's content or a symbolic link's target; ``device`` a node's (major, minor).
    """

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(path: str, mode: int = 0o755) -> Entry:
    """A directory."""
    return Entry(path, stat.S_IFDIR | mode)


def file(path: str, data: bytes, mode: int = 0o644) -> Entry:
    """A regular file."""
    return Entry(path, stat.S_IFREG | mode, data)


def symlink(path: str, target: str) -> Entry:
    """A symbolic link from ``path`` to ``target``."""
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def newc(entries: Iterable[Entry]) -> bytes:
    """The entries as an uncompressed newc archive, owned by root, at time 0.

    Parents that are not among the entries before their children are added as 0755 directories;
    the kernel does not make them (init/initramfs.c). A path that comes twice is a ValueError.
    """
    archive = bytearray()
    seen: set[str] = set()
    for entry in entries:
        if entry.path in seen:
            raise ValueError(f"{entry.path} is in the archive twice")
        for parent in _parents(entry.path):
            if parent not in seen:
                seen.add(parent)
                _append(archive, directory(parent), len(seen))
        seen.add(entry.path)
        _append(archive, entry, len(seen))
    _append(archive, Entry("TRAILER!!!", 0), 0)
    return bytes(archive)


def _parents(path: str) -> Iterator[str]:
    """The directories above a path, outermost first."""
    parts = path.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        yield "/".join(parts[:depth])


def _append(archive: bytearray, entry: Entry, inode: int) -> None:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    size, (major, minor) = len(entry.data), entry.device
    numbers = (inode, entry.mode, 0, 0, links, 0, size, 0, 0, major, minor, len(name), 0)
    archive += b"070701" + b"".join(b"%08X" % number for number in numbers) + name
    archive += bytes(-len(archive) % 4)
    archive += entry.data
    archive += bytes(-len(archive) % 4)


@dataclass(frozen=True)
class _Segment:
    kind: int
    offset: int
    address: int
    size: int
    align: int


def _segments(elf: bytes) -> list[_Segment]:
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    segments = []
    for index in range(count):
        kind, _, offset, address, _, length, _, align = struct.unpack_from(
            "<IIQQQQQQ", elf, table + index * size
        )
        segments.append(_Segment(kind, offset, address, length, align))
    return segments


def _string(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()


def has_pvh_entry(elf: bytes) -> bool:
    """Whether an uncompressed kernel carries the note that names its 32-bit PVH entry point."""
    for segment in _segments(elf):
        if segment.kind != _PT_NOTE:
            continue
        position, end, align = segment.offset, segment.offset + segment.size, segment.align or 4
        while position + 12 <= end:
            name_size, size, kind = struct.unpack_from("<III", elf, position)
            name = elf[position + 12 : position + 12 + name_size].rstrip(b"\0")
            if name == b"Xen" and kind == PHYS32_ENTRY:
                return True
            position += 12 + name_size + -name_size % align
            position += size + -size % align
    return False


def interpreter(elf: bytes) -> str | None:
    """The path of the loader that a program asks for; None for a static one or a library."""
    for segment in _segments(elf):
        if segment.kind == _PT_INTERP:
            return _string(elf, segment.offset)
    return None


def needed(elf: bytes) -> tuple[str, ...]:
    """The sonames of the shared libraries that a program or library is linked with."""
    segments = _segments(elf)
    dynamic = [segment for segment in segments if segment.kind == _PT_DYNAMIC]
    if not dynamic:
        return ()
    start = dynamic[0].offset
    tags = list(struct.iter_unpack("<qQ", elf[start : start + dynamic[0].size]))
    strings = next(value for tag, value in tags if tag == _DT_STRTAB)
    for segment in segments:
        if segment.kind == _PT_LOAD and 0 <= strings - segment.address < segment.size:
            strings += segment.offset - segment.address
            break
    return tuple(_string(elf, strings + value) for tag, value in tags if tag == _DT_NEEDED)


@dataclass(frozen=True)
class Module:
    """A kernel module: its name (underscores, no suffix), its bytes, what it says of itself."""

    name: str
    data: bytes
    depends: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


def module_name(file_name: str) -> str:
    """The kernel's name for a module file: ``usb-storage.ko.xz`` is ``usb_storage``."""
    return file_name.partition(".ko")[0].replace("-", "_")


def read_module(name: str, data: bytes) -> Module:
    """The module in an uncompressed .ko file, without its signature.

    The signature is left out to spare an emulated processor the check (its cost is not measured);
    a kernel that does not enforce signatures loads the module without one.
    """
    fields: dict[str, list[str]] = {}
    for item in _section(data, ".modinfo").split(b"\0"):
        key, found, value = item.decode(errors="replace").partition("=")
        if found:
            fields.setdefault(key, []).append(value)
    depends = [one for value in fields.get("depends", []) for one in value.split(",") if one]
    return Module(
        name,
        _unsigned(data),
        tuple(module_name(one) for one in depends),
        tuple(fields.get("alias", [])),
    )


def _section(elf: bytes, wanted: str) -> bytes:
    """The content of a section; empty when the file has no such section."""
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + index * size) for index in range(count)]
    strings = headers[names][4]
    for name, _, _, _, offset, length in headers:
        if _string(elf, strings + name) == wanted:
            return elf[offset : offset + length]
    return b""


def _unsigned(data: bytes) -> bytes:
    if not data.endswith(_SIGNATURE_MARK):
        return data
    end = len(data) - len(_SIGNATURE_MARK) - _SIGNATURE_INFO.size
    return data[: end - _SIGNATURE_INFO.unpack_from(data, end)[5]]


def resolve(
    wanted: Iterable[str], load: Callable[[str], Module | None]
) -> tuple[dict[str, Module], set[str]]:
    """The wanted modules with all that they depend on, and the wanted names that cannot be had.

    ``load`` gives a module by name, or None where the kernel has it built in or not at all; a
    missing dependency is therefore taken as built in. The modules come in an order in which each
    can be loaded after the ones before it.
    """
    found: dict[str, Module] = {}
    absent: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> bool:
        if name in found or name in trail:
            return True
        module = load(name)
        if module is None:
            return False
        for dependency in module.depends:
            visit(dependency, (*trail, name))
        found[name] = module
        return True

    for name in wanted:
        if not visit(name, ()):
            absent.add(name)
    return found, absent


def module_index(modules: Mapping[str, Module]) -> tuple[str, str]:
    """The text of modules.dep and modules.alias (modules.dep(5)) for modules in one directory.

    A line of modules.dep holds all that a module needs, and the last of it is loaded first.
    """
    order = {name: place for place, name in enumerate(modules)}

    def closure(name: str) -> set[str]:
        direct = {one for one in modules[name].depends if one in modules}
        return direct.union(*(closure(one) for one in direct))

    dependencies = []
    for name in modules:
        chain = sorted(closure(name), key=order.__getitem__, reverse=True)
        dependencies.append(" ".join([f"{name}.ko:", *(f"{one}.ko" for one in chain)]) + "\n")
    aliases = [f"alias {one} {m.name}\n" for m in modules.values() for one in m.aliases]
    return "".join(dependencies), "".join(aliases)


def compressed_kernel(image: bytes) -> bytes:
    """The compressed vmlinux inside a bzImage (boot protocol 2.08, Linux 2.6.26, or newer)."""
    if image[0x202:0x206] != b"HdrS" or struct.unpack_from("<H", image, 0x206)[0] < 0x208:
        raise ValueError("not a bzImage of boot protocol 2.08 or newer")
    sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (sectors + 1) * 512 + offset
    return image[start : start + length]
