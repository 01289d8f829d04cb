"""Whether figures may be reported: the op's tests pass, and the sources are those of a commit."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass, field

from rich.console import Console

from benchmarks.harness.measure import ROOT
from benchmarks.harness.report import commit

FOLDERS = ("ops", "backends", "nn")  # of tests about ops


@dataclass
class Tests:
    """What running the tests of one op on one device showed.

    `left_out` are the reasons of skipped tests that this machine could have run.
    """

    passed: int = 0
    failed: bool = True
    left_out: list[str] = field(default_factory=list)

    @property
    def verified(self) -> bool:
        """Whether a row may say so: something was tested, and nothing failed."""
        return self.passed > 0 and not self.failed


def run_tests(op: str, device: str, console: Console) -> Tests:
    """Every test with the op in its name or its file's, of all its backends, on `device`."""
    folders = [str(p) for f in FOLDERS if (p := ROOT / "tests" / f).is_dir()]
    console.print(f"testing {op} on {device} ...")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rs", "-k", op, *folders]
    environment = {**os.environ, "TILEWISE_TEST_DEVICE": device}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    found = re.search(r"(\d+) passed", done.stdout)
    tests = Tests(int(found[1]) if found else 0, done.returncode != 0)
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", done.stdout, re.M)
    # A GPU's run leaves out the tests of the CPU's backends.
    tests.left_out = [r for r in reasons if device == "cpu" and not r.startswith("this CPU")]
    if not tests.verified:
        console.print(done.stdout[-3000:] + done.stderr[-1000:], markup=False)
    else:
        console.print(f"{tests.passed} tests passed")
    return tests


def why_not_record(tests: Tests | None) -> str:
    """Why results may not be committed; empty where they may. `tests` None: none were run."""
    if tests is None:
        return "the op's tests were not run"
    if tests.left_out:
        return f"tests were skipped: {'; '.join(sorted(set(tests.left_out)))}"
    head = commit()
    if not head:
        return "the sources are not in a git checkout"
    if head.endswith("-dirty"):
        return f"the sources differ from commit {head.removesuffix('-dirty')}: commit them first"
    return ""
