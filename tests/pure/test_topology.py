"""Reading a topology: what is right becomes a Topology, everything wrong is reported at once."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netorch import model, topology_checks, topology_shape
from netorch.errors import Mistake, TopologyError, dotted, quoted
from netorch.names import bridge_name, shorten, tap_name, tap_names, veth_name
from netorch.topology import load, memory_mib, parse
from netorch.topology_values import Wrong, lease_seconds

ROOT = Path(__file__).parents[2]
MISTAKES = sorted((Path(__file__).parent / "golden" / "mistakes").glob("*.toml"))


def read(text: str, source: str = "lab.toml") -> model.Topology:
    return parse(text, source, Path("/base"))


def mistakes(text: str) -> list[str]:
    with pytest.raises(TopologyError) as caught:
        read(text)
    return [f"{m.path}: {m.message}" for m in caught.value.mistakes]


@pytest.mark.parametrize("path", MISTAKES, ids=lambda path: path.stem)
def test_mistakes_are_reported_as_in_the_golden_file(
    path: Path, golden: Callable[[Path, str], None]
) -> None:
    with pytest.raises(TopologyError) as caught:
        parse(path.read_text(), path.name, path.parent)
    found = caught.value.mistakes
    assert [m.line for m in found] == sorted(m.line for m in found)
    assert all(m.line for m in found)
    golden(path.with_suffix(".txt"), f"{caught.value}\n")


# What is right


def test_an_empty_file_is_an_empty_lab() -> None:
    assert read("") == model.Topology(lab=model.Lab(name="lab"))


def test_values_are_as_written_and_paths_absolute() -> None:
    text = """
    [networks.default]
    address = "auto"
    [guests.a]
    image = "images/../a.qcow2"
    [guests.b]
    image = "/x/b.raw"
    [guests.c]
    image = "./tiny"
    [guests.d]
    nics = [{ network = "default" }]
    """
    found = read(text)
    images = [guest.image for guest in found.guests.values()]
    assert images == ["/base/a.qcow2", "/x/b.raw", "/base/tiny", "tiny"]
    assert found.networks["default"] == model.Network(address="auto")
    assert found.guests["d"].nics == (model.Nic(network="default"),)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("dir/default.toml", "default"),
        ("My lab (2).toml", "My-lab-2"),
        ("-x.toml", "x"),
        ("<stdin>", "stdin"),
        ("äöü.toml", "lab"),
        ("a" * 80 + ".toml", "a" * 63),
    ],
)
def test_the_lab_is_called_after_the_file(source: str, name: str) -> None:
    assert read("", source).name == name
    assert read('[lab]\nname = "own"', source).name == "own"


def test_a_range_may_contain_the_gateway_and_a_static_host_the_range() -> None:
    read("""
    [networks.a]
    address = "10.0.0.1/24"
    dhcp = { range = ["10.0.0.1", "10.0.0.254"] }
    [hosts.h]
    nics = [{ network = "a", address = "10.0.0.9/24" }]
    """)


@pytest.mark.parametrize(
    ("value", "mib"),
    [(64, 64), ("256M", 256), ("256", 256), ("1G", 1024), ("1 GiB", 1024), ("2t", 2 << 20)],
)
def test_memory(value: int | str, mib: int) -> None:
    assert memory_mib(value) == mib


@pytest.mark.parametrize("value", ["", "M", "1.5G", "-1", "1K", "²M", "1e3", "9" * 5000])
def test_not_memory(value: str) -> None:
    with pytest.raises(Wrong):
        memory_mib(value)


def test_lease_times() -> None:
    assert [lease_seconds(text) for text in ("300", "5m", "2h", "1w")] == [300, 300, 7200, 604800]
    assert lease_seconds("infinite") > 1e12


def test_1023_ports_are_enough_for_anyone() -> None:
    text = '[networks.a]\n[taps.t]\nnetwork = "a"\ncount = 1023\n'
    read(text)
    more = text + '[hosts.h]\nnics = [{ network = "a" }]\n'
    assert mistakes(more) == ["networks.a: has 1024 ports; a Linux bridge takes at most 1023"]


def test_a_thousand_networks_overlap_nowhere_and_then_once() -> None:
    nets = [f'[networks.n{i}]\naddress = "10.{i // 256}.{i % 256}.1/24"\n' for i in range(1000)]
    read("".join(nets))
    assert mistakes("".join(nets) + '[networks.last]\naddress = "10.2.0.1/23"\n') == [
        "networks.last.address: 10.2.0.0/23 overlaps 10.2.0.0/24 of networks.n512",
        "networks.last.address: 10.2.0.0/23 overlaps 10.2.1.0/24 of networks.n513",
    ]


# Names


def test_derived_names() -> None:
    assert bridge_name("default", model.Network()) == "virbr0"
    assert bridge_name("lan", model.Network()) == "br-lan"
    assert bridge_name("lan", model.Network(bridge="br0")) == "br0"
    assert tap_name("vm1", 0, model.Nic(network="lan")) == "vm1-0"
    assert tap_name("vm1", 0, model.Nic(network="lan", tap="t")) == "t"
    assert veth_name("server", 1) == "server-1"
    assert tap_names("lab", model.Taps(network="lan", count=2)) == ["lab0", "lab1"]


@given(st.from_regex(model.NAME, fullmatch=True), st.integers(0, 99))
def test_derived_names_are_interface_names(name: str, index: int) -> None:
    assert len(shorten(f"{name}-{index}").encode()) <= 15


@pytest.mark.parametrize(
    "bad", ["a\\n", "a b", "a/b", "..", ".", "-a", "a%d", 'a\\"b', "ä", "a" * 16]
)
def test_not_an_interface_name(bad: str) -> None:
    assert len(mistakes(f'[networks.a]\nbridge = "{bad}"')) == 1


def test_a_newline_hides_nowhere() -> None:
    """Python's `$` matches before a last newline; dnsmasq would read what follows as an option."""
    text = """
    [lab]
    name = "a\\n"
    [networks."b\\n"]
    domain = "c\\n"
    mac = "52:54:00:12:34:56\\n"
    dhcp = { lease = "1h\\n" }
    [taps.t]
    network = "b\\n"
    owner = "d\\n"
    """
    assert len(mistakes(text)) == 7


