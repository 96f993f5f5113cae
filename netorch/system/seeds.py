"""cloud-init's seeds: directories run/seeds/<guest> with the files, and the image made of them.

The image is ISO 9660 with the label that cloud-init's NoCloud looks for. What a seed is is read
from the files beside it. A directory is made under another name and renamed, so one that is there
is whole.
"""

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from netorch.planner import Update
from netorch.resources import Resource, Seed
from netorch.system.rundir import write
from netorch.system.scope import SEEDS, Scope

_IMAGE = "seed.iso"
_UNFINISHED = "+"  # no guest's name begins with it


def seed_image(scope: Scope, guest: str) -> Path:
    return scope.run / SEEDS / guest / _IMAGE


class Seeds:
    """The adapter for seeds."""

    kinds: tuple[type[Resource], ...] = (Seed,)

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def observe(self, look: object = None) -> Iterable[Seed]:
        for image in sorted((self._scope.run / SEEDS).glob(f"*/{_IMAGE}")):
            directory = image.parent
            if not directory.name.startswith(_UNFINISHED):
                texts = (path for path in sorted(directory.iterdir()) if path != image)
                files = {path.name: path.read_text("utf-8", "replace") for path in texts}
                yield Seed(guest=directory.name, files=files)

    def check(self, wanted: Sequence[Resource]) -> list[str]:
        return []

    def create(self, wanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        for seed in wanted:
            assert isinstance(seed, Seed)
            self.delete([seed], lambda _seed: None)
            directory, new = self._directories(seed)
            new.mkdir(mode=0o700, parents=True)
            for name, text in seed.files.items():
                write(new / name, text)
            _write_image(new / _IMAGE, seed)
            new.rename(directory)
            done(seed)

    def update(self, wanted: Sequence[Update], done: Callable[[Resource], None]) -> None:
        raise AssertionError("a seed has no live field")

    def delete(self, unwanted: Sequence[Resource], done: Callable[[Resource], None]) -> None:
        for seed in unwanted:
            assert isinstance(seed, Seed)
            for directory in self._directories(seed):
                if directory.exists():
                    shutil.rmtree(directory)
            done(seed)

    def _directories(self, seed: Seed) -> tuple[Path, Path]:
        """Where it is, and where it is made."""
        directory = self._scope.run / SEEDS / seed.guest
        return directory, directory.with_name(_UNFINISHED + directory.name)


def _write_image(path: Path, seed: Seed) -> None:
    """The files under their own names, which Rock Ridge and Joliet keep: Linux reads either."""
    import io

    import pycdlib

    image = pycdlib.PyCdlib()
    image.new(vol_ident="cidata", joliet=3, rock_ridge="1.09", interchange_level=3)
    for number, (name, text) in enumerate(seed.files.items()):
        data = text.encode()
        image.add_fp(
            io.BytesIO(data),
            len(data),
            f"/FILE{number}.;1",
            rr_name=name,
            joliet_path=f"/{name}",
        )
    image.write(str(path))
    image.close()
