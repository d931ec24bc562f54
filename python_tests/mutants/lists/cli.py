"""fgvc_ext/cli: what the commands print and return."""

from ..mutant import Mutant, of

TESTS = ("python_tests/cli/test_cli.py",)

MUTANTS = [
    *of(
        "fgvc_ext/cli/__init__.py",
        Mutant("cli-error-is-success", "file=sys.stderr)\n    return 1", "file=sys.stderr)\n    return 0"),
        Mutant("cli-root-not-asked-for", "is None:\n            check.error(f", "is None:\n            print(f"),
        Mutant("cli-train-options-parsed-here", 'if arguments[:1] == ["train"]:', 'if arguments == ["train"]:'),
        tests=(*TESTS, "python_tests/training/test_driver.py", "-m", "not slow"),
    ),
    *of(
        "fgvc_ext/cli/data.py",
        Mutant("cli-warnings-are-errors", "return 1 if serious else 0", "return 1 if problems else 0"),
        Mutant(
            "cli-no-data-is-success",
            'print(f"error: {error}")\n            return 1',
            'print(f"error: {error}")\n            return 0',
        ),
        Mutant("cli-no-validation-split", 'for name in ("val", "test") if', 'for name in ("test",) if'),
        Mutant(
            "cli-warnings-not-counted",
            "{len(problems) - serious + len(caught)} warnings",
            "{len(problems) - serious} warnings",
        ),
        tests=TESTS,
    ),
    *of(
        "fgvc_ext/cli/train.py",
        Mutant("cli-wrong-paper-is-success", "return 0 if wanted else 2", "return 0"),
        Mutant(
            "cli-another-command-to-go-on", 'main(arguments[1:], ["fgvc-ext", "train", paper])', "main(arguments[1:])"
        ),
        Mutant("cli-paper-given-to-the-driver", "DRIVER.main(arguments[1:], [", "DRIVER.main(arguments, ["),
        tests=(*TESTS, "python_tests/training/test_driver.py", "-m", "not slow"),
    ),
]
