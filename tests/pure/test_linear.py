"""Every phase before the machine is touched takes time in proportion to the file's size."""

import time
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netorch.addresses import Ranges
from netorch.compiler import compile
from netorch.facts import Facts
from netorch.planner import diff
from netorch.state import EMPTY
from netorch.topology import parse


def automatic(count: int) -> str:
    return "".join(f"[networks.n{i}]\n[taps.t{i}x]\nnetwork = 'n{i}'\n" for i in range(count))


def hosts(count: int) -> str:
    return "".join(
        f"[networks.n{i}]\naddress = '10.{i // 250}.{i % 250}.1/24'\n"
        f"[hosts.h{i}]\nnics = [{{ network = 'n{i}' }}]\n"
        for i in range(count)
    )


def expectations(count: int) -> str:
    nodes = "".join(f"[hosts.h{i}]\nnics = [{{ network = 'n' }}]\n" for i in range(count))
    asked = "".join(
        f"[[expect]]\nfrom = 'h{i}'\nto = 'gateway'\nseen_as = '10.0.0.9'\n" for i in range(count)
    )
    return f"[networks.n]\naddress = '10.0.0.1/16'\n{nodes}{asked}"


def seconds(text: str) -> float:
    def once() -> float:
        began = time.process_time()
        topology = parse(text, "t.toml", Path("/"))
        state = compile(topology, Facts(), Path("/run/netorch/t"), "netorch_t")
        diff(state, EMPTY)
        diff(EMPTY, state)
        return time.process_time() - began

    return min(once() for _ in range(3))


@pytest.mark.parametrize("shape", [automatic, hosts, expectations])
def test_ten_times_the_file_takes_ten_times_as_long(shape: Callable[[int], str]) -> None:
    """What is quadratic takes a hundred times as long; the bound lies between on purpose."""
    assert seconds(shape(1000)) < 30 * seconds(shape(100))


NETWORKS = st.builds(
    lambda address, length: IPv4Network((address, length), strict=False),
    st.integers(0xC0A80000, 0xC0A8FFFF),
    st.integers(18, 32),
)


@given(st.lists(NETWORKS), NETWORKS)
def test_ranges_meet_what_any_of_them_overlaps(
    known: list[IPv4Network], asked: IPv4Network
) -> None:
    assert (asked in Ranges(known)) == any(asked.overlaps(network) for network in known)