# Files


def load_failure(path: Path) -> str:
    with pytest.raises(TopologyError) as caught:
        load(path)
    return str(caught.value).removeprefix(str(path))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_bytes(b"[lab]\n# \xff\n")
    assert load_failure(tmp_path / "none.toml") == ": there is no such file"
    assert load_failure(tmp_path).startswith(": is a directory")
    assert load_failure(bad / "x.toml") == ": can't be read: Not a directory"
    assert load_failure(bad).startswith(":2: is not UTF-8 text")
    assert "null byte" in load_failure(Path("a\0b"))
    assert load_failure(Path("/dev/zero")) == ": is larger than 16 MiB (is it a topology?)"


def test_a_byte_order_mark_and_crlf_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "dos.toml"
    path.write_bytes(b'\xef\xbb\xbf[lab]\r\nname = "x"\r\n[networks.a]\r\nmode = "natt"\r\n')
    assert load_failure(path).startswith(":4: networks.a.mode: ")


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "a = " + "9" * 5000, "a = 0x" + "f" * 5000])
def test_what_tomllib_stumbles_over(text: str) -> None:
    assert len(mistakes(text)) == 1


def test_dotted_and_quoted() -> None:
    assert dotted(("guests", "vm 1", "nics", 0, "a.b")) == 'guests."vm 1".nics[0]."a.b"'
    assert quoted('a\n"\x00') == '"a\\n\\"\\x00"'
    assert quoted("x" * 99) == '"' + "x" * 40 + "…" + "x" * 15 + '"'


