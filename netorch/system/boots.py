"""What a guest boots besides its disks, opened for its QEMU: a kernel, firmware, a seed."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from netorch.boot_devices import Firmware, Kernel
from netorch.errors import ImageError, MissingError
from netorch.guests import Boot
from netorch.resources import Guest
from netorch.system.firmware import uefi, variables_path
from netorch.system.images import image_format
from netorch.system.scope import Scope
from netorch.system.seeds import seed_image
from netorch.system.tiny import tiny_image


def reasons(guest: Guest) -> Iterator[str]:
    """Why a guest can't boot as it should, but for its image: a sentence each."""
    for path in filter(None, (guest.boot.kernel, guest.boot.initrd)):
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            if os.path.isdir(path):
                yield f"failed to read {path} of guest {guest.name}: Is a directory"
        except OSError as error:
            yield f"failed to read {path} of guest {guest.name}: {error.strerror}"
    if guest.boot.uefi:
        try:
            uefi(guest.machine)
        except MissingError as error:
            yield f"{error.message}: {error.hint}"


class Opening:
    """What a guest boots, opened until `opened` is closed. `fds` are the descriptors so far."""

    def __init__(
        self,
        scope: Scope,
        guest: Guest,
        accel: str,
        opened: contextlib.ExitStack,
        progress: Callable[[str], None],
    ) -> None:
        self.fds: list[int] = []
        self._scope = scope
        self._guest = guest
        self._accel = accel
        self._opened = opened
        self._progress = progress

    def boot(self) -> Boot:
        guest = self._guest
        seed = self._open(seed_image(self._scope, guest.name)) if guest.boot.seed else None
        firmware = self._firmware() if guest.boot.uefi else None
        return Boot(kernel=self._kernel(), firmware=firmware, seed_fd=seed)

    def _kernel(self) -> Kernel | None:
        boot = self._guest.boot
        if self._guest.image == "tiny":
            tiny = tiny_image(self._progress)
            cmdline = f"{tiny.cmdline} netorch.hostname={self._guest.name}"
            kernel = tiny.vmlinuz if boot.uefi or self._guest.video else tiny.kernel
            if self._guest.machine == "microvm" and self._accel == "tcg":
                from netorch.system.tsc import tsc_khz

                cmdline += f" tsc_early_khz={tsc_khz()}"
            return Kernel(str(kernel), str(tiny.initrd), cmdline)
        if not boot.kernel:
            return None
        initrd = self._path_of_fd(boot.initrd) if boot.initrd else ""
        return Kernel(self._path_of_fd(boot.kernel), initrd, boot.cmdline)

    def _path_of_fd(self, path: str) -> str:
        return f"/proc/self/fd/{self._open(Path(path))}"

    def _firmware(self) -> Firmware:
        code = uefi(self._guest.machine).code
        variables = variables_path(self._scope, self._guest.name, self._guest.machine)
        return Firmware(self._open(code.path), code.format, variables, image_format(variables))

    def _open(self, path: Path) -> int:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ImageError(
                f"failed to read {path} for guest {self._guest.name}: {error.strerror}"
            ) from error
        self._opened.callback(os.close, fd)
        self.fds.append(fd)
        return fd
