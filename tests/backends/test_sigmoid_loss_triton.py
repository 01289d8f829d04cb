"""The Triton backend of sigmoid_loss, in the interpreter: what no other op promises."""

import pytest
import torch

import tilewise as tw
from tests.backends.contrast_adapters import SIGMOID, features
from tests.common.contrastive_cases import Case, related
from tests.ops.test_sigmoid_loss import outputs
from tests.triton_tools.checker import MemoryFault, checked
from tilewise.kernels import sigmoid_loss as kernels
from tilewise.kernels._contrast import Launch


def test_checker_sees_a_workspace_without_room_for_whole_tiles(monkeypatch):
    case = Case("small", related(33, 40, 16))
    monkeypatch.setattr(Launch, "workspace", lambda self, image, size: image.new_empty(size))
    with pytest.raises(MemoryFault), checked(SIGMOID.outputs):
        SIGMOID.run(case, features(case, torch.bfloat16))


@pytest.mark.parametrize("z", [1.0, 20.0, 60.0])
def test_a_well_separated_pair_keeps_its_digits(z):
    """softplus(z) - z would be 0 or rounding noise from z = 17 on."""
    one = torch.ones(1, 1)
    loss, d_image, *_ = kernels.sigmoid_loss(
        one, one, torch.tensor(z), None, 0, None, None, *[True] * 4
    )
    exact = torch.nn.functional.softplus(torch.tensor(-z, dtype=torch.float64))
    tiny = torch.sigmoid(torch.tensor(-z, dtype=torch.float64))
    assert abs(loss / exact - 1) < 2e-5 and abs(d_image / (-z * tiny) - 1) < 2e-5


def test_float16_negatives_do_not_flush_to_zero():
    """sigmoid(-16) / B is far below float16's range, and all that these gradients consist of."""
    case = Case("negatives", related(64, 64, 16), logit_scale=1.0, logit_bias=-16.0, positives=None)
    tensors = features(case, torch.float16)
    exact = [x.double() for x in tensors.values()]
    truth = outputs(tw.reference.sigmoid_loss, case, exact, torch.float64)
    got = SIGMOID.run(case, tensors)[1].double()
    assert (got - truth["d_image"]).norm() < 1e-3 * truth["d_image"].norm()
