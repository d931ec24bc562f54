"""Which file of weights a training starts from: one of the user's, or a library's, which is downloaded once."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from fgvc_ext.atomic_files import file_sha256
from fgvc_ext.models.timm_library import timm_weights
from fgvc_ext.models.torchvision_backbone import torchvision_names, torchvision_weights

EXPECTED = "expected imagenet, birds, none or a file (safetensors or .pth)"
BIRDS = "resnet10_narrow"
"""The backbone of the weights that lie in the package, pretrained on synthetic birds (scripts/birds_backbone.py)."""
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.pth$")  # the custom of torch.hub, which both libraries keep


@dataclass(frozen=True)
class StartingWeights:
    """A file of weights.

    Attributes:
        name: for people and for run.json.
        file: where it lies; a library's may not be there yet.
        url: where it comes from, if it is a library's.
        hash_prefix: how its sha256 begins, where the library says so.
    """

    name: str
    file: Path
    url: str | None = None
    hash_prefix: str = ""

    def fetch(self) -> Path:
        """The file, after it was downloaded where that is needed, which is said first.

        Raises:
            FileNotFoundError: the user's file is not there. OSError: a library's cannot be downloaded.
        """
        if self.file.is_file():
            return self.file
        if self.url is None:
            raise FileNotFoundError(f"weights {self.file}: {EXPECTED}, and there is no such file")
        print(f"downloading {self.name}: {self.url} to {self.file}", flush=True)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            # It writes to a temporary file, and compares the hash before it gives it its name.
            torch.hub.download_url_to_file(
                self.url, str(self.file), self.hash_prefix or None, progress=sys.stderr.isatty()
            )
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"cannot download {self.name} ({error}): fetch {self.url} on another machine and give it as "
                "--model.weights FILE, or start from random weights with --model.weights none"
            ) from error
        return self.file

    def sha256(self) -> str:
        """The hash of the file that is there. ValueError where the library says that it has another one."""
        status = self.file.stat()
        found = _sha256(self.file, status.st_size, status.st_mtime_ns)
        if not found.startswith(self.hash_prefix):
            raise ValueError(
                f"weights {self.file}: damaged (its sha256 should begin with {self.hash_prefix}): remove it"
            )
        return found


@lru_cache(maxsize=8)
def _sha256(file: Path, size: int, changed: int) -> str:
    """Asked for several times in a run; size and time of change tell another file under the same name."""
    return file_sha256(file)


def starting_weights(weights: str | Path, backbone: str) -> StartingWeights | None:
    """What `--model.weights` names for this backbone; None for "none". Looks at no file and downloads nothing.

    Raises:
        ValueError: "imagenet" or "birds" for a backbone without such weights.
    """
    if weights == "none":
        return None
    if weights == "birds":
        if backbone != BIRDS:
            raise ValueError(f"weights: birds are those of {BIRDS}, got {backbone}: give imagenet, none or a file")
        return StartingWeights("birds", birds_file())
    if weights != "imagenet":
        return StartingWeights(str(weights), Path(weights))
    found = _library_weights(backbone)
    if found is None:
        raise ValueError(f"weights: {backbone} has no ImageNet weights: give none or a file")
    name, url = found
    prefix = _HASH_IN_NAME.search(name)
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    return StartingWeights(f"ImageNet weights {name}", file, url, prefix[1] if prefix else "")


def birds_file() -> Path:
    """The file in the package that `--model.weights birds` names."""
    return Path(__file__).with_name("birds.safetensors")


def _library_weights(backbone: str) -> tuple[str, str] | None:
    """Name and address of a library's file; None for a backbone without one."""
    if backbone.startswith("timm/"):
        return timm_weights(backbone.removeprefix("timm/"))
    return torchvision_weights(backbone) if backbone in torchvision_names() else None
