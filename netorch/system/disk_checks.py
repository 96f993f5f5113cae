"""What keeps the disks of guests from being what the file says, found before the first change."""

import os
import stat
from collections.abc import Iterable, Iterator
from itertools import pairwise, zip_longest
from pathlib import Path

from netorch.disk_devices import writes
from netorch.errors import ImageError
from netorch.resources import DiskLayer, Guest, GuestDisk
from netorch.system.disks import disk_path
from netorch.system.image_locks import conflict
from netorch.system.images import header, open_image
from netorch.system.scope import Scope

_FORMATS = ("qcow2", "raw")
_NAMED = 3  # of the guests with the same mistake


def reasons(scope: Scope, guests: Iterable[Guest]) -> list[str]:
    """Why these guests' disks can't be used, a sentence each."""
    guests = list(guests)
    users: dict[str, dict[str, None]] = {}
    for guest in guests:
        for disk in guest.disks:
            for reason in (*_of_layers(scope, disk), *_of_overlay(scope, guest, disk)):
                users.setdefault(reason, {})[guest.name] = None
    found = [f"{_named(sorted(names))}: {reason}" for reason, names in users.items()]
    return list(dict.fromkeys([*found, *_of_sharing(guests)]))


def _named(guests: list[str]) -> str:
    more = f" and {len(guests) - _NAMED} more" if len(guests) > _NAMED else ""
    return f"guest{'s' if guests[1:] else ''} {', '.join(guests[:_NAMED])}{more}"


def _of_layers(scope: Scope, disk: GuestDisk) -> Iterator[str]:
    layers = list(disk.layers)
    try:
        for index, layer in enumerate(layers):
            written = disk.use == "write" and writes(disk, index)
            yield from _of_file(scope, layer, written)
        for layer, next_one in zip_longest(layers, layers[1:]):
            if layer.format == "qcow2":
                yield from _of_header(Path(layer.file), next_one)
            elif next_one is not None:
                yield f"image {layer.file} is raw, so it can't be an overlay of {next_one.file}"
    except ImageError as error:
        yield error.message


def _of_file(scope: Scope, layer: DiskLayer, written: bool) -> Iterator[str]:
    path = Path(layer.file)
    os.close(open_image(path, written, exclusive=True))
    if layer.format not in _FORMATS:
        yield (
            f"image {path} has the format {layer.format}, which netorch does not know: "
            f"make one that it knows with `qemu-img convert -O qcow2 {path} NEW`"
        )
    if reason := conflict(scope.lab, path, written):
        yield reason


def _of_header(path: Path, named: DiskLayer | None) -> Iterator[str]:
    """`named` is what the file says that lies below; the image has to say the same."""
    found = header(path)
    if found.encrypted:
        yield f"image {path} is encrypted, and netorch has no key for it"
    if found.external_data:
        yield (
            f"image {path} has its data in another file, which can't be named: make one that "
            f"stands alone with `qemu-img convert -O qcow2 {path} NEW`"
        )
    if not found.backing:
        if named is not None:
            yield f"image {path} stands alone: it is no overlay of {named.file}"
        return
    below = os.path.join(path.parent, found.backing.removeprefix("file:"))
    if ":" in found.backing.removeprefix("file:").partition("/")[0]:
        yield (  # QEMU's path_has_protocol(), as in nbd://HOST and json:{...}
            f"image {path} is an overlay of {found.backing}, which is no file: make one that "
            f"stands alone with `qemu-img convert -O qcow2 {path} NEW`"
        )
    elif named is None:
        hint = f'backing = [{{ file = "{below}", format = "{found.backing_format or "raw"}" }}]'
        yield (
            f"image {path} is itself an overlay, of {below}, which the file does not name: write "
            f"{hint} beside it if you trust it, or make one that stands alone with "
            f"`qemu-img convert -O qcow2 {path} NEW`"
        )
    elif not (os.path.exists(below) and os.path.samefile(below, named.file)):
        yield f"image {path} is an overlay of {below}, and not of {named.file}"
    elif found.backing_format not in ("", named.format):
        yield (
            f"image {path} has the format of {named.file} as {found.backing_format}, and the file "
            f"says {named.format}"
        )


def _of_overlay(scope: Scope, guest: Guest, disk: GuestDisk) -> Iterator[str]:
    """Once what lies below was written to, an overlay means nothing."""
    if disk.use != "overlay":
        return
    try:
        made = disk_path(scope, guest.name, disk.name).stat().st_mtime
    except FileNotFoundError:
        return
    for layer in disk.layers:
        if os.path.isfile(layer.file) and os.stat(layer.file).st_mtime > made:
            yield (
                f"image {layer.file} was written to after the disk {disk.name} was made from it: "
                "take the guest out of the file and apply, then start it anew"
            )


def _of_sharing(guests: Iterable[Guest]) -> Iterator[str]:
    """A file that is written to has one user. Found by its inode: paths may differ."""
    uses: list[tuple[tuple[int, int, int], bool, str, str]] = []
    for guest in guests:
        for disk in guest.disks:
            for index, layer in enumerate(disk.layers):
                if os.path.exists(layer.file):
                    written = disk.use == "write" and writes(disk, index)
                    uses.append((_identity(layer.file), written, layer.file, guest.name))
    uses.sort(key=lambda use: (use[0], not use[1]))
    for (one, written, file, user), (other, _, same_file, second) in pairwise(uses):
        if one == other and written:
            who = _named(sorted({user, second}))
            yield f"{who}: image {file} is persistent, and used a second time as {same_file}"


def _identity(path: str) -> tuple[int, int, int]:
    found = os.stat(path)
    if stat.S_ISBLK(found.st_mode):
        return (0, 0, found.st_rdev)
    return (1, found.st_dev, found.st_ino)
