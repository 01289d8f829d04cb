"""What benchmarks do on a GPU, with one that writes down what is asked of it."""

import contextlib
import io
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from benchmarks import baselines, run
from benchmarks.baselines.peers import GPU_PEERS
from benchmarks.harness import bench, gpu, measure, registry, report


class FakeGpu:
    """Stands in torch.cuda's place: a clock that kernels move on, and a log."""

    def __init__(self):
        self.now, self.log, self.capturing, self.fails = 0.0, [], None, False
        self.Stream = lambda: SimpleNamespace(wait_stream=lambda other: None)
        self.current_stream = self.Stream
        self.stream = lambda stream: contextlib.nullcontext()
        self.synchronize = lambda: self.log.append("wait")

    def launch(self, name, milliseconds):
        self.log.append(name)
        if self.capturing is not None:
            self.capturing.append((name, milliseconds))
        else:
            self.now += milliseconds

    def Event(self, enable_timing):
        gpu = self

        class Event:
            def record(self):
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return other.at - self.at

        return Event()

    def _sleep(self, cycles):
        self.launch("sleep", 1.0)

    def CUDAGraph(self):
        kernels = []

        def replay():
            for name, milliseconds in kernels:
                self.launch(f"replayed {name}", milliseconds / 2)

        return SimpleNamespace(kernels=kernels, replay=replay)

    @contextlib.contextmanager
    def graph(self, graph):
        self.capturing = graph.kernels
        try:
            yield
            if self.fails:
                raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            self.capturing = None


@pytest.fixture
def device(monkeypatch):
    fake = FakeGpu()
    monkeypatch.setattr(torch, "cuda", fake)

    def empty(size, dtype, device):
        assert size >= 256 << 20 and device == "cuda"
        return SimpleNamespace(zero_=lambda: fake.launch("flush", 0.2))

    monkeypatch.setattr(torch, "empty", empty)
    return fake


def test_a_cold_call_comes_after_a_flush_and_while_the_host_is_ahead(device):
    assert gpu.cold_ms(lambda: device.launch("call", 3.0), rounds=3) == pytest.approx(3.0)
    assert device.log == ["flush", "sleep", "call"] * 3


def test_a_graph_is_warmed_up_captured_once_and_replayed(device):
    assert gpu.graph_ms(lambda: device.launch("call", 3.0), rounds=3) == pytest.approx(1.5)
    assert device.log == ["call"] * 3 + ["replayed call"] * 4


def test_what_cannot_be_captured_has_no_graph_time(device):
    device.fails = True
    assert gpu.graph_ms(lambda: device.launch("call", 3.0)) is None
    assert device.log[-1] == "wait"


def test_wall_clock_waits_for_the_device(device):
    measure.time_once(lambda: device.launch("call", 3.0), "cuda")
    assert device.log == ["wait", "call", "wait"]


@pytest.mark.parametrize("there, status, expected", [
    (False, 0, ""), (True, 9, ""), (True, 0, "1980 MHz, 2619 MHz, 40, 300 W, 0x0"),
])
def test_clocks(monkeypatch, there, status, expected):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if there else None)
    done = SimpleNamespace(returncode=status, stdout="1980 MHz, 2619 MHz, 40, 300 W, 0x0\nsecond")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: done)
    assert gpu.clocks() == expected


def test_rows_have_all_three_times_and_are_shown(monkeypatch, tmp_path):
    for name, value in (("graph_ms", 0.5), ("cold_ms", 2.0), ("clocks", "1980 MHz")):
        monkeypatch.setattr(gpu, name, lambda *_, value=value: value)
    monkeypatch.setattr(run.report, "machine", lambda device: ("NVIDIA H100", 8))
    times = {name: [4.0, 4.0] for name in (bench.OURS, bench.EAGER)}
    monkeypatch.setattr(run, "time_interleaved", lambda calls, *_: times)
    monkeypatch.setattr(run, "_memory_cap", lambda device: 80.0)
    options = run._parse(["--op", "code_sums", "--only", bench.OURS, bench.EAGER, "--quick"])
    options.device = "cuda"
    benchmark = registry.load("code_sums")
    monkeypatch.setattr(type(benchmark), "small_call", lambda *_: lambda: None)
    fake = SimpleNamespace(build=lambda inputs, kind: lambda: (torch.zeros(1),), needs=lambda _: 0)
    monkeypatch.setattr(run, "_chosen", lambda found, options: dict.fromkeys(times, fake))
    one = run.Run("code_sums", options, True, None)
    case = one.cases[0]
    rows = [one._row(case, case.kinds[0], name) for name in times]
    one.benchmark = SimpleNamespace(
        inputs=lambda case, device: {}, small_call=lambda *_: lambda: None, short=False,
        mistakes=None,
    )
    one._add_times(case, case.kinds[0], rows)
    assert {(r.median_ms, r.graph_ms, r.cold_ms, r.clocks) for r in rows} == {
        (4.0, 0.5, 2.0, "1980 MHz")
    }
    report.write_csv(rows, tmp_path / "rows.csv")
    assert report.read_csv(tmp_path / "rows.csv") == rows
    console = Console(width=150, record=True, file=io.StringIO())
    report.print_tables(rows, console)
    shown = console.export_text()
    assert "graph" in shown and "cold" in shown and "NVIDIA H100" in shown
    assert "verified: the op's tests ran on this device" in shown


