"""Copies of the tree with a fault in them, built and tested."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.mutants import ROOT, Mutant

LIMIT = 300  # seconds, for the tests of one fault
ENDED = {0: "passed", 1: "failed", -signal.SIGKILL: "took too long"}


class Copy:
    """A copy of the tree in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        files = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.splitlines()
        for name in files:
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        # Where Python finds the package before it looks at what is installed.
        (folder / "pyext/tilewise/kernels").symlink_to(folder / "kernels")
        shutil.copy2(ROOT / "pyext/tilewise/_build.json", folder / "pyext/tilewise")
        (folder / "objects").mkdir()
        self.built = folder / "objects/_C.so"
        library = next(ROOT.glob("pyext/tilewise/_C*.so"))
        self.library = folder / library.relative_to(ROOT)
        for path in (self.built, self.library):
            shutil.copy2(library, path)
        self.server = self._started()

    def _started(self) -> subprocess.Popen[str]:
        # No byte code: that of a file of the same size and second would be taken for this one's.
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1",
            "PYTHONDONTWRITEBYTECODE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(self.folder / ".hypothesis"),
        }
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tests/mutants/server.py")], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )

    @contextlib.contextmanager
    def planted(self, mutant: Mutant) -> Iterator[None]:
        """The copy has the fault while this lasts."""
        path = self.folder / mutant.file
        text = path.read_text()
        path.write_text(text.replace(mutant.old, mutant.new))
        try:
            yield
        finally:
            path.write_text(text)
            if mutant.file.startswith("csrc/"):
                self.library.unlink(missing_ok=True)
                shutil.copy2(self.built, self.library)

    def test(self, tests: list[str]) -> tuple[str, list[str]]:
        """How the tests ended, stopping at the first that fails, and which failed."""
        cache, output = self.folder / ".failed", self.folder / "output"
        shutil.rmtree(cache, ignore_errors=True)
        words = [
            "-q", "-x", "--timeout=240", "-m", "not alone and not slow",
            "-o", f"cache_dir={cache}", *tests,
        ]
        assert self.server.stdin and self.server.stdout
        self.server.stdin.write(json.dumps([str(self.folder), str(output), words]) + "\n")
        self.server.stdin.flush()
        process = int(self.server.stdout.readline())
        limit = threading.Timer(LIMIT, os.killpg, [process, signal.SIGKILL])
        limit.start()
        status = int(self.server.stdout.readline())
        limit.cancel()
        failed = cache / "v/cache/lastfailed"
        names = list(json.loads(failed.read_text())) if failed.is_file() else []
        if status not in ENDED or (status == 1 and not names):
            return "error", [output.read_text()[-2000:]]
        return ENDED[status], names

    def end(self) -> None:
        """Ends its process."""
        self.server.communicate()

    def build(self, mutant: Mutant) -> str | None:
        """Compiles what the fault is in, for this CPU alone; returns why it does not compile."""
        objects = {}
        for command in commands():
            if (ROOT / mutant.file) in command.sources and command.is_used:
                output = self.folder / "objects" / Path(command.output).name
                error = command.run(self.folder, output)
                if error:
                    return error
                objects[command.output] = str(output)
        if not objects:
            return "no object is made of it"
        link = next(c for c in commands() if c.output.endswith(".so"))
        self.library.unlink()
        return link.run(self.folder, self.library, objects)


class Command:
    """One line of the build: a compilation, or the link."""

    def __init__(self, entry: dict, headers: dict[str, set[Path]]):
        self.folder = Path(entry["directory"])
        self.words = shlex.split(entry["command"])
        self.output = entry["output"]
        file = (self.folder / entry["file"]).resolve()
        self.sources = {file, *headers.get(self.output, ())}

    @property
    def is_used(self) -> bool:
        """Whether this CPU runs it."""
        from tilewise import _extension

        used = _extension.build_info()["cpu_capability"]
        named = [w.split("=")[1] for w in self.words if w.startswith("-DCPU_CAPABILITY=")]
        return not named or named[0] == used

    def run(self, folder: Path, output: Path, objects: dict[str, str] | None = None) -> str | None:
        """Runs it on the copy in `folder`; returns what went wrong."""
        words = []
        for word in self.words:
            path = (self.folder / word).resolve()
            if word == self.output or path == (self.folder / self.output).resolve():
                word = str(output)
            elif word == f"{self.output}.d":
                word = f"{output}.d"
            elif objects is not None and word in objects:
                word = objects[word]
            elif word.endswith(".cpp") and ROOT in path.parents:
                word = str(folder / path.relative_to(ROOT))
            words.append(word)
        run = subprocess.run(words, cwd=self.folder, capture_output=True, text=True)
        return run.stderr[-2000:] if run.returncode else None


_commands: list[Command] = []


def commands() -> list[Command]:
    """Those that ninja would run to build the extension."""
    if not _commands:
        files = ROOT.glob("build/ninja-*/build.ninja")  # every build writes its own anew
        folder = max(files, key=lambda file: file.stat().st_mtime).parent

        def ninja(*words: str) -> str:
            return subprocess.run(
                [sys.executable, "-m", "ninja", "-C", str(folder), "-t", *words],
                check=True, capture_output=True, text=True,
            ).stdout

        headers: dict[str, set[Path]] = {}
        for line in ninja("deps").splitlines():
            if line.startswith("    "):
                headers[output].add((folder / line.strip()).resolve())  # noqa: F821
            elif ": #deps" in line:
                output = line.split(": #deps")[0]
                headers[output] = set()
        text = ninja("compdb")
        _commands.extend(Command(entry, headers) for entry in json.loads(text[text.index("[") :]))
    return _commands
