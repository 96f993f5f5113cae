"""Threads may read topologies at once from the start (msgspec would crash, see netorch.api)."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys, threading
from pathlib import Path
import netorch.api
from netorch.topology import parse

def read():
    together.wait()
    parse("[networks.lan]", "x", Path("/"))

sys.setswitchinterval(1e-6)
together = threading.Barrier(6)
threads = [threading.Thread(target=read) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_read_topologies_at_once() -> None:
    root = Path(__file__).parents[2]
    for _ in range(5):
        subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, check=True)
