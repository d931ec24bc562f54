"""Measures how many images a second a core prepares for training: ``python benchmarks/data.py --help``.

Synthetic birds are written as JPEGs, then read, resized and cropped by the package and by the plain pipeline that one
would write with Pillow and torchvision, in turns within one process. One thread, in processor time: other processes
take the clock, not the ratio.
"""

import argparse
import csv
import datetime
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import PIL
import torch
import torchvision
from PIL import Image
from results import machine, table
from timing import keep_freed_memory
from torchvision import transforms

from fgvc_ext.data import ImageFolder, SyntheticBirds
from fgvc_ext.data.loading import Samples, collate, to_device
from fgvc_ext.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

OURS, NORMALISED, EVALUATED, PLAIN = (
    "fgvc_ext",
    "fgvc_ext, normalised on the CPU",
    "fgvc_ext, evaluation",
    "Pillow and torchvision",
)
WANTED = 2.0
"""Images a second of ours over those of the plain pipeline, at least."""

Contender = Callable[[list[int]], torch.Tensor]


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times the way from JPEG files to batches, per core.")
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--resize", type=int, default=600)
    parser.add_argument("--crop", type=int, default=448)
    parser.add_argument("--images", type=int, default=16, help="JPEGs, which make one batch")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="CSV file (default: benchmarks/results/data-<date>.csv)")
    return parser.parse_args(words)


def write_jpegs(folder: Path, count: int, width: int, height: int) -> ImageFolder:
    birds = SyntheticBirds(
        "train", classes=2, train_per_class=-(-count // 2), image_size=max(width, height), cache=False
    )
    place = folder / "train" / "bird"
    place.mkdir(parents=True)
    top, left = ((birds.image_size - length) // 2 for length in (height, width))
    for index in range(count):
        pixels = birds.load(index)[:, top : top + height, left : left + width]
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(place / f"{index:04d}.jpg", quality=90)
    return ImageFolder(folder, "train")


def contenders(dataset: ImageFolder, resize: int, crop: int) -> dict[str, Contender]:
    prepare = Preprocessing(resize, crop)
    train = Samples(dataset, prepare.train_crop(), normalise=prepare.normalise)
    evaluated = Samples(dataset, prepare.eval_crop(), normalise=prepare.normalise)
    plain = transforms.Compose([
        transforms.Resize(resize), transforms.RandomCrop(crop), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])  # fmt: skip

    def load(samples: Samples, rows: list[int]) -> dict[str, torch.Tensor]:
        batch = collate(samples.__getitems__([(row, row) for row in rows]))
        if isinstance(batch, Exception):
            raise batch
        return batch

    def normalised(rows: list[int]) -> torch.Tensor:
        return to_device(load(train, rows), torch.device("cpu"), normalise=train.normalise)["image"]

    def by_hand(rows: list[int]) -> torch.Tensor:
        return torch.stack([plain(Image.open(dataset.paths[row]).convert("RGB")) for row in rows])

    return {
        OURS: lambda rows: load(train, rows)["image"],
        NORMALISED: normalised,
        EVALUATED: lambda rows: load(evaluated, rows)["image"],
        PLAIN: by_hand,
    }


def measure(contenders: dict[str, Contender], images: int, rounds: int) -> dict[str, list[float]]:
    """Images a second of processor time, by contender and round."""
    rows, found = list(range(images)), {name: [] for name in contenders}
    names = list(contenders)
    for number in range(-1, rounds):  # the first round warms up
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.process_time()
            contenders[name](rows)
            seconds = time.process_time() - start
            if number >= 0:
                found[name].append(images / seconds)
    return found


def ratio(rates: dict[str, list[float]], name: str) -> float:
    """Median over the rounds of the images a second of `name` over those of the plain pipeline."""
    return statistics.median(ours / plain for ours, plain in zip(rates[name], rates[PLAIN], strict=True))


def write_csv(path: Path, args: argparse.Namespace, rates: dict[str, list[float]]) -> None:
    what = {"width": args.size[0], "height": args.size[1], "resize": args.resize, "crop": args.crop}
    facts = {**machine("cpu"), "torchvision": torchvision.__version__, "pillow": PIL.__version__}
    columns = ("contender", "images_per_second", "p10", "p90", "ratio_to_plain", "rounds", "images")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, *what, *facts])
        for name, values in rates.items():
            tenths = statistics.quantiles(values, n=10, method="inclusive")
            numbers = [f"{value:.1f}" for value in (statistics.median(values), tenths[0], tenths[-1])]
            row = [name, *numbers, f"{ratio(rates, name):.3f}", len(values), args.images]
            writer.writerow([*row, *what.values(), *facts.values()])


def main(words: Sequence[str] | None = None) -> int:
    args = arguments(words)
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_jpegs(Path(folder), args.images, *args.size)
        torch.manual_seed(0)
        rates = measure(contenders(dataset, args.resize, args.crop), args.images, args.rounds)
    path = args.out or Path(__file__).parent / "results" / f"data-{datetime.date.today()}.csv"
    write_csv(path, args, rates)
    lines = [[name, f"{statistics.median(rates[name]):.0f}", f"{ratio(rates, name):.2f}"] for name in rates]
    print(table([["", "images a second and core", "ratio"], *lines]))
    print(f"wanted: {OURS} / {PLAIN} at least {WANTED}: {'pass' if ratio(rates, OURS) >= WANTED else 'FALL SHORT'}")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
