"""netorch: one TOML file becomes a running QEMU network lab, and goes away without a trace.

The names below are the Python API (docs/python.md). Each is imported when it is first used, since
every command of the command line imports this module.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from netorch.api import Guest as LabGuest
    from netorch.api import Host as LabHost
    from netorch.api import Lab, Link
    from netorch.capture import Capture
    from netorch.commands import Process
    from netorch.errors import NetorchError
    from netorch.model import Dhcp, Guest, Host, HostNic, Network, Nic, Taps, Topology
    from netorch.model import Lab as LabTable

_WHERE = {
    "Lab": ("netorch.api", "Lab"),
    "LabHost": ("netorch.api", "Host"),
    "LabGuest": ("netorch.api", "Guest"),
    "Link": ("netorch.api", "Link"),
    "Capture": ("netorch.capture", "Capture"),
    "Process": ("netorch.commands", "Process"),
    "NetorchError": ("netorch.errors", "NetorchError"),
    "LabTable": ("netorch.model", "Lab"),
    **{
        name: ("netorch.model", name)
        for name in ("Dhcp", "Guest", "Host", "HostNic", "Network", "Nic", "Taps", "Topology")
    },
}

__all__ = [
    "Capture",
    "Dhcp",
    "Guest",
    "Host",
    "HostNic",
    "Lab",
    "LabGuest",
    "LabHost",
    "LabTable",
    "Link",
    "NetorchError",
    "Network",
    "Nic",
    "Process",
    "Taps",
    "Topology",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _WHERE[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
