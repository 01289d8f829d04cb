"""What benchmarks do on a GPU, with one that writes down what is asked of it."""

import contextlib
import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import run
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
    monkeypatch.setattr(run, "installed", lambda name: name != "siglip_kernel")
    monkeypatch.setattr(run, "_run", lambda *_: 0)
    assert run.main(["--op", "code_sums"]) == 0
    assert "not installed, and not compared with: siglip_kernel" in console.export_text()
