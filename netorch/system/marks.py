"""Which labs are here, by the marks that they left in this network namespace."""

from netorch.system.netlink import Netlink
from netorch.system.nft import Nft
from netorch.system.places import has_net_admin, marked_processes
from netorch.system.scope import CLAIMS_PREFIX, TABLE_PREFIX, current_place
from netorch.system.snapshot import labs


def marked_labs() -> list[str]:
    """The names of the labs that have links, processes or nft tables in the current network
    namespace.

    Tables are only looked for by those who may see them.
    """
    with Netlink() as netlink:
        found = labs(netlink)
    here = str(current_place())
    for _pid, marks in marked_processes():
        if marks["NETORCH_PLACE"] == here and "NETORCH_PRIVATE" not in marks:
            found[marks["NETORCH_LAB"]] = None
    if has_net_admin():
        for table in Nft().tables():
            for prefix in (TABLE_PREFIX, CLAIMS_PREFIX):
                if table.startswith(prefix):
                    found[table.removeprefix(prefix)] = None
    return list(found)
