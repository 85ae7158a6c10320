"""Divergences in float64 NumPy, written from the formulas and not from the library.

A logit of -inf is a probability of exactly 0; a KL that is infinite is `inf` here.
"""

import numpy as np


def log_softmax(logits, temperature=1.0):
  z = np.asarray(logits, np.float64) / temperature
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def softmax(logits, temperature=1.0):
  return np.exp(log_softmax(logits, temperature))


def kl(log_p, log_q):
  """KL(p || q) from log-probabilities: those of 1e-5000 do not turn into 0."""
  p = np.exp(log_p)
  with np.errstate(invalid="ignore"):
    return np.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def mixture(weight, log_p, log_q):
  """log(weight p + (1 - weight) q)."""
  with np.errstate(divide="ignore"):
    return np.logaddexp(np.log(weight) + log_p, np.log(1 - weight) + log_q)


def _pair(teacher, student, temperature):
  return log_softmax(teacher, temperature), log_softmax(student, temperature)


def forward_kl(teacher, student, temperature=1.0):
  p, q = _pair(teacher, student, temperature)
  return temperature**2 * kl(p, q)


def reverse_kl(teacher, student, temperature=1.0):
  p, q = _pair(teacher, student, temperature)
  return temperature**2 * kl(q, p)


def jensen_shannon(teacher, student, temperature=1.0, beta=0.5, normalize=False):
  if beta == 0:
    return forward_kl(teacher, student, temperature)
  if beta == 1:
    return reverse_kl(teacher, student, temperature)
  p, q = _pair(teacher, student, temperature)
  m = mixture(beta, p, q)
  value = temperature**2 * (beta * kl(p, m) + (1 - beta) * kl(q, m))
  return value / (beta * (1 - beta)) if normalize else value


def skew_forward_kl(teacher, student, temperature=1.0, alpha=0.1):
  p, q = _pair(teacher, student, temperature)
  return temperature**2 * kl(p, mixture(alpha, p, q))


def skew_reverse_kl(teacher, student, temperature=1.0, alpha=0.1):
  p, q = _pair(teacher, student, temperature)
  return temperature**2 * kl(q, mixture(alpha, q, p))


def total_variation(teacher, student, temperature=1.0):
  p, q = _pair(teacher, student, temperature)
  return temperature**2 * 0.5 * np.abs(np.exp(p) - np.exp(q)).sum(-1)


def adaptive_head(probabilities, head_mass):
  """Which tokens of one position are the head: one pass over them, likeliest first."""
  head, mass = np.zeros(len(probabilities), bool), 0.0
  for rank, v in enumerate(np.argsort(-probabilities, kind="stable")):
    mass += probabilities[v]
    head[v] = rank == 0 or mass <= head_mass
  return head


def adaptive_weight(teacher, student, temperature=1.0, head_mass=0.5):
  """w_h, the weight of the forward KL; 1/2 where there is no gap at all."""
  p, q = softmax(teacher, temperature), softmax(student, temperature)
  gap, weight = np.abs(p - q), np.empty(p.shape[:-1])
  for at in np.ndindex(weight.shape):
    head = adaptive_head(p[at], head_mass)
    total = gap[at].sum()
    weight[at] = gap[at][head].sum() / total if total > 0 else 0.5
  return weight


def adaptive_kl(teacher, student, temperature=1.0, head_mass=0.5, weight=None):
  """`weight` fixes w_h, so that differences see what the gradient must see."""
  if weight is None:
    weight = adaptive_weight(teacher, student, temperature, head_mass)
  return weighted_kl(teacher, student, temperature, weight)


def weighted_kl(teacher, student, temperature=1.0, weight=0.5):
  p, q = _pair(teacher, student, temperature)
  return temperature**2 * (weight * kl(p, q) + (1 - weight) * kl(q, p))


def alpha_beta(teacher, student, temperature=1.0, alpha=0.2, beta=0.7):
  """ABKD's divergence (arXiv 2505.04560) with its limits at alpha = 0 and beta = 0."""
  p, q = _pair(teacher, student, temperature)
  if beta == 0:
    return temperature**2 * _one_power(p, q, alpha)
  if alpha == 0:
    return temperature**2 * _one_power(q, p, beta)
  both = alpha + beta
  cross = np.exp(alpha * p + beta * q)
  own = (alpha * np.exp(both * p) + beta * np.exp(both * q)) / both
  return temperature**2 * (own - cross).sum(-1) / (alpha * beta)


