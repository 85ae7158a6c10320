"""Frozen weights in eight bits: int8 kernels with a scale for each output channel.

A kernel W [D, F] becomes q [D, F] and s [F], W = q s to half a step, the channel's
largest value over 127. The product is (x q) s, so q is widened a layer at a time and
the gradient reaches x, and with it any online module, through the same q. Of experts it
is all those of a layer. Embeddings, head, router, norms and biases stay as they are.

LLM.int8, Dettmers et al. 2022, arXiv 2208.07339, has the scales; a small float module
on a quantised frozen model is QLoRA's idea, Dettmers et al. 2023, arXiv 2305.14314.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float, Int, Num

Kernel = Float[Array | np.ndarray, "*N D F"]
SCALE = "kernel_scale"  # of the 'kernel' beside it
LARGEST = 127
_QUANTISED = re.compile(r"layers/.*(?<!router)/kernel")


def applies(path: str) -> bool:
  """Whether the parameter at 'layers/mlp/up/kernel' is one of those kernels."""
  return _QUANTISED.fullmatch(path) is not None


def quantize(
  kernel: Kernel,
) -> tuple[Num[Array | np.ndarray, "*N D F"], Float[Array | np.ndarray, "*N F"]]:
  """(q, s) of float kernels, by numpy on the host or by JAX, as they come."""
  xp = np if isinstance(kernel, np.ndarray) else jnp
  kernel = kernel.astype(np.float32)
  scale = xp.abs(kernel).max(-2) / LARGEST
  scale = xp.where(scale == 0, np.float32(1), scale)
  return xp.rint(kernel / scale[..., None, :]).astype(np.int8), scale


def quantized(params: dict[str, Any]) -> dict[str, Any]:
  """A decoder's parameters with (q, s) in the places of kernels, under jit or not."""
  found = {}
  for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
    if applies(path):
      found[path], found[path.removesuffix("kernel") + SCALE] = quantize(leaf)
    else:
      found[path] = leaf
  return traverse_util.unflatten_dict(found, sep="/")


def dequantized(params: dict[str, Any]) -> dict[str, Any]:
  """The way back, float32 kernels; what holds no scales comes back as it is."""
  flat = traverse_util.flatten_dict(params, sep="/")
  found = {}
  for path, leaf in flat.items():
    if path.endswith(SCALE):
      continue
    scale = flat.get(path.removesuffix("kernel") + SCALE)
    found[path] = leaf if scale is None else widened(leaf, scale, jnp.float32)
  return traverse_util.unflatten_dict(found, sep="/")


def widened(
  kernel: Num[Array | np.ndarray, "*N D F"],
  scale: Float[Array | np.ndarray, "*N F"] | None,
  dtype: Any,
) -> Float[Array | np.ndarray, "*N D F"]:
  """The kernel in `dtype`; without a scale it is a plain one."""
  kernel = kernel.astype(dtype)
  return kernel if scale is None else kernel * scale[..., None, :].astype(dtype)


@jax.custom_vjp
def project(
  x: Float[Array, "*B D"], kernel: Int[Array, "D F"], scale: Float[Array, " F"]
) -> Float[Array, "*B F"]:
  """x @ (kernel * scale) [*B, F] in x's dtype, added up in float32.

  Only x is differentiated. What is kept for that is the int8 kernel: JAX's own rule
  would keep a widened copy of every layer's.
  """
  product = jnp.einsum(
    "...d,df->...f", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32
  )
  return (product * _beside(scale, x)).astype(x.dtype)


def _beside(scale: Float[Array, " F"], x: Float[Array, "*B D"]) -> Float[Array, "..."]:
  """The scale with as many axes as x has."""
  return scale[(None,) * (x.ndim - 1)]


def _forward(
  x: Float[Array, "*B D"], kernel: Int[Array, "D F"], scale: Float[Array, " F"]
) -> tuple[Float[Array, "*B F"], tuple[Int[Array, "D F"], Float[Array, " F"]]]:
  return project(x, kernel, scale), (kernel, scale)


def _backward(
  kept: tuple[Int[Array, "D F"], Float[Array, " F"]], dy: Float[Array, "*B F"]
) -> tuple[Float[Array, "*B D"], None, None]:
  kernel, scale = kept
  scaled = (dy * _beside(scale, dy)).astype(dy.dtype)
  return jnp.einsum("...f,df->...d", scaled, kernel.astype(dy.dtype)), None, None


project.defvjp(_forward, _backward)
