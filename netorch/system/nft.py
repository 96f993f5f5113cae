"""libnftables in this network namespace: run a script as one transaction, try one, list tables.

The library's socket belongs to the namespace in which a `Nft` was made, so make it after entering a
place. Nothing here needs the `nft` program.
"""

import ctypes
import errno
import os

from netorch.errors import KernelError, MissingError

_LIBRARY = "libnftables.so.1"
_PROBE_PREFIX = "try_"  # no lab's table begins so
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
            ctypes.CDLL(_LIBRARY)
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

    def check(self, table: str, text: str, what: str) -> None:
        """Have the kernel go through a script that makes table inet `table`, to no effect.

        In one transaction the table is made, under a name of its own, and deleted again, so nobody
        ever sees it. nftables' own dry run (`nft -c`) has the same answer, but ends by aborting the
        transaction, for which the kernel waits for all CPUs (net/netfilter/nf_tables_api.c,
        __nf_tables_abort): 8 to 16 ms instead of half a millisecond. Raises as `run` does.
        """
        probe = f"{_PROBE_PREFIX}{table}"
        body = text.replace(f"table inet {table} {{", f"table inet {probe} {{", 1)
        assert body != text, "the text of one table, as nft lists it"
        self.run(f"create table inet {probe}\n{body}\ndelete table inet {probe}", what)

    def tables(self) -> list[str]:
        """The names of the tables of family inet."""
        listing = self.run("list tables inet", "list the nft tables")
        return [line.removeprefix("table inet ") for line in listing.splitlines()]


def _refused(what: str, error: str) -> KernelError:
    """libnftables says what is wrong in text only: "Error: <what>: <strerror>", then the place."""
    first = error.partition("\n")[0].removeprefix("Error: ")
    number = next((number for number in errno.errorcode if os.strerror(number) in error), 0)
    return KernelError(f"failed to {what}: {first}", number, _HINTS.get(number, ""))
