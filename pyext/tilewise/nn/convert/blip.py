"""BLIP's, ALBEF's and LAVIS's queues as ours."""

from torch import nn

from tilewise.nn.convert._state import StateDict, build, some, state_of
from tilewise.nn.losses.itc_loss import ItcLoss


def from_blip(source: nn.Module | StateDict, *, prefix: str = "", alpha: float = 0.4) -> ItcLoss:
    """An `ItcLoss` with the queues and the temperature of a model of BLIP, ALBEF or LAVIS.

    Args:
        source: the model or its state dict, with `temp` (), `image_queue` and `text_queue` (D, Q),
            `queue_ptr` or `ptr_queue` (1,), and `idx_queue` (1, Q) if it has ids. Other keys change
            nothing.
        prefix: of these keys, where the model is a part of a larger one.
        alpha: as in `ItcLoss`; no state dict says it.

    Returns:
        `ItcLoss`, with copies of these tensors in float32.

    Raises:
        ValueError: one of the keys is missing.
    """
    state = state_of(source, prefix)
    pointer = "ptr_queue" if "ptr_queue" in state else "queue_ptr"
    for key in ("temp", "image_queue", "text_queue", pointer):
        if key not in state:
            raise ValueError(
                f"source: expected the key {key!r} of a BLIP or ALBEF model, got {some(state)}"
            )
    dim, size = state["image_queue"].shape
    ours = {
        "temperature": state["temp"].view(()),
        "image_queue": state["image_queue"].T,
        "text_queue": state["text_queue"].T,
        "queue_pointer": state[pointer].view(()),
    }
    ids = state.get("idx_queue")
    ours["id_queue"] = ItcLoss(1, size).id_queue if ids is None else ids.view(-1)
    return build(ItcLoss, dict(dim=dim, queue_size=size, alpha=alpha), ours, None)
