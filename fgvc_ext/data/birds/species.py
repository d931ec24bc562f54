"""The species of the synthetic birds: which part looks how, in pairs that differ in one part only."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

PARTS = ("body", "beak", "crown", "eye", "breast", "wing", "tail")
"""The parts that carry class information, in the order of `SyntheticBirds.parts`; "body" is the plumage's colour."""

LOOKS: dict[str, dict[str, str]] = {
    "body": {
        "russet": "Russet",
        "slate": "Slaty",
        "olive": "Olive",
        "umber": "Umber",
        "azure": "Azure",
        "fawn": "Fawn",
        "moss": "Mossy",
        "plum": "Plum",
    },
    "beak": {
        "cone-horn": "Thick-billed",
        "cone-red": "Red-billed",
        "dagger-black": "Dagger-billed",
        "dagger-yellow": "Yellow-billed",
        "hook-black": "Hook-billed",
        "curved-orange": "Sickle-billed",
    },
    "crown": {
        "plain": "Plain-crowned",
        "black-cap": "Black-capped",
        "red-cap": "Red-capped",
        "white-brow": "White-browed",
        "gold-stripe": "Gold-striped",
        "crest": "Crested",
    },
    "eye": {
        "plain": "Plain-eyed",
        "white-ring": "White-eyed",
        "gold-ring": "Gold-eyed",
        "red-patch": "Red-eyed",
        "black-mask": "Masked",
    },
    "breast": {
        "plain": "Plain-breasted",
        "spots": "Spotted",
        "streaks": "Streaked",
        "black-band": "Ring-breasted",
        "red-bib": "Red-breasted",
        "gold-bib": "Gold-breasted",
    },
    "wing": {
        "plain": "Plain-winged",
        "white-bar": "White-barred",
        "two-bars": "Two-barred",
        "gold-patch": "Gold-winged",
        "blue-patch": "Blue-winged",
    },
    "tail": {
        "plain": "Plain-tailed",
        "long": "Long-tailed",
        "forked": "Fork-tailed",
        "white-tip": "White-tailed",
        "banded": "Band-tailed",
    },
}
"""Every look of every part, with the word that a species is named by when this look sets it apart from its twin."""

_PAIR_PARTS = PARTS[1:]  # twins share their plumage: only a small part tells them apart
_PLACES = ("Hill", "River", "Forest", "Island", "Meadow", "Marsh", "Canyon", "Coast", "Orchard", "Heath")
_BIRDS = ("Finch", "Warbler", "Thrush", "Bunting", "Chat", "Lark", "Tit", "Wren", "Starling", "Pipit", "Robin", "Vireo")

MAX_CLASSES = 2 * len(_PLACES) * len(_BIRDS)

Looks = dict[str, str]
Item = TypeVar("Item")


def pick(options: Sequence[Item], random: Random) -> Item:
    """One of `options`. Built on `random()` alone, the only method whose stream Python promises to keep."""
    return options[int(random.random() * len(options))]


def make_species(count: int, seed: int) -> tuple[list[str], list[Looks]]:
    """`count` species: (names, looks of each part).

    Species 2i and 2i + 1 are twins and differ in exactly one part, never the plumage; any other two differ in at least
    two parts. With an odd count the last species has no twin. Raises ValueError outside 2..`MAX_CLASSES`.
    """
    if not 2 <= count <= MAX_CLASSES:
        raise ValueError(f"classes: expected 2..{MAX_CLASSES}, got {count}")
    random = Random(f"species/{seed}")
    titles = [f"{place} {bird}" for bird in _BIRDS for place in _PLACES]
    names: list[str] = []
    species: list[Looks] = []
    deal = {part: _Deck(list(looks), random) for part, looks in LOOKS.items()}
    deck = _Deck(list(_PAIR_PARTS), random)
    while len(species) < count:
        part = deck.draw()
        first = {name: deal[name].draw() for name in PARTS}
        others = [look for look in LOOKS[part] if look != first[part]]
        twins = [first, {**first, part: pick(others, random)}]
        while any(_too_close(old, new) for old in species for new in twins):
            changed = pick([name for name in PARTS if name != part], random)
            for looks in twins:
                looks[changed] = deal[changed].draw() if looks is first else first[changed]
        title = titles.pop(int(random.random() * len(titles)))
        species += twins
        names += [f"{LOOKS[part][looks[part]]} {title}" for looks in twins]
    return names[:count], species[:count]


def differing_parts(first: Looks, second: Looks) -> list[str]:
    """The parts in which two species differ, in the order of `PARTS`."""
    return [part for part in PARTS if first[part] != second[part]]


def _too_close(first: Looks, second: Looks) -> bool:
    return len(differing_parts(first, second)) < 2


class _Deck:
    """Deals every item once in random order before any comes again, so that no look is rare by chance."""

    def __init__(self, items: list[str], random: Random) -> None:
        self.items, self.random = items, random
        self.left: list[str] = []

    def draw(self) -> str:
        self.left = self.left or list(self.items)
        return self.left.pop(int(self.random.random() * len(self.left)))
