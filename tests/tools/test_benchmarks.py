"""The benchmarks measure what they say, and report nothing that was not verified."""

import csv
import dataclasses
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import tilewise as tw
from benchmarks import nearest_code, run
from benchmarks.baselines import SOFTMAX
from benchmarks.harness import measure, predict, registry
from benchmarks.harness.registry import EAGER, OURS, PRODUCTS

MIB = 2**20
# No two calls agree.
RANDOM = {"gaussian_sample", "gumbel_argmax", "gumbel_softmax", "hard_negatives"}


def prepare_allocation(mib: int, spared: int = 32):
    """A call that touches `mib` MiB and returns a number; its input must not count."""
    x = torch.ones(spared * MIB // 4)
    return lambda: float(torch.full((mib * MIB // 4,), 2.0)[-1] + x[-1])


def prepare_failure():
    raise ValueError("no such case")


def test_peak_bytes_sees_what_is_freed_again():
    assert measure.peak_bytes(prepare_allocation, mib=96) == pytest.approx(96 * MIB, rel=0.05)


def test_peak_bytes_of_each_call_is_its_own():
    cases = [{"mib": 128}, {"mib": 64}, {"mib": 96}]
    peaks = measure.peak_bytes_each(prepare_allocation, cases)
    assert peaks == pytest.approx([case["mib"] * MIB for case in cases], rel=0.05)


def test_peak_bytes_passes_errors_on():
    with pytest.raises(RuntimeError, match="no such case"):
        measure.peak_bytes(prepare_failure)
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


@pytest.mark.parametrize("op", sorted({*registry.names()} - RANDOM))
def test_candidates_agree(op):
    benchmark = registry.load(op)
    inputs = benchmark.inputs(benchmark.small, "cpu")
    with tw.backend("reference"):
        main = benchmark.small.kinds[0]
        expected = benchmark.candidates("cpu")[OURS].build(inputs, main)()
    for name, candidate in benchmark.candidates("cpu").items():
        if name != PRODUCTS:
            for kind in benchmark.small.kinds:
                result = candidate.build(inputs, kind)()
                torch.testing.assert_close(
                    result, expected[: len(result)], rtol=1e-3, atol=1e-6, msg=f"{name}, {kind}"
                )


@pytest.mark.parametrize("op", sorted(RANDOM))
def test_random_candidates_have_one_law(op):
    torch.manual_seed(0)
    benchmark = registry.load(op)
    inputs = benchmark.inputs(benchmark.small, "cpu")
    weights = weights_of(inputs)
    for kind in benchmark.small.kinds:
        with tw.backend("reference"):
            expected = benchmark.candidates("cpu")[OURS].build(inputs, kind)()
        for name, candidate in benchmark.candidates("cpu").items():
            if name not in (SOFTMAX, PRODUCTS):  # they draw nothing
                result = candidate.build(inputs, kind)()
                assert len(result) == len(expected)
                for mine, theirs, weight in zip(result, expected, weights, strict=False):
                    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
                    assert_same_means(mine, theirs, weight, f"{name}, {kind}")


def weights_of(inputs):
    """For each result the logits that it was drawn by, or something else of its shape."""
    if "text" in inputs:
        logits = inputs["image"] @ inputs["text"].T
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


def test_flops_are_those_of_the_bare_products(op):
    benchmark = registry.load(op)
    if PRODUCTS not in benchmark.candidates("cpu"):
        assert benchmark.flops(benchmark.small, benchmark.small.kinds[0]) == 0
        return
    inputs = benchmark.inputs(benchmark.small, "cpu")
    for kind in benchmark.small.kinds:
        call = benchmark.candidates("cpu")[PRODUCTS].build(inputs, kind)
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == benchmark.flops(benchmark.small, kind)


def test_cases_can_be_told_apart(op):
    benchmark = registry.load(op)
    for case in benchmark.cases:
        assert benchmark.case(case.label) is case
    assert any(case.quick for case in benchmark.cases)
    assert benchmark.baseline in benchmark.candidates("cpu")


def test_quick_run_reports(tmp_path, capsys):
    """Eager does not fit at the largest quick size, and no test was run: every row says so."""
    arguments = ["--op", "sigmoid_loss", "--quick", "--no-verify", "--memory-cap", "0.05"]
    status = run.main([*arguments, "--only", OURS, EAGER, "--out", str(tmp_path)])
    assert status == 0 and "NOT VERIFIED" in capsys.readouterr().out
    for what in ("time", "memory"):
        picture = (tmp_path / f"sigmoid_loss-cpu-{what}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000

    with (tmp_path / "sigmoid_loss-cpu.csv").open() as file:
        small, small_eager, large, large_eager = csv.DictReader(file)
    assert [row["candidate"] for row in (small, small_eager)] == [OURS, EAGER]
    assert large_eager["status"] == "skipped: needs 0.11 GB" and not large_eager["median_ms"]
    for row in (small, small_eager, large):
        assert (row["status"], row["verified"]) == ("measured", "False")
        assert 0 < float(row["q25_ms"]) <= float(row["median_ms"]) <= float(row["q75_ms"])
        assert int(row["rounds"]) >= 5 and row["torch"] == torch.__version__ and row["machine"]
    gradients = 2 * 2048 * 512 * 4
    assert gradients <= int(large["peak_bytes"]) < 4 * gradients


@pytest.fixture
def unmeasured(monkeypatch):
    """Candidates run, but nothing is measured."""
    monkeypatch.setattr(run, "peak_bytes_each", lambda prepare, cases: [2**20] * len(cases))
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
    assert {row["data"] for row in rows} == {"", "16 clusters"}
    wrong = {name: [row["wrong"] for row in rows if row["candidate"] == name]
             for name in (OURS, PRODUCTS, nearest_code.ADDMM)}  # fmt: skip
    assert wrong[OURS] == ["0", "0"] and wrong[PRODUCTS] == ["", ""]
    assert int(wrong[nearest_code.ADDMM][1]) > 0  # clusters are too close for float32
    assert all(int(row["checked"]) == 2048 for row in rows if row["candidate"] != PRODUCTS)


@pytest.mark.parametrize("missing", [True, False])
def test_bfloat16_is_left_to_ours_where_the_cpu_has_none(monkeypatch, missing):
    monkeypatch.setattr(run, "no_bfloat16", lambda: missing)
    options = run._parse(["--op", "clip_loss", "--memory-cap", "100"])
    one = run.Run("clip_loss", options, verified=False)
    case = one.benchmark.case("B=8192 D=512 bfloat16")
    assert one._status(case, OURS) == "measured"
    assert (one._status(case, EAGER) == "measured") != missing


def test_wrong_results_of_ours_are_not_written(tmp_path, unmeasured, monkeypatch, capsys):
    benchmark = registry.load("nearest_code")
    benchmark = dataclasses.replace(benchmark, mistakes=lambda inputs: lambda result: (3, 2048))
    monkeypatch.setattr(registry, "load", lambda op: benchmark)
    arguments = ["--op", "nearest_code", "--quick", "--no-verify", "--out", str(tmp_path / "out")]
    assert run.main([*arguments, "--only", OURS, "--case", "clusters"]) == 1
    assert "tilewise is wrong" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_all_ops_run_and_one_failure_counts(monkeypatch):
    ran = []
    monkeypatch.setattr(run, "_run", lambda op, options: ran.append(op) or op == "nearest_code")
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


def test_a_failing_yardstick_is_left_out(tmp_path, monkeypatch, capsys):
    """It must not stop the run; our own failure must."""

    def measured(prepare, cases):
        if any(case["candidate"] == broken for case in cases):
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


@pytest.mark.parametrize("content", [None, "def test(): assert False", "def test(: broken"])
def test_refuses_an_op_that_fails(tmp_path, monkeypatch, capsys, content):
    """No tests at all, tests that fail, tests that cannot run."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    if content:
        (tmp_path / "tests" / "ops" / "test_sigmoid_loss.py").write_text(content)
    assert run.main(["--op", "sigmoid_loss", "--quick", "--out", str(tmp_path / "out")]) == 1
    assert "nothing is reported" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_verifies_an_op_that_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "tests" / "ops").mkdir(parents=True)
    (tmp_path / "tests" / "ops" / "test_sigmoid_loss.py").write_text("def test(): pass")
    assert run.verify("sigmoid_loss")