def test_the_short_way_imports_little() -> None:
    script = (
        "import sys; from pathlib import Path; from netorch.topology import load;"
        "load(Path('topologies/virbr0-vs-br0.toml')); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    late = {"netorch.toml_lines", "netorch.topology_shape", "difflib", "hashlib", "dataclasses"}
    assert not loaded & late


# Nothing but TopologyError, and the slow way agrees with the fast one.

WORDS = st.one_of(
    st.sampled_from(
        [
            *("auto", "dhcp", "nat", "bridge", "isolated", "tiny", "e1000", "virbr0", "default"),
            *(
                "10.0.0.1/24",
                "10.0.0.5",
                "10.0.0.5/24",
                "192.168.122.1/24",
                "fd00::1",
                "10.0.0.0/33",
            ),
            *("52:54:00:00:00:01", "1h", "infinite", "256M", "~", "all", "vm1", "lan"),
            *("network:lan", "network:", "gateway"),
        ]
    ),
    st.text(st.characters(codec="utf-8"), max_size=6),
)
SCALARS = WORDS | st.integers(-5, 3000) | st.booleans() | st.floats() | st.dates()


def table(kind: type[msgspec.Struct], **known: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Tables with some keys of the kind, mostly of the right type, and now and then a stranger."""
    names = [field.encode_name for field in msgspec.structs.fields(kind)]
    keys = {name: known.get(name, SCALARS) for name in names}
    tables = st.fixed_dictionaries({}, optional={**keys, "nmae": SCALARS})
    return st.one_of(tables, tables, tables, SCALARS)


def named(item: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.dictionaries(st.sampled_from(["default", "lan", "vm1", "VM1", ""]), item, max_size=3)


DHCP = table(model.Dhcp, range=st.lists(WORDS, min_size=1, max_size=3))
NICS = st.lists(table(model.Nic), max_size=3)
HOST_NICS = st.lists(table(model.HostNic), max_size=3)
EXPECT = table(
    model.Expect,
    **{"from": WORDS | st.lists(WORDS, max_size=2)},
    to=WORDS | st.sampled_from(["gateway", "a.example"]),
    by=st.sampled_from(["ping", "tcp:0", "udp:53", "dns:a", "dns:-", "dhcp", "pong"]),
)
DOCUMENTS = table(
    model.Topology,
    lab=table(model.Lab),
    networks=named(table(model.Network, dhcp=DHCP | st.booleans())),
    guests=named(table(model.Guest, nics=NICS)),
    hosts=named(table(model.Host, nics=HOST_NICS)),
    taps=named(table(model.Taps)),
    expect=st.lists(EXPECT, max_size=3),
).filter(lambda document: isinstance(document, dict))


@settings(max_examples=400)
@given(DOCUMENTS)
def test_the_slow_way_finds_what_the_fast_one_finds(document: dict[str, Any]) -> None:
    partial, findings, broken = topology_shape.read(document)
    topology_checks.check(partial, broken)
    try:
        topology = msgspec.convert(document, model.Topology)
    except msgspec.ValidationError:
        assert findings
    else:
        assert not findings
        assert partial == topology


def attempt(text: str) -> tuple[Mistake, ...] | None:
    """The mistakes in the text; None if it is a topology."""
    try:
        read(text)
    except TopologyError as error:
        return error.mistakes
    return None


@settings(max_examples=300)
@given(st.text(st.characters(codec="utf-8")) | st.binary().map(lambda b: b.decode("latin-1")))
def test_any_text_is_a_topology_or_a_topology_error(text: str) -> None:
    assert attempt(text) != ()


TEXTS = [path.read_text() for path in (*MISTAKES, *(ROOT / "topologies").glob("*.toml"))]


@settings(max_examples=400)
@given(st.data())
def test_a_damaged_file_is_a_topology_or_a_topology_error(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(TEXTS))
    start = data.draw(st.integers(0, len(text)))
    length = data.draw(st.integers(0, 20))
    inserted = data.draw(st.sampled_from(['"', "]", "[", "{}", "\n", "=", "1", "é", "\0", ".", ""]))
    found = attempt(text[:start] + inserted + text[start + length :])
    assert found != ()
    assert all(mistake.line for mistake in found or ())
