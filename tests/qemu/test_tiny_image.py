"""The cache of the image tiny, with a builder that writes two small files instead of an image."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from netorch.errors import ImageError
from netorch.system import tiny, tiny_build
from netorch.system.tiny_build import Progress


class Builder:
    """Stands in for tiny_build.build: counts its calls and gives the digest that it is told."""

    def __init__(self) -> None:
        self.calls = 0
        self.digest = "0123456789abcdef"
        self.failure: Exception | None = None

    def build(self, _init: bytes, result: Path, _scratch: Path, progress: Progress) -> str:
        self.calls += 1
        (result / "kernel").write_bytes(b"kernel")
        (result / "vmlinuz").write_bytes(b"vmlinuz")
        if self.failure:
            raise self.failure
        (result / "initrd").write_bytes(b"initrd")
        progress("built")
        return self.digest


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Builder:
    fake = Builder()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiny_build, "build", fake.build)
    return fake


def refuse(line: str) -> None:
    raise AssertionError(f"a cache hit reported progress: {line}")


def test_the_second_call_builds_nothing(builder: Builder, tmp_path: Path) -> None:
    lines: list[str] = []
    image = tiny.tiny_image(lines.append)
    assert lines == ["built"]
    assert image.kernel == tmp_path / "netorch/tiny-0123456789abcdef/kernel"
    assert image.kernel.read_bytes() + image.initrd.read_bytes() == b"kernelinitrd"
    assert tiny.tiny_image(refuse) == image
    assert builder.calls == 1


def test_a_failed_build_leaves_nothing_behind(builder: Builder, tmp_path: Path) -> None:
    builder.failure = ImageError("no kernel", "install one")
    with pytest.raises(ImageError, match="no kernel"):
        tiny.tiny_image(print)
    assert [path.name for path in (tmp_path / "netorch").iterdir()] == ["tiny.lock"]


def test_what_a_crashed_build_left_is_removed(builder: Builder, tmp_path: Path) -> None:
    leftover = tmp_path / "netorch/.tiny-dead"
    leftover.mkdir(parents=True)
    tiny.tiny_image(print)
    assert not leftover.exists()


def test_a_removed_image_is_built_again(builder: Builder) -> None:
    image = tiny.tiny_image(print)
    image.initrd.unlink()
    assert tiny.tiny_image(print) == image
    assert image.initrd.is_file()


def test_another_init_script_makes_another_image(
    builder: Builder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = tiny.tiny_image(print)
    other = tmp_path / "init.sh"
    other.write_text("#!/bin/sh\n")
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "_INIT", other)
        builder.digest = "fedcba9876543210"
        assert tiny.tiny_image(print) != old
    assert tiny.tiny_image(refuse) == old


def test_two_builders_build_once(builder: Builder) -> None:
    images: list[tiny.TinyImage] = []
    threads = [
        threading.Thread(target=lambda: images.append(tiny.tiny_image(print))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(images)) == 1
    assert builder.calls == 1


def test_a_cache_that_cannot_be_made_is_an_image_error(
    builder: Builder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with pytest.raises(ImageError, match="failed to build the image tiny in"):
        tiny.tiny_image(print)
