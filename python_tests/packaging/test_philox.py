"""Philox 4x32-10 against the known-answer vectors that its authors publish with Random123 (kat_vectors)."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fgvc_ext import _library
from fgvc_ext.reference.philox import draws, philox

from .conftest import compiled

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_reference(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    answer = philox(tuple(torch.tensor(word) for word in counter), tuple(torch.tensor(word) for word in key))
    assert tuple(word.item() for word in answer) == words


@compiled
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [known for known in KNOWN_ANSWERS if known[0][0] == 0],  # its calls count from 0
)
def test_the_compiled_stream(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert _library._module is not None
    _, channel, sample, stream = counter
    answer = _library._module.philox_words(key[0] | key[1] << 32, channel, sample, stream, 1)
    assert answer.dtype == np.uint32
    assert tuple(answer[0]) == words


def test_a_seed_of_its_own_makes_every_sample_the_first() -> None:
    seeds = torch.tensor([5, -7, 5])
    words = draws(seeds, 3, 4, 6, 1)
    alone = torch.cat([draws(seed, 1, 4, 6, 1) for seed in seeds])
    assert torch.equal(words, alone)
    numbered = draws(seeds[0], 3, 4, 6, 1)
    assert torch.equal(numbered[0], words[0])
    assert not torch.equal(numbered[2], words[2])


def test_the_operators_word_makes_other_draws() -> None:
    assert not torch.equal(*(draws(torch.tensor(5), 1, 1, 8, operator) for operator in (1, 2)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_header(tmp_path: Path) -> None:
    header = Path(__file__).parents[2] / "csrc" / "common" / "philox.h"
    calls = "".join(
        f"show(fgvc_ext::philox<>({{{{{', '.join(f'{word}u' for word in counter)}}}}}, {key[0] | key[1] << 32}ull));"
        for counter, key, _ in KNOWN_ANSWERS
    )
    source = f"""
    #include <cstdio>
    #include "{header}"
    void show(const fgvc_ext::PhiloxWords<fgvc_ext::OneLane>& words) {{
      for (uint32_t word : words.word) std::printf("%u ", word);
    }}
    int main() {{ {calls} }}"""
    command = ["g++", "-std=c++20", "-xc++", "-", "-o", str(tmp_path / "philox")]
    subprocess.run(command, input=source, text=True, check=True)
    output = subprocess.run([str(tmp_path / "philox")], capture_output=True, text=True, check=True).stdout
    assert [int(word) for word in output.split()] == [word for _, _, words in KNOWN_ANSWERS for word in words]


@compiled
@pytest.mark.parametrize("seed", [0, 1, -1, 0x299F31D0A4093822, -(2**63), 2**63 - 1])
def test_reference_and_compiled_draw_the_same(seed: int) -> None:
    """Also with the carries, high words and large counters that the published vectors for the first call leave out."""
    assert _library._module is not None
    samples, channels, count, operator = 3, 5, 22, 1
    words = draws(torch.tensor(seed), samples, channels, count, operator)
    for sample in range(samples):
        for channel in range(channels):
            stream = _library._module.philox_words(seed % 2**64, channel, sample, operator, (count + 3) // 4)
            assert words[sample, channel].tolist() == stream.flatten()[:count].tolist()
    counter = (7, ONES, 0x13198A2E, 0x03707344)
    (answer,) = _library._module.philox_words(seed % 2**64, *counter[1:], 8)[7:]
    key = (torch.tensor(seed & ONES), torch.tensor(seed >> 32 & ONES))
    assert answer.tolist() == [word.item() for word in philox(tuple(torch.tensor(word) for word in counter), key)]
