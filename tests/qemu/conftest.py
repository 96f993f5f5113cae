"""Tests with real guests."""

import shutil

import pytest

from netorch.system.tiny import tiny_image

_PROGRAMS = ("qemu-system-x86_64", "qemu-img", "dnsmasq", "busybox", "nft")


@pytest.fixture(scope="session", autouse=True)
def _tiny() -> None:
    """The image tiny, built before the first test goes where there is no network."""
    for program in _PROGRAMS:
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    tiny_image(print)
