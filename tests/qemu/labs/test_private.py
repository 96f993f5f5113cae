"""Private places: two labs with the same file, side by side, from wherever netorch is called."""

import json

from tests.isolation import ip_json
from tests.qemu.labs.lab import Machine

SAME = """
[networks.default]
address = "192.168.122.1/24"

[guests.vm1]
nics = [{ network = "default", address = "192.168.122.6" }]

[hosts.client]
nics = [{ network = "default", gateway = false }]
"""


def test_two_labs_with_one_subnet(machine: Machine) -> None:
    first, second = (machine.up(name, SAME, "--private") for name in ("one", "two"))
    labs = (first, second)
    assert [link["ifname"] for link in ip_json("link")][:1] == ["lo"]
    assert not any(entry.startswith(("link", "table")) for entry in machine.left())
    listed = {lab["lab"]: lab for lab in json.loads(machine.netorch("ls", "--json").stdout)}
    for lab in labs:
        assert listed[lab.name]["place"]["private"]
        assert listed[lab.name]["file"] == str(lab.file)
        lab.sh("vm1", "ping -c 1 -W 60 192.168.122.1")
        lab.sh("vm1", f"touch /{lab.name}")
    for lab, other in (labs, labs[::-1]):
        lab.sh("vm1", f"test -e /{lab.name} && ! test -e /{other.name}")
        lab.unchanged()
    taps = json.loads(machine.netorch("taps", "--json", "vm1-0").stdout)
    for lab in labs:
        (row,) = (row for row in taps if row["lab"] == lab.name)
        assert (row["place"], row["state"], row["namespace_from"]) == ("private", "open", "kernel")
        assert row["namespace"] == listed[lab.name]["place"]["inode"]
        assert (row["guest"], row["address"]) == ("vm1", "192.168.122.6")
        assert machine.netorch("taps", str(row["pid"])).stdout.count("vm1-0") == 1
    for command in (["status"], ["teardown"], ["leases"]):
        refused = machine.netorch(*command, status=2)
        assert "more than one lab is running: say which" in refused.stderr
        assert first.name in refused.stderr
        assert second.name in refused.stderr
    for command in (["exec", "vm1", "--", "true"], ["console", "vm1"]):
        refused = machine.netorch(*command, status=2)
        assert "more than one lab has 'vm1'" in refused.stderr
        assert "--lab" in refused.stderr
    first.teardown()
    assert first.name not in machine.netorch("ls").stdout
    assert not first.run.exists()
    assert second.name in machine.netorch("ls").stdout
    second.sh("vm1", "ping -c 1 -W 60 192.168.122.1")
    second.unchanged()