def _one_power(log_p, log_q, power):
  """1/power^2 sum_v [q^power - p^power + power p^power (log p - log q)]."""
  p, q = np.exp(power * log_p), np.exp(power * log_q)
  with np.errstate(invalid="ignore"):
    logs = np.where(p > 0, power * p * (log_p - log_q), 0.0)
  return (q - p + logs).sum(-1) / power**2


def cross_entropy(logits, labels):
  return -np.take_along_axis(log_softmax(logits), labels[..., None], -1)[..., 0]


def token_mean(values, mask):
  return (values * mask).sum() / mask.sum()


def buckets(logits, ids, temperature=1.0):
  """Log-masses of the listed ids of one position, and of all others together."""
  log_p = log_softmax(logits, temperature)
  rest = [v for v in range(len(log_p)) if v not in set(ids.tolist())]
  tail = np.logaddexp.reduce(log_p[rest]) if rest else -np.inf
  return np.append(log_p[ids], tail)


def topk_forward_kl(teacher, student, ids, temperature=1.0):
  """KL between the K + 1 buckets that the ids [..., K] cut both sides into."""
  return _bucket_kl(teacher, student, ids, temperature)


def topk_reverse_kl(teacher, student, ids, temperature=1.0):
  return _bucket_kl(student, teacher, ids, temperature)


def _bucket_kl(first, second, ids, temperature):
  value = np.empty(np.shape(first)[:-1])
  for at in np.ndindex(value.shape):
    p = buckets(np.asarray(first)[at], np.asarray(ids)[at], temperature)
    q = buckets(np.asarray(second)[at], np.asarray(ids)[at], temperature)
    value[at] = kl(p, q)
  return temperature**2 * value


def union(teacher, student, k):
  """The ids among the top k of either side of one position, ties by index."""
  top = [np.argsort(-np.asarray(x), kind="stable")[:k] for x in (teacher, student)]
  return sorted(set(top[0].tolist()) | set(top[1].tolist()))


def soft_ranks(z, temperature):
  """r_i = sum_j sigmoid((z_i - z_j) / temperature); two -inf are equal, so 1/2."""
  with np.errstate(invalid="ignore", over="ignore"):
    gap = np.where(z[:, None] == z, 0.0, (z[:, None] - z) / temperature)
    return (1 / (1 + np.exp(-gap))).sum(-1)


def pearson(x, y):
  x, y = x - x.mean(), y - y.mean()
  return (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())


def rank_correlation(teacher, student, k=5, temperature=1.0, ids=None):
  """1 - rho over the union's soft ranks; `ids` fixes one position's union."""
  teacher, student = np.asarray(teacher, float), np.asarray(student, float)
  value = np.empty(teacher.shape[:-1])
  for at in np.ndindex(value.shape):
    u = union(teacher[at], student[at], k) if ids is None else ids
    ranks = [soft_ranks(x[at][u], temperature) for x in (teacher, student)]
    value[at] = 1 - pearson(*ranks)
  return value


def spearman(teacher, student, k=5):
  """1 - rho over the union's hard ranks: the textbook 6 sum d^2 / (n (n^2 - 1))."""
  value = np.empty(np.shape(teacher)[:-1])
  for at in np.ndindex(value.shape):
    u = union(teacher[at], student[at], k)
    d = [np.argsort(np.argsort(np.asarray(x[at])[u])) for x in (teacher, student)]
    n = len(u)
    value[at] = 6 * ((d[0] - d[1]) ** 2).sum() / (n * (n**2 - 1))
  return value


def gradient(function, x, step=1e-5):
  """Central differences of [..., V] -> [...] in x's last axis, every row at once."""
  x = np.asarray(x, np.float64)
  columns = []
  for v in range(x.shape[-1]):
    d = np.zeros(x.shape[-1])
    d[v] = step
    columns.append((function(x + d) - function(x - d)) / (2 * step))
  return np.stack(columns, -1)
