"""An edited file changes what differs and nothing else, while traffic goes on."""

import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import msgspec

from netorch import labs
from netorch.engine import Progress
from netorch.model import Topology
from netorch.system import namespaces
from netorch.topology import load
from tests.engine.topologies import random_topology
from tests.whole_labs import LabMachine, chosen_seed, in_child, links, said

Make = Callable[..., LabMachine]
TRANSITIONS = 15
LAB = """
[networks.default]
bridge = "virbr0"
address = "192.168.122.1/24"
[networks.lan]
mode = "bridge"
bridge = "br0"
address = "10.0.0.1/24"
[networks.other]
bridge = "br1"
address = "10.1.0.1/24"
[hosts.client]
nics = [{ network = "lan", address = "10.0.0.81/24" }]
[hosts.server]
nics = [{ network = "lan", address = "10.0.0.80/24" }]
[hosts.leaser]
nics = [{ network = "default" }]
[hosts.mover]
nics = [{ network = "other", address = "10.1.0.9/24" }]
"""

# (text in the file, its replacement, keys that the plan may name besides the record)
CHANGES: list[tuple[str, str, set[str]]] = [
    (
        "[hosts.mover]",
        '[hosts.new]\nnics = [{ network = "other", address = "10.1.0.8/24" }]\n[hosts.mover]',
        {"namespace:new", "veth:new:0", "dnsmasq:other"},
    ),
    (
        "[hosts.client]",
        '[networks.more]\nbridge = "br2"\naddress = "10.2.0.1/24"\n[hosts.client]',
        {"bridge:more", "dnsmasq:more", "ruleset"},
    ),
    (
        "[hosts.client]",
        '[taps.lab]\nnetwork = "other"\ncount = 2\n[hosts.client]',
        {"tap:lab:0", "tap:lab:1"},
    ),
    ("count = 2", "count = 1", {"tap:lab:1"}),
    (
        'address = "10.1.0.1/24"',
        'address = "10.1.0.1/24"\nmtu = 1400',
        {"bridge:other", "veth:mover:0", "veth:new:0", "tap:lab:0", "dnsmasq:other"},
    ),
    (
        'address = "10.1.0.1/24"',
        'address = "10.1.0.2/24"',
        {"bridge:other", "veth:mover:0", "veth:new:0", "dnsmasq:other", "ruleset"},
    ),
    (
        'bridge = "virbr0"',
        'bridge = "virbr0"\nmode = "isolated"',
        {"bridge:default", "ruleset", "dnsmasq:default", "forwarding:wan0"},
    ),
    (
        '\nmode = "isolated"',
        "",
        {"bridge:default", "ruleset", "dnsmasq:default", "forwarding:wan0"},
    ),
    (
        'bridge = "br1"',
        'bridge = "br9"',
        {"bridge:other", "veth:mover:0", "veth:new:0", "tap:lab:0", "dnsmasq:other", "ruleset"},
    ),
    (
        '[hosts.mover]\nnics = [{ network = "other", address = "10.1.0.9/24" }]',
        '[hosts.mover]\nnics = [{ network = "more", address = "10.2.0.9/24" }]',
        {"veth:mover:0", "dnsmasq:other", "dnsmasq:more"},
    ),
    (
        '[hosts.new]\nnics = [{ network = "other", address = "10.1.0.8/24" }]\n',
        "",
        {"namespace:new", "veth:new:0", "dnsmasq:other"},
    ),
]


def test_only_what_differs_changes_and_traffic_goes_on(lab_machine: Make) -> None:
    machine = lab_machine()
    text = LAB
    machine.write(text)
    machine.up()
    with transfer(machine) as transferred:
        for old, new, allowed in CHANGES:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
            machine.write(text)
            before = {**links(), **machine.processes()}
            keys = in_child(lambda: applied_keys(machine))
            assert isinstance(keys, list)
            assert {"record"} < set(keys) <= {"record", *allowed}, new
            assert machine.differences() == []
            after = {**links(), **machine.processes()}
            kept = [
                *("br0", "virbr0", "client-0", "server-0", "leaser-0"),
                *("dnsmasq:lan", "dhcp:leaser:eth0"),
            ]
            assert {key: before[key] for key in kept} == {key: after[key] for key in kept}, new
            transferred()
    machine.down()


def applied_keys(machine: LabMachine) -> list[str]:
    outcome = labs.apply(load(machine.file), str(machine.file), machine.place, Progress())
    return [action.key for action in outcome.plan]


@contextmanager
def transfer(machine: LabMachine) -> Iterator[Callable[[], None]]:
    """A TCP transfer from the host client to the host server, over the network lan, that runs all
    the while. What it yields waits until another megabyte has come through.
    """
    with namespaces.in_namespace(machine.scope.namespace("server")):
        listening = socket.create_server(("10.0.0.80", 5001))
    with namespaces.in_namespace(machine.scope.namespace("client")):
        sending = socket.create_connection(("10.0.0.80", 5001), timeout=60)
    sending.settimeout(None)  # it stands still for as long as nobody waits for more
    receiving, _ = listening.accept()
    receiving.settimeout(60)

    def pump() -> None:
        with suppress(OSError):  # the end of the test
            while True:
                sending.sendall(bytes(65536))

    pumping = threading.Thread(target=pump)
    pumping.start()

    def more() -> None:
        left = 1 << 20
        while left > 0:
            got = len(receiving.recv(65536))
            assert got, "the connection was closed"
            left -= got

    try:
        more()
        yield more
    finally:
        sending.shutdown(socket.SHUT_RDWR)
        pumping.join()
        for sock in (sending, receiving, listening):
            sock.close()


def test_random_walks_on_the_kernel(lab_machine: Make) -> None:
    """From one topology to the next, each ending in sync: what a plan calls an update is one."""
    machine = lab_machine()
    seed = chosen_seed()
    rng = random.Random(seed)
    for step in range(TRANSITIONS):
        topology = random_topology(rng)
        topology = msgspec.structs.replace(
            topology,
            lab=msgspec.structs.replace(topology.lab, name=machine.name, timeout=60),
            guests={},
        )

        def walk(topology: Topology = topology) -> list[str]:
            outcome = labs.apply(topology, "/walk.toml", "current", Progress())
            return outcome.plan.describe()

        said(f"seed {seed}, step {step}: {in_child(walk)}")
        assert machine.differences() == []
    machine.down()
