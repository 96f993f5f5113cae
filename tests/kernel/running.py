"""A lab of hosts that runs in the network namespace of a test."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from netorch import labs
from netorch.engine import Progress
from netorch.labs import Lab
from netorch.topology import parse

LAB = """
[networks.inner]
address = "192.168.150.1/24"

[networks.lan]
mode = "bridge"
address = "203.0.113.1/24"

[hosts.client]
nics = [{ network = "inner" }]

[hosts.server]
nics = [{ network = "lan", address = "203.0.113.80/24" }]

[hosts.other]
nics = [{ network = "lan", address = "203.0.113.81/24" }]
"""


@contextmanager
def running(tmp_path: Path, expect: str, text: str = LAB) -> Iterator[Lab]:
    """The lab with these expectations, in the network namespace of the test."""
    os.environ["NETORCH_RUN_DIR"] = str(tmp_path / "run")
    os.environ["NETORCH_DISK_DIR"] = str(tmp_path / "disks")
    written = f'[lab]\nname = "v{os.getpid()}"\n{text}\n{expect}'
    outcome = labs.apply(parse(written, "lab.toml", tmp_path), "lab.toml", "current", Progress())
    assert outcome.running is not None
    try:
        yield outcome.running
    finally:
        assert labs.teardown(outcome.running, Progress()) == []


def expect(from_: str, to: str = "", by: str = "ping", **more: object) -> str:
    keys = {"from": from_, **({"to": to} if to else {}), "by": by, **more}
    return "[[expect]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in keys.items())
