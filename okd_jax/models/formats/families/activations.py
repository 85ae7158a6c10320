"""Names of activation functions, Hugging Face's and ours."""

from okd_jax.errors import UserError

_OURS = {
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "relu": "relu",
  "silu": "silu",
  "swish": "silu",
}
_THEIRS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}


def from_hf(name: str) -> str:
  """Our name for theirs; a UserError for one that the decoder does not have."""
  if name not in _OURS:
    raise UserError(f"activation {name!r} is not supported, only {', '.join(_OURS)}")
  return _OURS[name]


def to_hf(name: str, usual: str) -> str:
  """Their name for ours, the family's `usual` one if that means the same."""
  return usual if _OURS[usual] == name else _THEIRS[name]
