"""Where netorch keeps what it can find out or build again."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """netorch's cache directory, which may not be there yet."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification: a relative path is invalid and to be ignored.
    base = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
    return base / "netorch"
