"""The rate of this processor's time stamp counter, for guests that can't find it out.

A microvm has no HPET and no ACPI timer, and its ACPI says "hardware-reduced", so Linux leaves the
PIT's interrupts alone as well (arch/x86/kernel/acpi/boot.c, acpi_reduced_hw_init). All that it can
tell the time by is the TSC, whose rate it takes from the PIT's counter. Under TCG on a busy machine
that fails ("tsc: Unable to calibrate against PIT", then "Marking TSC unstable"), and the guest
hangs in its wait for the first tick. TCG shows a guest this machine's own TSC, so the rate can be
measured here and given to the kernel as `tsc_early_khz` (Linux 4.20).
"""

import ctypes
import mmap
import time

# rdtsc; shl rdx, 32; or rax, rdx; ret
_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_SECONDS = 0.02


def tsc_khz() -> int:
    """The rate in kHz, to within 0.1 %; takes 20 ms. Raises OSError where memory can't be
    made executable.
    """
    code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(_RDTSC)
    anchor = ctypes.c_char.from_buffer(code)
    read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))
    read()  # the first call takes longer
    began, first = time.monotonic_ns(), read()
    while time.monotonic_ns() - began < _SECONDS * 1e9:
        continue
    ended, last = time.monotonic_ns(), read()
    return int((last - first) * 1_000_000 // (ended - began))
