"""libnftables in this network namespace: run a script as one transaction, try one, list tables.

The library's socket belongs to the namespace in which a `Nft` was made, so make it after entering a
place. Nothing here needs the `nft` program.
"""

import ctypes
import errno
import os

from netorch.errors import KernelError, MissingError

_LIBRARY = "libnftables.so.1"
_MODULES = (
    "the kernel may lack a part of nftables: modprobe nf_tables nft_chain_nat nft_masq nft_ct"
)
_HINTS = {
    errno.EPERM: "nftables needs CAP_NET_ADMIN over the network namespace; try --private",
    errno.ENOENT: _MODULES,
    errno.EOPNOTSUPP: _MODULES,
    errno.EPROTONOSUPPORT: _MODULES,
}


class Nft:
    """A libnftables context; with `counters` listings show their values. Raises MissingError where
    the library isn't installed.
    """

    def __init__(self, *, handles: bool = False, counters: bool = False) -> None:
        """`handles`: listings show the rules' handles."""
        try:
            self._library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise MissingError(
                f"failed to load {_LIBRARY}: {error}",
                "install the package libnftables1 (Debian, Ubuntu) or nftables (Fedora, Arch)",
            ) from error
        import nftables

        self._context = nftables.Nftables()
        self._context.set_stateless_output(not counters)
        self._context.set_handle_output(handles)

    def run(self, script: str, what: str) -> str:
        """Carry out a script, all or nothing, and return what it prints.

        `what` completes "failed to ..." in the KernelError that is raised if nftables refuses it.
        """
        status, output, error = self._context.cmd(script)
        if status:
            raise _refused(what, error)
        return str(output)

    def check(self, script: str, what: str) -> None:
        """Have the kernel go through a script without committing it (`nft -c`).

        Raises as `run` does. The binding has no word for this (as of 1.0.6), the library has.
        """
        library = self._library
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        context = ctypes.c_void_p(library.nft_ctx_new(0))
        try:
            library.nft_ctx_buffer_output(context)
            library.nft_ctx_buffer_error(context)
            library.nft_ctx_set_dry_run(context, True)
            if library.nft_run_cmd_from_buffer(context, script.encode()):
                raise _refused(what, library.nft_ctx_get_error_buffer(context).decode())
        finally:
            library.nft_ctx_free(context)

    def tables(self) -> list[str]:
        """The names of the tables of family inet."""
        listing = self.run("list tables inet", "list the nft tables")
        return [line.removeprefix("table inet ") for line in listing.splitlines()]


def _refused(what: str, error: str) -> KernelError:
    """libnftables says what is wrong in text only: "Error: <what>: <strerror>", then the place."""
    first = error.partition("\n")[0].removeprefix("Error: ")
    number = next((number for number in errno.errorcode if os.strerror(number) in error), 0)
    return KernelError(f"failed to {what}: {first}", number, _HINTS.get(number, ""))
