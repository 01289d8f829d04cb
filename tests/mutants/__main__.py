"""Plants each fault in a copy of the tree and runs the tests that should find it.

    python -m tests.mutants            all of them, two at a time
    python -m tests.mutants hard_neg   those whose file or fault has this in its name
"""

import queue
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.mutants import Mutant, read_all
from tests.mutants.plant import Copy

COPIES = 2


def run(copy: Copy, mutant: Mutant) -> tuple[str, list[str]]:
    """What became of a fault, and the tests that found it."""
    with copy.planted(mutant):
        if mutant.file.startswith("csrc/") and (error := copy.build(mutant)):
            return "error", [error]
        ended, names = copy.test(list(mutant.tests))
    words = {"passed": "survived", "failed": "killed", "took too long": "killed (endless)"}
    return words.get(ended, ended), names


def run_all(mutants: list[Mutant], folder: Path) -> list[tuple[str, list[str]]]:
    """Of each fault what became of it, in their order."""
    results: dict[int, tuple[str, list[str]]] = {}
    jobs: queue.Queue[int] = queue.Queue()
    for i in sorted(range(len(mutants)), key=lambda i: not mutants[i].file.startswith("csrc/")):
        jobs.put(i)

    def work(copy: Copy) -> None:
        while True:
            try:
                i = jobs.get_nowait()
            except queue.Empty:
                return copy.end()
            begin = time.perf_counter()
            results[i] = run(copy, mutants[i])
            seconds = time.perf_counter() - begin
            by = results[i][1][0].splitlines()[-1] if results[i][1] else ""
            print(f"{results[i][0]:9s} {seconds:5.1f} s  {mutants[i].name}  {by}", flush=True)

    threads = [
        threading.Thread(target=work, args=[Copy(folder / str(i))], daemon=True)
        for i in range(COPIES)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[i] for i in range(len(mutants))]


def main(words: list[str]) -> int:
    mutants = [m for m in read_all() if not words or any(w in m.name for w in words)]
    broken = [error for m in mutants if (error := m.error())]
    if broken or not mutants:
        print("\n".join(broken) or "no fault has such a name")
        return 1
    begin = time.perf_counter()
    tested = [m for m in mutants if m.tests]
    with tempfile.TemporaryDirectory(prefix="tilewise-mutants-") as folder:
        results = run_all(tested, Path(folder))
        # What found a fault must not fail without it.
        killers = sorted({n for ended, names in results if ended == "killed" for n in names})
        clean = Copy(Path(folder) / "clean")
        ended, names = clean.test(killers) if killers else ("passed", [])
        clean.end()
    print()
    bad = 0
    for mutant, (ended_as, output) in zip(tested, results, strict=True):
        if not ended_as.startswith("killed"):
            bad += 1
            print(f"{ended_as}: {mutant.name} (line {mutant.line})", *output, sep="\n    ")
    for mutant in mutants:
        if not mutant.tests:
            print(f"not tried: {mutant.name}: {mutant.reason}")
    if ended != "passed":
        bad += 1
        print("these fail without a fault too:", *names, sep="\n    ")
    seconds = time.perf_counter() - begin
    print(f"{len(tested) - bad} of {len(tested)} faults were found, in {seconds / 60:.1f} minutes")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
