"""The whole decoder in float64 numpy: one sequence, one layer after the other.

An oracle for `okd_jax.models`, written down from the papers in the plainest way.
"""

import math

import jax
import numpy as np

from okd_jax.models import LayerKind, ModelConfig


def logits(c: ModelConfig, params, tokens) -> np.ndarray:
  """[L, V] of tokens [L]."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  x = p["embed"]["embedding"][tokens] * c.embed_scale
  if c.embed_size != c.hidden_size:
    x = x @ p["widen"]["kernel"]
  if c.position == "learned":
    x = x + p["position_embed"]["embedding"][: len(tokens)]
  for i in range(c.num_layers):
    kind = c.layer_kinds[i] if c.layer_kinds else LayerKind()
    layer = jax.tree.map(lambda w: w[i], p["layers"])  # noqa: B023
    for part in ("attention", "mlp"):
      x = _part(c, kind, layer, part, x)
  if c.final_norm:
    x = _norm(c, p["norm"], x)
  if c.embed_size != c.hidden_size:
    x = x @ p["narrow"]["kernel"]
  head = p["embed"]["embedding"] if c.tie_embeddings else p["head"]
  return _capped(x @ head.T / c.logit_divisor, c.logit_cap)


def _part(c, kind, layer, part, x):
  h = x
  if c.norm_place in ("before", "both"):
    h = _norm(c, layer[f"{part}_norm"], h)
  if part == "attention":
    h = _attention(c, kind, layer[part], h)
  else:
    h = (_experts if c.experts else _mlp)(c, layer[part], h)
  if c.norm_place in ("on_output", "both"):
    h = _norm(c, layer[f"{part}_out_norm"], h)
  x = x + c.residual_scale * h
  return _norm(c, layer[f"{part}_norm"], x) if c.norm_place == "on_sum" else x


def _norm(c, weights, x):
  if c.norm == "layernorm":
    x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)
  return x * (weights["scale"] + c.norm_from_one) + weights.get("bias", 0)


def _linear(weights, x):
  return x @ weights["kernel"] + weights.get("bias", 0)


def _capped(x, cap):
  return cap * np.tanh(x / cap) if cap else x


def _attention(c, kind, weights, x):
  length = len(x)

  def heads(name):
    y = _linear(weights[name], x)
    norm = weights.get(f"{name}_norm")
    if norm and c.qk_norm == "projection":
      y = _norm(c, norm, y)
    y = y.reshape(length, -1, c.head_dim)
    return _norm(c, norm, y) if norm and c.qk_norm == "head" else y

  q, k, v = map(heads, ("query", "key", "value"))
  if c.position == "rope" and kind.rotary:
    frequencies, factor = _frequencies(c, kind, length)
    turn = factor * np.exp(1j * np.arange(length)[:, None] * frequencies)[:, None]
    q, k = (_turned(y, turn) for y in (q, k))  # a rotation is a complex product
  out = np.zeros_like(q)
  back = np.arange(length)[:, None] - np.arange(length)
  seen = (back >= 0) & (back < (kind.window or length))
  for head in range(c.num_heads):
    shared = head * c.num_kv_heads // c.num_heads
    scores = q[:, head] @ k[:, shared].T * (c.attention_scale or c.head_dim**-0.5)
    scores = np.where(seen, _capped(scores, c.attention_cap), -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    out[:, head] = weight / weight.sum(-1, keepdims=True) @ v[:, shared]
  return _linear(weights["out"], out.reshape(length, -1))


def _turned(y, turn):
  half = turn.shape[-1]
  first, second, rest = np.split(y, [half, 2 * half], axis=-1)
  z = (first + 1j * second) * turn
  return np.concatenate([z.real, z.imag, rest], -1)


def _frequencies(c, kind, length):
  """(radians per position of each pair, the factor of cosine and sine)."""
  size = int(c.head_dim * c.rotary_share)
  plain = (kind.rope_theta or c.rope_theta) ** (-np.arange(0, size, 2) / size)
  s = None if kind.rope_theta else c.rope_scaling
  if s is None or s.kind == "dynamic":
    return plain, 1.0
  if s.kind == "linear":
    return plain / s.factor, 1.0
  if s.kind == "longrope":
    beyond = length > s.original_max_length
    return plain / np.array(s.long_factors if beyond else s.short_factors), (
      s.attention_factor
    )
  turns = s.original_max_length * plain / (2 * np.pi)
  if s.kind == "llama3":
    keep = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    keep = keep.clip(0, 1)
    return keep * plain + (1 - keep) * plain / s.factor, 1.0
  # yarn: the pair whose wavelength turns so often, in units of pairs
  base = 2 * np.log(kind.rope_theta or c.rope_theta) / size
  low, high = (
    np.log(s.original_max_length / (2 * np.pi * beta)) / base
    for beta in (s.beta_fast, s.beta_slow)
  )
  low, high = max(np.floor(low), 0), min(np.ceil(high), size - 1)
  keep = 1 - ((np.arange(size // 2) - low) / (high - low)).clip(0, 1)
  return keep * plain + (1 - keep) * plain / s.factor, s.attention_factor


def _mlp(c, weights, x):
  activate = _ACTIVATIONS[c.activation]
  up = _linear(weights["up"], x)
  if c.gated_mlp:
    up = activate(_linear(weights["gate"], x)) * up
  else:
    up = activate(up)
  return _linear(weights["down"], up)


def _experts(c, weights, x):
  """Token by token, expert by expert."""
  out = np.zeros_like(x)
  for i, token in enumerate(x):
    shares = np.exp(token @ weights["router"]["kernel"])
    shares /= shares.sum()
    chosen = np.argsort(-shares)[: c.experts_per_token]
    total = shares[chosen].sum() if c.normalize_experts else 1.0
    for e in chosen:
      own = {n: weights[f"experts_{n}"]["kernel"][e] for n in ("gate", "up", "down")}
      up = _ACTIVATIONS[c.activation](token @ own["gate"]) * (token @ own["up"])
      out[i] += shares[e] / total * (up @ own["down"])
  return out


def _silu(x):
  return x / (1 + np.exp(-x))


def _gelu(x):
  return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def _gelu_tanh(x):
  return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


_ACTIVATIONS = {
  "silu": _silu,
  "gelu": _gelu,
  "gelu_tanh": _gelu_tanh,
  "relu": lambda x: np.maximum(x, 0),
}
