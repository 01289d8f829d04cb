"""What people run today, as they write it. Tests, benchmarks and examples compare with it."""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor


def eager_sigmoid_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    positives: int | tuple[Tensor, Tensor] | None = 0,
) -> Tensor:
    """The sigmoid loss in the inputs' own dtype, with its B x N matrices of logits and labels."""
    logits = logit_scale * image_features @ text_features.T  # (B, N)
    if logit_bias is not None:
        logits = logits + logit_bias
    labels = -torch.ones_like(logits)
    if isinstance(positives, tuple):
        labels = labels + 2 * (positives[0][:, None] == positives[1])
    elif positives is not None:
        rows = torch.arange(len(image_features), device=logits.device)
        columns = torch.arange(len(text_features), device=logits.device)
        labels = labels + 2 * (columns == rows[:, None] + positives)
    return -F.logsigmoid(labels * logits).sum() / len(image_features)


def eager_clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    positives: int | tuple[Tensor, Tensor] = 0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """CLIP's loss in the inputs' own dtype, with a matrix of logits for each direction."""
    forth = logit_scale * image_features @ text_features.T
    back = logit_scale * text_features @ image_features.T

    def cross_entropy(logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        if not rows.any():
            return 0 * logits.sum()
        return F.cross_entropy(logits[rows], targets[rows], label_smoothing=label_smoothing)

    def of_offset(logits: Tensor, offset: int) -> Tensor:
        if offset == 0 and len(logits) == logits.shape[1] > 0:  # as open_clip has it
            labels = torch.arange(len(logits), device=logits.device)
            return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        labels = [i + offset for i in range(len(logits))]  # which may be huge
        rows = torch.tensor([0 <= label < logits.shape[1] for label in labels], dtype=torch.bool)
        kept = [label if 0 <= label < logits.shape[1] else 0 for label in labels]
        labels = torch.tensor(kept, dtype=torch.long, device=logits.device)
        return cross_entropy(logits, labels, rows.to(logits.device))

    def of_pairs(logits: Tensor, pairs: Tensor) -> Tensor:
        targets = pairs / pairs.sum(1, keepdim=True).clamp(min=1)
        return cross_entropy(logits, targets.to(logits.dtype), pairs.any(1))

    if isinstance(positives, tuple):
        pairs = positives[0][:, None] == positives[1]  # (B, N)
        return (of_pairs(forth, pairs) + of_pairs(back, pairs.T)) / 2
    return (of_offset(forth, positives) + of_offset(back, -positives)) / 2


def eager_itc_loss(
    query: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    queue: Tensor | None = None,
    teacher_query: Tensor | None = None,
    alpha: float = 0.4,
    positives: int | tuple[Tensor, Tensor] = 0,
) -> Tensor:
    """One direction of BLIP's contrast in the inputs' own dtype, with its B x (K + Q) matrices."""
    candidates = keys if queue is None else torch.cat([keys, queue])
    logits = logit_scale * query @ candidates.T  # (B, K + Q)
    with torch.no_grad():
        targets = _matching(logits, positives).to(logits.dtype)
        count = targets.sum(1, keepdim=True)
        targets = targets / count.clamp(min=1)
        if teacher_query is not None:
            soft = F.softmax(logit_scale * teacher_query @ candidates.T, dim=1)
            targets = alpha * soft + (1 - alpha) * targets
    losses = -torch.sum(F.log_softmax(logits, dim=1) * targets, dim=1)
    rows = count.squeeze(1) > 0
    return torch.where(rows, losses, 0.0).sum() / rows.sum().clamp(min=1)


def eager_hard_negatives(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    positives: int | tuple[Tensor, Tensor] | None = 0,
) -> tuple[Tensor, Tensor]:
    """ALBEF's hard negatives, all rows in one call; BLIP adds 1e-4 to each probability."""
    logits = logit_scale * image_features @ text_features.T  # (B, N)
    pairs = _matching(logits, positives)

    def sample(logits: Tensor, pairs: Tensor) -> Tensor:
        weights = F.softmax(logits, dim=1, dtype=torch.float32).masked_fill(pairs, 0)
        return torch.multinomial(weights, 1).squeeze(1)

    return sample(logits, pairs), sample(logits.T, pairs.T)


def _matching(logits: Tensor, positives: int | tuple[Tensor, Tensor] | None) -> Tensor:
    """Which rows and columns of the logits match: bool in their shape."""
    if isinstance(positives, tuple):
        return positives[0][:, None] == positives[1]
    pairs = torch.zeros_like(logits, dtype=torch.bool)
    rows, cols = logits.shape
    if positives is not None and -rows < positives < cols:
        pairs.diagonal(positives).fill_(True)
    return pairs


@functools.cache
def compiled(function: Callable) -> Callable:
    """`function` through torch.compile, compiled once for all sizes."""
    # Dtypes, layouts and options are each compiled for. By default the ninth would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, dynamic=True)


def installed(package: str) -> bool:
    """Whether `package` could be imported."""
    return importlib.util.find_spec(package) is not None


def open_clip_sigmoid_loss(*features_scale_bias: Tensor, chunk_size: int = 0) -> Tensor:
    """open_clip's SigLipLoss; a `chunk_size` only where `open_clip_has_chunks`."""
    options = {"chunk_size": chunk_size} if chunk_size else {}
    return open_clip_loss().SigLipLoss(**options)(*features_scale_bias)


def open_clip_clip_loss(*features_scale: Tensor) -> Tensor:
    """open_clip's ClipLoss."""
    return open_clip_loss().ClipLoss()(*features_scale)


def open_clip_has_chunks() -> bool:
    """Whether the installed open_clip can compute its sigmoid loss chunk by chunk."""
    return "chunk_size" in inspect.signature(open_clip_loss().SigLipLoss).parameters


def siglip_kernel_sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """siglip_kernel's fused loss, for GPUs; it takes the logarithm of the scale."""
    return importlib.import_module("siglip_kernel").fused_siglip_loss(
        image, text, scale.log(), bias
    )


def cdist_nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code by torch.cdist, whose N x K distances are stored."""
    return torch.cdist(x, codebook).argmin(1)


def addmm_nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code by c^2 / 2 - <x, c> in float32, a few rows at a time.

    The fastest few lines of PyTorch (`min` finds a minimum faster than `argmin`), and inexact where
    distances are small beside the vectors.
    """
    half = codebook.square().sum(1) / 2
    step = max(1, 2**20 // len(codebook))
    scores = x.new_empty(step, len(codebook))  # 4 MB, which stay in the cache
    indices = []
    for part in x.split(step):
        out = torch.addmm(half, part, codebook.T, alpha=-1, out=scores[: len(part)])
        indices.append(out.min(1).indices)
    return torch.cat(indices)


def faiss_nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code by faiss' exhaustive search, the index made of the codes as they are now."""
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(codebook.shape[1])
    index.add(codebook.numpy())
    return torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])


