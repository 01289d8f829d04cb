"""Runs pytest again and again, each time in a fork of a process that has imported torch already.

A line on stdin, `[folder, output, [words for pytest]]` in JSON, is answered by two lines on stdout:
the process and its exit status. Nothing of the project is imported here, only what it imports.
"""

import json
import os
import sys
import traceback


def test(folder: str, output: str, words: list[str]) -> int:
    """In the fork: the exit status of pytest in `folder`, what it prints being in `output`."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.setsid()  # so that all that it starts can be ended with it
    os.chdir(folder)
    sys.path[:1] = [folder, os.path.join(folder, "pyext")]
    os.environ["PYTHONPATH"] = os.path.join(folder, "pyext")  # for what the tests start
    try:
        return int(pytest.main(words))
    except BaseException:
        traceback.print_exc()
        return 3


if __name__ == "__main__":
    import hypothesis  # noqa: F401
    import pytest
    import torch._inductor.config  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = test(*json.loads(line))
            sys.stdout.flush()
            os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
