"""How guests boot: files that a topology takes in, cloud-init's seed, and what is made again."""

import json
from pathlib import Path

import pytest
import yaml

from netorch.boot_resources import Seed
from netorch.cloud_init import SeedNic, seed_files
from netorch.compiler import compile
from netorch.errors import TopologyError
from netorch.facts import Facts, Uplink
from netorch.planner import Delete, diff
from netorch.resources import Dnsmasq, Guest
from netorch.state import State
from netorch.topology import parse

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGyOM5WNfDgaAfr0qIMHd5kk2YxXGUGWVu3m4Gh5pdcb a b"
FACTS = Facts(uplinks=(Uplink("eth0", 1500),))
CLOUD = '[guests.vm1]\nimage = "cloud.img"\n'


def compiled(text: str, base: Path = Path("/labs")) -> State:
    return compile(parse(text, "lab.toml", base), FACTS, Path("/run/netorch/lab"), "netorch_lab")


def test_a_seed_is_yaml_that_names_each_nic_by_its_mac() -> None:
    nics = [SeedNic("52:54:00:00:00:01", True), SeedNic("52:54:00:00:00:02", False)]
    files = {
        name: yaml.safe_load(text) for name, text in seed_files("vm1", "", [KEY], nics).items()
    }
    assert files["meta-data"]["local-hostname"] == "vm1"
    assert files["meta-data"]["public-keys"] == [KEY]
    assert files["user-data"] == {}
    first, second = files["network-config"]["ethernets"].values()
    assert first["match"] == {"macaddress": "52:54:00:00:00:01"}
    assert (first["set-name"], second["set-name"]) == ("eth0", "eth1")
    assert (first["dhcp4"], second["dhcp4"]) == (True, False)


def test_another_seed_is_another_instance() -> None:
    nic = SeedNic("52:54:00:00:00:01", True)
    seeds = [
        seed_files("vm1", "", [], [nic]),
        seed_files("vm2", "", [], [nic]),
        seed_files("vm1", "#cloud-config\na: 1\n", [], [nic]),
        seed_files("vm1", "", [KEY], [nic]),
        seed_files("vm1", "", [], [nic._replace(dhcp=False)]),
    ]
    assert len({json.loads(seed["meta-data"])["instance-id"] for seed in seeds}) == len(seeds)
    assert seeds[0] == seed_files("vm1", "", [], [nic])


def test_files_of_cloud_init_are_taken_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user-data").write_text("#cloud-config")
    (tmp_path / "keys").write_text(f"# two\n{KEY}\n\n{KEY}2\n")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "id.pub").write_text(f"{KEY}3\n")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text = CLOUD + f'user_data = "user-data"\nssh_keys = ["keys", "{KEY}", "~/id.pub"]'
    (guest,) = parse(text, "lab.toml", tmp_path).guests.values()
    assert guest.user_data == "#cloud-config\n"
    assert guest.ssh_keys == (KEY, f"{KEY}2", KEY, f"{KEY}3")
    (seed,) = compiled(text, tmp_path).of(Seed)
    assert seed.files["user-data"] == "#cloud-config\n"


def test_files_that_can_not_be_taken_in_are_mistakes_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff")
    (tmp_path / "key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    (tmp_path / "empty.pub").write_text("# none\n")
    text = CLOUD + 'user_data = "none"\nssh_keys = ["key",\n"empty.pub", "binary",\n"~nobody0/id"]'
    with pytest.raises(TopologyError) as caught:
        parse(text, "lab.toml", tmp_path)
    found = [(m.line, m.path, m.message, m.hint) for m in caught.value.mistakes]
    where = "guests.vm1.ssh_keys"
    assert found[:4] == [
        (
            *(3, "guests.vm1.user_data"),
            *(f"failed to read {tmp_path}/none: No such file or directory", "relative to the file"),
        ),
        (
            *(4, f"{where}[0]", f"{tmp_path}/key does not hold public keys"),
            "a public key's name ends in .pub",
        ),
        (5, f"{where}[1]", f"{tmp_path}/empty.pub does not hold public keys", "one on each line"),
        (5, f"{where}[2]", f"{tmp_path}/binary is not UTF-8 text", "save it as such"),
    ]
    assert "Could not determine home" in found[4][2]


def test_with_a_kernel_or_from_the_network_tiny_has_no_part() -> None:
    state = compiled("""
        [networks.default]
        [guests.kernel]
        kernel = "boot/bzImage"
        [guests.pxe]
        boot = "network"
        nics = [{ network = "default" }]
        [guests.disk]
        kernel = "/bzImage"
        image = "root.img"
        cmdline = "ro"
    """)
    kernel, pxe, disk = state.of(Guest)
    assert (kernel.image, kernel.boot.kernel) == ("none", "/labs/boot/bzImage")
    assert (pxe.image, pxe.boot.nics) == ("none", (0,))
    assert (disk.image, disk.boot.cmdline) == ("/labs/root.img", "ro")
    assert "overlay:disk:image" in state
    assert "overlay:kernel:image" not in state


def test_a_guest_boots_from_the_networks_that_say_what() -> None:
    text = """
        [networks.a]
        [networks.b]
        dhcp = { boot = "http://192.0.2.1/boot" }
        [guests.one]
        boot = "network"
        nics = [{ network = "a" }, { network = "b" }]
    """
    (guest,) = compiled(text).of(Guest)
    assert guest.boot.nics == (1,)
    (guest,) = compiled(text.replace("dhcp", "#")).of(Guest)
    assert guest.boot.nics == (0, 1)


def test_a_guest_asks_for_addresses_where_somebody_gives_them() -> None:
    state = compiled(
        CLOUD
        + f"""
        ssh_keys = ["{KEY}"]
        nics = [{{ network = "a" }}, {{ network = "b" }}, {{ network = "c" }}, {{ network = "d" }}]
        [networks.a]
        [networks.b]
        mode = "bridge"
        [networks.c]
        mode = "bridge"
        uplink = "eth1"
        [networks.d]
        mode = "bridge"
        bridge = "br0"
        external = true
        """
    )
    (seed,) = state.of(Seed)
    nics = json.loads(seed.files["network-config"])["ethernets"].values()
    assert [nic["dhcp4"] for nic in nics] == [True, False, True, True]


def test_a_directory_is_served_without_dhcp_and_dns_too() -> None:
    text = '[networks.a]\ntftp = "a, b"\ndhcp = false\ndns = false'
    (dnsmasq,) = compiled(text).of(Dnsmasq)
    assert 'tftp-root="/labs/a, b"' in dnsmasq.config
    assert "dhcp-range" not in dnsmasq.config
    assert dnsmasq.tftp == "/labs/a, b"


def test_another_seed_starts_the_guest_again_and_leaves_its_disk() -> None:
    before = compiled(CLOUD + f'firmware = "uefi"\nssh_keys = ["{KEY}"]')
    after = compiled(CLOUD + f'firmware = "uefi"\nssh_keys = ["{KEY}2"]')
    plan = diff(after, before)
    deleted = [action.key for action in plan if isinstance(action, Delete)]
    assert deleted == ["guest:vm1", "seed:vm1"]
    assert "(to make it again: meta-data)" in "".join(plan.describe())
    assert not diff(after, after)
