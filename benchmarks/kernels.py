"""Registers, stack, shared memory and instructions of every kernel in libfgvc_ext_cuda.so, read from its machine code.

    python benchmarks/kernels.py [LIBRARY]

No GPU is needed, only `cuobjdump` and the `nvdisasm` that it calls: of a CUDA toolkit on PATH, of
`pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm`, or of the triton that comes with torch. For the kernels on
maps of 14×14 a second table multiplies the instructions of each loop by its trips: what a warp issues per map, by
counting and not by measuring. The budget: at [256,2048,14,14] about 200 leave time to move the bytes at 85 % of copy
bandwidth.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

LIBRARY = Path(__file__).parents[1] / "fgvc_ext" / "lib" / "libfgvc_ext_cuda.so"
BUDGET = 200


@dataclass(frozen=True)
class Path14:
    """How a kernel runs on maps of 14×14: the trips of its loops, in the order of their first instruction.

    A loop of 0 trips stands in code that a usual map does not reach: with it goes the most that one branch skips
    without skipping a loop that runs. Of a loop of ALONE trips nothing but the loop is left out. All other branches
    count as not taken, so that the result is an upper bound.
    """

    what: str
    kernel: str  # a part of the mangled name
    maps_per_warp: float
    trips: tuple[float, ...]


ALONE = 1e-9

# k = 4. A block has 8 warps: it takes 8 maps, one per warp, or 32 channels, 4 per warp.
POOL = (1, 3, 0, 0, 2)  # tiles; lane maxima after the first; twice the way out of many ties; fours of candidates
POOL_WORDS = (1, 4)  # tiles; ranks
POOL_CHANNELS = (
    6,
    0.5,
    3 / 8,
    4,
    0.5,
    0.5,
    0,
    0,
)  # fours of positions; the rest; merges, and their ranks; ranks written
SCATTER = (1, 0, 2, 4, 0, 0, 0, 0)  # parts; unused with k > 32; chunks, and their ranks
SCATTER_CHANNELS = (0.5, 0, 1, 6.5)  # indices of int16, of int32; parts; positions
SUPPRESS = (7 / 8, 2 / 8, 1, 1, 0, 1)  # table; draws; maximum; sum; sum of larger maps; mask
SUPPRESS_CHANNELS = (7 / 8, 7 / 8, 6, 0.5, 3, 25 / 8)  # table; draws; maximum, and its rest; bytes; mask
# A block of the attention map has 256 channels, 32 per warp.
WEIGH = (16, 0)  # pairs of maps; fours of a thread's positions
# Fours of zeros; 32 channels: fours of positions to add up, or with gaps between rows; to weigh, or likewise; written.
WEIGH_CHANNELS = (1 / 4, 8, 6, 0, 24.5, 0, 1 / 4)
GRADIENT = (ALONE, 2)  # fours of a lane's chunks; chunks
GRADIENT_CHANNELS = (6, 0, 24.5, 0)  # fours of positions to add up, or with gaps between rows; to write, or likewise
PATHS = [
    Path14("k-max pooling, float32", "pool_mapsIfLi4ELi1Ej", 1, POOL),
    Path14("k-max pooling, bfloat16", "pool_mapsI13__nv_bfloat16Li4ELi1Ej", 1, POOL_WORDS),
    Path14("k-max pooling, channels_last, float32", "pool_channelsIfLi4Ej", 4, POOL_CHANNELS),
    Path14("k-max pooling, channels_last, bfloat16", "pool_channelsI13__nv_bfloat16Li4Ej", 4, POOL_CHANNELS),
    Path14("its backward, float32", "scatter_mapsIfLi4Ej", 1, SCATTER),
    Path14("its backward, channels_last, float32", "scatter_channelsIfLi4Ej", 4, SCATTER_CHANNELS),
    Path14("diversify, float32", "suppress_and_poolIfLi4Ej", 1, SUPPRESS),
    Path14("diversify, channels_last, float32", "suppress_channelsIfj", 4, SUPPRESS_CHANNELS),
    Path14("its backward, float32", "spread_mapsIfNS_14SpreadGradientELi4Ej", 32 * 4 / 196, ()),
    Path14("its backward, channels_last, float32", "spread_channelsIfNS_14SpreadGradientEj", 4, (25 / 8, 3)),
    Path14("attention map, float32", "weigh_mapsIfLi8ELi4Ej", 32, WEIGH),
    Path14("attention map, bfloat16", "weigh_mapsI13__nv_bfloat16Li8ELi4Ej", 32, WEIGH),
    Path14("attention map, channels_last, float32", "weigh_channelsIfj", 32, WEIGH_CHANNELS),
    Path14("attention map, channels_last, bfloat16", "weigh_channelsI13__nv_bfloat16j", 32, WEIGH_CHANNELS),
    Path14("its backward, float32", "16gradient_of_mapsIfLi4Ej", 1, GRADIENT),
    Path14("its backward, bfloat16", "16gradient_of_mapsI13__nv_bfloat16Li4Ej", 1, GRADIENT),
    Path14("its backward, channels_last, float32", "20gradient_of_channelsIfj", 4, GRADIENT_CHANNELS),
    Path14("its backward, channels_last, bfloat16", "20gradient_of_channelsI13__nv_bfloat16j", 4, GRADIENT_CHANNELS),
]


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int
    stack: int
    shared: int
    code: tuple[tuple[int, str], ...]  # address and text of each instruction

    def body(self) -> list[tuple[int, str]]:
        """What is executed: behind the last exit stands code for lanes that have diverged and for rare divisions."""
        exits = [number for number, (_, text) in enumerate(self.code) if text.startswith("EXIT")]
        return list(self.code[: exits[-1] + 1])

    def branches(self) -> list[tuple[int, int]]:
        found = [(address, re.search(r"\bBRA (?:\S+, )?0x([0-9a-f]+)", text)) for address, text in self.body()]
        return [(address, int(match[1], 16)) for address, match in found if match]

    def loops(self) -> list[tuple[int, int]]:
        """First and last address."""
        ends: dict[int, int] = {}
        for address, target in self.branches():
            if target < address:
                ends[target] = max(ends.get(target, 0), address)
        return sorted(ends.items(), key=lambda loop: (loop[0], -loop[1]))


def find_tools() -> str | None:
    """The PATH on which `cuobjdump` is found, and the `nvdisasm` that it calls; None without one of them."""
    libraries = Path(sysconfig.get_path("purelib"))
    packages = [*libraries.glob("nvidia/*/bin"), libraries / "triton" / "backends" / "nvidia" / "bin"]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, packages)])
    return path if all(shutil.which(tool, path=path) for tool in ("cuobjdump", "nvdisasm")) else None


def read_kernels(library: Path, path: str) -> list[Kernel]:
    cuobjdump, environment = shutil.which("cuobjdump", path=path), {**os.environ, "PATH": path}

    def dump(option: str) -> str:
        command = [cuobjdump, option, str(library)]
        return subprocess.run(command, check=True, text=True, capture_output=True, env=environment).stdout

    usage = re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", dump("-res-usage"))
    code: dict[str, list[tuple[int, str]]] = {}
    name = ""
    for line in dump("-sass").splitlines():
        if "Function :" in line:
            name = line.split()[-1]
            code[name] = []
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            code[name].append((int(match[1], 16), match[2].strip()))
    return [
        Kernel(name, *map(int, numbers), tuple(line for line in code[name] if not line[1].startswith("NOP")))
        for name, *numbers in sorted(usage)
    ]


def instructions(kernel: Kernel, trips: tuple[float, ...]) -> float | None:
    """What one warp issues, or None where the kernel has other loops than its table entry."""
    loops, weight = kernel.loops(), dict.fromkeys((address for address, _ in kernel.body()), 1.0)
    if len(loops) != len(trips):
        return None
    for (first, last), count in zip(loops, trips, strict=True):
        if count == 0:
            running = [loop for loop, times in zip(loops, trips, strict=True) if times]
            skips = [
                (at, to)
                for at, to in kernel.branches()
                if at < first and last < to and not any(at < begin and end < to for begin, end in running)
            ]
            first, last = max(skips, key=lambda skip: skip[1] - skip[0], default=(first, last + 1))
            first, last = first + 1, last - 1
        for address in weight:
            if first <= address <= last:
                weight[address] *= count
    return sum(weight.values())


def short(name: str) -> str:
    match = re.search(r"cuda\d+(\w+?)I(.*?)EEv", name)
    return f"{match[1]}<{match[2]}>" if match else name


def table(head: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def per_map(path: Path14, kernels: list[Kernel]) -> tuple[Kernel, int]:
    """The path's kernel, and what a warp issues per map. Raises where the library has none, several or another one."""
    found = [kernel for kernel in kernels if path.kernel in kernel.name]
    if len(found) != 1:
        raise ValueError(f"{path.what}: {len(found)} kernels are called {path.kernel}")
    issued = instructions(found[0], path.trips)
    if issued is None:
        raise ValueError(f"{path.what}: {len(found[0].loops())} loops, but trips for {len(path.trips)}")
    return found[0], round(issued / path.maps_per_warp)


def main(library: Path) -> None:
    path = find_tools()
    if not path or not library.exists():
        sys.exit(f"needs {library}, cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    kernels = read_kernels(library, path)
    print(f"{len(kernels)} kernels; stack of more than 8 bytes: {sum(k.stack > 8 for k in kernels)}\n")
    rows = [(short(k.name), k.registers, k.stack, k.shared, len(k.code)) for k in kernels]
    print(table(("kernel", "registers", "stack", "shared memory", "instructions"), sorted(rows)))
    print("\nInstructions per map of 14×14, static count × trips, not measured:\n")
    paths = []
    for one in PATHS:
        kernel, count = per_map(one, kernels)
        paths.append((one.what, kernel.registers, kernel.stack, len(kernel.code), count, BUDGET))
    print(table(("", "registers", "stack", "static", "per map", "budget"), paths))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else LIBRARY)
