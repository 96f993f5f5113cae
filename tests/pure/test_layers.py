"""Imports point downwards only, and what is below `system` touches no machine
(docs/architecture.md).
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "netorch"

# From the top. A module may import those of its own layer and of the layers below.
LAYERS = (
    {"__main__"},
    {"cli", "watchdog"},
    {"pytest_plugin"},
    {"needs"},
    {"api", "api_nodes"},
    {"capture", "commands"},
    {"starter"},
    {"agent", "agents"},
    {"wire"},
    {"guest_cli", "save_cli", "cli_access"},
    {"command_line"},
    {"cli_options"},
    {"watcher", "access", "snapshots"},
    {"report", "nodes", "verify", "picture", "lifecycle", "tap_report"},
    {"output"},
    {"labs"},
    {"whereabouts", "surroundings", "bridging", "tap_queues"},
    {"engine"},
    {"system"},
    {"planner"},
    {"compiler", "junit"},
    {"guest_nics"},
    {"expectations"},
    {
        "addresses",
        "networks",
        "guests",
        "qemu_options",
        "nic_devices",
        "disk_devices",
        "guest_disks",
        "bare_guests",
        "topology",
        "schema",
        "boot_devices",
        "cloud_init",
        "keys",
        "png",
    },
    {"topology_checks", "topology_clashes", "topology_disks", "topology_expect"}
    | {"topology_shape", "topology_order", "topology_boot", "topology_files", "topology_nics"}
    | {"topology_rates"}
    | {"topology_values", "toml_lines"},
    {"state"},
    {"resources", "guest_resources", "boot_resources", "resource", "facts", "names"},
    {"model"},
    {"errors", "digests", "__init__"},
)
PURE = frozenset().union(*LAYERS[LAYERS.index({"planner"}) :]) - {"__init__"}
MACHINE = {
    "ctypes",
    "fcntl",
    "nftables",
    "os",
    "pyroute2",
    "select",
    "signal",
    "socket",
    "subprocess",
    "time",
}
# topology_files makes paths absolute.
ALLOWED = {("topology_files", "os")}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def depth(name: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if name in layer)


def imports(path: Path) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            parts = tuple((node.module or "").split("."))
            if parts == ("netorch",):
                found += [("netorch", alias.name) for alias in node.names]
            else:
                found.append(parts)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return  # the face of the package: at run time it imports names when they are asked for
    here = depth(name_of(path))
    for parts in imports(path):
        if parts[0] == "netorch" and len(parts) > 1 and parts[1] != "__version__":
            assert depth(parts[1]) >= here, (
                f"{name_of(path)} imports {'.'.join(parts)}, which is above it"
            )


@pytest.mark.parametrize(
    "path", [p for p in modules() if name_of(p) in PURE], ids=lambda path: path.stem
)
def test_what_is_pure_touches_no_machine(path: Path) -> None:
    for parts in imports(path):
        assert parts[0] not in MACHINE or (path.stem, parts[0]) in ALLOWED, (
            f"{path.stem} imports {parts[0]}"
        )


def test_modules_stay_readable() -> None:
    """STYLE: past about 300 lines there is a second noun in it."""
    long = {p.name: n for p in modules() if (n := p.read_text().count("\n")) > 400}
    assert not long
