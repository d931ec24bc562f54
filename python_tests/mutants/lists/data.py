"""From a file to a batch: crops, samples and their random numbers, fingerprints, what is held out."""

from ..mutant import Mutant, of

D = "python_tests/data"
CROPS = (f"{D}/test_crops.py", f"{D}/test_transforms.py")
BENCHMARKS = (f"{D}/test_benchmarks_on_disk.py", f"{D}/test_cub.py")
LOADING = (f"{D}/test_loading.py", "python_tests/training/test_sampling.py")

MUTANTS = [
    *of(
        "fgvc_ext/data/crops.py",
        Mutant("crops-larger-than-the-image", "if not 0 < crop <= resize:", "if not 0 < crop:"),
        Mutant(
            "crops-of-the-copy",
            "image.shape[-2:] if size is None else size",
            "image.shape[-2:]",
            survives="A copy is smaller by a factor that divides both sides: its resized sides round to the same.",
        ),
        Mutant("crops-never-flipped", "(self.rotate, self.flip, self.jitter)", "(self.rotate, self.jitter)"),
        Mutant("crops-never-jittered", "(self.rotate, self.flip, self.jitter)", "(self.rotate, self.flip)"),
        Mutant("crops-always-on-top", "int(torch.randint(0, length - crop + 1, ()))", "0"),
        Mutant("crops-last-place-missed", "length - crop + 1, ())", "length - crop, ())"),
        Mutant("crops-reach-of-a-pixel", "support * max(1.0, scale) + 1", "support"),
        Mutant("crops-rounded-up", "int(shorter * width / height)", "math.ceil(shorter * width / height)"),
        Mutant("crops-centre-first", "stacked([centre, *corners])", "stacked([*corners, centre])"),
        Mutant("crops-aliased", "antialias=True", "antialias=False"),
        tests=CROPS,
    ),
    *of(
        "fgvc_ext/data/loading.py",
        Mutant(
            "loading-one-seed", "torch.default_generator.manual_seed(seed)", "torch.default_generator.manual_seed(0)"
        ),
        Mutant("loading-skips-in-silence", 'if self.broken_images == "error":', "if False:"),
        Mutant("loading-skipped-uncounted", "torch.tensor(len(samples) - len(kept))", "torch.tensor(0)"),
        Mutant("loading-twice-normalised", "images.dtype == torch.uint8:", "images.dtype != torch.bool:"),
        Mutant(
            "loading-order-in-memory", "torch.channels_last if channels_last and", "torch.channels_last if False and"
        ),
        Mutant("loading-dies-of-sigterm", "signal.signal(signal.SIGTERM, signal.SIG_IGN)", "pass"),
        tests=LOADING,
    ),
    *of(
        "fgvc_ext/data/file_contents.py",
        Mutant(
            "fingerprint-of-lengths", "hashlib.sha256(file.read_bytes()).hexdigest()", "str(len(file.read_bytes()))"
        ),
        Mutant(
            "fingerprint-beginning-alone",
            "for place in (0, length // 2, max(0, length - SAMPLE)):",
            "for place in (0,):",
        ),
        Mutant("fingerprint-always-sampled", "<= read_whole", "< 0"),
        tests=(f"{D}/test_folder.py", f"{D}/test_cub.py"),
    ),
    *of(
        "fgvc_ext/data/official.py",
        Mutant("official-boxes-from-one", "max(x_min - 1, 0)", "max(x_min, 0)"),
        Mutant("official-counts-exclusive", "if not low <= count <= high]", "if not low < count < high]"),
        Mutant("official-part-is-serious", "return len(self.per_class) == self.official.classes", "return True"),
        tests=BENCHMARKS,
    ),
    *of(
        "fgvc_ext/data/aircraft.py",
        Mutant("aircraft-banner-stays", "return image[:, :-BANNER]", "return image"),
        Mutant("aircraft-trained-without-val", '"trainval" if split', '"train" if split'),
        tests=BENCHMARKS,
    ),
    *of(
        "fgvc_ext/data/cars.py",
        Mutant("cars-other-split", 'int(row["test"]) == (split == "test")', 'int(row["test"]) != (split == "test")'),
        tests=BENCHMARKS,
    ),
]
