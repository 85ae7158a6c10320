"""What a step must compute, counted from shapes: the arithmetic, not the clock.

A product of [T, D] and [D, F] is 2 T D F operations; its backward pass is as much again
for each side that somebody differentiates. Attention is counted as it is computed on a
CPU, all pairs of a row. Norms, activations and softmax are not counted.
"""

from typing import NamedTuple

from okd_jax.methods.base import TokenWeight
from okd_jax.models import ModelConfig


class InPart(NamedTuple):
  """What is trained of a student that is trained in part.

  layers: how many of its top layers the backward pass goes through.
  kernels: trained numbers in the layers' own kernels.
  modules: numbers of its LoRA.
  head: whether the head is trained.
  """

  layers: int
  kernels: int
  modules: int
  head: bool


def step(
  student: ModelConfig,
  teacher: ModelConfig | None,
  tokens: int,
  length: int,
  *,
  in_part: InPart | None = None,
  adapted_layers: int = 0,
  module_size: int = 0,
  taught: float = 1.0,
  token_weight: TokenWeight | None = None,
  module_tokens: TokenWeight | None = None,
) -> dict[str, float]:
  """{part: operations} of one step on `tokens` tokens in rows of `length`.

  adapted_layers: how many of the teacher's top layers hold modules. The backward pass
    goes through these and the head, and takes no gradient of a frozen weight.
  module_size: parameters of all modules together.
  in_part: what of the student is trained; None: all.
  taught: the share of the rows that modules learn from, over the steps.
  token_weight, module_tokens: how the student's loss and the modules' weigh tokens,
    which takes logits of its own; what neither of them keeps has none in the losses.
  """
  forward, backward = 1, 2
  parts = {"student": _student(student, tokens, length, in_part)}
  own_head = (3 if in_part is None or in_part.head else 2) * _head(student, tokens)
  if not teacher:
    return parts | {"heads": own_head}
  parts["teacher forward"] = _layers(teacher, tokens, length)
  if adapted_layers:
    through = _through(teacher, tokens, length, adapted_layers)
    parts["teacher backward"] = taught * through
    parts["modules"] = (forward + backward * taught) * 2 * module_size * tokens
  else:
    taught = 0.0
  heads = _heads(
    student, teacher, own_head, tokens, taught, token_weight, module_tokens
  )
  return parts | {"heads": heads}


def _student(
  config: ModelConfig, tokens: int, length: int, in_part: InPart | None
) -> float:
  """The student's layers, forwards and backwards."""
  forward = _layers(config, tokens, length)
  if in_part is None:
    return 3 * forward
  weights = 2 * tokens * (in_part.kernels + 3 * in_part.modules)
  return forward + _through(config, tokens, length, in_part.layers) + weights


def _through(config: ModelConfig, tokens: int, length: int, layers: int) -> float:
  """A backward pass through so many layers that makes no gradient of a weight.

  Of a product with a frozen weight one side, of attention's products both.
  """
  share = layers / config.num_layers
  attention = _attention(config, tokens, length) * layers
  return share * _layers(config, tokens, length) + attention


def _heads(
  student: ModelConfig,
  teacher: ModelConfig,
  own_head: float,
  tokens: int,
  taught: float,
  token_weight: TokenWeight | None,
  module_tokens: TokenWeight | None,
) -> float:
  """Logits: of both models forwards, the student's and, for its modules, the teacher's
  backwards; and those that tokens are weighed by."""
  own = own_head + _head(teacher, tokens)
  kept, pulls = (how.share if how else 1.0 for how in (token_weight, module_tokens))
  both = max(kept, pulls)
  total = kept * own + _scores(token_weight, student, teacher, tokens)
  total += taught * ((both - kept) * own + both * _head(teacher, tokens))
  return total + taught * _scores(module_tokens, student, teacher, tokens)


def _scores(
  how: TokenWeight | None, student: ModelConfig, teacher: ModelConfig, tokens: int
) -> float:
  """Logits that tokens are weighed by, where they are."""
  if not how:
    return 0.0
  models = [teacher] if how.kind == "entropy" else [teacher, student]
  return sum(_head(model, tokens) for model in models)


def _layers(config: ModelConfig, tokens: int, length: int) -> float:
  """All layers, forwards."""
  size, heads = config.hidden_size, config.num_heads * config.head_dim
  kv = config.num_kv_heads * config.head_dim
  mlp = (3 if config.gated_mlp else 2) * size * config.mlp_size
  if config.experts:
    mlp = config.experts_per_token * mlp + size * config.experts
  weights = 2 * size * heads + 2 * size * kv + mlp
  each = 2 * tokens * weights + _attention(config, tokens, length)
  return config.num_layers * each


def _attention(config: ModelConfig, tokens: int, length: int) -> float:
  """Scores and their use in one layer, forwards."""
  return 2 * 2 * tokens * length * config.num_heads * config.head_dim


def _head(config: ModelConfig, tokens: int) -> float:
  return 2 * tokens * config.vocab_size * config.embed_size
