"""docs/topology.md, topologies/ and the JSON Schema say what the model says."""

import re
from pathlib import Path

import msgspec
import pytest

from netorch import model
from netorch.schema import DESCRIPTIONS, schema
from netorch.topology import load, parse

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "topology.md").read_text()
TABLES: dict[str, type[msgspec.Struct]] = {
    "`[lab]`": model.Lab,
    "`[networks.NAME]`": model.Network,
    "`dhcp`": model.Dhcp,
    "`[guests.NAME]`": model.Guest,
    "`disks` of a guest": model.Disk,
    "`backing` of a disk": model.Layer,
    "`nics` of a guest": model.Nic,
    "`rate` of a NIC": model.Rates,
    "`forward` of a NIC": model.Forward,
    "`[hosts.NAME]`": model.Host,
    "`nics` of a host": model.HostNic,
    "`[taps.NAME]`": model.Taps,
    "`[[expect]]`": model.Expect,
}


def sections() -> dict[str, str]:
    parts = re.split(r"^##+ (.+)$", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def said(default: object) -> set[str]:
    """How the page may write a default."""
    if default is msgspec.NODEFAULT:
        return {"required"}
    if default is None:
        return {"derived", "none"}
    return {f"`{msgspec.json.encode(default).decode()}`"}


def test_every_table_of_the_file_has_a_section() -> None:
    assert sections().keys() == TABLES.keys()
    documented = {table.__name__ for table in TABLES.values()}
    assert documented == {key.partition(".")[0] for key in DESCRIPTIONS} - {"Topology"}


@pytest.mark.parametrize("title", TABLES)
def test_every_key_is_there_with_its_default(title: str) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+?) \| (.+) \|$", sections()[title], re.MULTILINE)
    page = {key: default for key, _, default, _ in rows}
    fields = {field.encode_name: field.default for field in msgspec.structs.fields(TABLES[title])}
    assert page.keys() == fields.keys()
    for key, default in page.items():
        assert default in said(fields[key]), key


@pytest.mark.parametrize("title", TABLES)
def test_every_value_of_a_choice_is_there(title: str) -> None:
    section = sections()[title]
    for field in msgspec.inspect.type_info(TABLES[title]).fields:  # type: ignore[attr-defined]
        for value in getattr(field.type, "values", ()):
            assert f'`"{value}"`' in section, field.name


def blocks() -> list[str]:
    return re.findall(r"^```toml\n(.+?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", blocks())
def test_every_example_is_valid(block: str) -> None:
    parse(block, "example.toml", ROOT)


def test_the_examples_show_every_key() -> None:
    shown = "\n".join(blocks())
    for table in TABLES.values():
        for field in msgspec.structs.fields(table):
            assert re.search(rf"\b{field.encode_name}\b", shown), f"{table.__name__}.{field.name}"


@pytest.mark.parametrize("path", sorted((ROOT / "topologies").glob("*.toml")), ids=lambda p: p.stem)
def test_every_shipped_topology_is_valid(path: Path) -> None:
    assert load(path).name == path.stem


def test_the_schema_describes_every_key() -> None:
    made = schema()
    for name, definition in made["$defs"].items():
        assert definition["additionalProperties"] is False
        for key, value in definition["properties"].items():
            assert value["description"] == DESCRIPTIONS[f"{name}.{key}"]
    assert "(?!" not in str(made)
