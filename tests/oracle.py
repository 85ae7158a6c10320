"""Divergences in float64 NumPy, written from the formulas and not from the library."""

import numpy as np


def softmax(logits, temperature=1.0):
  z = np.asarray(logits, np.float64) / temperature
  e = np.exp(z - z.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def kl(p, q):
  with np.errstate(divide="ignore", invalid="ignore"):
    terms = np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0)
  return terms.sum(-1)


def forward_kl(teacher, student, temperature=1.0):
  p, q = softmax(teacher, temperature), softmax(student, temperature)
  return temperature**2 * kl(p, q)


def reverse_kl(teacher, student, temperature=1.0):
  p, q = softmax(teacher, temperature), softmax(student, temperature)
  return temperature**2 * kl(q, p)


def jensen_shannon(teacher, student, temperature=1.0, beta=0.5):
  p, q = softmax(teacher, temperature), softmax(student, temperature)
  m = beta * p + (1 - beta) * q
  return temperature**2 * (beta * kl(p, m) + (1 - beta) * kl(q, m))


def cross_entropy(logits, labels):
  q = softmax(logits)
  return -np.log(np.take_along_axis(q, labels[..., None], -1)[..., 0])


def token_mean(values, mask):
  return (values * mask).sum() / mask.sum()
