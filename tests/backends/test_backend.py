"""Choice of the backend that serves a call, and life without the extension."""

import warnings

import pytest
import torch

import tilewise as tw
from tests.common import fresh
from tilewise import _backend, _extension

X, Y = torch.randn(5, 4), torch.randn(5, 4)
BROKEN_EXTENSION = """
import importlib.abc, sys
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "tilewise._C":
            raise ImportError("compiled for torch 1")
sys.meta_path.insert(0, Broken())
"""
USE = """
import torch, tilewise as tw, warnings
x = torch.randn(5, 4, requires_grad=True)
"""


def run(code, absent=None, prelude="", **environment):
    if absent:
        prelude = f"import sys; sys.modules[{absent!r}] = None"
    return fresh.run(prelude + USE + code, **environment)


def test_backend_forces_and_restores():
    with tw.backend("reference"):
        inside = tw.sigmoid_loss(X, Y, 10.0)
        with tw.backend("cpu"):
            assert _backend.choose(X.device, X.dtype) == "cpu"
        assert _backend.choose(X.device, X.dtype) == "reference"
    assert _backend.choose(X.device, X.dtype) == "cpu"
    torch.testing.assert_close(inside, tw.sigmoid_loss(X, Y, 10.0))


def test_backend_is_restored_after_an_error():
    with pytest.raises(KeyError), tw.backend("reference"):
        raise KeyError
    assert _backend.choose(X.device, X.dtype) == "cpu"


def test_reference_can_be_differentiated_twice():
    x = X.clone().requires_grad_()
    with tw.backend("reference"):
        gradient, = torch.autograd.grad(tw.sigmoid_loss(x, Y, 10.0), x, create_graph=True)
    assert gradient.requires_grad


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="nonsense.*reference"), tw.backend("nonsense"):
        pass
    child = run("tw.sigmoid_loss(x, x, 1.0)", TILEWISE_BACKEND="nonsense")
    assert "ValueError: TILEWISE_BACKEND='nonsense'" in child.stderr


def test_environment_variable():
    child = run("print(tw.sigmoid_loss(x, x, 1.0).grad_fn.name())", TILEWISE_BACKEND="reference")
    assert child.returncode == 0 and "tilewise" not in child.stdout.lower(), child.stderr


def rows_of(text):
    """{op: what serves CPU tensors} of what `tw.backends` printed, and the lines below."""
    head, names, *lines = text.splitlines()
    assert head.startswith("backend: ") and names.split()[:3] == ["op", "CPU", "tensors"]
    rows = [line.split(maxsplit=1) for line in lines[: len(_backend.ops())]]
    assert [op for op, _ in rows] == _backend.ops()
    return dict(rows), lines[len(rows) :]


def test_backends_prints_a_row_for_each_op(capsys, monkeypatch):
    info = _extension.build_info()
    tw.backends()
    rows, _ = rows_of(capsys.readouterr().out)
    cpu = f"cpu: C++ {info['cpu_capability']}"
    assert rows["nearest_code"].startswith(f"{cpu}, integer unit {info['integer_unit']}")
    how = {"none": "as float32", "amx": "with amx", "avx512_bf16": "with avx512_bf16"}
    assert rows["clip_loss"] == f"{cpu}, multiplies bfloat16 {how[info['bfloat16_unit']]}"
    assert all(row.startswith(cpu) for row in rows.values())
    monkeypatch.setattr(_backend, "_interpreted", False)
    monkeypatch.setattr(_backend, "_has_triton", False)
    monkeypatch.setattr(_extension, "why_missing", "no compiler")
    tw.backends()
    rows, reasons = rows_of(capsys.readouterr().out)
    assert all(row.startswith("reference") for row in rows.values())
    assert reasons == ["cpu doesn't serve: no compiler",
                       "triton doesn't serve: Triton is not installed"]
    with tw.backend("triton"):
        tw.backends()
    rows, _ = rows_of(capsys.readouterr().out)
    assert all(row.startswith("none (triton was asked for)") for row in rows.values())


def test_without_the_extension_the_reference_serves_after_one_warning():
    child = run("""
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        tw.sigmoid_loss(x, x, 1.0, -1.0).backward()
print(len(caught), caught[0].message, caught[0].filename, x.grad.norm() > 0)
tw.backends()
try:
    with tw.backend("cpu"):
        tw.sigmoid_loss(x, x, 1.0)
except RuntimeError as error:
    print(error)
""", absent="tilewise._C")
    assert child.returncode == 0, child.stderr
    lines = child.stdout.splitlines()
    assert lines[0].startswith("1 tilewise: no kernel serves this call") and "True" in lines[0]
    assert "<string>" in lines[0]  # the warning points at the caller's line
    assert "cpu doesn't serve: the C++ extension is not built" in child.stdout
    assert "is not built" in lines[-1]


def test_an_extension_that_does_not_load_is_explained():
    child = run("tw.backends()", prelude=BROKEN_EXTENSION)
    assert child.returncode == 0 and "does not load: compiled for torch 1" in child.stdout


def test_a_binary_for_another_torch_is_refused():
    pretend = (
        "import importlib.metadata, torch\n"
        "torch.__version__ = '1.0.0+cpu'; importlib.metadata.version = lambda name: '1.0.0'\n"
    )
    use = "import tilewise as tw; tw.backends(); x = torch.ones(2, 2); tw.sigmoid_loss(x, x, 1)"
    child = fresh.run(pretend + use)
    assert child.returncode == 0, child.stderr
    assert "built for torch 2" in child.stdout and "running torch 1.0.0" in child.stdout
    assert "no kernel serves" in child.stderr


def test_import_without_triton():
    child = run("print(tw.sigmoid_loss(x, x, 1.0).item() > 0); tw.backends()", absent="triton")
    assert child.returncode == 0 and child.stdout.startswith("True"), child.stderr
    assert "Triton is not installed" in child.stdout


def test_triton_on_a_cpu_needs_its_interpreter():
    child = run("with tw.backend('triton'): tw.sigmoid_loss(x, x, 1.0)", TRITON_INTERPRET="0")
    assert "RuntimeError: backend 'triton' was asked for but can't serve" in child.stderr
    child = run("with tw.backend('triton'): print(tw.sigmoid_loss(x, x, 1.0).item() > 0)",
                TRITON_INTERPRET="1")
    assert child.stdout.strip() == "True", child.stderr


def test_triton_refuses_float64():
    with tw.backend("triton"), pytest.raises(RuntimeError, match="no float64"):
        tw.sigmoid_loss(X.double(), Y.double(), 10.0)


def test_importing_is_quiet_and_light():
    child = run("import sys; print({'triton', 'matplotlib', 'rich'} & set(sys.modules))")
    assert child.stdout.strip() == "set()" and child.stderr == ""


def test_other_devices_fall_back():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loss = tw.sigmoid_loss(X.to("meta"), Y.to("meta"), 10.0)
    assert loss.device.type == "meta" and loss.shape == ()
    with tw.backend("cpu"), pytest.raises(RuntimeError, match="CPU tensors.*meta"):
        tw.sigmoid_loss(X.to("meta"), Y.to("meta"), 10.0)
