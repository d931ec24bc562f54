"""Make `fgvc_ext/models/birds.safetensors` again: the small backbone that `--model.weights birds` starts from.

resnet10_narrow as the plain network, trained from nothing on synthetic species that no preset shows. About five minutes
on two cores; on the same machine with the same torch, the same bytes.

python scripts/birds_backbone.py [FOLDER OF THE RUN]
"""

from __future__ import annotations

import sys
from pathlib import Path

import safetensors.torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fgvc_ext.cli.train import load_driver  # noqa: E402
from fgvc_ext.data.birds.species import make_species  # noqa: E402
from fgvc_ext.models.starting_weights import birds_file  # noqa: E402
from fgvc_ext.models.weights_file import load_weights_file  # noqa: E402

CLASSES, SPECIES = 100, 1000
SHOWN = range(10)  # seeds of species that presets and tables use
# All that decides the bytes is said here: the preset that it begins with may change.
ARGUMENTS = f"""
demo --data.classes {CLASSES} --data.species {SPECIES} --data.train-per-class 30 --data.test-per-class 10
--data.image-size 128 --data.resize 128 --data.crop 112 --data.flip 0.5 --data.jitter 0
--model.backbone resnet10_narrow --model.weights none
--method.diversification False --method.gce False --method.compare-plain False
--optim.epochs 30 --optim.batch-size 30 --optim.lr 0.05 --optim.new-layers-lr 0.05 --optim.weight-decay 5e-4
--optim.schedule cosine --optim.warmup-epochs 1
--engine.precision fp32 --engine.channels-last True --engine.eval-every 10 --report False --five-crop False --seed 0
""".split()


def check_species() -> None:
    """ValueError where a preset's species is among those of the backbone."""
    own = make_species(CLASSES, SPECIES)[1]
    for seed in SHOWN:
        if any(looks in own for looks in make_species(CLASSES, seed)[1]):
            raise ValueError(f"species {SPECIES}: one of them is also drawn from seed {seed}: take another seed")


def keep_backbone(trained: Path, file: Path) -> None:
    """The layers of the backbone in float16, under the names of `resnet10_narrow`."""
    state = load_weights_file(trained)[0]
    kept = {name: value for name, value in state.items() if name.startswith("backbone.")}
    half = {
        name.removeprefix("backbone."): value.half() if value.is_floating_point() else value
        for name, value in kept.items()
        if not name.endswith("num_batches_tracked")
    }
    file.write_bytes(safetensors.torch.save({name: half[name].contiguous() for name in sorted(half)}))
    print(f"{file}: {sum(value.numel() for value in half.values()):,} numbers, {file.stat().st_size:,} bytes")


def main(arguments: list[str]) -> int:
    check_species()
    out = Path(arguments[0]) if arguments else ROOT / "runs" / "birds_backbone"
    driver = load_driver(ROOT / "train" / "subtle_differences.py").DRIVER
    status: int = driver.main([*ARGUMENTS, "--out", str(out)], [sys.executable, __file__])
    if status == 0:
        keep_backbone(out / "weights" / "last.safetensors", birds_file())
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
