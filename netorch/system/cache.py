"""Where netorch keeps what it can find out or build again."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_directory() -> Path:
    """netorch's cache directory, which may not be there yet."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification: a relative path is invalid and to be ignored.
    base = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
    return base / "netorch"


@contextmanager
def alone(cache: Path, what: str, makes: str, progress: Callable[[str], None]) -> Iterator[None]:
    """Be the only netorch that makes a `what` there, with nothing left of one that was killed
    making it; `progress` hears that another one is at it. Scratch directories are `.<what>-*`.
    """
    import fcntl
    import shutil

    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{what}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another netorch, which {makes}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in cache.glob(f".{what}-*"):
            shutil.rmtree(leftover)
        yield
