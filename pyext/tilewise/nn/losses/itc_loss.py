"""ItcLoss: BLIP's and ALBEF's image-text contrast, with its queues and its temperature."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tilewise import _backend
from tilewise.distributed import Peers
from tilewise.nn import _sync
from tilewise.nn._precision import without_halving
from tilewise.nn.losses import _ring, _ring_itc
from tilewise.ops import _arguments
from tilewise.ops._register import define
from tilewise.ops.itc_loss import itc_loss

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup

LOWEST, HIGHEST = 0.001, 0.5  # temperature
FEATURES = (
    "image_features", "text_features", "teacher_image_features", "teacher_text_features",
)  # fmt: skip
NO_ID = -100  # of a place in the queue that no id was given for


class ItcLoss(nn.Module):
    r"""Image-text contrast with the features of earlier batches, which it keeps in two queues.

        loss = 1/2 itc(image; teacher_text, text_queue) + 1/2 itc(text; teacher_image, image_queue)

    where `itc` is `tilewise.itc_loss` with logit_scale = 1 / temperature. Queries come from the
    student, candidates and soft targets from the teacher, which `tilewise.nn.momentum_update`
    moves. In training the teacher's features then take the place of the oldest ones in the queues.

    Args:
        dim: D, channels of the features.
        queue_size: Q, how many features each queue keeps. 0: no queue.
        alpha: from 0 to 1, the teacher's part of the targets. With a float 0 the teacher's logits
            are not computed: MoCo's targets, at half the cost.
        temperature: that learning begins with: a parameter, which divides the products. Each call
            first clamps it to [0.001, 0.5].
        group: processes whose pairs are candidates of each other, `torch.distributed.group.WORLD`
            for all (which is None before `init_process_group`). None: a process has its own pairs
            and the queue, as in BLIP.

    Raises:
        ValueError, TypeError: an argument out of its range; with a group all processes raise it,
            also where they differ in D, dtype or options.
        RuntimeError: a process of the group that was lost, by name.

    State dict: `temperature` () float32, `image_queue` and `text_queue` (Q, D) float32, `id_queue`
    (Q,) int64, `queue_pointer` () int64: the oldest place, which is written to next. Queues begin
    with random unit rows, and with ids of -100. `.to(dtype)` also converts the queues, which saves
    their memory and a conversion in each call where features have that dtype; the temperature stays
    in float32 at least, since a step of an optimiser would be lost in half precision.
    `tilewise.nn.from_blip` reads the queues of BLIP's, ALBEF's and LAVIS's checkpoints.

    In evaluation, nothing is enqueued. Calling forward twice on a batch (activation checkpointing)
    enqueues it twice. A NaN of the teacher stays until it is overwritten.

    Nothing waits for a GPU, except that with torch.distributed the first call in training compares
    how many rows the processes have. On CPUs every call does; compiled ones never do.

    With torch.distributed and no group, as published, each process contrasts its own batch with the
    queues, and enqueues the features of all processes, which must have the same number of rows.
    With a group, it has the features of all as candidates, whose numbers may differ and be 0; its
    loss is the sum over its own pairs, over the mean number of pairs: the mean of all processes'
    losses is the loss of one with all pairs, as is training under DistributedDataParallel. All must
    then multiply the loss by the same number. Either way queues that begin alike stay alike, and
    are those of one process; DistributedDataParallel makes them alike, as every buffer.

    Differences to BLIP: a batch need not divide the queue. Queues are (Q, D), not (D, Q).

    Cost: two calls of `tilewise.itc_loss`, so 8 matrix products of B * (B + Q) * D, and B rows
    written to the queues: no matrix of B x (B + Q), no copy of a queue in its own dtype. With a
    group of W the B candidates are W * B, and memory is as much whatever W: the teacher's features
    go round a ring, which each process sends W - 1 times.

    Papers: Li et al., Align before Fuse: Vision and Language Representation Learning with Momentum
    Distillation, NeurIPS 2021; Li et al., BLIP: Bootstrapping Language-Image Pre-training for
    Unified Vision-Language Understanding and Generation, ICML 2022.

    Example:
        >>> loss = tw.nn.ItcLoss(dim=256)
        >>> teacher = copy.deepcopy(towers).requires_grad_(False)
        >>> for step, (image, text) in enumerate(batches):
        ...     tw.nn.momentum_update(teacher, towers)
        ...     with torch.no_grad():
        ...         targets = teacher(image, text)
        ...     alpha = 0.4 * min(1, step / (2 * steps_per_epoch))
        ...     loss(*towers(image, text), *targets, alpha=alpha).backward()
    """

    image_queue: Tensor
    text_queue: Tensor
    id_queue: Tensor
    queue_pointer: Tensor

    __call__: Callable[..., Tensor]  # nn.Module's returns Any

    def __init__(
        self,
        dim: int,
        queue_size: int = 57600,
        alpha: float = 0.4,
        temperature: float = 0.07,
        *,
        group: ProcessGroup | None = None,
    ):
        super().__init__()
        self.group = group
        self.dim = _arguments.integer("dim", dim, least=1)
        self.queue_size = _arguments.integer("queue_size", queue_size, least=0)
        _arguments.check_between("alpha", alpha, 0, 1)
        _arguments.check_between("temperature", temperature, LOWEST, HIGHEST)
        self.alpha = alpha
        self._rows_checked = False
        self.temperature = nn.Parameter(torch.tensor(temperature, dtype=torch.float32))
        for name in ("image_queue", "text_queue"):
            rows = torch.randn(self.queue_size, self.dim, dtype=torch.float32)
            self.register_buffer(name, F.normalize(rows, dim=1))
        self.register_buffer("id_queue", torch.full((queue_size,), NO_ID))
        self.register_buffer("queue_pointer", torch.tensor(0))

    @property
    def logit_scale(self) -> Tensor:
        """1 / temperature, (), constant: for `tilewise.hard_negatives` of the same features."""
        return 1 / self.temperature.detach().clamp(LOWEST, HIGHEST)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        teacher_image_features: Tensor,
        teacher_text_features: Tensor,
        ids: Tensor | None = None,
        alpha: Tensor | float | None = None,
    ) -> Tensor:
        """The loss of a batch; in training, the batch is then enqueued.

        Args:
            image_features, text_features: (B, D), float16, bfloat16, float32 or float64, usually
                L2-normalised: the student's. Text i belongs to image i.
            teacher_image_features, teacher_text_features: (B, D), the same dtype: the teacher's of
                the same pairs, through which no gradient flows.
            ids: (B,) int64: what has equal ids matches, in the batch and in the queues. Any number
                but -100, which is the id of what came without. None: text i matches image i alone.
            alpha: in place of the constructor's. BLIP ramps it over two epochs,
                0.4 * min(1, step / (2 * steps_per_epoch)). Under torch.compile, make it a tensor.

        Returns:
            0-d float32 (float64 for float64 features), differentiable once in the student's
            features and the temperature.

        Raises:
            ValueError, TypeError: an argument of the wrong shape, dtype or device, which is named;
                in training, other numbers of rows in other processes.
        """
        features = image_features, text_features, teacher_image_features, teacher_text_features
        alpha = self.alpha if alpha is None else alpha
        if self.group is not None and dist.get_world_size(self.group) != 1:
            return self._over_processes(features, ids, alpha)
        image, text, teacher_image, teacher_text = self._checked(*features)
        positives: int | tuple[Tensor, Tensor] = 0  # text i matches image i alone
        if ids is not None:
            _arguments.check_ids("ids", ids, len(image), image.device)
            positives = ids, torch.cat([ids, self.id_queue])
        scale = self._clamped().reciprocal()
        taught = isinstance(alpha, Tensor) or alpha != 0
        if not isinstance(alpha, Tensor):
            alpha = _arguments.check_between("alpha", alpha, 0, 1)
        part = _arguments.scalar("alpha", alpha, image)  # once for both directions
        text_queue, image_queue = self._queues(image.dtype)

        def contrast(query: Tensor, keys: Tensor, queue: Tensor, teacher: Tensor) -> Tensor:
            return itc_loss(
                query,
                keys.detach(),
                scale,
                positives=positives,
                queue=queue if self.queue_size else None,
                teacher_query=teacher.detach() if taught else None,
                alpha=part,
            )

        of_images = contrast(image, teacher_text, text_queue, teacher_image)
        of_texts = contrast(text, teacher_image, image_queue, teacher_text)
        if self.training and self.queue_size:
            self._enqueue(teacher_image_features, teacher_text_features, ids)
        return (of_images + of_texts) / 2

    def _queues(self, dtype: torch.dtype) -> list[Tensor]:
        """Texts' and images' queue in the features' dtype, in one launch."""
        queues = [self.text_queue, self.image_queue]
        if self.text_queue.dtype == dtype:
            return queues
        cast = [torch.empty_like(queue, dtype=dtype) for queue in queues]
        torch._foreach_copy_(cast, queues)
        return cast

    @torch._disable_dynamo  # the exchanges are not traced; the public name imports dynamo at once
    def _over_processes(
        self, features: tuple[Tensor, ...], ids: Tensor | None, alpha: Tensor | float
    ) -> Tensor:
        """The loss of one's own pairs, over the mean number of pairs in a process."""
        peers = Peers(self.group, "tilewise.nn.ItcLoss")

        def check():
            image, text, *_ = self._checked(*features)
            if ids is not None:
                _arguments.check_ids("ids", ids, len(image), image.device)
            part = alpha if isinstance(alpha, Tensor) else None
            if part is None:
                _arguments.check_between("alpha", alpha, 0, 1)
                part = None if alpha == 0 else alpha
            if part is not None:
                part = _arguments.scalar("alpha", part, image).detach()
            inputs = [image, text, _arguments.scalar("temperature", 1 / self._clamped(), image)]
            needs = _arguments.needs(*inputs)
            facts = {
                "loss": "ItcLoss",
                "D": self.dim,
                "queue_size": self.queue_size,
                "dtype": " ".join(str(x.dtype) for x in features),
                "training": self.training,
                "alpha": "a tensor" if isinstance(alpha, Tensor) else float(alpha),
                "ids": "None" if ids is None else "given",
            }
            return (inputs, needs, part), len(image), facts

        device = _ring.device_of(*features)
        (inputs, needs, part), rows = _ring.agreed(peers, check, device)
        own = _ring_itc.Candidates(features[2].detach(), features[3].detach(), ids)
        queue = _ring_itc.Candidates(self.image_queue, self.text_queue, self.id_queue)

        def enqueue(owner: int, block: _ring_itc.Candidates) -> None:
            if self.training and self.queue_size:
                self._write(sum(rows[:owner]), sum(rows), *block)

        def run(needs):
            image, text, scale = inputs
            found = _ring_itc.itc(
                peers, rows, (image, text), own, queue, scale, part, needs, enqueue
            )
            if self.training and self.queue_size:
                self._move_pointer(sum(rows))
            return found

        return _ring.finished(run, needs, *inputs)

    def _checked(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The features, of one shape and dtype; cast as autocast casts a matrix product's."""
        features = dict(zip(FEATURES, inputs, strict=True))
        cast = _arguments.features(**features)
        shape = len(features["image_features"]), self.dim
        for name, x in features.items():
            if x.shape != shape:
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
        return cast

    @torch.no_grad()
    def _enqueue(self, image: Tensor, text: Tensor, ids: Tensor | None) -> None:
        """Writes the teacher's features (B, D) of all processes over the oldest ones."""
        self._check_rows(image)
        image, text = _sync.all_gather(image), _sync.all_gather(text)
        ids = None if ids is None else _sync.all_gather(ids)
        self._write(0, len(image), image, text, ids, moves=True)

    def _write(
        self, first: int, total: int, image: Tensor, text: Tensor, ids: Tensor | None,
        moves: bool = False,
    ) -> None:
        """Writes rows `first` and on of `total` that are enqueued; the pointer then `moves`."""
        # What does not fit would be overwritten in the same call; the last rows stay.
        skipped = min(max(total - self.queue_size - first, 0), len(image))
        first += skipped
        image, text = image[skipped:], text[skipped:]
        ids = None if ids is None else ids[skipped:]
        queues = self.image_queue, self.text_queue, self.id_queue
        dtypes = (x.dtype for x in (*queues[:2], image, text))
        kernel = _backend.triton_operator("enqueue", image.device, *dtypes)
        if kernel is not None and all(x.is_contiguous() for x in queues):
            steps = total if moves else 0
            kernel(*queues, self.queue_pointer, image, text, ids, first, steps, NO_ID)
            return
        if ids is None:
            ids = self.id_queue.new_full((len(image),), NO_ID)
        place = torch.arange(len(image), device=self.queue_pointer.device) + first
        place = (self.queue_pointer + place) % self.queue_size
        for queue, rows in zip(queues, (image, text, ids), strict=True):
            queue.index_copy_(0, place, rows.to(queue.dtype))
        if moves:
            self._move_pointer(total)

    def _move_pointer(self, steps: int) -> None:
        self.queue_pointer.copy_((self.queue_pointer + steps) % self.queue_size)

    def _clamped(self) -> Tensor:
        """The temperature, clamped in place where that may be: transforms of torch.func refuse."""
        if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack():
            return self.temperature.clamp(LOWEST, HIGHEST)
        with torch.no_grad():
            self.temperature.clamp_(LOWEST, HIGHEST)
        return self.temperature

    def _check_rows(self, image: Tensor) -> None:
        """All processes must have as many, or gathering ends them without a word.

        On a GPU in the first call alone, since looking stalls it.
        """
        alone = _sync.world_size(sync=True) == 1
        if alone or torch.compiler.is_compiling() or (image.is_cuda and self._rows_checked):
            return
        rows = _sync.all_gather(torch.tensor([len(image)], device=image.device)).tolist()
        if len(set(rows)) > 1:
            raise ValueError(
                f"image_features: expected as many rows in every process, got {rows}; "
                "drop_last=True of a data loader leaves out the last batch, which is smaller"
            )
        self._rows_checked = True

    def _apply(self, fn, recurse=True):
        keep = without_halving(fn)
        # The temperature is the one number; queues may be halved.
        return super()._apply(lambda x: keep(x) if x.dim() == 0 else fn(x), recurse)

    def extra_repr(self) -> str:
        return f"{self.dim}, queue_size={self.queue_size}, alpha={self.alpha}"


define(
    "enqueue",
    "(Tensor(a!) image_queue, Tensor(b!) text_queue, Tensor(c!) id_queue, Tensor(d!) pointer, "
    "Tensor image, Tensor text, Tensor? ids, SymInt first, SymInt steps, int no_id) -> ()",
    lambda *_: None,
    module="_enqueue",
)
