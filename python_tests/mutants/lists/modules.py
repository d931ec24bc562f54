"""fgvc_ext/nn: the module that keeps class means, in one process and in several."""

from ..mutant import Mutant, of

MUTANTS = [
    *of(
        "fgvc_ext/nn/class_mean.py",
        Mutant(
            "class-mean-module-sums-in-place",
            "total = grad.clone(memory_format=torch.contiguous_format)",
            "total = grad.contiguous()",
        ),
        Mutant(
            "class-mean-module-own-size", "if len(given) != ranks or given[rank] != own:", "if len(given) != ranks:"
        ),
        Mutant("class-mean-module-even-ranks", "start = sum(ctx.sizes[:rank])", "start = rank * ctx.sizes[0]"),
        Mutant(
            "class-mean-module-gathers-always", "gathers = self.training and _world_size()", "gathers = _world_size()"
        ),
        Mutant(
            "class-mean-module-infinite-between",
            "losses.within.isfinite() & losses.between.isfinite()",
            "losses.within.isfinite()",
        ),
        Mutant(
            "class-mean-module-keeps-half", "self.class_means = means.to(", "self.class_means = self.class_means.to("
        ),
        Mutant(
            "class-mean-module-seed-of-each",
            "distributed.broadcast(seed, src=0)\n",
            "distributed.broadcast(seed.clone(), src=0)\n",
        ),
        Mutant("class-mean-module-absent-means", 'if self.variant == "official":  #', "if False:  #"),
        tests=("python_tests/ops/test_class_mean_module.py", "python_tests/distributed", "-m", "not slow"),
    ),
]
