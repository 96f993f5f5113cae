"""Tests in rootless containers. They run in no namespace of their own: podman's machine has its."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from netorch.system.tiny import tiny_image
from tests import isolation
from tests.containers.engine import Engine, require_podman


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    require_podman()
    isolation.require_tun()
    cache = tiny_image(lambda _line: None).kernel.parents[1]  # containers have no way to a mirror
    # Not pytest's own directory: podman's user could not come in there.
    with tempfile.TemporaryDirectory(prefix="containers-") as scratch:
        engine = Engine(Path(scratch), cache)
        try:
            if engine.refused:
                pytest.skip(engine.refused)
            yield engine
        finally:
            engine.close()
