"""Online modules: the trained parts of a teacher that is otherwise frozen.

They live in the Flax collection `adapter`, beside `params` and never inside it,
so that `teacher.apply({'params': frozen, 'adapter': trained}, tokens)` is the
adapted teacher, the same call without `adapter` is the plain one, and a gradient
with respect to `adapter` touches no base weight.

    params/layers/attention/query/kernel     [N, D, H]      frozen
    adapter/layers/attention/query/down      [k, D, r]      lora
    adapter/layers/attention/query/up        [k, r, H]      lora, zero at the start
    adapter/layers/attention/prefix_key      [k, m, K, D]   prefix
    adapter/layers/attention/prefix_value    [k, m, K, D]   prefix
    adapter/prompt/embedding                 [m, D]         prompt, and its MLP's
    adapter/prompt/{hidden,out}/{kernel,bias}               kernels [D, D], biases [D]
    adapter/layers/attention/query/kernel    [c, D, H]      blocks, and so on: all of c
                                                            layers' own parameters

With LoRA and blocks the adapted teacher is the plain one at step 0. Prefix and prompt
have no such start: whatever virtual tokens hold, they take attention from the real
ones.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from okd_jax.errors import UserError
from okd_jax.models.product import project

TARGETS = ("query", "key", "value", "out", "gate", "up", "down")
KINDS = ("lora", "prefix", "prompt", "blocks")
_STD = 0.02  # of virtual tokens at the start


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
  """Which online module the teacher carries.

  lora: adds `scale * x @ down @ up` to the named projections' outputs (LoRA, Hu et
    al. 2021, arXiv 2106.09685; OKD, arXiv 2409.12512, Eq. 15).
  prefix: puts `length` learned keys and values before the real ones of each layer
    (Prefix-Tuning, Li and Liang 2021, arXiv 2101.00190; without its MLP).
  prompt: puts `length` learned input vectors before the text (P-tuning, Liu et al.
    2021, arXiv 2103.10385; with its MLP, without its LSTM). Always in all layers.
  blocks: adds nothing; the teacher's own layers named in `blocks`, numbered from below,
    are replaced by trained copies (`methods.clda`). The copies are float32 whatever the
    teacher's dtype, since small updates would be lost in bfloat16.

  `layers` counts from the top of the teacher; 0 means all of them. `rank`, `scale`
  and `targets` are LoRA's alone, `length` is the others'. OKD's P-tuning refers to
  v2, which is per-layer prompting: our prefix.
  """

  kind: str = "lora"
  rank: int = 32
  scale: float = 1.0
  targets: tuple[str, ...] = ("query", "value")
  layers: int = 0
  length: int = 16
  blocks: tuple[int, ...] = ()

  def __post_init__(self):
    object.__setattr__(self, "targets", tuple(self.targets))
    object.__setattr__(self, "blocks", tuple(map(int, self.blocks)))
    if self.kind not in KINDS:
      raise UserError(
        f"adapter.kind={self.kind!r} is unknown; use one of {', '.join(KINDS)}"
      )
    if problems := list(self._problems()):
      raise UserError("; ".join(problems))

  def _problems(self):
    if self.kind == "lora":
      unknown = [name for name in self.targets if name not in TARGETS]
      if unknown or not self.targets:
        yield (
          f"adapter.targets={list(self.targets)} must name at least one of "
          f"{', '.join(TARGETS)} and nothing else"
        )
      if self.rank < 1:
        yield f"adapter.rank={self.rank} must be at least 1"
    if self.layers < 0:
      yield f"adapter.layers={self.layers} must be at least 0"
    if self.length < 1:
      yield f"adapter.length={self.length} must be at least 1"
    if self.kind == "prompt" and self.layers:
      yield (
        f"adapter.layers={self.layers} does not go with adapter.kind='prompt', whose "
        "vectors pass through all layers; leave it at 0"
      )
    if self.kind == "blocks":
      if self.layers:
        yield (
          f"adapter.layers={self.layers} does not go with adapter.kind='blocks', which "
          "chooses layers by their saliency; leave it at 0 and set adapter.share"
        )
      if not self.blocks or list(self.blocks) != sorted({*self.blocks}):
        yield f"blocks {list(self.blocks)} must be at least one, ascending, each once"

  def adapts(self, projection: str) -> bool:
    """Whether the projection of this name carries a LoRA pair."""
    return self.kind == "lora" and projection in self.targets

  def num_layers(self, total: int) -> int:
    """How many of `total` layers, counted from the top, carry a module.

    Of blocks: how many there are from the lowest trained one upwards.
    """
    if self.kind == "blocks":
      return total - self.blocks[0]
    return self.layers or total

  def check(self, total: int, gated_mlp: bool) -> None:
    """Raises a UserError if a model of `total` layers has no place for the module."""
    if self.layers > total:
      raise UserError(
        f"adapter.layers={self.layers}, but the teacher has only {total} layers"
      )
    if self.kind == "blocks" and not 0 <= self.blocks[0] <= self.blocks[-1] < total:
      raise UserError(
        f"blocks {list(self.blocks)} are not all among the teacher's {total} layers"
      )
    if self.adapts("gate") and not gated_mlp:
      raise UserError(
        "adapter.targets names 'gate', but the teacher's MLP has no gate; leave it out"
      )


def lora_delta(
  module: nn.Module, config: AdapterConfig, x: Float[Array, "*B D"], features: int
) -> Float[Array, "*B H"]:
  """`scale * x @ down @ up`, its matrices declared in `module`'s adapter collection.

  `down` starts as a variance-scaled normal and `up` at zero, so that the adapted
  teacher equals the plain one at step 0. The product runs in x's dtype.
  """

  def init_down():
    shape = (x.shape[-1], config.rank)
    init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
    return init(module.make_rng("params"), shape, jnp.float32)

  down = module.variable("adapter", "down", init_down).value
  up = module.variable("adapter", "up", jnp.zeros, (config.rank, features)).value
  inner = config.scale * project(x, down.astype(x.dtype))
  return project(inner, up.astype(x.dtype))


def merge(params, adapter, config: AdapterConfig):
  """The base with LoRA pairs multiplied out and added: W + scale * down @ up.

  Each sum is made in float32 and rounded once to the weights' own dtype.

  Raises:
    UserError: for virtual tokens, which no weight can hold.
  """
  if config.kind != "lora":
    raise UserError(f"a {config.kind} module cannot be merged into weights: LoRA can")
  flat, pairs = (traverse_util.flatten_dict(tree) for tree in (params, adapter))
  for path in {path[:-1] for path in pairs}:
    kernel = flat[*path, "kernel"]
    delta = config.scale * jnp.einsum(
      "kdr,krh->kdh", pairs[*path, "down"], pairs[*path, "up"]
    )
    top = kernel[-len(delta) :].astype(jnp.float32) + delta
    merged = kernel.at[-len(delta) :].set(top.astype(kernel.dtype))
    flat[*path, "kernel"] = merged
  return traverse_util.unflatten_dict(flat)


def prefix(
  module: nn.Module, config: AdapterConfig, heads: int, head_dim: int, dtype
) -> tuple[Float[Array, "1 m K D"], Float[Array, "1 m K D"]]:
  """One layer's keys and values, declared in `module`'s adapter collection.

  They are no token's and so have no position: rotary embeddings leave them alone.
  """

  def init():
    shape = (config.length, heads, head_dim)
    return _STD * jax.random.normal(module.make_rng("params"), shape)

  key = module.variable("adapter", "prefix_key", init).value
  value = module.variable("adapter", "prefix_value", init).value
  return key.astype(dtype)[None], value.astype(dtype)[None]


def prompt(
  module: nn.Module, config: AdapterConfig, features: int, dtype
) -> Float[Array, "1 m D"]:
  """The virtual tokens' input vectors, declared in `module`'s adapter collection.

  A tree that holds just `vectors` [m, D] is taken as it is: what is left of a prompt
  whose MLP has been dropped after training (`models.save_adapter`).
  """

  def init():
    return _init_prompt(module.make_rng("params"), config.length, features)

  tree = module.variable("adapter", "prompt", init).value
  return prompt_vectors(tree).astype(dtype)[None]


def prompt_vectors(tree) -> Float[Array, "m D"]:
  """`adapter/prompt` to its vectors: embedding, then dense, ReLU, dense, in float32.

  P-tuning's MLP is two-layered with ReLU (arXiv 2103.10385, section 3.2).
  """
  if "vectors" in tree:
    return tree["vectors"]
  x = tree["embedding"]
  for name in ("hidden", "out"):
    x = x @ tree[name]["kernel"] + tree[name]["bias"][None]
    x = nn.relu(x) if name == "hidden" else x
  return x


def _init_prompt(key, length: int, features: int):
  """Unit-sized activations inside, so that the MLP trains well, but vectors of 0.02.

  So small they lie where the input embeddings of most models start: the layers above
  are used to such inputs, and LLaMA's do not even see their length.
  """
  keys = jax.random.split(key, 3)
  tree = {"embedding": jax.random.normal(keys[0], (length, features))}
  # Twice the variance where ReLU then drops half of it.
  for name, variance, key in (("hidden", 2.0, keys[1]), ("out", _STD**2, keys[2])):
    init = nn.initializers.variance_scaling(variance, "fan_in", "normal")
    kernel = init(key, (features, features), jnp.float32)
    tree[name] = {"kernel": kernel, "bias": jnp.zeros(features)}
  return tree


def cut(layers, first: int, last: int):
  """The stacked layers from `first` to before `last`."""
  return jax.tree.map(lambda x: x[first:last], layers)


def take_blocks(layers, config: AdapterConfig):
  """float32 copies of the stacked layers that `config.blocks` names, [c, …]."""
  index = np.array(config.blocks)
  return jax.tree.map(lambda x: x[index].astype(jnp.float32), layers)


def replace_blocks(layers, own, config: AdapterConfig):
  """The stacked layers with the trained ones in their places, in the frozen dtype."""
  index = np.array(config.blocks)
  return jax.tree.map(lambda x, y: x.at[index].set(y.astype(x.dtype)), layers, own)


def block_runs(layers, own, config: AdapterConfig, start: int, stop: int):
  """(first, last, weights): the layers of `replace_blocks` from `start` to `stop`.

  In runs that are frozen or trained as a whole, so that no gradient of a frozen layer
  is ever computed, nor a second copy of the frozen ones made.
  """
  first = start
  while first < stop:
    trained, last = first in config.blocks, first + 1
    while last < stop and (last in config.blocks) == trained:
      last += 1
    weights = cut(layers, first, last)
    if trained:
      row = config.blocks.index(first)
      new = cut(own, row, row + last - first)
      weights = jax.tree.map(lambda x, y: y.astype(x.dtype), weights, new)
    yield first, last, weights
    first = last


def module_norm(adapter, base=None) -> Float[Array, ""]:
  """How large a module is: the Frobenius norm of what it adds or puts in.

  Of a LoRA pair that is the norm of down @ up (before `scale`), 0 at the start, found
  without making the product: |down up|^2 = tr(down' down up up'). Of a prompt it is
  that of its vectors, whatever its MLP holds, and of blocks that of what they have
  changed since they were `base`.
  """
  if base is not None:
    adapter = jax.tree.map(jnp.subtract, adapter, base)
  if "prompt" in adapter:
    adapter = {"vectors": prompt_vectors(adapter["prompt"])}
  flat = traverse_util.flatten_dict(adapter)
  total = jnp.zeros(())
  for (*path, name), leaf in flat.items():
    down = flat.get((*path, "down"))
    if name == "up" and down is not None:
      inner = jnp.einsum("ndr,nds->nrs", down, down)
      total += jnp.sum(inner * jnp.einsum("nrh,nsh->nrs", leaf, leaf))
    elif name != "down":
      total += jnp.sum(jnp.square(leaf))
  return jnp.sqrt(total)
