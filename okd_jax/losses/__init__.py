"""Token-level losses. They know arrays only."""

from okd_jax.losses.chunked import Output, TokenLoss, unembed, weighted_sums
from okd_jax.losses.divergences import (
  cross_entropy,
  forward_kl,
  jensen_shannon,
  log_probs,
  reverse_kl,
)
from okd_jax.losses.mean import Mean, token_weights

__all__ = [
  "Mean",
  "Output",
  "TokenLoss",
  "cross_entropy",
  "forward_kl",
  "jensen_shannon",
  "log_probs",
  "reverse_kl",
  "token_weights",
  "unembed",
  "weighted_sums",
]
