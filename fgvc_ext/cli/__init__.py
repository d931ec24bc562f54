"""The command `fgvc-ext`. The parsers stand here; what a command does, in a module of its own, imported at need.

Exit status: 0 all is well, 1 a problem was found, 2 the command was used wrongly.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .._version import __version__

Command = Callable[[argparse.Namespace], int]

DATASETS = ("synthetic", "folder", "cub", "cars", "aircraft", "dogs", "gtos")
"""Names that `load_dataset` knows: the command line is read without importing torch."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `fgvc-ext` with the given arguments, or else those of the process, and returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["train"]:  # what follows is the driver's, --help too
            from .train import train_command

            return train_command(arguments[1:])
        parsed = _parser().parse_args(arguments)
        command: Command = parsed.command
        return command(parsed)
    except ModuleNotFoundError as error:
        print(f"fgvc-ext: error: {error}: pip install 'fgvc_ext[train]'", file=sys.stderr)
    except OSError as error:
        print(f"fgvc-ext: error: {error}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fgvc-ext", description="Fine-grained visual classification with PyTorch.")
    parser.add_argument("--version", action="version", version=f"fgvc_ext {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_info(commands)
    commands.add_parser("train", help="train a paper's pipeline: fgvc-ext train PAPER PRESET [changes]", add_help=False)
    _add_demo(commands)
    _add_data(commands)
    return parser


def _add_info(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "versions, libraries found, instruction set in use, or why something is missing"
    commands.add_parser("info", help=text, description=text).set_defaults(command=_info)


def _info(parsed: argparse.Namespace) -> int:
    from .info import info_command

    return info_command()


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "train every method on the embedded birds, a few minutes on a CPU: one table, one page"
    demo = commands.add_parser("demo", help=text, description=text)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the runs (default: runs/demo)")
    demo.add_argument("--seed", type=int, default=0, help="of the trainings (default: 0)")
    jobs = "methods that train at the same time (default: one for each of torch's threads; with a GPU 1)"
    demo.add_argument("--jobs", type=int, help=jobs)

    def command(parsed: argparse.Namespace) -> int:
        if parsed.jobs is not None and parsed.jobs < 1:
            demo.error(f"--jobs: expected at least 1, got {parsed.jobs}")
        from .demo import demo_command

        return demo_command(parsed.out, parsed.seed, parsed.jobs)

    demo.set_defaults(command=command)


def _add_data(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    data = commands.add_parser("data", help="look after data sets", description="Look after data sets.")
    actions = data.add_subparsers(metavar="ACTION", required=True)
    text = "read, decode and compare every image of a data set, before training on it"
    check = actions.add_parser("check", help=text, description=text)
    check.add_argument("dataset", choices=DATASETS, help="how the data set is laid out")
    check.add_argument(
        "root", nargs="?", type=Path, metavar="ROOT", help="its folder; 'synthetic' is drawn and has none"
    )

    def command(parsed: argparse.Namespace) -> int:
        if parsed.dataset == "synthetic" and parsed.root is not None:
            check.error(f"'synthetic' is drawn and takes no ROOT, got {str(parsed.root)!r}")
        if parsed.dataset != "synthetic" and parsed.root is None:
            check.error(f"{parsed.dataset!r} needs ROOT, the folder that holds it")
        from .data import check_command

        return check_command(parsed.dataset, parsed.root)

    check.set_defaults(command=command)
