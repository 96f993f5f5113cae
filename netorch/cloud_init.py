"""cloud-init's datasource NoCloud: the three files of a seed, as text. Pure rendering.

meta-data and network-config are YAML to cloud-init, and JSON is YAML. The format of the network's
is version 2, which cloud-init renders for whatever the image has (systemd-networkd, netplan, ...).
NICs are found by MAC and called eth0, eth1, ... as in hosts and in tiny: cloud-init up to 23 takes
the name of an entry for the interface's, unless it says `set-name`
(cloudinit/net/network_state.py).

The instance id is made of all the rest: cloud-init does what it does once for an instance, so an
image that has seen a seed does it anew where the seed is another one.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

_NO_USER_DATA = "#cloud-config\n{}\n"


class SeedNic(NamedTuple):
    """A NIC, in the guest's order. `dhcp`: somebody there gives it an address."""

    mac: str
    dhcp: bool


def seed_files(
    guest: str, user_data: str, keys: Sequence[str], nics: Sequence[SeedNic]
) -> dict[str, str]:
    """user-data, meta-data and network-config by their names."""
    network = {
        f"eth{index}": {
            "match": {"macaddress": nic.mac},
            "set-name": f"eth{index}",
            "dhcp4": nic.dhcp,
            "dhcp6": False,
        }
        for index, nic in enumerate(nics)
    }
    files = {
        "network-config": _text({"version": 2, "ethernets": network}),
        "user-data": user_data or _NO_USER_DATA,
    }
    meta: dict[str, object] = {"local-hostname": guest, "public-keys": list(keys)}
    content = json.dumps([files, meta]).encode()
    meta["instance-id"] = f"{guest}-{hashlib.sha256(content).hexdigest()[:16]}"
    return {"meta-data": _text(meta), **files}


def _text(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"
