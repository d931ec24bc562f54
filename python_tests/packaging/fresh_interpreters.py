"""A process that has imported torch, and nothing of fgvc_ext, and forks a child for every piece of code it is given.

Tests of the import need many fresh interpreters; torch's import, seconds of each, is paid once. Run as a program, it
reads the arguments of `run` as JSON, a line each, and answers in lines.
"""

import json
import os
import sys
import tempfile
import traceback
import warnings
from typing import Any, NoReturn


def child(code: str, path: str, environment: dict[str, str], output: int) -> NoReturn:
    """Runs the code, its output in a file, `path` first on sys.path, and no FGVC_EXT variable but the given ones."""
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        for name in [name for name in os.environ if name.startswith("FGVC_EXT_")]:
            del os.environ[name]
        os.environ.update(environment)
        sys.path.insert(0, path)
        # An editable install would lend its modules to a copy of the package that lacks them.
        sys.meta_path[:] = [
            finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")
        ]
        sys.dont_write_bytecode = True
        warnings.simplefilter("always")
        exec(compile(code, "<test>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(code: str, path: str, environment: dict[str, str], copies: int) -> list[dict[str, Any]]:
    """Exit status (minus the signal, where one ended it) and output of each of `copies` children at the same time."""
    children = []
    for _ in range(copies):
        output = tempfile.TemporaryFile()  # noqa: SIM115 (one a child, read after all have ended)
        process = os.fork()
        if process == 0:
            child(code, path, environment, output.fileno())
        children.append((process, output))
    results = []
    for process, output in children:
        _, status = os.waitpid(process, 0)
        output.seek(0)
        results.append({"status": os.waitstatus_to_exitcode(status), "output": output.read().decode()})
        output.close()
    return results


if __name__ == "__main__":
    import torch  # noqa: F401

    assert "fgvc_ext" not in sys.modules
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
