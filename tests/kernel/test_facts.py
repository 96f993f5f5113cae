"""What the compiler is told about the machine."""

from collections.abc import Callable

from netorch.facts import Facts, Uplink
from netorch.resources import Bridge
from netorch.system.facts import observe_facts
from netorch.system.links import Links
from netorch.system.scope import Scope
from tests.isolation import ip

MakeScope = Callable[..., Scope]


def test_an_empty_namespace(scope: MakeScope) -> None:
    assert observe_facts(scope()) == Facts(taken=("127.0.0.0/8", "127.0.0.1/32"))


def test_ranges_uplinks_and_own_addresses(scope: MakeScope) -> None:
    for name, mtu in (("up0", "1400"), ("up1", "1500"), ("up2", "1300")):
        ip("link", "add", name, "type", "bridge")
        ip("link", "set", name, "up", "mtu", mtu)
    ip("addr", "add", "10.1.0.5/16", "dev", "up0")
    ip("route", "add", "default", "via", "10.1.0.1", "metric", "200")
    ip("route", "add", "default", "dev", "up1", "metric", "100")
    ip("route", "add", "172.20.0.0/14", "dev", "up1")
    ip("route", "add", "default", "dev", "up2", "table", "77")
    bridge = Bridge(
        network="default", name="virbr0", mac="52:54:00:00:00:01", addresses=("192.168.122.1/24",)
    )
    Links(scope()).create([bridge], lambda _: None)
    facts = observe_facts(scope())
    assert facts.uplinks == (Uplink("up1", 1500), Uplink("up0", 1400))
    assert facts.addresses == {"default": "192.168.122.1/24"}
    assert {"10.1.0.0/16", "172.20.0.0/14"} < set(facts.taken)
    assert not [prefix for prefix in facts.taken if prefix.startswith(("192.168.", "0.0.0.0"))]
    assert "192.168.122.0/24" in observe_facts(scope("another")).taken
