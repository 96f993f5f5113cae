"""What a rootless container allows, and what netorch makes of it (docs/containers.md)."""

import errno
import json
import re

import pytest

from tests.containers.engine import ROOT, Container, Engine

NET_ADMIN = "--cap-add=NET_ADMIN"
TUN = "--device=/dev/net/tun"
GUEST = "topologies/default.toml"
HOSTS = "topologies/hosts-only.toml"

EXPECTATIONS = """
[[expect]]
from = "vm1"
to   = "gateway"
[[expect]]
from = "vm1"
to   = "gateway"
by   = "tcp:80"
[[expect]]
from = "vm1"
by   = "dhcp"
[[expect]]
from = "vm1"
by   = "dns:vm1"
"""

# All that netorch could leave or change. Zombies are not its own: nobody reaps in these containers.
LOOK = r"""
ip -o link; ip -4 -o address; ip -4 route; nft list ruleset 2>&1
cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/*/forwarding
ls -A /run /var/lib /tmp /root /home
cut -d' ' -f5 /proc/self/mountinfo
ps -eo stat,comm | grep -v -e ^Z -e ' ps$' -e ' grep$' -e ' sh$'
"""


def look(container: Container) -> str:
    return container.run("sh", "-c", LOOK).text


def refused(container: Container, *argv: str) -> str:
    """What netorch says when it fails, as one line; it must have changed nothing."""
    before = look(container)
    done = container.netorch(*argv)
    assert done.status == 1, done.output
    assert look(container) == before
    return " ".join(done.output.split())


def with_expectations(container: Container) -> str:
    """The lab with a guest as a file in the container, with what must be true of it."""
    text = (ROOT / GUEST).read_text() + EXPECTATIONS
    file = "/tmp/default.toml"
    assert container.run("sh", "-c", 'printf %s "$1" >"$2"', "sh", text, file).text == ""
    return file


def guest_lab(container: Container, place: str) -> None:
    """Bring the lab with a guest up, use it, take it down: all as on a machine."""
    can_verify = container.netorch("verify", "--help").status == 0
    file = with_expectations(container) if can_verify else GUEST
    before = look(container)
    assert re.search(rf"\nlab default is up in {place}", container.netorch("apply", file).text)
    assert "changed" not in container.netorch("status").text  # exit status 0: in sync
    ping = container.netorch("exec", "vm1", "--", "ping", "-c", "1", "192.168.122.1").text
    assert "1 packets received" in ping
    if can_verify:
        assert container.netorch("verify").text.count("ok ") == EXPECTATIONS.count("[[expect]]")
    assert "lab default is gone" in container.netorch("teardown").text
    assert look(container) == before


def host_lab(container: Container, *options: str) -> str:
    """The same for a lab of namespaces; what `apply` said."""
    before = look(container)
    said = container.netorch("apply", *options, HOSTS).text
    ping = container.netorch("exec", "client", "--", "ping", "-c", "1", "203.0.113.80")
    assert "1 received" in ping.text
    assert "changed" not in container.netorch("status").text
    assert "lab hosts-only is gone" in container.netorch("teardown").text
    assert look(container) == before
    return said


def test_net_admin_and_tun(engine: Engine) -> None:
    with engine.container(NET_ADMIN, TUN) as container:
        writing = container.run("sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
        assert "Read-only file system" in writing.output
        guest_lab(container, "this network namespace")


def test_default_capabilities_and_tun(engine: Engine) -> None:
    with engine.container(TUN) as container:
        assert container.run("ip", "link", "add", "br9", "type", "bridge").status != 0
        guest_lab(container, r"a private namespace \(uplink: (pasta|slirp4netns)\)")


def test_an_ordinary_user_in_a_container(engine: Engine) -> None:
    if engine.ids == 1:
        pytest.skip("this user has no subordinate ids in /etc/subuid")
    with engine.container(TUN, "--userns=keep-id") as container:
        assert container.run("id", "-u").text != "0\n"
        guest_lab(container, r"a private namespace \(uplink: (pasta|slirp4netns)\)")


def test_no_tun_device(engine: Engine) -> None:
    with engine.container() as container:
        said = host_lab(container)
        assert "up in a private namespace (uplink: none)" in said
        assert "it has no way out: /dev/net/tun can't be opened: No such file" in said
        why = refused(container, "apply", GUEST)
        assert "/dev/net/tun can't be opened: No such file or directory" in why
        assert "`--device /dev/net/tun`" in why


def test_net_admin_without_tun(engine: Engine) -> None:
    with engine.container(NET_ADMIN) as container:
        why = refused(container, "apply", GUEST)
        assert "/dev/net/tun can't be opened: No such file or directory" in why
        assert "`--device /dev/net/tun`" in why


def test_hosts_need_more_than_net_admin_or_a_private_place(engine: Engine) -> None:
    with engine.container(NET_ADMIN) as container:
        why = refused(container, "apply", HOSTS)
        assert "CAP_SYS_ADMIN" in why
        assert "--private" in why
        host_lab(container, "--private")


def test_hosts_in_the_containers_own_namespace(engine: Engine) -> None:
    with engine.container(NET_ADMIN, "--cap-add=SYS_ADMIN") as container:
        assert "`--cap-add NET_RAW`" in refused(container, "apply", HOSTS)
    with engine.container(NET_ADMIN, "--cap-add=SYS_ADMIN", "--cap-add=NET_RAW") as container:
        assert "up in this network namespace" in host_lab(container)


def test_no_capabilities(engine: Engine) -> None:
    with engine.container("--cap-drop=all") as container:
        assert "`--cap-add SETFCAP`" in refused(container, "apply", HOSTS)
    with engine.container("--cap-drop=all", "--cap-add=SETFCAP") as container:
        host_lab(container)
    with engine.container("--cap-drop=all", NET_ADMIN, TUN) as container:
        assert "`--cap-add NET_BIND_SERVICE`" in refused(container, "apply", GUEST)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS], ids=["docker", "podman"])
def test_a_seccomp_profile_that_forbids_user_namespaces(engine: Engine, number: int) -> None:
    rule = {"names": ["unshare"], "action": "SCMP_ACT_ERRNO", "errnoRet": number}
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}
    path = engine.file(f"seccomp-{number}.json", json.dumps(profile))
    with engine.container(f"--security-opt=seccomp={path}") as container:
        why = refused(container, "apply", HOSTS)
        assert "`--cap-add NET_ADMIN` or `--security-opt seccomp=unconfined`" in why


def test_no_network(engine: Engine) -> None:
    with engine.container(TUN, "--network=none") as container:
        said = host_lab(container)
        assert "it has no way out: the network namespace that netorch runs in has no routes" in said


def test_a_read_only_container(engine: Engine) -> None:
    with engine.container("--read-only") as container:
        host_lab(container)
    with engine.container("--read-only", "--read-only-tmpfs=false") as container:
        assert "`--tmpfs /run --tmpfs /var/lib`" in refused(container, "apply", HOSTS)
    with engine.container("--read-only", "--read-only-tmpfs=false", "--tmpfs=/run") as container:
        host_lab(container)
