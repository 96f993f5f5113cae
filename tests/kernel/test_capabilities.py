"""Which capabilities a process lacks, asked of the kernel."""

from pathlib import Path

from netorch.system.capabilities import NET_ADMIN, NET_BIND_SERVICE, NET_RAW, confine, missing


def test_what_was_given_up_is_missing() -> None:
    assert missing(NET_ADMIN, NET_RAW, NET_BIND_SERVICE) == []
    confine([NET_ADMIN])
    assert missing(NET_ADMIN, NET_RAW, NET_BIND_SERVICE) == ["NET_RAW", "NET_BIND_SERVICE"]


def test_ports_that_anyone_may_bind_need_no_capability() -> None:
    first_free = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    first_free.write_text("53")  # of the test's own network namespace
    confine([])
    assert missing(NET_BIND_SERVICE, port=53) == []
    assert missing(NET_BIND_SERVICE, port=52) == ["NET_BIND_SERVICE"]
