"""fgvc_ext/cli: what the commands print and return."""

from ..mutant import Mutant, of

TESTS = ("python_tests/cli/test_cli.py",)

MUTANTS = [
    *of(
        "fgvc_ext/cli/__init__.py",
        Mutant("cli-error-is-success", "file=sys.stderr)\n    return 1", "file=sys.stderr)\n    return 0"),
        Mutant("cli-root-not-asked-for", "is None:\n            check.error(f", "is None:\n            print(f"),
        Mutant("cli-train-options-parsed-here", 'if arguments[:1] == ["train"]:', 'if arguments == ["train"]:'),
        Mutant("cli-jobs-lost", "parsed.seed, parsed.jobs)", "parsed.seed)"),
        Mutant("cli-no-jobs", "parsed.jobs < 1", "parsed.jobs < 0"),
        tests=(*TESTS, "python_tests/cli/test_demo.py", "python_tests/training/test_driver.py", "-m", "not slow"),
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
        "fgvc_ext/cli/demo.py",
        Mutant("demo-gpu-shared", 'threads if choose_device("auto").type == "cpu" else 1', "threads"),
        Mutant("demo-no-thread-left", "str(max(1, threads // jobs))", "str(threads // jobs)"),
        Mutant("demo-loaders-not-shared", "if jobs > 1 else []", "if jobs < 1 else []"),
        Mutant("demo-package-of-the-current-folder", "sys.path[:] = {sys.path!r}; ", ""),
        Mutant("demo-environment-lost", "{**os.environ, **environment}", "{**environment}"),
        Mutant("demo-errors-apart", '"stderr": subprocess.STDOUT', '"stderr": None'),
        Mutant("demo-bytes-must-be-text", '"errors": "replace"', '"errors": "strict"'),
        Mutant(
            "demo-goes-on-after-an-error",
            "codes[name] = code if code > 0 else 128 - code\n                stopped.set()",
            "codes[name] = code if code > 0 else 128 - code",
        ),
        Mutant("demo-killed-is-negative", "code if code > 0 else 128 - code", "code"),
        Mutant("demo-begins-when-stopped", "if stopped.is_set():\n            return", "if False:\n            return"),
        Mutant("demo-drivers-not-told", "process.terminate()  # also", "pass  # also"),
        Mutant(
            "demo-interruption-is-lost",
            "except KeyboardInterrupt:\n                    stop()",
            "except KeyboardInterrupt:\n                    pass",
        ),
        Mutant("demo-second-interruption-is-an-error", "return EXIT_INTERRUPTED", "raise"),
        Mutant("demo-unnamed-failure", "for name, code in codes.items():", "for name, code in {}.items():"),
        Mutant("demo-stopped-is-success", "EXIT_PREEMPTED if stopped.is_set() else 0", "0"),
        Mutant("demo-handler-stays", "signal.signal(number, before)", "pass"),
        tests=("python_tests/cli/test_demo.py",),
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
