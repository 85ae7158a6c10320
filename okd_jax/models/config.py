"""What decides the shape of a decoder: one frozen dataclass for every family."""

import dataclasses
from collections.abc import Iterator

from okd_jax.errors import UserError

NORMS = ("layernorm", "rmsnorm")
POSITIONS = ("learned", "rope")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """LLaMA-3's frequency-dependent stretch, or a plain linear one.

  kind: 'linear' divides every frequency by `factor`; 'llama3' keeps the short
  wavelengths, divides the long ones and blends between (The Llama 3 Herd of
  Models, Dubey et al. 2024, arXiv 2407.21783; constants in the model's config).
  """

  kind: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_length: int = 8192

  def __post_init__(self) -> None:
    if self.kind not in ("linear", "llama3"):
      raise UserError(
        f"rope scaling {self.kind!r} is not supported; use 'linear' or 'llama3'"
      )


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
  mlp_size: int = 0  # 0: four times hidden_size
  max_length: int = 1024
  norm: str = "rmsnorm"
  norm_eps: float = 1e-5
  position: str = "rope"
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  activation: str = "silu"
  gated_mlp: bool = True
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  tie_embeddings: bool = True
  init_std: float = 0.02
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()  # generation stops at any of these
  pad_id: int | None = None

  def __post_init__(self) -> None:
    fill = object.__setattr__
    if not self.num_kv_heads:
      fill(self, "num_kv_heads", self.num_heads)
    if not self.head_dim:
      fill(self, "head_dim", self.hidden_size // self.num_heads)
    if not self.mlp_size:
      fill(self, "mlp_size", 4 * self.hidden_size)
    problems = list(_problems(self))
    if problems:
      raise UserError("the model's configuration is unusable: " + "; ".join(problems))


Field = bool | int | float | str | tuple[int, ...] | RopeScaling | None

# What sets a family apart from the defaults above.
PRESETS = {
  "gpt2": {
    "norm": "layernorm",
    "position": "learned",
    "activation": "gelu_tanh",
    "gated_mlp": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
  },
  "llama": {},
  "mistral": {},
}


def preset(family: str, **dimensions: Field) -> ModelConfig:
  """A model of `family` with these dimensions; a UserError if there is none such."""
  if family not in PRESETS:
    raise UserError(f"model family {family!r} is none of {', '.join(PRESETS)}")
  return ModelConfig(family=family, **(PRESETS[family] | dimensions))


def _problems(config: ModelConfig) -> Iterator[str]:
  for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "max_length"):
    if getattr(config, name) < 1:
      yield f"{name}={getattr(config, name)} must be at least 1"
  if config.num_heads % config.num_kv_heads:
    yield (
      f"num_heads={config.num_heads} is no multiple of "
      f"num_kv_heads={config.num_kv_heads}"
    )
  if config.position == "rope" and config.head_dim % 2:
    yield f"head_dim={config.head_dim} must be even for rotary positions"
  for name, allowed in (
    ("norm", NORMS),
    ("position", POSITIONS),
    ("activation", ACTIVATIONS),
  ):
    if getattr(config, name) not in allowed:
      yield f"{name}={getattr(config, name)!r} is none of {', '.join(allowed)}"
