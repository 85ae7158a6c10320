"""What decides the shape of a decoder: one frozen dataclass for every family."""

import dataclasses
from collections.abc import Iterator, Sequence

from okd_jax.errors import UserError
from okd_jax.models.bounds import (
  LIST,
  NUMBER,
  SWITCH,
  TEXT,
  WHOLE,
  Bound,
  number,
  whole,
)
from okd_jax.models.bounds import problems as out_of_bounds

NORMS = ("layernorm", "rmsnorm")
POSITIONS = ("learned", "rope", "none")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
# Where a layer's norms stand: before attention and MLP, on what these put out, at both
# places, or on the sum with the residual (the original transformer's way).
NORM_PLACES = ("before", "on_output", "both", "on_sum")
QK_NORMS = ("", "head", "projection")
SCALINGS = ("linear", "dynamic", "llama3", "yarn", "longrope")
MOST_LAYERS, MOST_LENGTH, MOST_IDS = 4096, 1 << 30, (1 << 31) - 1
_FACTOR = number(-1e9, 1e9)
BOUNDS = (
  {  # of the fields of `ModelConfig`; those of 0 say that another decides
    "family": Bound(TEXT),
    "vocab_size": whole(0, 1 << 24),
    "hidden_size": whole(0, 1 << 18),
    "num_layers": whole(0, MOST_LAYERS),
    "num_heads": whole(0, 1 << 14),
    "num_kv_heads": whole(0, 1 << 14),
    "head_dim": whole(0, 1 << 14),
    "mlp_size": whole(0, 1 << 20),
    "embed_size": whole(0, 1 << 18),
    "max_length": whole(0, MOST_LENGTH),
    "norm_eps": number(0.0, 1.0),
    "rope_theta": number(1e-3, 1e15),
    "rotary_share": number(0.0, 1.0),
    "experts": whole(0, 1 << 14),
    "experts_per_token": whole(0, 1 << 14),
    "embed_scale": _FACTOR,
    "residual_scale": _FACTOR,
    "attention_scale": _FACTOR,
    "logit_divisor": number(1e-9, 1e9),
    "attention_cap": number(0.0, 1e9),
    "logit_cap": number(0.0, 1e9),
    "init_std": number(0.0, 100.0),
    "bos_id": whole(0, MOST_IDS),
    "eos_ids": Bound(LIST, 0, MOST_IDS, WHOLE),
    "pad_id": whole(0, MOST_IDS),
  }
  | {
    name: Bound(SWITCH)
    for name in ("norm_from_one", "final_norm", "gated_mlp", "normalize_experts")
    + ("qkv_bias", "out_bias", "mlp_bias", "tie_embeddings")
  }
  | {
    name: Bound(TEXT)
    for name in ("norm", "norm_place", "qk_norm", "position") + ("activation",)
  }
)
_OF_SCALING = {
  name: number(1e-6, 1e6)
  for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast")
  + ("beta_slow", "attention_factor")
} | {
  "original_max_length": whole(1, MOST_LENGTH),
  "truncate": Bound(SWITCH),
  "short_factors": Bound(LIST, 1e-9, 1e9, NUMBER),
  "long_factors": Bound(LIST, 1e-9, 1e9, NUMBER),
}
_OF_KIND = {
  "window": whole(0, MOST_LENGTH),
  "rotary": Bound(SWITCH),
  "rope_theta": number(0.0, 1e15),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are changed to reach texts longer than the first training's.

  kind: 'linear' divides every frequency by `factor`; 'llama3' keeps the short
    wavelengths, divides the long ones and blends between (The Llama 3 Herd of
    Models, Dubey et al. 2024, arXiv 2407.21783); 'yarn' does so by the number of turns
    within `original_max_length` (Peng et al. 2023, arXiv 2309.00071); 'longrope'
    divides each by its own factor, in texts beyond `original_max_length` by another
    (Ding et al. 2024, arXiv 2402.13753); 'dynamic' changes them in texts beyond the
    model's `max_length` alone, which no row here may be.
  attention_factor: yarn's and longrope's, of cosine and sine.
  short_factors, long_factors: longrope's, one for each pair of channels.
  """

  kind: str
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_length: int = 8192
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True
  attention_factor: float = 1.0
  short_factors: tuple[float, ...] = ()
  long_factors: tuple[float, ...] = ()

  def __post_init__(self) -> None:
    if self.kind not in SCALINGS:
      raise UserError(
        f"rope scaling {self.kind!r} is not supported, only {', '.join(SCALINGS)}"
      )
    if wrong := list(out_of_bounds(vars(self), _OF_SCALING)):
      raise UserError(f"rope scaling {self.kind!r}: {'; '.join(wrong)}")

  @property
  def by_pair(self) -> bool:
    """Whether each pair of channels has factors of its own, two for two lengths."""
    return self.kind == "longrope"


@dataclasses.dataclass(frozen=True)
class LayerKind:
  """What the attention of some layers does unlike that of others.

  window: tokens that a query sees, itself the last of them; 0: all before it.
  rotary: False for a layer that knows no positions.
  rope_theta: a base of its own, without scaling; 0: the model's base and scaling.
  """

  window: int = 0
  rotary: bool = True
  rope_theta: float = 0.0

  def __post_init__(self) -> None:
    if wrong := list(out_of_bounds(vars(self), _OF_KIND)):
      raise UserError(f"a layer's attention: {'; '.join(wrong)}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer; the defaults are a small LLaMA.

  Widths are in units (not bytes), `max_length` in tokens. `family` names the
  Hugging Face layout the weights are read from and written to.
  """

  family: str = "llama"
  vocab_size: int = 512
  hidden_size: int = 64
  num_layers: int = 2
  num_heads: int = 4
  num_kv_heads: int = 0  # 0: as many as num_heads
  head_dim: int = 0  # 0: hidden_size // num_heads
  mlp_size: int = 0  # 0: four times hidden_size; of an expert, where there are any
  embed_size: int = 0  # of a token's vector; 0: hidden_size, else there are projections
  max_length: int = 1024
  norm: str = "rmsnorm"
  norm_eps: float = 1e-5
  norm_place: str = "before"
  norm_from_one: bool = False  # a norm's scale is 1 + w
  final_norm: bool = True
  qk_norm: str = ""  # of queries and keys: 'head' by head, or the whole 'projection'
  position: str = "rope"
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  rotary_share: float = 1.0  # of a head's channels, the first ones are turned
  layer_kinds: tuple[LayerKind, ...] = ()  # one a layer; (): LayerKind() everywhere
  activation: str = "silu"
  gated_mlp: bool = True
  experts: int = 0  # 0: one MLP a layer, else so many and a router
  experts_per_token: int = 1
  normalize_experts: bool = True  # those chosen have weights that add up to 1
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  tie_embeddings: bool = True
  embed_scale: float = 1.0  # multiplies the tokens' vectors
  residual_scale: float = 1.0  # multiplies what attention and MLP add
  attention_scale: float = 0.0  # multiplies the scores; 0: 1 / sqrt(head_dim)
  logit_divisor: float = 1.0  # the logits are divided by it
  attention_cap: float = 0.0  # c tanh(x / c) of the scores; 0: no cap
  logit_cap: float = 0.0  # the same of the logits
  init_std: float = 0.02
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()  # generation stops at any of these
  pad_id: int | None = None

  def __post_init__(self) -> None:
    fill = object.__setattr__
    if wrong := list(out_of_bounds(vars(self), BOUNDS)):
      raise UserError(f"the model's configuration is unusable: {'; '.join(wrong)}")
    if not self.num_kv_heads:
      fill(self, "num_kv_heads", self.num_heads)
    if not self.head_dim:
      fill(self, "head_dim", self.hidden_size // max(self.num_heads, 1))
    if not self.mlp_size:
      fill(self, "mlp_size", 4 * self.hidden_size)
    if not self.embed_size:
      fill(self, "embed_size", self.hidden_size)
    if set(self.layer_kinds) == {LayerKind()}:
      fill(self, "layer_kinds", ())
    problems = list(_problems(self))
    if problems:
      raise UserError("the model's configuration is unusable: " + "; ".join(problems))

  @property
  def rotary_dim(self) -> int:
    """How many of a head's channels are turned."""
    return int(self.head_dim * self.rotary_share)

  @property
  def kinds(self) -> tuple[LayerKind, ...]:
    """The different kinds of layers, in the order of their first appearance."""
    return tuple(dict.fromkeys(self.layer_kinds)) or (LayerKind(),)

  def window(self, keys: int) -> int | None:
    """The window of all layers in rows of so many keys, 0 for none that cuts any off.

    None where it differs from layer to layer.
    """
    windows = {kind.window if kind.window < keys else 0 for kind in self.kinds}
    return windows.pop() if len(windows) == 1 else None

  def of_layers(self, layers: Sequence[int]) -> "ModelConfig":
    """The shape of a model that has these of the layers alone, in this order."""
    kinds = self.layer_kinds and tuple(self.layer_kinds[i] for i in layers)
    return dataclasses.replace(self, num_layers=len(layers), layer_kinds=kinds)


Field = (
  bool
  | int
  | float
  | str
  | tuple[int, ...]
  | tuple[LayerKind, ...]
  | RopeScaling
  | None
)


def _problems(config: ModelConfig) -> Iterator[str]:
  names = ["vocab_size", "hidden_size", "num_layers", "num_heads", "max_length"]
  for name in (*names, "num_kv_heads", "head_dim", "mlp_size", "embed_size"):
    if getattr(config, name) < 1:
      yield f"{name}={getattr(config, name)} must be at least 1"
  if config.num_kv_heads > 0 and config.num_heads % config.num_kv_heads:
    yield (
      f"num_heads={config.num_heads} is no multiple of "
      f"num_kv_heads={config.num_kv_heads}"
    )
  if config.position == "rope":
    yield from _rotary_problems(config)
  if config.experts and not 1 <= config.experts_per_token <= config.experts:
    yield (
      f"experts_per_token={config.experts_per_token} must lie between 1 and "
      f"experts={config.experts}"
    )
  if config.layer_kinds and len(config.layer_kinds) != config.num_layers:
    yield (
      f"layer_kinds has {len(config.layer_kinds)} of them for num_layers="
      f"{config.num_layers}"
    )
  for name, allowed in (
    ("norm", NORMS),
    ("norm_place", NORM_PLACES),
    ("qk_norm", QK_NORMS),
    ("position", POSITIONS),
    ("activation", ACTIVATIONS),
  ):
    if getattr(config, name) not in allowed:
      yield f"{name}={getattr(config, name)!r} is none of {', '.join(allowed)}"


def _rotary_problems(config: ModelConfig) -> Iterator[str]:
  if not 0 < config.rotary_share <= 1:
    yield f"rotary_share={config.rotary_share} must be above 0 and at most 1"
    return
  if config.rotary_dim % 2 or not config.rotary_dim:
    part = "" if config.rotary_share == 1 else f" times {config.rotary_share}"
    yield f"head_dim={config.head_dim}{part} must be even for rotary positions"
  scaling, pairs = config.rope_scaling, config.rotary_dim // 2
  if scaling and scaling.by_pair:
    for name in ("short_factors", "long_factors"):
      if len(getattr(scaling, name)) != pairs:
        yield (
          f"rope scaling {scaling.kind!r} has {len(getattr(scaling, name))} {name} for "
          f"{pairs} pairs of channels"
        )
