"""Queues of BLIP's and ALBEF's models as ours."""

import pytest
import torch

import tilewise as tw
from tests.common.quantizer_cases import rows

D, Q = 8, 20


def published(pointer):
    return {
        "temp": torch.tensor(0.03),
        "image_queue": rows(D, Q),
        "text_queue": rows(D, Q, seed=1),
        "idx_queue": torch.arange(Q)[None],
        pointer: torch.tensor([5]),
        "itm_head.bias": torch.zeros(2),
    }


@pytest.mark.parametrize("pointer", ["ptr_queue", "queue_ptr"])
def test_from_blip(pointer):
    state = published(pointer)
    larger = {f"blip.{key}": x for key, x in state.items()}
    for ours in (
        tw.nn.from_blip(state, alpha=0.2), tw.nn.from_blip(larger, prefix="blip.", alpha=0.2)
    ):
        assert (ours.dim, ours.queue_size, ours.alpha) == (D, Q, 0.2)
        assert ours.temperature.item() == pytest.approx(0.03)
        assert torch.equal(ours.image_queue, state["image_queue"].T)
        assert torch.equal(ours.text_queue, state["text_queue"].T)
        assert torch.equal(ours.id_queue, torch.arange(Q)) and ours.queue_pointer == 5
        ours.image_queue.zero_()
        assert state["image_queue"].abs().sum() > 0  # a copy
    del state["idx_queue"]
    assert (tw.nn.from_blip(state).id_queue == -100).all()
    del state[pointer]
    with pytest.raises(ValueError, match="queue_ptr"):
        tw.nn.from_blip(state)
