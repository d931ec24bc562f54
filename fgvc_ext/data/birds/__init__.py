"""The embedded data set `synthetic`: birds that are drawn, in twin species that differ in one small part."""

from .dataset import SyntheticBirds, default_cache_dir, drawing_key
from .species import PARTS

__all__ = ["PARTS", "SyntheticBirds", "default_cache_dir", "drawing_key"]
