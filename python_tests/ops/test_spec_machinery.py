"""The machinery of specs on what no operator of the package has yet: lists of tensors, several results, integers.

A throw-away operator stands here, made with torch.library in Python. It and its faulty twins go through the functions
that compare, and through the tests that take a spec.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from . import spec, test_fuzzing, test_gradients, test_graphs, test_saved_memory
from .comparison import assert_follows, in_dtype, leaves, named_tensors, run
from .generators import SeededDraw, arrange, random
from .spec import SPECS, Sample, Saved, Spec

NAME = "throw_away"  # of the operator: the root mean square of several maps, and where it is largest


class Energy(NamedTuple):
    energy: Tensor  # [N]
    place: Tensor  # [N], int64
    mean: Tensor  # [], a result without gradient


def reference(maps: list[Tensor], scale: Tensor) -> Energy:
    """A list of tensors [N,P], and a constant scale []."""
    squares = sum(one.square().sum(1) for one in maps)
    energy = (squares * scale.detach()).sqrt()
    return Energy(energy, torch.cat(list(maps), dim=1).abs().argmax(1), energy.detach().mean())


def _forward(maps: list[Tensor], scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        return tuple(reference(list(maps), scale))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    maps, scale = inputs
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(output[0], scale, *maps)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[list[Tensor], None]:
    energy, scale, *maps = ctx.saved_tensors
    return [one * (grad * scale / energy)[:, None] for one in maps], None


@pytest.fixture(scope="module")
def library() -> Iterator[None]:
    with torch.library._scoped_library("fgvc_ext_test", "DEF") as scope:
        scope.define(f"{NAME}(Tensor[] maps, Tensor scale) -> (Tensor, Tensor, Tensor)")
        scope.impl(NAME, _forward, "CompositeExplicitAutograd")
        fake = lambda maps, scale: (  # noqa: E731
            maps[0].new_empty(maps[0].shape[0]),
            maps[0].new_empty(maps[0].shape[0], dtype=torch.int64),
            maps[0].new_empty(()),
        )
        torch.library.register_fake(f"fgvc_ext_test::{NAME}", fake, lib=scope)
        torch.library.register_autograd(f"fgvc_ext_test::{NAME}", _backward, setup_context=_setup, lib=scope)
        yield


def public(maps: list[Tensor], scale: Tensor) -> Energy:
    if not all(isinstance(one, Tensor) and one.dim() == 2 for one in maps):
        raise TypeError(f"{NAME}: maps must be a list of tensors [N,P]")
    return Energy(*torch.ops.fgvc_ext_test.throw_away(maps, scale.detach()))


def samples(dtype: torch.dtype, device: str, layout: str = "contiguous") -> list[Sample]:
    return [
        Sample(
            f"{count} maps",
            {
                "maps": [
                    arrange(random(3, 4 + number, dtype=dtype, device=device, seed=number), layout)
                    for number in range(count)
                ],
                "scale": torch.tensor(0.5, dtype=dtype, device=device),
            },
            ("maps",),
        )
        for count in (3, 1, 2)
    ]


def saved() -> list[Saved]:
    sample = samples(torch.float32, "cpu")[0]
    return [Saved(sample, 3 * 4, keeps=("maps[0]", "maps[1]", "maps[2]", "scale"))]


THROW_AWAY = Spec(
    name=NAME,
    function=public,
    reference=reference,
    samples=samples,
    empty=list,
    large=list,
    of_size=lambda size, device: samples(torch.float32, device)[0],
    raw=lambda sample: (sample.tensors["maps"], sample.tensors["scale"]),
    drawn=lambda draw: draw.choice(samples(torch.float32, "cpu")),
    faults=(lambda draw, sample: ("maps", draw.choice([[1.0], [None], [sample.tensors["scale"]]])),),
    saved=saved,
    differentiable=("maps",),
    constant_results=("place", "mean"),
    layouts=("contiguous", "transposed", "expanded"),
)


@pytest.mark.usefixtures("library")
class TestAListOfTensors:
    def test_equals_its_reference(self) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for layout in THROW_AWAY.layouts:
                for sample in samples(dtype, "cpu", layout):
                    assert_follows(public, reference, sample)

    def test_every_tensor_of_the_list_has_its_gradient(self) -> None:
        outcome = run(public, samples(torch.float32, "cpu")[0])
        assert list(outcome.results) == ["energy", "place", "mean"]
        assert outcome.with_gradient == ("energy",)
        assert list(outcome.gradients) == ["maps[0]", "maps[1]", "maps[2]"]
        assert all(grad is not None and grad.any() for grad in outcome.gradients.values())

    @pytest.mark.parametrize(
        "test",
        [
            test_gradients.test_gradcheck,
            test_gradients.test_what_is_said_to_have_no_gradient_has_none,
            test_gradients.test_an_output_gradient_may_have_any_strides,
            test_graphs.test_compiles_whole,
            test_graphs.test_exports,
            test_graphs.test_an_exported_program_can_be_trained,
            test_saved_memory.test_what_is_saved_is_what_the_spec_says,
        ],
        ids=lambda test: test.__name__,
    )
    def test_passes_what_takes_a_spec(self, test: Callable[..., None]) -> None:
        extra = {
            "function": "function",
            "device": "cpu",
            "layout": "contiguous",
            "dynamic": False,
            "kind": "one number",
        }
        wanted = test.__code__.co_varnames[: test.__code__.co_argcount]
        test(spec=THROW_AWAY, **{name: value for name, value in extra.items() if name in wanted})

    def test_faults_are_drawn_and_refused(self) -> None:
        for seed in range(20):
            draw = SeededDraw(seed)
            name, value = THROW_AWAY.faults[0](draw, THROW_AWAY.drawn(draw))
            with pytest.raises(TypeError, match=f"{NAME}: maps"):
                public(**{**samples(torch.float32, "cpu")[0].tensors, name: value})


def changed(**fields: Callable[[Tensor], Tensor]) -> Callable[..., Energy]:
    """The reference with some of its results changed."""

    def function(maps: list[Tensor], scale: Tensor) -> Energy:
        value = reference(maps, scale)
        return value._replace(**{name: change(getattr(value, name)) for name, change in fields.items()})

    return function


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (changed(energy=lambda x: x * 1.001), "energy: error"),
        (changed(place=lambda x: x + (torch.arange(3) == 1)), "place: 1 of 3 entries differ"),
        (changed(mean=lambda x: x + 0.001), "mean: error"),
        (changed(place=lambda x: x.int()), "place: dtype torch.int32"),
        (changed(energy=lambda x: x.detach()), r"gradients through \(\)"),
        (lambda maps, scale: reference([maps[0], maps[1].detach(), maps[2]], scale), r"gradient of maps\[1\]: one of"),
        (lambda maps, scale: tuple(reference(maps, scale)), "results"),
    ],
)
def test_a_fault_in_any_result_is_seen(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_follows(function, reference, samples(torch.float32, "cpu")[0])


def test_a_constant_that_gets_a_gradient_is_seen() -> None:
    def function(maps: list[Tensor], scale: Tensor) -> Energy:
        value = reference(maps, scale)
        return value._replace(energy=value.energy * scale / scale.detach())

    with pytest.raises(AssertionError, match="scale"):
        test_gradients.test_what_is_said_to_have_no_gradient_has_none(
            "function", replace(THROW_AWAY, function=function), "cpu"
        )


def test_lists_change_their_dtype_and_give_their_leaves() -> None:
    sample = in_dtype(samples(torch.float32, "cpu")[0], torch.float64)
    assert {tensor.dtype for _, tensor in named_tensors(sample.tensors)} == {torch.float64}
    assert [name for name, _ in leaves(sample)] == ["maps[0]", "maps[1]", "maps[2]"]


def test_every_file_of_the_folder_is_found() -> None:
    folder = test_fuzzing.__file__.replace("test_fuzzing.py", "specs")
    assert spec.Path(folder).is_dir()
    assert {one.name for one in SPECS} >= {path.stem for path in spec.Path(folder).glob("[a-z]*.py")}
    assert len({one.name for one in SPECS}) == len(SPECS)