def test_peers_that_are_missing_are_named(monkeypatch):
    console = Console(width=150, record=True, file=io.StringIO())
    monkeypatch.setattr(run, "console", console)
    monkeypatch.setattr(run, "installed", lambda name: name not in ("memeff", "open_clip"))
    monkeypatch.setattr(run, "_run", lambda *_: 0)
    assert run.main(["--op", "code_sums"]) == 0
    line = "not installed, and not compared with: open_clip"
    assert console.export_text().strip() == line  # of those for a CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run.main(["--op", "code_sums", "--device", "cuda"]) == 0
    assert console.export_text().strip() == f"{line}, memeff"


# What packages for GPUs compute, as they say, in their own words and shapes


class Temperature(torch.nn.Module):
    """memeff's."""

    def __init__(self, temperature=0.07, normalized_inputs=False, stable=True):
        super().__init__()
        assert isinstance(temperature, float) and normalized_inputs and not stable
        self.scale = 1 / temperature

    def forward(self, image_features, text_features):
        return baselines.eager_clip_loss(image_features, text_features, self.scale)


def by_heads(q, k, labels=None, scale=None, head_dim=256):
    """Inf-CL's, for each row."""
    q, k = ((x.view(len(x), -1, head_dim).float()) for x in (scale * q, k))
    logits = torch.einsum("mhd,nhd->mn", q, k)
    return F.cross_entropy(logits, torch.arange(len(q)), reduction="none")


def classifier(e, c, targets, filter_eps="high"):
    """Cut cross-entropy's, which leaves out small gradients unless it is told not to."""
    assert filter_eps is None and e.dtype == c.dtype
    return F.cross_entropy((e @ c.T).float(), targets)


def with_the_logarithm(image, text, log_scale, bias):
    """siglip_kernel's."""
    return baselines.eager_sigmoid_loss(image, text, log_scale.exp(), bias)


def of_batches(x, centroids, x_sq):
    """flash-kmeans'."""
    assert x_sq.dtype == torch.float32 and x_sq.shape == x.shape[:2]
    return torch.cdist(x, centroids).argmin(2).int()


STAND_INS = {
    "memeff": {"MemoryEfficientCLIPLoss": Temperature},
    "inf_cl.flash": {"cal_flash_loss": by_heads},
    "cut_cross_entropy": {"linear_cross_entropy": classifier},
    "siglip_kernel": {"fused_siglip_loss": with_the_logarithm},
    "flash_kmeans.assign_euclid_triton": {"euclid_assign_triton": of_batches},
}


@pytest.mark.parametrize("op", ["sigmoid_loss", "clip_loss", "info_nce", "nearest_code"])
def test_peers_for_gpus_agree(monkeypatch, op):
    for name, content in STAND_INS.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    cpu = baselines.installed
    monkeypatch.setattr(baselines, "installed", lambda name: name in GPU_PEERS or cpu(name))
    benchmark = registry.load(op)
    peers = benchmark.implementations("cuda")
    peers = {name: peers[name] for name in GPU_PEERS if name in peers}
    assert peers
    inputs = benchmark.inputs(benchmark.small, "cpu")
    kind = benchmark.small.kinds[0]
    expected = benchmark.implementations("cpu")[bench.OURS].build(inputs, kind)()
    for name, made in peers.items():
        result = made.build(inputs, kind)()
        assert len(result) >= len(expected) - (name == "memeff")  # whose scale is a number
        for mine, ours in zip(result, expected, strict=False):
            torch.testing.assert_close(mine, ours, rtol=1e-4, atol=1e-6, msg=name)


def test_a_gpu_has_cases_of_its_own():
    cases = registry.load("sigmoid_loss").cases
    options, found = run._parse(["--op", "sigmoid_loss"]), {}
    for device in ("cpu", "cuda"):
        options.device = device
        found[device] = {case.label for case in run._chosen_cases(cases, options)}
    more = found["cuda"] - found["cpu"]
    assert more == {
        f"B=16384 D=512 {kind}"
        for kind in ("bfloat16", "float16", "float32 by TF32", "float32 by bfloat16")
    }
    assert found["cpu"] < found["cuda"]


def test_each_case_is_measured_in_its_precision(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", seen.append)
    monkeypatch.setattr(run, "time_interleaved", lambda *_: {})
    options = run._parse(["--op", "sigmoid_loss", "--quick"])
    one = run.Run("sigmoid_loss", options, True, None)
    one.benchmark = SimpleNamespace(inputs=lambda *_: {}, short=False, mistakes=None)
    for case in bench.on_gpu({"B": 8, "D": 4}):
        one._add_times(case, case.kinds[0], [])
    assert seen == ["highest", "highest", "high", "medium"]


def test_a_peer_that_fails_is_left_out(monkeypatch):
    def fails():
        raise AssertionError("not on this GPU")

    options = run._parse(["--op", "sigmoid_loss", "--quick"])
    one = run.Run("sigmoid_loss", options, True, None)
    monkeypatch.setattr(run, "time_interleaved", lambda *_: {})
    case = one.cases[0]
    one.benchmark = SimpleNamespace(
        inputs=lambda *_: {}, small_call=lambda *_: fails, short=False, mistakes=None
    )
    row = report.Row("sigmoid_loss", case.label, case.kinds[0], "peer", report.MEASURED, True,
                     "float32", case.sizes_text)  # fmt: skip
    one._add_times(case, case.kinds[0], [row])
    assert row.status == "skipped: it fails"
    row.implementation, row.status = bench.OURS, report.MEASURED
    with pytest.raises(AssertionError, match="not on this GPU"):
        one._add_times(case, case.kinds[0], [row])
