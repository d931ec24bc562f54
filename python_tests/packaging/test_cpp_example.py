"""The C++ example: packages of AOTInductor that hold our operators, run by docs/examples/run_package.cpp.

The program is compiled by the project's CMake and loads the CPU library that this package has.
"""

import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from fgvc_ext import _library, ops

from .conftest import PACKAGE, PROGRAMS, compiled

ROOT = PACKAGE.parent
EXAMPLES = ROOT / "docs" / "examples"
LIBRARY = _library.FOLDER / "libfgvc_ext_cpu.so"
CMAKE, NINJA = shutil.which("cmake", path=PROGRAMS), shutil.which("ninja", path=PROGRAMS)

pytestmark = [
    compiled,
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the sources are not here"),
    pytest.mark.skipif(shutil.which("g++") is None or CMAKE is None, reason="needs g++ and cmake"),
    # One worker builds and exports once.
    pytest.mark.xdist_group("cpp_example"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build = tmp_path_factory.mktemp("build")
    assert CMAKE is not None
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={NINJA}"] if NINJA else []
    options = [f"-DPython_EXECUTABLE={sys.executable}", "-DFGVC_EXT_EXAMPLES=ON"]
    for command in (
        ["-S", str(ROOT), "-B", str(build), *generator, *options],
        ["--build", str(build), "--target", "run_package"],
    ):
        built = subprocess.run([CMAKE, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert built.returncode == 0, built.stdout
    abi = f"_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    compilations = json.loads((build / "compile_commands.json").read_text())
    assert [abi in each["command"] for each in compilations if each["file"].endswith("run_package.cpp")] == [True]
    return build / "docs" / "examples" / "run_package"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """docs/examples/aot_inductor.py; imported, it exports nothing."""
    specification = importlib.util.spec_from_file_location("aot_inductor", EXAMPLES / "aot_inductor.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the script has written."""
    folder = tmp_path_factory.mktemp("example")
    script.main(folder)
    return folder


def run(
    program: Path, folder: Path, package: Path, inputs: Path, *libraries: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Without any variable of this process: nothing may tell the program where Python or torch are."""
    command = [str(program), str(package), str(inputs), str(folder / "outputs.pt"), *map(str, libraries)]
    environment = {"TMPDIR": str(folder), **environment}  # where the package is unpacked
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def outputs(program: Path, folder: Path, package: Path, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    torch.save(inputs, folder / "inputs.pt")
    result = run(program, folder, package, folder / "inputs.pt", LIBRARY)
    assert result.returncode == 0, result.stderr
    return torch.load(folder / "outputs.pt", weights_only=True)


def called_by(package: Path) -> list[str]:
    """The operators that the package has torch's dispatcher call."""
    with zipfile.ZipFile(package) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".wrapper.json")]
        return [node["node"]["target"] for node in json.loads(archive.read(name))["nodes"]]


@pytest.mark.parametrize("batch", [1, 5])
def test_the_program_gives_what_eager_gives(
    program: Path, script: ModuleType, example: Path, tmp_path: Path, batch: int
) -> None:
    features = torch.randn(batch, script.CHANNELS, script.SIDE, script.SIDE)
    embedding, scores, boxes = outputs(program, tmp_path, example / "model.pt2", (features,))
    with torch.no_grad():
        eager_embedding, eager_scores, eager_boxes = script.make_model()(features)
    assert torch.equal(embedding, eager_embedding)
    assert torch.equal(boxes, eager_boxes)
    torch.testing.assert_close(scores, eager_scores)  # convolution and mean are Inductor's


def test_there_is_no_python_in_the_process(program: Path, example: Path, tmp_path: Path) -> None:
    result = run(program, tmp_path, example / "model.pt2", example / "inputs.pt", LIBRARY, LD_DEBUG="files")
    assert result.returncode == 0, result.stderr
    loaded = {Path(file).name for file in re.findall(r"file=(\S+) \[", result.stderr)}
    assert {"libtorch_cpu.so", LIBRARY.name} <= loaded  # loaded at the start, and by the program
    assert not [name for name in loaded if "python" in name]


def test_without_the_library_the_missing_operator_is_named(program: Path, example: Path, tmp_path: Path) -> None:
    result = run(program, tmp_path, example / "model.pt2", example / "inputs.pt")
    assert result.returncode == 1
    assert re.search(r"Could not find schema for fgvc_ext::(global_k_max_pool|spatial_attention_map)", result.stderr)


def test_what_cannot_be_read_is_named(program: Path, example: Path, tmp_path: Path) -> None:
    result = run(program, tmp_path, example / "model.pt2", tmp_path / "no.pt", LIBRARY)
    assert (result.returncode, result.stderr) == (1, f"run_package: cannot read {tmp_path / 'no.pt'}\n")
    result = run(program, tmp_path, example / "model.pt2", example / "inputs.pt", tmp_path / "no.so")
    assert result.returncode == 1
    assert str(tmp_path / "no.so") in result.stderr


class EveryOperator(nn.Module):
    """Each takes inputs of the model, so that only its own kernel decides about the bits."""

    def forward(
        self,
        features: Tensor,
        weight: Tensor,
        maps: Tensor,
        seeds: Tensor,
        embeddings: Tensor,
        labels: Tensor,
        class_means: Tensor,
        student_map: Tensor,
        teacher_maps: Tensor,
    ) -> tuple[Tensor, ...]:
        height, width = student_map.shape[1:]
        scores = ops.diversify(maps, seed=seeds)
        boxes, candidates = embeddings.unflatten(1, (4, 4)), maps[:, :4, 0, 0] > 0
        return (
            ops.global_k_max_pool(features, 4, weight),
            ops.global_k_max_pool(features, 3),  # without the optional tensor
            scores,
            ops.diversify(maps, seed=7, alpha=0),
            ops.suppression_mask(maps, seed=seeds),
            ops.gradient_boosting_cross_entropy(scores, labels, k=3),
            ops.gradient_boosting_cross_entropy(scores, labels, k=3, reduction="none"),
            *ops.class_mean_loss(embeddings, labels, class_means, margin=1),  # an int where the schema has a float
            ops.spatial_attention_map(features),
            ops.orthogonal_loss(student_map, teacher_maps),
            ops.heatmap_to_boxes(student_map, threshold=0.3, image_size=224, min_size=10),
            ops.heatmap_to_boxes(student_map, threshold=0, image_size=(32 * height, 16 * width)),  # symbolic sizes
            ops.location_heatmap([features, maps], (32 * height, 16 * width)),  # a list
            ops.compose_parts(features[:, :3], boxes, blur_sigma=6, seed=seeds),
            *ops.select_boxes(embeddings[:, :4], boxes, candidates, top=2),
            *ops.part_box_losses(boxes, candidates, embeddings[:, 0].abs(), min_area=1),
            ops.semantic_grouping_loss(features, 4),
            ops.group_bilinear(features, 4, position=class_means[0], out_channels=10),
            ops.group_bilinear(features, 2),  # without the optional tensor
        )


def inputs_of_every_operator(batch: int, height: int, width: int) -> tuple[Tensor, ...]:
    classes, channels = 10, 16
    return (
        torch.randn(batch, channels, height, width),
        torch.randn(4),
        torch.randn(batch, classes, height, width),
        torch.arange(batch) * 7,
        torch.randn(batch, channels),
        torch.arange(batch) % classes,
        torch.randn(classes, channels),
        torch.randn(batch, height, width),
        torch.randn(2, batch, height, width),
    )


@pytest.fixture(scope="module")
def every_operator(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    dynamic = torch.export.Dim.DYNAMIC
    batch, maps = {0: dynamic}, {0: dynamic, 2: dynamic, 3: dynamic}
    student, teachers = dict.fromkeys((0, 1, 2), dynamic), dict.fromkeys((1, 2, 3), dynamic)
    exported = torch.export.export(
        EveryOperator(),
        inputs_of_every_operator(4, 7, 6),
        dynamic_shapes=(maps, None, maps, batch, batch, batch, None, student, teachers),
    )
    calls = {name: script.operators_in(exported).count(f"fgvc_ext.{name}.default") for name in public_operators()}
    twice = (
        *("global_k_max_pool", "diversify", "gradient_boosting_cross_entropy", "heatmap_to_boxes"),
        "group_bilinear",
    )
    assert calls == {name: 2 if name in twice else 1 for name in public_operators()}
    assert sorted(script.operators_in(exported.run_decompositions())) == sorted(script.operators_in(exported))
    path = tmp_path_factory.mktemp("every_operator") / "model.pt2"
    torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
    return path


def public_operators() -> list[str]:
    return [name for name, value in vars(ops).items() if inspect.isfunction(value) and not name.startswith("_")]


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 7, 6), (9, 5, 8)])
def test_every_public_operator_gives_the_bits_of_eager(
    program: Path, every_operator: Path, tmp_path: Path, batch: int, height: int, width: int
) -> None:
    inputs = inputs_of_every_operator(batch, height, width)
    expected = EveryOperator()(*inputs)
    results = outputs(program, tmp_path, every_operator, inputs)
    assert len(results) == len(expected)
    for number, (result, eager) in enumerate(zip(results, expected, strict=True)):
        assert result.dtype == eager.dtype, number
        assert torch.equal(result, eager), number


def test_packages_call_our_operators_as_they_are(example: Path, every_operator: Path) -> None:
    """Not decomposed, and no kernel of Inductor's in their place."""
    assert sorted(called_by(example / "model.pt2")) == [
        "fgvc_ext::global_k_max_pool",
        "fgvc_ext::heatmap_to_boxes",
        "fgvc_ext::spatial_attention_map",
    ]
    assert set(called_by(every_operator)) == {f"fgvc_ext::{name}" for name in public_operators()}
    assert len(called_by(every_operator)) == 19
