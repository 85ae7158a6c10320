"""Token-level losses. They know arrays only."""

from okd_jax.losses import stored
from okd_jax.losses.chunked import Part, TokenLoss, sums_of_parts, weighted_sums
from okd_jax.losses.cross_tokenizer import align, sorted_distance
from okd_jax.losses.divergences import (
  acceptance,
  adaptive_kl,
  alpha_beta,
  forward_kl,
  jensen_shannon,
  reverse_kl,
  skew_forward_kl,
  skew_reverse_kl,
  total_variation,
  weighted_kl,
)
from okd_jax.losses.logits import (
  cross_entropy,
  entropy,
  log_probs,
  top1_agreement,
  top_k_overlap,
)
from okd_jax.losses.mean import Mean, token_weights
from okd_jax.losses.mixture import mixture
from okd_jax.losses.outputs import Output, soft_cap, unembed
from okd_jax.losses.per_token import per_token
from okd_jax.losses.ranking import rank_correlation
from okd_jax.losses.sparse import (
  TopK,
  buckets,
  top_k,
  topk_forward_kl,
  topk_reverse_kl,
)

__all__ = [
  "Mean",
  "Output",
  "Part",
  "TokenLoss",
  "TopK",
  "acceptance",
  "adaptive_kl",
  "align",
  "alpha_beta",
  "buckets",
  "cross_entropy",
  "entropy",
  "forward_kl",
  "mixture",
  "jensen_shannon",
  "log_probs",
  "per_token",
  "rank_correlation",
  "reverse_kl",
  "skew_forward_kl",
  "skew_reverse_kl",
  "soft_cap",
  "sorted_distance",
  "stored",
  "sums_of_parts",
  "token_weights",
  "top1_agreement",
  "top_k",
  "top_k_overlap",
  "topk_forward_kl",
  "topk_reverse_kl",
  "total_variation",
  "unembed",
  "weighted_kl",
  "weighted_sums",
]
