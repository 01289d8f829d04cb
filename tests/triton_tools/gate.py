"""Static gate: what each shipped Triton kernel compiles to, on every architecture, without a GPU.

`python -m tests.triton_tools.gate` compiles all, checks the rules and compares with the table
kernels/static_gate.csv. `--changed` compiles only rows whose sources, launch or compilers are no
longer those that the table was made from. `--write` renews the rows that are compiled: read the
diff of the table.
"""

import argparse
import csv
import datetime
import itertools
import multiprocessing
import os
import random
import sys
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton

from tests.triton_tools.figures import broken_rules, figures
from tilewise import _backend

TABLE = Path(__file__).parents[2] / "kernels" / "static_gate.csv"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")
KEY = ("kernel", "arch", "case")
FIGURES = ("binaries", "registers", "stack", "shared", "programs", "matrix", "instructions")
COLUMNS = (*KEY, *FIGURES, "made_from")
RENEW = 'make gate GATE="--changed --write"'

# Whose kernels there are: ops, and what modules have besides.
OWNERS = (*_backend.ops(), "_enqueue", "_matched", "_moving_averages", "_straight_through")

FEW = 16  # cases that are compiled sooner than another process has started

Key = tuple[str, str, str]
Task = tuple[str, str]  # op, architecture
Table = dict[Key, dict]


def rows_of(op: str, arch: str, wanted: Mapping[Key, str] | None) -> list[dict]:
    """One row for each kernel that a case of the op launches on `arch`.

    Of those that are wanted, with figures; without `wanted` all, without figures.

    Args:
        wanted: what each row is made from, by its key.
    """
    from tests.triton_tools import cases, offline  # which refuse to be imported to interpret

    torch.set_num_threads(1)
    rows = []
    with offline.launching_for(arch, set((wanted or {}).values())) as launched:
        for case, calls in getattr(cases, op)(arch):
            if wanted is not None and not any(key[2] == case for key in wanted):
                continue
            launched.clear()
            for call in calls:
                call()
            count = len(launched) // len(calls)  # calls launch the same kernels, in one order
            names = [launch.name for launch in launched[:count]]
            for i, launch in enumerate(launched[:count]):
                before = names[:i].count(names[i])
                row = {
                    "kernel": names[i] + (f" {before + 1}" if before else ""), "arch": arch,
                    "case": case, "made_from": launch.made_from, "products": launch.products,
                    "binaries": len({other.made_from for other in launched[i::count]}),
                }
                if wanted is None:
                    rows.append(row)
                elif key_of(row) in wanted:
                    rows.append(row | figures(launch.binary, arch))
    return rows


def key_of(row: dict) -> Key:
    return row["kernel"], row["arch"], row["case"]


def recipes() -> tuple[Table, dict[Key, Task]]:
    """All rows without figures, and who makes them. Nothing is compiled: it takes seconds."""
    rows, owner = {}, {}
    for task in itertools.product(OWNERS, ARCHITECTURES):
        for row in rows_of(*task, None):
            rows[key_of(row)], owner[key_of(row)] = row, task
    return rows, owner


def compiled(keys: Collection[Key], rows: Table, owner: dict[Key, Task]) -> Iterator[dict]:
    """The rows of these keys as they come; those that are made from the same are compiled once."""
    alike: dict[str, list[Key]] = {}
    for key in keys:
        alike.setdefault(rows[key]["made_from"], []).append(key)
    for row in _compiled({same[0]: made for made, same in alike.items()}, owner):
        found = {name: row[name] for name in FIGURES if name != "binaries"}
        yield from (rows[key] | found for key in alike[row["made_from"]])


def _compiled(wanted: dict[Key, str], owner: dict[Key, Task]) -> Iterator[dict]:
    """The rows of these keys; many in as many processes as there are cores."""
    # One case at a time, so that cores are busy to the end.
    cases: dict[tuple[Task, str], dict[Key, str]] = {}
    for key, made_from in wanted.items():
        cases.setdefault((owner[key], key[2]), {})[key] = made_from
    arguments = [[task[0] for task, _ in cases], [task[1] for task, _ in cases], cases.values()]
    if len(cases) <= FEW:
        yield from itertools.chain.from_iterable(map(rows_of, *arguments))
    else:
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            yield from itertools.chain.from_iterable(pool.map(rows_of, *arguments))


def read_table() -> tuple[str, Table]:
    """The Triton version that the table was made with, and its rows by key."""
    with open(TABLE, newline="") as file:
        version = file.readline().removeprefix("# triton ").strip()
        rows = [
            {k: int(v) if k in FIGURES else v for k, v in row.items()}
            for row in csv.DictReader(file)
        ]
    return version, {key_of(row): row for row in rows}


def write_table(table: Table, recipes: Table) -> None:
    """The rows that there still are, in their order."""
    rows = [table[key] for key in recipes if key in table]
    with open(TABLE, "w", newline="") as file:
        file.write(f"# triton {triton.__version__}\n")
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def stale(recipes: Table, table: Table) -> list[Key]:
    """Rows that are made from something else than in the table, or are not in it."""
    return [
        key for key, row in recipes.items()
        if key not in table or table[key]["made_from"] != row["made_from"]
    ]


def differences(rows: list[dict], table: Table) -> list[str]:
    """How the rows differ from the table."""
    lines = []
    for row in rows:
        expected = table.get(key_of(row))
        if expected is None:
            lines.append(f"{key_of(row)}: not in the table")
            continue
        lines += [
            f"{key_of(row)}: {name} {expected[name]} in the table, now {row[name]}"
            for name in FIGURES if expected[name] != row[name]
        ]
    return lines


def chosen(changed: list[Key], keys: Collection[Key], arguments) -> list[Key]:
    """The rows to compile, in an order that soon has seen some of every kind."""
    draw = random.Random(str(datetime.date.today()))
    if not arguments.changed:
        return draw.sample(list(keys), len(keys))
    most = len(changed) if arguments.most is None else min(arguments.most, len(changed))
    rest = sorted(set(keys) - set(changed))
    return draw.sample(changed, most) + draw.sample(rest, min(arguments.sample, len(rest)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changed", action="store_true", help="only rows that are out of date")
    parser.add_argument("--most", type=int, help="a random choice of so many of these")
    parser.add_argument("--sample", type=int, default=0, help="and as many others")
    parser.add_argument("--write", action="store_true", help="renew the rows that are compiled")
    arguments = parser.parse_args()
    version, table = read_table()
    wanted, owner = recipes()
    changed = stale(wanted, table)
    rows = []
    for row in compiled(chosen(changed, wanted, arguments), wanted, owner):
        rows.append(row)
        if arguments.write:
            table[key_of(row)] = row
        if arguments.write and len(rows) % 20 == 0:  # an interrupted run is not lost
            write_table(table, wanted)
    if arguments.write:
        write_table(table, wanted)
        version, table = read_table()
        changed = stale(wanted, table)
    if version == triton.__version__:
        problems = differences(rows, table)
        problems += [f"{key}: in the table only" for key in table.keys() - wanted.keys()]
        if not arguments.changed:
            problems += [f"{key}: made from something else in the table" for key in changed]
        if changed:
            print(f"{len(changed)} rows of the table are out of date; renew them: {RENEW}")
    else:
        problems = []
        print(f"the table is of triton {version}, this is {triton.__version__}: rules only")
    problems += [f"{key_of(row)}: {rule}" for row in rows for rule in broken_rules(row)]
    print(f"compiled {len(rows)} of {len(wanted)} rows (drawn for {datetime.date.today()})")
    print(*sorted(problems), f"{len(problems)} problems", sep="\n")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
