"""What the paper says of the diversification block, beyond the contract that every operator keeps."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.export import Dim

import fgvc_ext
from fgvc_ext import _library, nn, ops
from fgvc_ext.reference.diversify import hide_threshold
from fgvc_ext.reference.philox import philox


def test_an_example_by_hand() -> None:
    """One patch a position; a mask that the raw words decide, checked against eq. 1–8 written out."""
    maps = torch.tensor([[[[1.0, 4.0], [4.0, 2.0]]]])
    hidden = ops.suppression_mask(maps, p_peak=1.0, p_patch=0.0, seed=3)
    assert hidden.tolist() == [[[[False, True], [True, False]]]]  # both tied peaks, together
    assert ops.diversify(maps, p_peak=1.0, p_patch=0.0, alpha=0.5, seed=3).item() == pytest.approx((1 + 2 + 2 + 2) / 4)
    assert ops.diversify(maps, p_peak=0.0, p_patch=1.0, alpha=0.5, seed=3).item() == pytest.approx(
        (0.5 + 4 + 4 + 1) / 4
    )


def test_the_mask_is_what_the_words_of_philox_say() -> None:
    maps = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    seed, p_peak, p_patch, size = 0x0123_4567_89AB_CDEF, 0.4, 0.3, 3
    mask = ops.suppression_mask(maps, p_peak=p_peak, p_patch=p_patch, patch_size=size, seed=seed)

    def word(sample: int, channel: int, draw: int) -> int:
        counter = tuple(torch.tensor(value) for value in (draw // 4, channel, sample, 1))
        key = (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32))
        return int(philox(counter, key)[draw % 4])

    for n in range(2):
        for c in range(3):
            peak = maps[n, c].argmax().item()
            for position in range(35):
                y, x = divmod(position, 7)
                draw, p = (0, p_peak) if position == peak else (1 + y // size * 3 + x // size, p_patch)
                assert mask[n, c, y, x] == (word(n, c, draw) < round(p * 2**32))


@pytest.mark.skipif(_library._module is None, reason="the package has no compiled libraries")
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_draws_have_their_probabilities(p: float) -> None:
    """20,000 draws: five standard deviations of their mean."""
    maps = torch.randn(20, 1000, 2, 2)
    mask = ops.suppression_mask(maps, p_peak=p, p_patch=p, patch_size=1, seed=11).flatten(2)
    peak = maps.flatten(2).argmax(2, keepdim=True)
    spread = 5 * (p * (1 - p) / 20000) ** 0.5
    assert mask.gather(2, peak).double().mean().item() == pytest.approx(p, abs=spread)
    for position in range(4):
        others = mask[:, :, position][(peak != position)[..., 0]]
        assert others.double().mean().item() == pytest.approx(p, abs=2 * spread)


def test_a_threshold_is_the_share_of_all_words() -> None:
    words = 2**32
    assert [hide_threshold(p) for p in (0.0, 1 / words, 0.5, 1 - 1 / words, 1.0)] == [0, 1, 2**31, words - 1, words]


@pytest.mark.parametrize("backend", ["kernel", "reference"])
def test_the_mask_has_the_layout_of_the_maps(backend: str) -> None:
    maps = torch.randn(2, 5, 4, 6).contiguous(memory_format=torch.channels_last)
    with fgvc_ext.use_reference() if backend == "reference" else contextlib.nullcontext():
        assert ops.suppression_mask(maps, seed=1).stride() == maps.stride()


@pytest.mark.parametrize("width", [1, 7, 8, 9, 16])
def test_a_graph_knows_how_many_bytes_hold_the_mask(width: int) -> None:
    """Whole bytes a map: a multiple of eight positions needs no further one."""
    if not _library.has_schemas():
        pytest.skip("the package has no compiled libraries")
    arguments = (torch.tensor(0), 2**31, 2**31, 3, 0.1)
    bits = torch.ops.fgvc_ext.diversify(torch.randn(2, 3, 1, width), *arguments)[1]
    traced = torch.ops.fgvc_ext.diversify(torch.empty(2, 3, 1, width, device="meta"), *arguments)[1]
    assert traced.shape == bits.shape == (2, 3, -(-width // 8))


def test_patches_at_the_edge_are_hidden_like_the_others() -> None:
    maps = torch.zeros(1, 400, 5, 5)
    maps[..., 0, 0] = 1
    mask = ops.suppression_mask(maps, p_peak=0.0, p_patch=0.5, patch_size=3, seed=1)
    corner = mask[:, :, 3:, 3:]  # a patch of 2 × 2
    assert (corner.flatten(2).all(2) | ~corner.flatten(2).any(2)).all()
    assert 0.3 < corner[:, :, 0, 0].double().mean() < 0.7


def test_a_map_with_nan_has_no_peaks_and_a_constant_one_only_peaks() -> None:
    maps = torch.zeros(1, 2, 3, 3)
    maps[0, 0, 1, 1] = float("nan")
    mask = ops.suppression_mask(maps, p_peak=1.0, p_patch=0.0, seed=0)
    assert not mask[0, 0].any()
    assert mask[0, 1].all()
    assert ops.diversify(maps, seed=0).isnan().tolist() == [[True, False]]


def test_a_seed_a_sample_makes_the_batch_split_irrelevant() -> None:
    maps, seeds = torch.randn(6, 5, 7, 7), torch.randint(-(2**62), 2**62, (6,))
    together = ops.suppression_mask(maps, seed=seeds)
    apart = torch.cat([ops.suppression_mask(maps[i : i + 1], seed=seeds[i : i + 1]) for i in (0, 1, 2, 3, 4, 5)])
    assert torch.equal(together, apart)
    assert not torch.equal(ops.suppression_mask(maps, seed=seeds.flip(0)), together)


def test_manual_seed_rules_where_no_seed_is_given() -> None:
    maps = torch.randn(2, 3, 7, 7)
    torch.manual_seed(5)
    first, second = ops.diversify(maps), ops.diversify(maps)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(ops.diversify(maps), first)


def test_a_compiled_call_draws_anew() -> None:
    maps = torch.randn(2, 3, 7, 7)
    function = torch.compile(lambda x: ops.diversify(x), backend="aot_eager", fullgraph=True)
    assert not torch.equal(function(maps), function(maps))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"p_peak": 1.5}, ValueError, r"p_peak must be a probability in \[0, 1\], got 1.5"),
        ({"p_patch": float("nan")}, ValueError, r"p_patch must be a probability in \[0, 1\], got nan"),
        ({"p_patch": "half"}, TypeError, "p_patch must be a number, got str"),
        ({"patch_size": 0}, ValueError, "patch_size must be at least 1, got 0"),
        ({"alpha": float("inf")}, ValueError, "alpha must be finite in float32, got inf"),
        ({"alpha": -1e39}, ValueError, r"alpha must be finite in float32, got -1e\+39"),
        ({"seed": 1.0}, TypeError, "seed must be None, an int or an int64 tensor, got float"),
        ({"seed": 2**63}, ValueError, "seed must fit 64 bits"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seed must have shape \[\] or \[2\], got \[3\]"),
        ({"seed": torch.zeros(2)}, TypeError, "seed must be of dtype int64, got float32"),
    ],
)
def test_bad_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"diversify: {message}"):
        ops.diversify(torch.zeros(2, 3, 4, 4), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_alpha(dtype: torch.dtype) -> None:
    """It is a number of the dtype in which the operator computes, float64 for float64 and else float32."""
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    alpha = torch.finfo(accumulation).max
    maps = torch.full((1, 1, 2, 2), 2.0**-20, dtype=dtype)
    scores = ops.diversify(maps, p_peak=1.0, alpha=alpha, seed=0)
    assert scores.item() == torch.tensor(2.0**-20 * alpha, dtype=dtype).item()
    with fgvc_ext.use_reference():
        assert torch.equal(ops.diversify(maps, p_peak=1.0, alpha=alpha, seed=0), scores)
    if dtype != torch.float64:
        with pytest.raises(ValueError, match="diversify: alpha must be finite in float32, got 1e\\+39"):
            ops.diversify(maps, alpha=1e39)


@pytest.mark.parametrize("operator", [ops.diversify, ops.suppression_mask])
def test_a_map_of_too_many_positions_is_refused(operator: Callable[..., torch.Tensor]) -> None:
    maps = torch.zeros(1).expand(1, 1, 2**16, 2**16)  # one number in memory
    message = rf"{operator.__name__}: maps must have at most 2147483647 positions per map, got H\*W = 65536\*65536"
    with pytest.raises(ValueError, match=message):
        operator(maps)


@pytest.mark.parametrize("operator", [ops.diversify, ops.suppression_mask])
def test_one_graph_serves_every_seed(operator: Callable[..., torch.Tensor]) -> None:
    counter = CompileCounter()
    compiled = torch.compile(lambda x, s: operator(x, seed=s), backend=counter, fullgraph=True, dynamic=True)
    maps = torch.randn(2, 3, 5, 5)
    for seed in (5, 6, 2**40, 2**62):
        assert torch.equal(compiled(maps, seed), operator(maps, seed=seed))
    assert counter.frame_count == 1


def test_an_exported_program_takes_the_seed_as_its_input() -> None:
    class Module(torch.nn.Module):
        def forward(self, maps: torch.Tensor, seed: int) -> torch.Tensor:
            return ops.diversify(maps, seed=seed)

    maps = torch.randn(2, 3, 5, 5)
    program = torch.export.export(Module(), (maps, 5), dynamic_shapes=(None, Dim.DYNAMIC)).module()
    for seed in (5, 6, 2**40):
        assert torch.equal(program(maps, seed), ops.diversify(maps, seed=seed))


def test_an_empty_map_is_refused() -> None:
    with pytest.raises(ValueError, match="H and W of at least 1"):
        ops.diversify(torch.zeros(2, 3, 0, 4))


class TestDiversification2d:
    def test_evaluation_is_the_plain_mean(self) -> None:
        maps = torch.randn(2, 3, 7, 7)
        assert torch.equal(nn.Diversification2d().eval()(maps), maps.mean((2, 3)))

    def test_the_mask_that_was_used_can_be_drawn_again(self) -> None:
        maps, block = torch.randn(2, 3, 7, 7), nn.Diversification2d(alpha=0.25)
        scores = block(maps)
        mask = block.suppression_mask(maps)
        torch.testing.assert_close(scores, torch.where(mask, 0.25 * maps, maps).mean((2, 3)))

    def test_before_a_forward_there_is_no_mask(self) -> None:
        with pytest.raises(RuntimeError, match="no mask has been drawn yet"):
            nn.Diversification2d().suppression_mask(torch.zeros(1, 1, 2, 2))
