"""The planted faults of `make mutants` can be planted."""

from collections import Counter

from tests.mutants import ROOT, read_all


def test_every_fault_can_be_planted():
    mutants = read_all()
    assert not [error for m in mutants if (error := m.error())]
    assert len(mutants) >= 60
    assert max(Counter(m.name for m in mutants).values()) == 1


def test_every_op_has_one():
    files = " ".join(m.file for m in read_all())
    for path in (ROOT / "pyext/tilewise/ops").glob("[!_]*.py"):
        assert path.name in files, path.stem
