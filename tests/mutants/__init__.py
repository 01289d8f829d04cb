"""Planted faults: the lists (*.txt) that `make mutants` lets the tests find."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Mutant:
    """One line of the sources, changed as somebody might get it wrong."""

    file: str
    fault: str
    old: str = ""
    new: str = ""
    tests: tuple[str, ...] = ()  # words for pytest: files or tests that should find it
    reason: str = ""  # why no test can

    @property
    def text(self) -> str:
        return (ROOT / self.file).read_text() if (ROOT / self.file).is_file() else ""

    @property
    def line(self) -> int:
        """Where it is, in a file that has it."""
        return self.text[: self.text.index(self.old)].count("\n") + 1

    @property
    def name(self) -> str:
        return f"{self.file}: {self.fault}"

    def error(self) -> str | None:
        """Why it can't be planted."""
        found = self.text.count(self.old) if self.old else 0
        if found != 1:
            return f"{self.name}: `{self.old}` found {found} times, expected once"
        if self.old == self.new:
            return f"{self.name}: nothing changes"
        files = [ROOT / word.split("::")[0] for word in self.tests if not word.startswith("-")]
        if not (files or self.reason) or not all(map(Path.is_file, files)):
            return f"{self.name}: expected files of tests, got {self.tests}"
        return None


def read(path: Path) -> list[Mutant]:
    """The faults of a list: paragraphs of `file: fault`, `- old`, `+ new`, `by tests`."""
    mutants: list[Mutant] = []
    for paragraph in path.read_text().split("\n\n"):
        lines = [line for line in paragraph.splitlines() if not line.startswith("#")]
        if not lines:
            continue
        file, fault = lines[0].split(": ", 1)
        mutant = Mutant(file, fault)
        for line in lines[1:]:
            key, _, value = line.partition(" ")
            if key == "by":
                mutant.tests += tuple(value.split())
            elif key in ("-", "+", "because"):
                setattr(mutant, {"-": "old", "+": "new", "because": "reason"}[key], value)
            else:
                raise ValueError(f"{path.name}: {mutant.name}: `{line}` begins with no keyword")
        mutants.append(mutant)
    return mutants


def read_all() -> list[Mutant]:
    return [mutant for path in sorted(Path(__file__).parent.glob("*.txt")) for mutant in read(path)]
