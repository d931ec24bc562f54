"""A process that has imported what every run of the tests imports, but nothing of fgvc_ext, and forks one for each run.

The imports take longer than most runs until their first failure. Started in the folder of the tests, it reads the
arguments of pytest and a limit in seconds as JSON, a line each, and answers in lines: the exit status, or null where
the run was ended at its limit, and the output.
"""

import json
import os
import signal
import sys
import tempfile
import time
from typing import NoReturn


def child(arguments: list[str], output: int) -> NoReturn:
    status = 1
    try:
        os.setsid()  # so that it ends with all that the tests start
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.path[0] = os.getcwd()  # as `python -m pytest` has it
        status = int(pytest.main(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def run(arguments: list[str], limit: float) -> tuple[int | None, str]:
    with tempfile.TemporaryFile() as output:
        process = os.fork()
        if process == 0:
            child(arguments, output.fileno())
        deadline = time.monotonic() + limit
        ended, status = os.waitpid(process, os.WNOHANG)
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)
            ended, status = os.waitpid(process, os.WNOHANG)
        if not ended:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status) if ended else None, output.read().decode(errors="replace")


if __name__ == "__main__":
    import hypothesis  # noqa: F401
    import pytest
    import torch._dynamo.testing
    import torch.export  # noqa: F401

    assert "fgvc_ext" not in sys.modules
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
