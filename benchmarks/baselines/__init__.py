"""What people run today, as they write it. Tests, benchmarks and examples compare with it."""

from benchmarks.baselines.codebooks import (
    addmm_nearest_code,
    bincount_code_sums,
    cdist_nearest_code,
    faiss_nearest_code,
    index_add_code_sums,
    one_hot_code_sums,
    scatter_add_code_sums,
    sklearn_nearest_code,
)
from benchmarks.baselines.gpu_peers import (
    cut_cross_entropy_info_nce,
    flash_kmeans_nearest_code,
    inf_cl_clip_loss,
    inf_cl_info_nce,
    memeff_clip_loss,
    siglip_kernel_sigmoid_loss,
)
from benchmarks.baselines.losses import (
    eager_clip_loss,
    eager_hard_negatives,
    eager_info_nce,
    eager_itc_loss,
    eager_sigmoid_loss,
    sentence_transformers_loss,
)
from benchmarks.baselines.peers import (
    compiled,
    diffusers_gaussian_sample,
    installed,
    lucidrains_gumbel_sample,
    lucidrains_quantizer,
    open_clip_clip_loss,
    open_clip_has_chunks,
    open_clip_loss,
    open_clip_sigmoid_loss,
)
from benchmarks.baselines.samples import (
    SOFTMAX,
    eager_gaussian_sample,
    gumbel_softmax,
    multinomial,
    relaxed_one_hot,
)

__all__ = [
    "SOFTMAX", "addmm_nearest_code", "bincount_code_sums", "cdist_nearest_code", "compiled",
    "cut_cross_entropy_info_nce", "diffusers_gaussian_sample", "eager_clip_loss",
    "eager_gaussian_sample", "eager_hard_negatives", "eager_info_nce", "eager_itc_loss",
    "eager_sigmoid_loss", "faiss_nearest_code", "flash_kmeans_nearest_code", "gumbel_softmax",
    "index_add_code_sums", "inf_cl_clip_loss", "inf_cl_info_nce", "installed",
    "lucidrains_gumbel_sample", "lucidrains_quantizer", "memeff_clip_loss", "multinomial",
    "one_hot_code_sums", "open_clip_clip_loss", "open_clip_has_chunks", "open_clip_loss",
    "open_clip_sigmoid_loss", "relaxed_one_hot", "scatter_add_code_sums",
    "sentence_transformers_loss", "siglip_kernel_sigmoid_loss", "sklearn_nearest_code",
]  # fmt: skip
