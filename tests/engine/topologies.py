"""Random topologies, for tests that walk from one to another."""

import random
from pathlib import Path

from netorch.compiler import compile
from netorch.facts import Facts, Uplink
from netorch.model import Disk, Guest, Host, HostNic, Lab, Mode, Network, Nic, Rates, Taps, Topology
from netorch.state import State

MODES: tuple[Mode, ...] = ("nat", "route", "open", "isolated", "bridge")
RATES = (None, "8mbit", Rates(out="1mbit"))
MODELS = ("virtio-net-pci", "e1000", "rtl8139")


def random_topology(rng: random.Random) -> Topology:
    """Up to three networks with guests, hosts and taps on them; always valid."""
    networks = {
        name: Network(
            mode=rng.choice(MODES),
            address=f"10.{index}.0.1/24",
            dhcp=rng.random() < 0.7,
            bridge=rng.choice([None, f"br{index}"]),
            mtu=rng.choice([None, 1400]),
        )
        for index, name in enumerate(
            rng.sample(["default", "lan", "lab", "dmz"], rng.randint(1, 3))
        )
    }
    names = list(networks)
    static = {name: f"10.{index}.0.9/24" for index, name in enumerate(networks)}
    guests = {
        f"vm{i}": Guest(
            memory=rng.choice([128, 256]),
            nics=tuple(
                Nic(
                    network=rng.choice(names),
                    model=rng.choice(MODELS),  # type: ignore[arg-type]
                    rate=rng.choice(RATES),
                )
                for _ in range(rng.randint(0, 2))
            ),
            disks=tuple(
                rng.choice([Disk(size="1G"), Disk(file="/images/data.img", bus="nvme")])
                for _ in range(rng.randint(0, 2))
            ),
        )
        for i in range(rng.randint(0, 3))
    }
    hosts = {
        f"host{i}": Host(
            nics=(HostNic(network=network, address=static[network], rate=rng.choice(RATES)),)
        )
        for i in range(rng.randint(0, 1))
        for network in [rng.choice(names)]
    }
    taps = (
        {"lab": Taps(network=rng.choice(names), count=rng.randint(1, 3))}
        if rng.random() < 0.5
        else {}
    )
    return Topology(
        lab=Lab(name="random"), networks=networks, guests=guests, hosts=hosts, taps=taps
    )


def state_of(topology: Topology) -> State:
    facts = Facts(uplinks=(Uplink(name="eth0", mtu=1500),))
    return compile(topology, facts, Path("/run/netorch/random"), "netorch_random", "/lab.toml")
