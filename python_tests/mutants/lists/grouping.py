"""Group bilinear pooling and the semantic grouping loss, in all their files."""

from ..mutant import EMULATION, Mutant, of

CUDA = (*EMULATION, "-m", "not slow")
GRAPHS = ("python_tests/ops/test_gradients.py", "python_tests/ops/test_graphs.py", "-m", "not slow")


def by(op: str) -> tuple[str, ...]:
    """The operator's own tests, and those of the contract that compare with the reference."""
    contract, own = "python_tests/ops/test_contract.py", f"python_tests/ops/test_{op}.py"
    return contract, own, "-k", f"{op} and (equal or layouts or test_{op})"


BILINEAR, LOSS = by("group_bilinear"), by("semantic_grouping_loss")

MUTANTS = [
    *of(
        "fgvc_ext/reference/group_bilinear.py",
        Mutant("reference-bilinear-code", "values = values + position.detach()", "values = values - position.detach()"),
        Mutant("reference-bilinear-steps", "steps = max(1, channels - 1)", "steps = max(1, channels)"),
        Mutant("reference-bilinear-weight", "below * (1 - weight) +", "below * weight +"),
        Mutant("reference-bilinear-layout", "if features.stride(1) == 1 and own > 1:", "if False:"),
        tests=BILINEAR,
    ),
    *of(
        "fgvc_ext/reference/semantic_grouping_loss.py",
        Mutant("reference-grouping-offset", "OFFSET = 1e-3  #", "OFFSET = 2e-3  #"),
        Mutant("reference-grouping-factor", "1e-3 / (channels / 512) ** 2", "1e-3 / (channels / 512)"),
        Mutant("reference-grouping-mean", "/ max(1, samples)", "/ 16"),
        Mutant("reference-grouping-overflow", "squares.isinf()", "squares.isnan()"),
        Mutant("reference-grouping-empty", "* min(1, samples)", ""),
        tests=(*LOSS[:-1], "semantic_grouping_loss"),
    ),
    *of(
        "fgvc_ext/ops/group_bilinear.py",
        Mutant("bilinear-py-channels", "if channels % check_int(", "if False and channels % check_int("),
        Mutant("bilinear-py-code-size", "if position.shape[0] != channels:", "if position.shape[0] < channels:"),
        Mutant("bilinear-py-group", "channels // groups > _MOST", "channels // groups >= _MOST"),
        Mutant("bilinear-py-constant", "position = constant(position)", "position = position + 0", tests=GRAPHS),
        Mutant("bilinear-py-fake", "return empty_maps(features,", "return features.new_empty(0,", tests=GRAPHS),
    ),
    *of(
        "fgvc_ext/ops/semantic_grouping_loss.py",
        Mutant(
            "grouping-py-fake-dtype",
            "features.new_empty((channels, channels), dtype=dtype)",
            "features.new_empty((channels, channels))",
            tests=GRAPHS,
        ),
    ),
    *of(
        "fgvc_ext/nn/group_bilinear.py",
        Mutant("bilinear-nn-identity", "nn.init.zeros_(self.norm.weight)", "pass"),
        Mutant("bilinear-nn-residual", "return features + self.norm", "return self.norm"),
        Mutant("bilinear-nn-state", "persistent=False", "persistent=True"),
        Mutant("bilinear-nn-even", "channel % 2 == 0, angles.sin()", "channel % 2 == 1, angles.sin()"),
        Mutant("bilinear-nn-upstream", "(channels, groups) == (2048, 32)", "channels == 256"),
        tests=("python_tests/ops/test_group_bilinear.py",),
    ),
    *of(
        "csrc/common/group_bilinear.h",
        Mutant(
            "bilinear-blocks-of-lines",
            "const bool whole = layout.positions",
            "const bool whole = true || layout.positions",
        ),
        Mutant("bilinear-strided-code", "position = as_accumulation(position, features);", ""),
        Mutant("bilinear-layout", "if (like.stride(1) != 1 ||", "if (true ||"),
    ),
    *of(
        "csrc/cpu/group_bilinear.h",
        Mutant("bilinear-code-lost", "position ? x + code : x", "x"),
        Mutant(
            "bilinear-neighbour",
            "above == 0 ? low :",
            "",
            tests=("python_tests/ops/test_contract.py", "-k", "nan and group"),
        ),
        Mutant("bilinear-weights", "add(x, 1 - above, rows", "add(x, 1, rows"),
        Mutant(
            "bilinear-symmetric",
            "load(gradient + upper) + load(gradient + lower)",
            "2 * load(gradient + upper)",
        ),
        Mutant("bilinear-slope", "(1 - t * t) * scale", "(1 - t) * scale"),
        Mutant("bilinear-begun", "for (; begun < x; ++begun)", "for (; begun + 1 < x; ++begun)"),
        Mutant("bilinear-columns", "for (; k < columns; ++k)", "for (; k + 1 < columns; ++k)"),
        Mutant(
            "bilinear-channels",
            "op.resize.channels > channels ? op.resize.channels",
            "op.resize.channels > channels ? channels",
            survives="It only takes too little memory, which nothing but AddressSanitizer sees.",
        ),
        tests=BILINEAR,
    ),
    *of(
        "csrc/cpu/vector.h",
        Mutant("tanh-sign", "(reinterpret_cast<Ints>(t) | sign)", "(reinterpret_cast<Ints>(t))"),
        Mutant("tanh-limit", "broadcast(20.f)", "broadcast(14.f)"),
        Mutant("tanh-digits", "m = multiply_add(p, power, power - 1.f)", "m = (p + 1.f) * power - 1.f"),
        tests=("python_tests/ops/test_group_bilinear.py",),
    ),
    *of(
        "csrc/cpu/products.h",
        Mutant(
            "products-columns",
            "i < columns ? from[i] : Value(0)",
            "i <= columns ? from[i] : Value(0)",
            survives="What stands behind the last column is computed and never read.",
        ),
        Mutant("products-sum", "store(to, load(to) + sums[r][c]);", "store(to, sums[r][c]);"),
        tests=LOSS,
    ),
    *of(
        "csrc/cpu/semantic_grouping_loss.h",
        Mutant("grouping-half", "(row == column ? 1 : 2)", "1"),
        Mutant("grouping-mirror", "residual[at * channels + i0 + i] = r;", ""),
        Mutant("grouping-group", "at >= first && at < past", "at >= first && at <= past"),
        Mutant("grouping-along", "- how.at(z, i, 0) * along)", ")"),
        Mutant("grouping-overflow", "finite - finite == 0 ? finite : finite - finite", "finite"),
        Mutant("grouping-depth", "done < op.depth; done += kPanelDepth", "done + 1 < op.depth; done += kPanelDepth"),
        tests=(*LOSS[:-1], "semantic_grouping_loss"),
    ),
    *of(
        "csrc/cuda/group_bilinear.cuh",
        Mutant("cuda-bilinear-code", "code ? widen(chunk.element[e]) + shift", "code ? widen(chunk.element[e])"),
        Mutant("cuda-bilinear-row-end", "kColumns + 1 < kColumns && k + 1 < p;", "kColumns + 1 < kColumns;"),
        Mutant("cuda-bilinear-barrier", "__syncthreads();  // the last columns' S has been read", ""),
        Mutant("cuda-bilinear-share", "if (lower == x) share = 1 - share;", ""),
        Mutant("cuda-bilinear-groups", "group * kGroupsPerBlock);", "0);"),
        Mutant("cuda-bilinear-transposed", "side == 0 ? i * p + k : k * p + i", "i * p + k"),
        tests=(*CUDA, "-k", "group_bilinear"),
    ),
    *of(
        "csrc/cuda/semantic_grouping_loss.cuh",
        Mutant(
            "cuda-grouping-lengths", "store(group.first_map + lane_index(), length)", "store(group.first_map, length)"
        ),
        Mutant("cuda-grouping-divisor", "/ static_cast<Value>(op.divisor) - together", "- together"),
        Mutant(
            "cuda-grouping-warps", "warp < kWarpsPerBlock; ++warp) total", "warp + 1 < kWarpsPerBlock; ++warp) total"
        ),
        tests=(*CUDA, "-k", "semantic_grouping"),
    ),
]
