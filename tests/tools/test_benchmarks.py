"""The benchmarks measure what they say, and report nothing that was not verified."""

import csv
import dataclasses
import itertools
import subprocess
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tilewise as tw
from benchmarks import nearest_code, run
from benchmarks.baselines import SOFTMAX
from benchmarks.harness import bench, measure, plot, predict, registry, report, verify
from benchmarks.harness.bench import COMPILED, EAGER, OURS, PRODUCTS, Case

MIB = 2**20
# No two calls agree.
RANDOM = {"gaussian_sample", "gumbel_argmax", "gumbel_softmax", "hard_negatives"}


def prepare_allocation(mib: int, spared: int = 32):
    """A call that touches `mib` MiB and returns a number; its input must not count."""
    if not mib:
        raise ValueError("no such case")
    x = torch.ones(spared * MIB // 4)
    return lambda: float(torch.full((mib * MIB // 4,), 2.0)[-1] + x[-1])


def test_peak_bytes_of_each_call_is_its_own_and_sees_what_is_freed():
    sizes = [128, 64, 96]
    with measure.Meter(prepare_allocation) as meter:
        peaks = measure.peak_bytes_each(prepare_allocation, [{"mib": m} for m in sizes], meter)
        assert peaks == pytest.approx([size * MIB for size in sizes], rel=0.05)
        with pytest.raises(RuntimeError, match="no such case"):
            meter.peak_bytes(mib=0)
    with pytest.raises(ValueError, match="top-level function"):
        measure.peak_bytes(lambda: None)


@pytest.mark.parametrize(
    ("warm", "long", "kept", "ran"), [(5.0, 20.0, 5, 6), (0.0, 20.0, 5, 5), (0.0, 0.0, 2, 2)]
)
def test_calls_take_turns(monkeypatch, warm, long, kept, ran):
    """Short rounds: the first is thrown away; longer ones: it is kept; very long ones: two."""
    monkeypatch.setattr(measure, "WARM_ROUND", warm)
    monkeypatch.setattr(measure, "LONG_ROUND", long)
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure.time_interleaved(calls, seconds=0)
    assert order == ["a", "b"] * ran
    assert [len(values) for values in times.values()] == [kept, kept]


def test_ratio_is_taken_within_rounds():
    slow_moment = 100.0
    ours, theirs = [1.0, 2 * slow_moment, 1.0], [2.0, slow_moment, 2.0]
    assert measure.ratio(ours, theirs) == 0.5
    assert measure.Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == measure.Spread(3.0, 2.0, 4.0)


@pytest.fixture(params=registry.names())
def op(request):
    return request.param


def implementations_of(op):
    """Those that are compared in a test. Compiling takes seconds, and shows by one op."""
    found = registry.load(op).implementations("cpu")
    left_out = {PRODUCTS, SOFTMAX} | ({COMPILED} if op != "gumbel_argmax" else set())
    return {name: made for name, made in found.items() if name not in left_out}


@pytest.mark.parametrize("op", sorted({*registry.names()} - RANDOM))
def test_implementations_agree(op):
    benchmark = registry.load(op)
    inputs = benchmark.inputs(benchmark.small, "cpu")
    with tw.backend("reference"):
        main = benchmark.small.kinds[0]
        expected = benchmark.implementations("cpu")[OURS].build(inputs, main)()
    for name, implementation in implementations_of(op).items():
        for kind in benchmark.small.kinds:
            result = implementation.build(inputs, kind)()
            torch.testing.assert_close(
                result, expected[: len(result)], rtol=1e-3, atol=1e-6, msg=f"{name}, {kind}"
            )


@pytest.mark.parametrize("op", sorted(RANDOM))
def test_random_implementations_have_one_law(op):
    torch.manual_seed(0)
    benchmark = registry.load(op)
    inputs = benchmark.inputs(benchmark.small, "cpu")
    weights = weights_of(inputs)
    for kind in benchmark.small.kinds:
        with tw.backend("reference"):
            expected = benchmark.implementations("cpu")[OURS].build(inputs, kind)()
        for name, implementation in implementations_of(op).items():
            result = implementation.build(inputs, kind)()
            assert len(result) == len(expected)
            for mine, theirs, weight in zip(result, expected, weights, strict=False):
                assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
                assert_same_means(mine, theirs, weight, f"{name}, {kind}")


def weights_of(inputs):
    """For each result the logits that it was drawn by, or something else of its shape."""
    if "text_features" in inputs:
        logits = inputs["image_features"] @ inputs["text_features"].T
        return logits, logits.T
    return itertools.repeat(next(iter(inputs.values())).detach())


def assert_same_means(mine, theirs, weight, message):
    """Of each column, and of the product with weights, over hundreds of rows."""
    means, variances = [], []
    for x in (mine, theirs):
        if x.dtype == torch.int64:
            x = torch.nn.functional.one_hot(x, weight.shape[1])
        x = x.double().flatten(1) if x.dim() > 1 else x.double()[:, None]
        if x.shape == weight.flatten(1).shape:
            x = torch.cat([x, (x * weight.flatten(1)).sum(1, keepdim=True)], 1)
        means.append(x.mean(0))
        variances.append(x.var(0))
    deviation = ((variances[0] + variances[1]) / len(mine)).sqrt() + 1e-6
    assert ((means[0] - means[1]).abs() < 6 * deviation).all(), message


def test_flops_are_those_of_the_products(op):
    benchmark = registry.load(op)
    if PRODUCTS not in benchmark.implementations("cpu"):
        assert benchmark.flops(benchmark.small, benchmark.small.kinds[0]) == 0
        return
    inputs = benchmark.inputs(benchmark.small, "cpu")
    for kind in benchmark.small.kinds:
        call = benchmark.implementations("cpu")[PRODUCTS].build(inputs, kind)
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == benchmark.flops(benchmark.small, kind)


def test_cases_can_be_told_apart(op):
    benchmark = registry.load(op)
    for case in benchmark.cases:
        assert benchmark.case(case.label) is case
    assert any(case.quick for case in benchmark.cases)
    assert benchmark.baseline in benchmark.implementations("cpu")


def test_quick_run_reports(tmp_path, capsys, monkeypatch):
    """Eager does not fit at the largest quick size, and no test was run: every row says so."""
    monkeypatch.setattr(run, "QUICK_SECONDS", 0.0)
    arguments = ["--op", "sigmoid_loss", "--quick", "--no-verify", "--memory-cap", "0.05"]
    status = run.main([*arguments, "--only", OURS, EAGER, "--out", str(tmp_path)])
    assert status == 0 and "NOT VERIFIED" in capsys.readouterr().out
    for what in ("time", "memory"):
        picture = (tmp_path / f"sigmoid_loss-cpu-{what}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000

    with (tmp_path / "sigmoid_loss-cpu.csv").open() as file:
        small, small_eager, large, large_eager = csv.DictReader(file)
    assert [row["implementation"] for row in (small, small_eager)] == [OURS, EAGER]
    assert large_eager["status"] == "skipped: needs 0.11 GB" and not large_eager["median_ms"]
    for row in (small, small_eager, large):
        assert (row["status"], row["verified"]) == ("measured", "False")
        assert 0 < float(row["q25_ms"]) <= float(row["median_ms"]) <= float(row["q75_ms"])
        assert int(row["rounds"]) >= 5 and row["torch"] == torch.__version__ and row["machine"]
    gradients = 2 * 2048 * 512 * 4
    # With them the features, packed, and 18 MiB of workspace; eager needs 110 MB.
    assert gradients <= int(large["peak_bytes"]) < 5 * gradients
    again = report.read_csv(tmp_path / "sigmoid_loss-cpu.csv")
    assert (again[0].rounds, again[0].verified, again[3].median_ms) == (5, False, None)
    report.write_csv(again, tmp_path / "copy.csv")
    first = (tmp_path / "sigmoid_loss-cpu.csv").read_text()
    assert (tmp_path / "copy.csv").read_text() == first


@pytest.fixture
def unmeasured(monkeypatch):
    """Candidates run, but nothing is measured."""
    monkeypatch.setattr(run, "peak_bytes_each", lambda prepare, cases, meter: [2**20] * len(cases))
    monkeypatch.setattr(run, "time_interleaved", lambda calls, *_: {n: [1.0] for n in calls})


def test_cases_are_drawn_side_by_side(tmp_path, unmeasured):
    """Without an axis; every index is compared with float64."""
    arguments = ["--op", "nearest_code", "--quick", "--no-verify", "--out", str(tmp_path)]
    assert run.main([*arguments, "--only", OURS, PRODUCTS, nearest_code.ADDMM]) == 0
    for what in ("time", "memory"):
        picture = (tmp_path / f"nearest_code-cpu-{what}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    with (tmp_path / "nearest_code-cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["data"] for row in rows} == {"", "16 clusters", "all equal", "nearly equal"}
    wrong = {name: [row["wrong"] for row in rows if row["implementation"] == name]
             for name in (OURS, PRODUCTS, nearest_code.ADDMM)}  # fmt: skip
    assert wrong[OURS] == ["0"] * 4 and wrong[PRODUCTS] == [""] * 4
    assert int(wrong[nearest_code.ADDMM][1]) > 0  # clusters are too close for float32
    checked = {row["checked"] for row in rows if row["implementation"] != PRODUCTS}
    assert checked == {"1200", "2048"}  # every row


def test_half_precision_is_left_out_where_it_is_emulated(monkeypatch):
    """What an implementation does with it decides, not what the CPU can do."""

    def sleeps(slow):
        def build(inputs, kind):
            return lambda: time.sleep(slow if inputs["x"].dtype == torch.bfloat16 else 5e-4)

        return bench.Implementation(build)

    case = Case({"N": 4}, "bfloat16")
    toy = bench.Benchmark(
        (case,), Case({"N": 2}),
        lambda case, device: {"x": torch.zeros(case.sizes["N"], dtype=case.torch_dtype)},
        lambda device: {OURS: sleeps(0.02), "slow": sleeps(0.02), "quick": sleeps(5e-4)},
        lambda case, kind: 0,
    )  # fmt: skip
    monkeypatch.setattr(registry, "load", lambda op: toy)
    one = run.Run("clip_loss", run._parse(["--op", "clip_loss"]), False, None)
    status = {name: one._status(case, bench.TRAINING, name) for name in (OURS, "slow", "quick")}
    assert status[OURS] == status["quick"] == "measured"
    assert status["slow"].startswith("skipped: bfloat16 takes ")


def test_labels_stand_in_the_order_of_the_lines():
    """Ours goes on alone, to a higher end than those that stop before."""
    ours, eager = {1: 1.0, 2: 2.0, 4: 9.0}, {1: 1.5, 2: 8.0}
    ends = [(points, name, "", "") for points, name in ((ours, OURS), (eager, EAGER))]
    assert [name for _, name, *_ in plot._lowest_first(ends)] == [OURS, EAGER]


def test_tracked_results_can_be_drawn_and_rows_of_one_size_told_apart():
    for path in run.RESULTS.glob("*-cpu.csv"):
        rows = report.read_csv(path)
        benchmark = registry.load(rows[0].op)
        assert {row.implementation for row in rows} >= {OURS, benchmark.baseline}
        cases = {row.case: plot._short(rows, row.case) for row in rows}
        assert len({*cases.values()}) == len(cases), path


def test_wrong_results_of_ours_are_not_written(tmp_path, unmeasured, monkeypatch, capsys):
    benchmark = registry.load("nearest_code")
    benchmark = dataclasses.replace(benchmark, mistakes=lambda inputs: lambda result: (3, 2048))
    monkeypatch.setattr(registry, "load", lambda op: benchmark)
    arguments = ["--op", "nearest_code", "--quick", "--no-verify", "--out", str(tmp_path / "out")]
    assert run.main([*arguments, "--only", OURS, "--case", "clusters"]) == 1
    assert "tilewise is wrong" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_all_ops_run_and_one_failure_counts(monkeypatch):
    ran = []
    fails = lambda op, *_: ran.append(op) or op == "nearest_code"  # noqa: E731
    monkeypatch.setattr(run, "_run", fails)
    assert run.main(["--op", "all", "--quick"]) == 1 and ran == registry.names()


def test_short_calls_run_just_before_they_are_timed():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure.time_interleaved(run._each_twice(calls), seconds=0)
    assert order[:4] == ["a", "a", "b", "b"] and set(times) > {"a", "b"}


def test_mistakes_are_counted():
    inputs = {"x": torch.arange(100.0)[:, None], "codebook": torch.arange(0, 100, 10.0)[:, None]}
    count = nearest_code.mistakes(inputs)
    nearest = (torch.arange(100) + 4) // 10  # the lower one of two equally near
    assert count((nearest.clamp(max=9),)) == (0, 100)
    assert count((torch.zeros(100, dtype=torch.long),)) == (94, 100)


def test_a_failing_baseline_is_left_out(tmp_path, monkeypatch, capsys):
    """It must not stop the run; our own failure must."""

    def measured(prepare, cases, meter):
        if any(case["implementation"] == broken for case in cases):
            raise RuntimeError("no such kernel")
        return [1] * len(cases)

    monkeypatch.setattr(run, "peak_bytes_each", measured)
    monkeypatch.setattr(run, "time_interleaved", lambda calls, *_: {n: [1.0] for n in calls})
    arguments = ["--op", "sigmoid_loss", "--quick", "--no-verify", "--out", str(tmp_path)]
    broken = EAGER
    assert run.main([*arguments, "--only", OURS, EAGER]) == 0
    assert "no such kernel" in capsys.readouterr().out
    assert "skipped: it fails" in (tmp_path / "sigmoid_loss-cpu.csv").read_text()
    broken = OURS
    with pytest.raises(RuntimeError, match="no such kernel"):
        run.main([*arguments, "--only", OURS, EAGER])


def test_predictions_are_marked():
    gpu = predict.Gpu("toy", tflops=1.0, gb_per_s=1.0, sms=1, ghz=1.0)
    best, worst = predict.bounds_ms(gpu, flops=2 * 10**9, moved=10**6, instructions=128 * 10**6)
    assert (best, worst) == (2.0, 3.0)
    rows = predict.rows("sigmoid_loss", registry.load("sigmoid_loss"))
    assert {row.status for row in rows} == {"predicted"} and not any(row.verified for row in rows)
    for arch in ("sm_80", "sm_89", "sm_90", "sm_100"):
        assert any(arch in row.machine for row in rows)


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A checkout with one commit and whatever tests of sigmoid_loss a test writes."""
    for module in (verify, report):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "tests" / "backends").mkdir(parents=True)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)

    def write(content):
        (tmp_path / "tests" / "backends" / "test_sigmoid_loss_cpu.py").write_text(content)
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "tests"], check=True)

    return write


@pytest.mark.parametrize("content", [None, "def test(): assert False"])
def test_refuses_an_op_that_fails(tmp_path, house, capsys, content):
    """No tests at all; a test that fails, in the file of a backend."""
    if content:
        house(content)
    assert run.main(["--op", "sigmoid_loss", "--quick", "--out", str(tmp_path / "out")]) == 1
    assert "nothing is reported" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


TESTS = """
import os, pytest
@pytest.mark.skip(reason="this CPU has none")
def test_it_cannot(): pass
@pytest.mark.skip(reason="no Triton")
def test_it_could(): pass
def test_device(): assert os.environ["TILEWISE_TEST_DEVICE"] == "{}"
"""


def test_only_what_was_tested_in_full_and_is_committed_is_recorded(tmp_path, house):
    house(TESTS.format("cpu"))
    tests = verify.run_tests("sigmoid_loss", "cpu", run.console)
    assert tests.verified and tests.passed == 1 and tests.left_out == ["no Triton"]
    assert "no Triton" in verify.why_not_record(tests)
    assert "not run" in verify.why_not_record(None)
    complete = verify.Tests(passed=1, failed=False)
    assert verify.why_not_record(complete) == ""
    (tmp_path / "new.py").write_text("")
    assert "commit them first" in verify.why_not_record(complete)
    assert run.main(["--op", "sigmoid_loss", "--record", "--no-verify"]) == 1


def test_tests_of_a_gpu_run_there(house):
    house(TESTS.format("cuda"))
    assert verify.run_tests("sigmoid_loss", "cuda", run.console) == verify.Tests(1, False, [])


def test_part_of_a_run_is_not_recorded():
    with pytest.raises(SystemExit):
        run._parse(["--op", "sigmoid_loss", "--record", "--quick"])
