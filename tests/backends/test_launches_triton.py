"""How many kernels ops start on a GPU: no more than allowed, as the table says, and no waiting."""

import pytest
import torch

from tests.triton_tools import launches

# In all, of torch's and of Triton's; of what is not chunked.
CEILINGS = {
    ("sigmoid_loss", "256", "forward"): 6,
    ("sigmoid_loss", "8192", "forward"): 6,
    ("sigmoid_loss", "256 ids", "forward"): 6,
    ("sigmoid_loss", "2048 float32", "forward"): 6,
    ("sigmoid_loss", "256", "backward"): 3,
    ("clip_loss", "256", "forward"): 8,
    ("clip_loss", "8192", "forward"): 8,
    ("clip_loss", "256 smoothed", "forward"): 8,
    ("clip_loss", "256 ids", "forward"): 8,
    ("clip_loss", "2048 float32", "forward"): 8,
    ("clip_loss", "256", "backward"): 3,
    ("itc_loss", "512 + 57600", "forward"): 14,
    ("itc_loss", "512 + 57600 ids", "forward"): 14,
    ("itc_loss", "512 + 57600", "backward"): 2,
    ("hard_negatives", "256", "forward"): 5,
    ("hard_negatives", "8192", "forward"): 5,
    ("hard_negatives", "256 ids", "forward"): 5,
    ("hard_negatives", "2048 float32", "forward"): 5,
    ("nearest_code", "4096 x 8192 l2", "forward"): 7,
    ("nearest_code", "4096 x 8192 cosine", "forward"): 7,
    ("nearest_code", "4096 x 8192 dot", "forward"): 7,
    ("nearest_code", "16 x 512 l2", "forward"): 1,
    ("nearest_code", "4096 x 8192 prepared", "forward"): 4,
    ("code_sums", "4096 x 8192", "forward"): 6,
    ("code_sums", "262144 x 1024", "forward"): 6,
    ("gumbel_softmax", "256 x 1000 soft", "forward"): 2,
    ("gumbel_softmax", "256 x 1000 soft", "backward"): 2,
    ("gumbel_softmax", "4 x 150000 hard", "forward"): 2,
    ("gumbel_argmax", "256 x 1000 k=4", "forward"): 2,
    ("gumbel_argmax", "4 x 150000 k=None", "forward"): 2,
    ("gumbel_argmax", "4 x 150000 k=4", "forward"): 2,
    ("gaussian_sample", "256 x 1000", "forward"): 2,
    ("gaussian_sample", "4 x 150000", "forward"): 2,
    ("gaussian_sample", "256 x 1000", "backward"): 2,
    ("nn.VectorQuantizer", "training", "step"): 25,
    ("nn.ItcLoss", "training", "step"): 40,
    ("nn.ItcLoss", "training ids", "step"): 40,
}


@pytest.fixture(scope="module")
def table():
    return launches.rows()


def test_table_is_of_this_tree(table):
    """Whoever starts another kernel sees it in the table's diff."""
    rows = [{k: str(v) for k, v in row.line().items()} for row in table]
    assert rows == launches.read_table(), f"renew it: {launches.RENEW}"


def test_no_more_launches_than_allowed(table):
    totals = {(row.of, row.case, row.when): row.total for row in table}
    assert {key: totals[key] for key in CEILINGS if totals[key] > CEILINGS[key]} == {}


@pytest.mark.parametrize("read", [
    lambda x: x.item(), lambda x: x.tolist(), bool, int, lambda x: x.nonzero(), lambda x: x[x > 0],
    lambda x: torch.equal(x, x),
], ids=["item", "tolist", "bool", "int", "nonzero", "mask", "equal"])
def test_waiting_for_the_device_is_refused(read):
    """So the table's calls, which ran, wait for nothing."""
    x = torch.ones(1)
    with pytest.raises(launches.Synchronised), launches.counted():
        read(x)


def test_kernels_are_counted_and_views_are_not():
    x = torch.ones(4, 4)
    with launches.counted() as count:
        torch.empty(3)
        x.t()[1:].unsqueeze(0)
        x[:, :0] + 1
        (x + 1).sum()
    assert count.torch == {"add": 1, "sum": 1} and not count.triton
