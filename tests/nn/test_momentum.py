"""momentum_update: a teacher that follows its student."""

import copy

import pytest
import torch
from torch import nn

import tilewise as tw
from tests.common.quantizer_cases import NoHostReads, rows


def towers():
    """A student, and a teacher with other weights and statistics."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    teacher = copy.deepcopy(student).requires_grad_(False)
    for x in (*student.parameters(), *student.buffers()):
        x.data += 1
    return teacher, student


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.995, 1.0])
def test_steps_are_published(momentum):
    """As in BLIP, for three steps of a student that moves."""
    teacher, student = towers()
    expected = [p.double() for p in teacher.parameters()]
    for step in range(3):
        tw.nn.momentum_update(teacher, student, momentum)
        expected = [
            e * momentum + p.detach() * (1 - momentum)
            for e, p in zip(expected, student.parameters(), strict=True)
        ]
        for p, e in zip(teacher.parameters(), expected, strict=True):
            torch.testing.assert_close(p.double(), e, rtol=1e-6, atol=1e-7)
        student[0].weight.data += rows(6, 4, seed=step)


def test_default_is_blips():
    teacher, student = towers()
    other = copy.deepcopy(teacher)
    tw.nn.momentum_update(teacher, student)
    tw.nn.momentum_update(other, student, 0.995)
    assert torch.equal(teacher[0].weight, other[0].weight)


def test_buffers_and_the_student_stay():
    teacher, student = towers()
    buffers, before = copy.deepcopy(list(teacher.buffers())), copy.deepcopy(student.state_dict())
    tw.nn.momentum_update(teacher, student, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(teacher.buffers(), buffers, strict=True))
    assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())


def test_parameters_are_moved_in_place_and_without_a_graph():
    teacher, student = towers()
    teacher.requires_grad_()
    weight = teacher[0].weight
    before = weight.detach().clone()
    with NoHostReads():
        tw.nn.momentum_update(teacher, student)
    assert teacher[0].weight is weight and weight.grad_fn is None
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_student_of_another_dtype(dtype):
    teacher, student = towers()
    expected = teacher[0].weight + 0.5 * (student[0].weight.to(dtype).float() - teacher[0].weight)
    tw.nn.momentum_update(teacher, student.to(dtype), 0.5)
    assert teacher[0].weight.dtype == torch.float32
    torch.testing.assert_close(teacher[0].weight, expected.detach())


def test_wrapped_students_and_modules_without_parameters():
    teacher, student = towers()
    tw.nn.momentum_update(teacher, nn.Sequential(student), 0.0)
    assert torch.equal(teacher[2].weight, student[2].weight)
    tw.nn.momentum_update(nn.ReLU(), nn.ReLU())


@pytest.mark.parametrize("student, momentum, text", [
    (lambda x: x[:2], 0.9, "student: expected 6 parameters like teacher, got 4"),
    (lambda x: nn.Sequential(x[0], x[1], nn.Linear(6, 3)), 0.9,
     r"student: expected shape \(2, 6\) like the teacher's 2.weight, got \(3, 6\)"),
    (lambda x: x, 1.1, "momentum: expected from 0 to 1, got 1.1"),
    (lambda x: x, float("nan"), "momentum: expected from 0 to 1, got nan"),
])
def test_wrong_arguments(student, momentum, text):
    teacher, other = towers()
    before = copy.deepcopy(teacher.state_dict())
    with pytest.raises(ValueError, match=text):
        tw.nn.momentum_update(teacher, student(other), momentum)
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())


@pytest.mark.parametrize("name", ["teacher", "student"])
def test_no_module(name):
    modules = {"teacher": nn.Linear(2, 2), "student": nn.Linear(2, 2)} | {name: None}
    with pytest.raises(TypeError, match=f"^{name}: .*NoneType"):
        tw.nn.momentum_update(**modules)
