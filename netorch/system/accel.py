"""Which accelerator guests get where the file says "auto".

That /dev/kvm exists proves nothing: on some machines it opens, makes a virtual machine, and the
first guest instruction then never ends. So a child process runs a guest of two instructions (`out`,
`hlt`) and has to report the value that came out of the port; if it does not within a second, it is
killed and the answer is tcg. The answer is remembered in the cache directory together with the boot
that it is true for.
"""

import os
import signal
from contextlib import suppress
from pathlib import Path

from netorch.system.cache import cache_directory
from netorch.system.namespaces import send_signal, wait_exit

_SECONDS = 1.0
_KVM = "/dev/kvm"

# <linux/kvm.h>, for x86_64
_KVM_CREATE_VM = 0xAE01
_KVM_GET_VCPU_MMAP_SIZE = 0xAE04
_KVM_CREATE_VCPU = 0xAE41
_KVM_RUN = 0xAE80
_KVM_SET_USER_MEMORY_REGION = 0x4020AE46
_KVM_SET_REGS = 0x4090AE82
_KVM_GET_SREGS = 0x8138AE83
_KVM_SET_SREGS = 0x4138AE84
_KVM_EXIT_IO = 2
_PORT, _VALUE = 0x42, 0x5A
_CODE = bytes([0xB0, _VALUE, 0xE6, _PORT, 0xF4])  # mov al, VALUE; out PORT, al; hlt
_CODE_AT = 0x1000


def accelerator() -> str:
    """`kvm` where guest code was seen to run under KVM on this boot, else `tcg`."""
    if os.uname().machine != "x86_64" or not os.access(_KVM, os.R_OK | os.W_OK):
        return "tcg"  # not remembered: tomorrow the person may be in the group kvm
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    memory = cache_directory() / "accel"
    try:
        known_boot, _, known = memory.read_text().partition(" ")
    except FileNotFoundError:
        known_boot = known = ""
    if known_boot == boot and known in ("kvm", "tcg"):
        return known
    answer = "kvm" if _guest_runs() else "tcg"
    with suppress(OSError):  # a cache that can't be written, as in containers: it saves time
        memory.parent.mkdir(parents=True, exist_ok=True)
        new = memory.with_suffix(f".{os.getpid()}")
        new.write_text(f"{boot} {answer}")
        new.rename(memory)
    return answer


def _guest_runs() -> bool:
    pid = os.fork()
    if pid == 0:
        works = False
        try:
            works = _run_guest()
        finally:
            os._exit(0 if works else 1)
    pidfd = os.pidfd_open(pid)
    try:
        if not wait_exit(pidfd, _SECONDS):
            send_signal(pidfd, signal.SIGKILL)
            # One that can't even be killed stays behind; netorch does not hang with it.
            wait_exit(pidfd, _SECONDS)
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        return ended is not None and ended.si_code == os.CLD_EXITED and ended.si_status == 0
    finally:
        os.close(pidfd)


def _run_guest() -> bool:
    """Run the guest's instructions in real mode; True if its `out` arrives. Raises OSError."""
    import ctypes
    import mmap
    import struct
    from fcntl import ioctl

    kvm = os.open(_KVM, os.O_RDWR | os.O_CLOEXEC)
    vm = ioctl(kvm, _KVM_CREATE_VM, 0)
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    memory[: len(_CODE)] = _CODE
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    ioctl(
        vm,
        _KVM_SET_USER_MEMORY_REGION,
        struct.pack("=IIQQQ", 0, 0, _CODE_AT, mmap.PAGESIZE, address),
    )
    cpu = ioctl(vm, _KVM_CREATE_VCPU, 0)
    run = mmap.mmap(cpu, ioctl(kvm, _KVM_GET_VCPU_MMAP_SIZE, 0))
    # struct kvm_sregs begins with the code segment: base (8 bytes), limit (4), selector (2).
    segments = bytearray(ioctl(cpu, _KVM_GET_SREGS, bytes(0x138)))
    struct.pack_into("=Q4xH", segments, 0, 0, 0)
    ioctl(cpu, _KVM_SET_SREGS, bytes(segments))
    # struct kvm_regs: 16 general registers, rip, rflags (bit 1 is always set).
    ioctl(cpu, _KVM_SET_REGS, struct.pack("=128xQQ", _CODE_AT, 2))
    ioctl(cpu, _KVM_RUN, 0)
    # struct kvm_run: exit_reason at 8; for I/O at 32: direction, size (1 each), port (2), count
    # (4), offset.
    reason = struct.unpack_from("=I", run, 8)[0]
    port, offset = struct.unpack_from("=H4xQ", run, 34)
    return bool(reason == _KVM_EXIT_IO and port == _PORT and run[offset] == _VALUE)
