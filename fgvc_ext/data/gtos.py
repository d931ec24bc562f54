"""GTOS-mobile, images of ground terrain (Xue et al., Deep Texture Manifold for Ground Terrain Recognition, 2018)."""

from __future__ import annotations

import os
from pathlib import Path

from .folder import ImageFolder
from .official import Official

OFFICIAL = Official("GTOS-mobile", 31, {"train": 31315, "test": 6066})


class GTOSMobile(ImageFolder):
    """GTOS-mobile: `root` is the folder `gtos-mobile` (`train/<class>/*.jpg`, `test/<class>/*.jpg`) or the one above.

    An `ImageFolder` whose numbers of classes and images are known: other ones give a warning with both.
    """

    def __init__(self, root: str | os.PathLike[str], split: str) -> None:
        OFFICIAL.check_split(split)
        inner = Path(root) / "gtos-mobile"
        super().__init__(inner if inner.is_dir() else root, split)
        self.name = "gtos"
        self.counts = OFFICIAL.compare(self.root, split, self.classes, self.labels)
