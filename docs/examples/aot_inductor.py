"""Compiles a small model with operators of fgvc_ext into a package that runs without Python: see README.md beside it.

python docs/examples/aot_inductor.py FOLDER     # writes FOLDER/model.pt2 and FOLDER/inputs.pt
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import fgvc_ext.nn
from fgvc_ext import ops

CHANNELS, SIDE = 64, 14  # of the features; the images behind them have IMAGE x IMAGE pixels
IMAGE = 448


class Head(nn.Module):
    """What stands on a backbone: an embedding, class scores, and a box around what the network looked at."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.pool = fgvc_ext.nn.GlobalKMaxPool2d(k=4, weighted=True)
        self.class_maps = nn.Conv2d(CHANNELS, classes, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.class_maps(features).mean(dim=(2, 3))  # as Diversification2d in evaluation
        attention = ops.spatial_attention_map(features)
        boxes = ops.heatmap_to_boxes(attention, threshold=0.3, image_size=IMAGE)
        return self.pool(features), scores, boxes


def make_model() -> nn.Module:
    """Stands for a trained model; here the seed alone makes the weights."""
    torch.manual_seed(0)
    return Head().eval()


def operators_in(program: torch.export.ExportedProgram) -> list[str]:
    """Our operators in the graph, each a single node there."""
    return [str(node.target) for node in program.graph.nodes if str(node.target).startswith("fgvc_ext.")]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    inputs = (torch.randn(3, CHANNELS, SIDE, SIDE),)
    program = torch.export.export(make_model(), inputs, dynamic_shapes=({0: torch.export.Dim("batch")},))
    operators = operators_in(program)
    if not operators:
        sys.exit("The program holds no operator of fgvc_ext, only their PyTorch reference: see `fgvc-ext info`")
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    torch.save(inputs, folder / "inputs.pt")
    print(f"{package} calls {', '.join(operators)}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
