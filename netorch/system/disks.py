"""The lab's own disks: qcow2 files that hold what guests write.

An overlay holds what a guest writes to a disk that is made from an image; all else is read from the
image. A volume starts empty. Both are resources of their own: a guest that is started again, even
with other memory, finds its disks as it left them. What they are stands in their headers.

What a guest has written is not to be lost by an apply that fails. So a file that is deleted is put
aside first, where a rollback finds it again, and is gone for good once an apply has come through
(`forget_removed`).

A volume grows by QMP where a QEMU has it open, which then also tells the guest. A running guest
gives its disk back before the file behind it is deleted (netorch.system.disk_removal).
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from netorch.disk_devices import Source, device_id, writes
from netorch.errors import ImageError, MissingError
from netorch.planner import Update
from netorch.resources import GuestDisk, Overlay, Resource, Volume
from netorch.system import rundir, saved
from netorch.system.disk_removal import block_nodes, unplug
from netorch.system.guest_devices import reach
from netorch.system.guest_processes import directory_of, running
from netorch.system.images import header, is_block_device, open_image, virtual_size
from netorch.system.scope import Scope
from netorch.system.starting import Child, program, start

_ASIDE = ".removed"
_INSTALL = "install qemu-utils (Fedora: qemu-img)"


def disk_path(scope: Scope, guest: str, disk: str) -> Path:
    """Where the lab's own file of a guest's disk is."""
    return scope.disks / guest / f"{disk}.qcow2"


def open_disk(
    scope: Scope, guest: str, disk: GuestDisk, sets: Iterator[int], opened: contextlib.ExitStack
) -> tuple[Source, ...]:
    """Everything behind a disk, opened for QEMU: the lab's own file, if it has one, then its
    layers. Raises ImageError.
    """
    paths = [Path(layer.file) for layer in disk.layers]
    if disk.use in ("overlay", "volume"):
        paths.insert(0, disk_path(scope, guest, disk.name))
    sources = []
    for index, path in enumerate(paths):
        descriptor = open_image(path, writes(disk, index))
        opened.callback(os.close, descriptor)
        sources.append(Source(descriptor, next(sets), is_block_device(descriptor)))
    return tuple(sources)


class Disks:
    """The adapter for overlays and volumes. One that an interrupted run left half made has another
    suffix.
    """

    kinds: tuple[type[Resource], ...] = (Overlay, Volume)

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def observe(self, look: object = None) -> Iterable[Resource]:
        for path in sorted(self._scope.disks.glob("*/*.qcow2")):
            yield _described(path)

    def check(self, wanted: Sequence[Resource]) -> list[str]:
        if wanted and program("qemu-img") is None:
            return [f"qemu-img is not installed: {_INSTALL}"]
        if wanted and self._scope.disks.exists() and not rundir.is_ours(self._scope.disks):
            hint = "set NETORCH_DISK_DIR to a directory of its own"
            return [f"{rundir.foreign(self._scope.disks)}: {hint}"]
        return []

    def create(self, wanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        rundir.make_disks(self._scope)
        children = []
        for resource in wanted:
            path = self._path(resource)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            if self._is_aside(resource):
                _aside(path).rename(path)
                done(resource)
                continue
            words = [*_contents(resource, _unfinished(path)), str(_size(resource))]
            children.append((resource, self._begin("create", "-q", "-f", "qcow2", *words)))
        for resource, child in children:
            _finish(child, f"create {resource.describe()}")
            path = self._path(resource)
            _unfinished(path).rename(path)
            done(resource)

    def update(self, wanted: Sequence[Update], done: Callable[[Resource], None]) -> None:
        for change in wanted:
            assert isinstance(change.old, Volume)
            assert isinstance(change.new, Volume)
            if refusal := change.old.refuses(change.new):
                raise ImageError(refusal)
            self._grow(change.new)
            done(change.new)

    def delete(self, unwanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        self._unplug(unwanted)
        for resource in unwanted:
            path = self._path(resource)
            saved.drop(self._scope, path.parent.name)  # it is nothing without this disk
            if _aside(path).exists():  # from before this apply; the file is younger than that
                path.unlink(missing_ok=True)
            else:
                with contextlib.suppress(FileNotFoundError):
                    path.rename(_aside(path))
            _unfinished(path).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something of the guest's is still there
                path.parent.rmdir()
            done(resource)

    def _is_aside(self, resource: Resource) -> bool:
        """Whether the very disk was deleted by the apply that is being taken back."""
        path = _aside(self._path(resource))
        return path.exists() and _described(path) == resource

    def _path(self, resource: Resource) -> Path:
        assert isinstance(resource, Overlay | Volume)
        return disk_path(self._scope, resource.guest, resource.disk)

    def _unplug(self, unwanted: Sequence[Resource]) -> None:
        """Take the disks of these files from guests that run."""
        names: dict[str, set[str]] = {}
        for resource in unwanted:
            assert isinstance(resource, Overlay | Volume)
            if (directory_of(self._scope, resource.guest) / "qmp.sock").exists():
                names.setdefault(resource.guest, set()).add(resource.disk)
        found = running(self._scope) if names else {}
        for guest, disks in names.items():
            for process in found.get(f"guest:{guest}", ()):
                unplug(self._scope, process, disks)

    def _grow(self, volume: Volume) -> None:
        if f"guest:{volume.guest}" in running(self._scope):
            with reach(self._scope, volume.guest) as qmp:
                qmp.ready()
                node = device_id(volume.disk)
                if node in block_nodes(qmp):
                    qmp.ask("block_resize", {"node-name": node, "size": volume.size})
                    return
        child = self._begin(
            "resize", "-q", "-f", "qcow2", str(self._path(volume)), str(volume.size)
        )
        _finish(child, f"grow {volume.describe()}")

    def _begin(self, *words: str) -> Child:
        qemu_img = program("qemu-img")
        if qemu_img is None:
            raise MissingError("qemu-img is not installed", _INSTALL)
        return start(self._scope, None, [qemu_img, *words], log=self._scope.run / "qemu-img.log")


def forget_removed(scope: Scope) -> None:
    """Delete for good what was put aside: an apply has come through."""
    for path in scope.disks.glob(f"*/*{_ASIDE}"):
        path.unlink()
        with contextlib.suppress(OSError):  # others of the guest's are there
            path.parent.rmdir()


def _described(path: Path) -> Resource:
    """What the header of a disk's file says it is."""
    found, guest = header(path), path.parent.name
    if not found.backing:
        return Volume(guest=guest, disk=path.stem, size=found.size)
    return Overlay(guest=guest, disk=path.stem, image=found.backing, format=found.backing_format)


def _contents(resource: Resource, path: Path) -> list[str]:
    if isinstance(resource, Overlay):
        # -u: the image is not opened, nor what its header may name.
        return ["-u", "-b", resource.image, "-F", resource.format, str(path)]
    return [str(path)]


def _size(resource: Resource) -> int:
    if isinstance(resource, Overlay):
        return virtual_size(Path(resource.image), resource.format)
    assert isinstance(resource, Volume)
    return resource.size


def _finish(child: Child, what: str) -> None:
    try:
        if child.exit_status() != 0:
            raise ImageError(f"failed to {what}: {child.output()}")
    finally:
        child.close()


def _aside(path: Path) -> Path:
    return path.with_suffix(_ASIDE)


def _unfinished(path: Path) -> Path:
    return path.with_suffix(".new")
