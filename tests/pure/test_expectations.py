"""Expectations as questions: who tries what against which address."""

import itertools
from pathlib import Path

import pytest

from netorch import model
from netorch.compiler import compile
from netorch.errors import TopologyError
from netorch.expectations import Question, questions
from netorch.facts import Facts
from netorch.topology import load, parse

ROOT = Path(__file__).parents[2]

LAB = """
[networks.default]
address = "192.168.122.1/24"
domain = "lab.test"

[networks.lan]
mode = "bridge"
address = "10.0.0.1/24"
dhcp = true

[networks.other]
mode = "bridge"

[guests.vm1]
nics = [{ network = "default", address = "192.168.122.6" }, { network = "lan" }]

[hosts.client]
nics = [{ network = "default", address = "192.168.122.7/24" }]

[hosts.server]
nics = [{ network = "lan", address = "10.0.0.80/24" },
        { network = "other", address = "172.16.0.80/24" }]

[hosts.far]
nics = [{ network = "other", address = "172.16.0.9/24", gateway = "172.16.0.80" }]

[hosts.guest]
nics = [{ network = "other", address = "dhcp" }]
"""


def ask(expect: str, text: str = LAB) -> list[Question]:
    topology = parse(f"{text}\n[[expect]]\n{expect}", "lab.toml", Path("/"))
    state = compile(topology, Facts(), Path("/run/netorch/lab"), "netorch_lab")
    return questions(topology, state)


def one(expect: str) -> Question:
    (question,) = ask(expect)
    return question


def test_a_far_node_is_tried_where_the_source_is_too() -> None:
    assert one('from = "client"\nto = "vm1"').far.address == "192.168.122.6"
    assert one('from = "server"\nto = "vm1"').far.network == "lan"
    assert one('from = "client"\nto = "server"').far.address == "10.0.0.80"
    assert one('from = "far"\nto = "server"').far.address == "172.16.0.80"


def test_a_network_means_all_others_on_it() -> None:
    sources = [q.source for q in ask('from = ["network:lan", "vm1"]\nto = "server"')]
    assert sources == ["vm1"]
    sources = [q.source for q in ask('from = ["network:default", "far"]\nto = "server"')]
    assert sources == ["vm1", "client", "far"]


def test_the_gateway_is_this_machine_or_who_the_file_says() -> None:
    here = one('from = "client"\nto = "gateway"').far
    assert (here.node, here.address) == ("", "192.168.122.1")
    there = one('from = "far"\nto = "gateway"').far
    assert (there.node, there.address) == ("server", "172.16.0.80")


def test_an_address_is_whose_it_is() -> None:
    assert one('from = "vm1"\nto = "10.0.0.80"').far.node == "server"
    assert one('from = "vm1"\nto = "10.0.0.1"').far.node == ""
    assert one('from = "vm1"\nto = "198.51.100.1"').far.node is None
    assert one('from = "vm1"\nto = "www.example"').far.name == "www.example"


def test_an_address_that_somebody_else_gives_is_to_be_found() -> None:
    far = one('from = "far"\nto = "guest"').far
    assert far.address == ""
    assert far.mac


def test_names_of_the_lab_have_known_addresses() -> None:
    assert one('from = "client"\nby = "dns:server"').answers == ("10.0.0.80", "172.16.0.80")
    assert one('from = "client"\nby = "dns:Server.lab.test"').answers
    assert one('from = "client"\nby = "dns:www.example"').answers == ()
    assert one('from = "client"\nby = "dns:server"').servers == ("192.168.122.1",)
    assert one('from = "far"\nby = "dns:server"').servers == ()


def test_a_no_is_held_against_this_machine_and_then_its_neighbours() -> None:
    assert one('from = "client"\nto = "server"').vantages == ()
    assert one('from = "client"\nto = "server"\nreach = false').vantages == ("", "vm1")
    assert one('from = "client"\nto = "far"\nreach = false').vantages == ("server", "guest")
    assert one('from = "client"\nto = "198.51.100.1"\nreach = false').vantages == ("",)


def test_deadlines() -> None:
    expect = 'from = "client"\nto = "server"\n'
    seconds = [one(expect + more).seconds for more in ("", "reach = false", "within = 7")]
    assert seconds == [10, 2, 7]


def test_titles() -> None:
    assert one('from = "vm1"\nto = "server"\nby = "tcp:22"').title == "vm1 -> server tcp:22"
    assert one('from = "vm1"\nby = "dhcp"').title == "vm1 dhcp"


WAYS = itertools.product(
    ["vm1", "client", "server", "far", "guest", "network:lan"],
    ["vm1", "server", "guest", "gateway", "10.0.0.80", "192.0.2.1", "a.example"],
    ["ping", "tcp:22", "udp:53", "dns:vm1"],
    [True, False],
)


def test_whatever_is_accepted_can_be_asked() -> None:
    refused = []
    for source, to, by, reach in WAYS:
        expect = f'from = "{source}"\nto = "{to}"\nby = "{by}"\nreach = {str(reach).lower()}'
        try:
            assert ask(expect)
        except TopologyError as error:
            refused += [mistake.message for mistake in error.mistakes]
    assert {message.partition(" ")[2] for message in refused} == {
        "always reaches itself",
        "is a DNS name",
        "has no gateway",
    }


@pytest.mark.parametrize("path", sorted((ROOT / "topologies").glob("*.toml")), ids=lambda p: p.stem)
def test_expectations_are_in_the_record_only(path: Path) -> None:
    topology = load(path)
    bare = model.Topology(
        **{key: getattr(topology, key) for key in topology.__struct_fields__ if key != "expect"}
    )
    states = [
        compile(t, Facts(users={"root": 0}), Path("/run/x"), "netorch_x") for t in (topology, bare)
    ]
    resources = [[r for r in state if r.key != "record"] for state in states]
    assert resources[0] == resources[1]