def sklearn_nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code by scikit-learn."""
    metrics = importlib.import_module("sklearn.metrics")
    return torch.from_numpy(metrics.pairwise_distances_argmin(x.numpy(), codebook.numpy()))


def lucidrains_quantizer(codebook: Tensor, **settings) -> torch.nn.Module:
    """lucidrains' VectorQuantize with the codes of `codebook` (K, D)."""
    package = importlib.import_module("vector_quantize_pytorch")
    codes, dim = codebook.shape
    quantizer = package.VectorQuantize(dim=dim, codebook_size=codes, **settings)
    quantizer.codebook = codebook
    return quantizer.to(codebook.device)


def one_hot_code_sums(x: Tensor, index: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts and sums of the rows of each code by an N x K one-hot matrix."""
    one_hot = F.one_hot(index, num_codes).to(x.dtype)
    return one_hot.sum(0).long(), one_hot.T @ x


def index_add_code_sums(x: Tensor, index: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts and sums of the rows of each code by index_add, torch's fastest way on a CPU."""
    counts = torch.bincount(index, minlength=num_codes)
    return counts, x.new_zeros(num_codes, x.shape[1]).index_add_(0, index, x)


def scatter_add_code_sums(x: Tensor, index: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts and sums of the rows of each code by scatter_add."""
    counts = torch.bincount(index, minlength=num_codes)
    places = index.unsqueeze(1).expand_as(x)
    return counts, x.new_zeros(num_codes, x.shape[1]).scatter_add_(0, places, x)


def bincount_code_sums(x: Tensor, index: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts and sums of the rows of each code by a weighted torch.bincount for each column."""
    columns = [torch.bincount(index, column, minlength=num_codes) for column in x.T]
    return torch.bincount(index, minlength=num_codes), torch.stack(columns, 1).to(x.dtype)


# The name of a candidate that draws nothing: a sample's reading, writing and exponentials alone.
SOFTMAX = "F.softmax"


def gumbel_softmax(logits: Tensor, hard: bool, dim: int) -> Tensor:
    """torch's own function."""
    return F.gumbel_softmax(logits, hard=hard, dim=dim)


def relaxed_one_hot(logits: Tensor, hard: bool, dim: int) -> Tensor:
    """torch.distributions' relaxed sample; hard as pyro's subclass makes it."""
    law = torch.distributions.RelaxedOneHotCategorical(
        torch.ones((), device=logits.device), logits=logits.movedim(dim, -1)
    )
    soft = law.rsample().movedim(-1, dim)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter(dim, soft.argmax(dim, keepdim=True), 1.0)
    return soft + (one_hot - soft).detach()


def multinomial(logits: Tensor, k: int | None) -> Tensor:
    """k categories without replacement; None: one, without a dimension."""
    index = torch.multinomial(logits.softmax(-1), k or 1)
    return index if k else index.squeeze(-1)


def lucidrains_gumbel_sample(logits: Tensor, k: int | None) -> Tensor:
    """The sampling of lucidrains' quantisers, which also makes a one-hot matrix."""
    package = importlib.import_module("vector_quantize_pytorch.vector_quantize_pytorch")
    return package.gumbel_sample(logits, stochastic=True, topk=k)[0]


def eager_gaussian_sample(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """A reparameterised sample and its divergence, as variational autoencoders write them."""
    std = torch.exp(0.5 * logvar)
    z = mean + std * torch.randn_like(std)
    kl = 0.5 * torch.sum(mean.square() + logvar.exp() - 1 - logvar, dim=(1, 2, 3))
    return z, kl


def diffusers_gaussian_sample(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """The same by diffusers' class, whose input holds mean and logvar."""
    _make_torchvision_importable()
    vae = importlib.import_module("diffusers.models.autoencoders.vae")
    posterior = vae.DiagonalGaussianDistribution(parameters)
    return posterior.sample(), posterior.kl()


_torchvision_ops: list[torch.library.Library] = []


def open_clip_loss() -> ModuleType:
    """open_clip.loss, also where torchvision was built for another torch."""
    _make_torchvision_importable()
    return importlib.import_module("open_clip.loss")


@functools.cache
def _make_torchvision_importable() -> None:
    """For open_clip and diffusers, which import it; neither needs it here.

    A torchvision whose C++ operators do not load stops at the first schema that it misses.
    Declaring two of them lets it go on.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _torchvision_ops.append(library)  # a library that is dropped takes its schemas along
