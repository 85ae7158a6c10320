"""A prompt: learned input vectors before the text."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from okd_jax.models.adapters.base import Adapter, Tree
from okd_jax.models.adapters.prefix import MOST_TOKENS, STD, length_problems
from okd_jax.models.bounds import LIST, WHOLE, Bound
from okd_jax.models.config import MOST_IDS


@dataclasses.dataclass(frozen=True)
class Prompt(Adapter):
  """Puts `length` learned input vectors before the text, and so into all layers.

  P-tuning, Liu et al. 2021, arXiv 2103.10385; with its MLP, without its LSTM. One that
  starts from a text, as in PromptKD (Kim et al. 2024, arXiv 2402.12842), has no MLP:
  its vectors are the text's embeddings.

  Attributes:
    length: virtual tokens.
    ids: the tokens of that text, repeated or cut to `length`, as PEFT does; () for a
      start at random.
  """

  kind: ClassVar[str] = "prompt"
  bounds: ClassVar[Mapping[str, Bound]] = {
    "length": MOST_TOKENS,
    "ids": Bound(LIST, 0, MOST_IDS, WHOLE),
  }
  whole: ClassVar[bool] = True
  layers_refused: ClassVar[str] = "whose vectors pass through all layers; leave it at 0"
  length: int = 16
  ids: Sequence[int] = ()

  def __post_init__(self):
    if isinstance(self.ids, range | np.ndarray):
      object.__setattr__(self, "ids", tuple(map(int, self.ids)))
    super().__post_init__()
    ids = np.resize(np.array(self.ids, np.int32), self.length) if len(self.ids) else ()
    object.__setattr__(self, "ids", tuple(map(int, ids)))

  def problems(self) -> Iterator[str]:
    """As in the base class."""
    return length_problems(self.length)

  def trunk_layers(self, total: int) -> int:
    """0: the vectors enter the lowest layer."""
    return 0

  @property
  def prefix_length(self) -> int:
    """Virtual keys that attention finds before the real ones."""
    return self.length

  @property
  def bare(self) -> "Prompt":
    """The same without its MLP, as it is kept once it is trained.

    Nothing is started from the token 0 that takes the place of missing ones.
    """
    return dataclasses.replace(self, ids=self.ids or (0,))

  def start(self, base: Tree) -> Tree | None:
    """The embeddings of `ids` in float32; None where there are none."""
    if not self.ids:
      return None
    vectors = base["embed"]["embedding"][np.array(self.ids, np.int32)]
    return {"prompt": {"vectors": vectors.astype(jnp.float32)}}

  def norm(self, tree: Tree, base: Tree | None) -> Float[Array, ""]:
    """The Frobenius norm of the vectors, whatever their MLP holds."""
    return super().norm({"vectors": prompt_vectors(tree["prompt"])}, base)

  def virtual(
    self, module: nn.Module, features: int, dtype: DTypeLike
  ) -> Float[Array, "1 m D"]:
    """The vectors; a tree that holds just `vectors` is taken as it is."""

    def init() -> Tree:
      if self.ids:  # `start` has what belongs here
        return {"vectors": jnp.zeros((self.length, features))}
      return _init(module.make_rng("params"), self.length, features)

    tree = module.variable("adapter", "prompt", init).value
    return prompt_vectors(tree).astype(dtype)[None]


def prompt_vectors(tree: Tree) -> Float[Array | np.ndarray, "m D"]:
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


def _init(key: Array, length: int, features: int) -> Tree:
  """Unit-sized activations inside, so that the MLP trains well, but vectors of 0.02.

  So small they lie where the input embeddings of most models start: the layers above
  are used to such inputs, and LLaMA's do not even see their length.
  """
  keys = jax.random.split(key, 3)
  tree = {"embedding": jax.random.normal(keys[0], (length, features))}
  # Twice the variance where ReLU then drops half of it.
  for name, variance, key in (("hidden", 2.0, keys[1]), ("out", STD**2, keys[2])):
    init = nn.initializers.variance_scaling(variance, "fan_in", "normal")
    kernel = init(key, (features, features), jnp.float32)
    tree[name] = {"kernel": kernel, "bias": jnp.zeros(features)}
  return tree
