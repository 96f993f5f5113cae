"""Whole labs without guests on the real machine: rest, drift, deadlines, and what is not ours."""

import subprocess
from collections.abc import Callable

import pytest

from netorch.labs import PlaceChoice
from tests.isolation import ip, ip_json
from tests.whole_labs import PLACES, LabMachine, Monitor, end_now, links, stops_dnsmasq

Make = Callable[..., LabMachine]
IN_BOTH = pytest.mark.parametrize("place", PLACES)
LAB = """
[networks.default]
bridge = "virbr0"
address = "192.168.122.1/24"
[networks.lan]
mode = "bridge"
bridge = "br0"
address = "10.0.0.1/24"
[hosts.client]
nics = [{ network = "default" }]
[hosts.server]
nics = [{ network = "lan", address = "10.0.0.80/24" }]
[taps.lab]
network = "default"
count = 2
"""


@IN_BOTH
def test_the_commands_and_their_exit_statuses(lab_machine: Make, place: PlaceChoice) -> None:
    machine = lab_machine(place)
    machine.write(LAB)
    place_option = machine.apply_arguments()[1:-1]
    file = str(machine.file)
    assert machine.netorch("check", file).status == 0
    plan = machine.netorch("plan", "--json", *place_option, file)
    assert plan.status == 3
    assert set(plan.json) == {"lab", "place", "actions", "restarts"}
    assert {"action", "key", "description", "new"} == set(plan.json["actions"][0])
    assert machine.leftovers() == []

    applied = machine.netorch("apply", "--json", *place_option, file)
    assert applied.status == 0, applied.err
    assert [a["key"] for a in applied.json["actions"]] == [a["key"] for a in plan.json["actions"]]
    assert applied.json["place"]["private"] == (place == "private")

    running = machine.look()
    again = machine.apply()
    assert (again.status, again.out) == (0, f"lab {machine.name}: nothing to do\n")
    plan = machine.netorch("plan", *place_option, file)
    assert (plan.status, plan.out) == (0, "nothing to do\n")
    status = machine.netorch("status", machine.name, "--json")
    assert status.status == 0
    assert {"lab", "place", "run", "file", "in_sync", "resources", "leases"} <= set(status.json)
    assert status.json["in_sync"] is True
    assert {row["state"] for row in status.json["resources"]} == {"ok"}
    (lease,) = machine.netorch("leases", machine.name, "--json").json
    assert lease == status.json["leases"][0]
    assert lease["name"] == "client"
    (listed,) = (x for x in machine.netorch("ls", "--json").json if x["lab"] == machine.name)
    assert listed["file"] == file
    assert machine.look() == running

    down = machine.netorch("teardown", machine.name)
    assert down.status == 0
    assert "is gone" in down.out
    assert machine.leftovers() == []
    assert machine.netorch("teardown", machine.name).status == 2


def test_a_second_apply_is_silent(lab_machine: Make) -> None:
    machine = lab_machine()
    machine.write(LAB)
    machine.up()
    files = _files(machine)
    monitor = Monitor()
    assert machine.apply().status == 0
    assert machine.netorch("status", machine.name).status == 0
    assert machine.netorch("plan", str(machine.file)).status == 0
    assert monitor.changes() == []
    assert _files(machine) == files
    machine.down()


def _files(machine: LabMachine) -> dict[str, tuple[int, int, int]]:
    """All of the run directory, itself too, with what every write changes."""
    paths = [machine.scope.run, *machine.scope.run.rglob("*")]
    stats = {str(path): path.stat() for path in paths}
    return {path: (s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats.items()}


def _in_server(machine: LabMachine, *words: str) -> None:
    ip("-n", machine.scope.namespace("server").name, *words)


DRIFTS: dict[str, tuple[Callable[[LabMachine], object], list[str]]] = {
    "a tap moved": (lambda m: ip("link", "set", "lab0", "master", "br0"), ["changed tap:lab:0"]),
    "a tap deleted": (lambda m: ip("link", "del", "lab1"), ["missing tap:lab:1"]),
    "a bridge's address": (
        lambda m: ip("addr", "del", "10.0.0.1/24", "dev", "br0"),
        ["changed bridge:lan"],
    ),
    "a bridge down": (lambda m: ip("link", "set", "virbr0", "down"), ["changed bridge:default"]),
    "a rule": (
        lambda m: subprocess.run(
            [
                "nft",
                f"add chain inet {m.scope.table} mine; add rule inet {m.scope.table} mine accept",
            ],
            check=True,
        ),
        ["changed ruleset"],
    ),
    "the rules": (
        lambda m: subprocess.run(["nft", f"delete table inet {m.scope.table}"], check=True),
        ["missing ruleset"],
    ),
    "dnsmasq": (lambda m: end_now(m.processes()["dnsmasq:default"]), ["missing dnsmasq:default"]),
    "a DHCP client": (
        lambda m: end_now(m.processes()["dhcp:client:eth0"]),
        ["missing dhcp:client:eth0"],
    ),
    "a route": (lambda m: _in_server(m, "route", "del", "default"), ["changed veth:server:0"]),
    "an address": (
        lambda m: _in_server(m, "addr", "add", "10.0.0.81/24", "dev", "eth0"),
        ["changed veth:server:0"],
    ),
}


def test_drift_is_seen_and_only_it_is_mended(lab_machine: Make) -> None:
    machine = lab_machine()
    machine.write(LAB)
    machine.up()
    for name, (change, expected) in DRIFTS.items():
        before = links(), machine.processes()
        change(machine)
        status = machine.netorch("status", machine.name, "--json")
        rows = [
            f"{row['state']} {row['key']}"
            for row in status.json["resources"]
            if row["state"] != "ok"
        ]
        assert (status.status, rows) == (3, expected), name
        done = machine.up()
        assert len(done) == 1, f"{name}: {done}"
        assert machine.differences() == [], name
        after = links(), machine.processes()
        for old, new in zip(before, after, strict=True):
            changed = {key for key in old | new if old.get(key) != new.get(key)}
            assert len(changed) <= 1, f"{name}: {changed}"
    machine.down()


def test_what_is_not_ours_survives(lab_machine: Make) -> None:
    machine = lab_machine()
    for line in ("link add brx type bridge", "tuntap add dev tapx mode tap"):
        ip(*line.split())
    subprocess.run(["nft", "add table inet x; add chain inet x y"], check=True)
    machine.before = machine.look()
    machine.write(LAB)
    machine.up()
    ip("link", "set", "tapx", "master", "virbr0")
    assert machine.differences() == []
    assert machine.up() == []
    assert machine.netorch("teardown", machine.name).status == 0
    (tap,) = ip_json("link", "show", "dev", "tapx")
    assert "master" not in tap
    assert machine.leftovers() == []


@IN_BOTH
def test_the_deadline_names_the_late_step(lab_machine: Make, place: PlaceChoice) -> None:
    """dnsmasq is stopped as soon as it is there, and so the client's questions get no answer."""
    machine = lab_machine(place)
    machine.write(LAB, "timeout = 2")
    with machine.apply_in_fork(stops_dnsmasq(machine)) as command:
        said = command.output.read()
    assert command.status == 1, said
    assert "client has no lease of network default yet" in said
    assert machine.netorch("status", machine.name).status == 0
    assert machine.netorch("teardown", machine.name).status == 0
    assert machine.leftovers() == []
