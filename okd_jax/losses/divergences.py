"""Per-token losses: logits `[B, L, V]` to `[B, L]`, in float32 whatever comes in.

Every divergence reads (teacher_logits, student_logits): the target p first, the
fitted model q second. Gradients flow to both sides; whoever wants one side constant
stops the gradient at the call (`methods/`). Where a temperature T is given, both
logits are divided by T and the value is multiplied by T^2, which keeps gradients
level (Hinton et al. 2015, arXiv 1503.02531; OKD, arXiv 2409.12512, Eq. 2).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Stands for log 0. Finite, so that 0 * log 0 is 0 and no gradient turns into NaN.
_LOG_ZERO = -1e30

Logits = Float[Array, "*B V"]
PerToken = Float[Array, "*B"]


def forward_kl(
  teacher_logits: Logits, student_logits: Logits, temperature: float = 1.0
) -> PerToken:
  """KL(p || q) * T^2; its gradient in the student's logits is (q - p) * T."""
  log_p = log_probs(teacher_logits, temperature)
  log_q = log_probs(student_logits, temperature)
  return temperature**2 * _kl(log_p, log_q)


def reverse_kl(
  teacher_logits: Logits, student_logits: Logits, temperature: float = 1.0
) -> PerToken:
  """KL(q || p) * T^2, differentiated through the outer q as well."""
  return forward_kl(student_logits, teacher_logits, temperature)


def jensen_shannon(
  teacher_logits: Logits,
  student_logits: Logits,
  temperature: float = 1.0,
  beta: float = 0.5,
) -> PerToken:
  """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, times T^2.

  On-Policy Distillation of Language Models (GKD), Agarwal et al. 2024, arXiv
  2306.13649, Eq. 1. The end points are defined as the plain divergences: 0 is
  `forward_kl`, 1 is `reverse_kl`; the value jumps there, since the formula itself
  tends to 0 at both ends.

  Raises:
    ValueError: if beta lies outside [0, 1].
  """
  if not 0 <= beta <= 1:
    raise ValueError(f"jensen_shannon: beta={beta} must lie between 0 and 1")
  if beta in (0, 1):
    end = reverse_kl if beta else forward_kl
    return end(teacher_logits, student_logits, temperature)
  log_p = log_probs(teacher_logits, temperature)
  log_q = log_probs(student_logits, temperature)
  log_m = jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
  return temperature**2 * (beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m))


def cross_entropy(logits: Logits, labels: Int[Array, "*B"]) -> PerToken:
  """-log q(label); its gradient in the logits is q - one_hot(label)."""
  log_q = log_probs(logits)
  return -jnp.take_along_axis(log_q, labels[..., None], axis=-1)[..., 0]


def log_probs(logits: Logits, temperature: float = 1.0) -> Logits:
  """float32 log-softmax of logits / T; a logit of -inf gives a very low number."""
  log_q = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)
  return jnp.maximum(log_q, _LOG_ZERO)


def _kl(log_p: Logits, log_q: Logits) -> PerToken:
  kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
  # Rounding may leave -1e-8 where the two agree: never report that, keep its gradient.
  return kl + jax.lax.stop_gradient(jnp.maximum(kl, 0) - kl)
