"""momentum_update: a teacher that follows its student slowly."""

from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tilewise.ops import _arguments


def momentum_update(teacher: nn.Module, student: nn.Module, momentum: float = 0.995) -> None:
    """Moves the parameters of a teacher towards those of its student, in place.

        teacher = momentum * teacher + (1 - momentum) * student

    Args:
        teacher: usually begins as `copy.deepcopy(student).requires_grad_(False)`. Better in float32
            than in half precision, whose rounding swallows steps this small.
        student: a module with as many parameters, of the same shapes in the same order; another
            dtype or device is converted. Names may differ, so wrapped modules will do.
        momentum: from 0 to 1; BLIP's and ALBEF's is 0.995, MoCo's 0.999.

    Buffers stay as they are, as published: in training mode, a teacher with batch normalisation
    gathers statistics of its own.

    Raises:
        ValueError: momentum out of its range, or parameters that do not match: nothing has moved.
        TypeError: what is no module.

    Cost: one pass over the parameters, nothing waits for a GPU.

    Paper: He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020.

    Example:
        >>> teacher = copy.deepcopy(tower).requires_grad_(False)
        >>> tw.nn.momentum_update(teacher, tower)  # before the teacher sees a batch
    """
    _arguments.check_between("momentum", momentum, 0, 1)
    for argument, module in (("teacher", teacher), ("student", student)):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{argument}: expected a module, got {type(module).__name__}")
    ours, theirs = list(teacher.named_parameters()), list(student.parameters())
    if len(ours) != len(theirs):
        raise ValueError(
            f"student: expected {len(ours)} parameters like teacher, got {len(theirs)}"
        )
    for (name, p), q in zip(ours, theirs, strict=True):
        if p.shape != q.shape:
            raise ValueError(
                f"student: expected shape {tuple(p.shape)} like the teacher's {name}, "
                f"got {tuple(q.shape)}"
            )
    if ours:
        kept = [p.detach() for _, p in ours]
        wanted = [q.detach().to(p) for p, q in zip(kept, theirs, strict=True)]
        get_ema_multi_avg_fn(momentum)(kept, wanted, 0)
