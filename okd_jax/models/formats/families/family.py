"""What a family of models is to us: how config.json and the weights of it read."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from okd_jax.errors import UserError
from okd_jax.models.config import Field, LayerKind, ModelConfig
from okd_jax.models.formats.families import activations
from okd_jax.models.formats.families.raw import wrong
from okd_jax.models.formats.weights import QKV, Weight, linear, require

Raw = Mapping[str, Any]  # what config.json holds
Fields = dict[str, Any]  # of `ModelConfig`, by name

REQUIRED = object()
_SLIDING, _FULL = "sliding_attention", "full_attention"
_IDS = ("family", "bos_id", "eos_ids", "pad_id")  # which `hf` reads and writes


class Key(NamedTuple):
  """A field of `ModelConfig` and the key of config.json that says it.

  default: what it means if the key is missing or null; for an activation, also the
    name that is written for it.
  """

  ours: str
  theirs: str
  default: Any = REQUIRED

  def read(self, raw: Raw) -> Field:
    """The field's value; KeyError for a key that must be there."""
    value = raw.get(self.theirs)
    if value is None:
      if self.default is REQUIRED:
        raise KeyError(self.theirs)
      value = self.default
    return activations.from_hf(value) if self.ours == "activation" else value

  def write(self, config: ModelConfig) -> Any:
    """The key's value."""
    value = getattr(config, self.ours)
    return (
      activations.to_hf(value, self.default) if self.ours == "activation" else value
    )


def _nothing(_: Any) -> Fields:
  return {}


@dataclasses.dataclass(frozen=True)
class Family:
  """A layout of configuration and weights, known by its model_type.

  Attributes:
    architecture: transformers' class, as config.json names it.
    weights: the table of all parameters; those that a model lacks are left out.
    keys: the table of the configuration.
    fixed: fields that are the same in all models of the family.
    read, write: what the tables cannot say: fields from config.json, and the way back.
      Nothing need be checked there: what was written is read and compared.
    derived: fields that follow from others, of a model that is made at random: from the
      fields that were given.
    only: options that change the computation, with the only value that we compute.
    defaults: values of keys that config.json leaves out, where they are not those of
      `LLAMA_KEYS`.
    prefix: of the tensors' names; absent where the model was saved without its head.
    layers: the list of layers, as PEFT names it.
    ignored: a pattern of tensors that say nothing new.
    fan_in_fan_out: whether kernels are kept [in, out]; PEFT asks.
  """

  architecture: str
  weights: tuple[Weight, ...]
  keys: tuple[Key, ...]
  fixed: Mapping[str, Field] = dataclasses.field(default_factory=dict)
  read: Callable[[Raw], Fields] = _nothing
  write: Callable[[ModelConfig], dict[str, Any]] = _nothing
  derived: Callable[[Fields], Fields] = _nothing
  only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  prefix: str = "model."
  layers: str = "layers"
  ignored: str = r"rotary_emb\.inv_freq$"  # derived; old versions stored it
  fan_in_fan_out: bool = False

  @property
  def projections(self) -> dict[str, tuple[str, tuple[str, ...]]]:
    """{'attention/query': (their layer 'self_attn.q_proj', all that are in it)}."""
    found = {}
    for row in self.weights:
      if row.path.endswith("/kernel") and row.stacked == 1:
        name = row.name.split(".{}.")[1].removesuffix(".weight")
        paths = (_projection(path) for path in row.fused or (row.path,))
        found[_projection(row.path)] = name, tuple(paths)
    return found

  def config_from_hf(self, raw: Raw) -> ModelConfig:
    """What config.json says; token ids are left to `hf`.

    Raises:
      UserError: for what we do not compute; KeyError: for a key that must be there.
    """
    left_out = {k: v for k, v in self.defaults.items() if raw.get(k) is None}
    raw = {**raw, **left_out}
    named = {key.theirs: key.ours for key in self.keys}
    if problems := list(wrong(raw, named)):
      raise UserError("; ".join(problems))
    for name, value in self.only.items():
      if raw.get(name, value) != value:
        raise UserError(f"{name}={raw[name]} is not supported, only {value}")
    fields = {key.ours: key.read(raw) for key in self.keys}
    return ModelConfig(
      family=raw["model_type"], **{**self.fixed, **fields, **self.read(raw)}
    )

  def config_to_hf(self, config: ModelConfig) -> dict[str, Any]:
    """The way back; a UserError where the layout cannot say it."""
    keys = {key.theirs: key.write(config) for key in self.keys}
    raw = {**self.only, **keys, **self.write(config)}
    # What no key says comes back as its default, and so is refused.
    back = self.config_from_hf({**raw, "model_type": config.family})
    require(config, **_meaning(back, config))
    return raw


def _meaning(back: ModelConfig, config: ModelConfig) -> Fields:
  """What a configuration says after its way there and back, in the first's words."""
  fields = {f.name: getattr(back, f.name) for f in dataclasses.fields(back)}
  for name in _IDS:
    del fields[name]
  if not config.attention_scale:
    fields["attention_scale"] = 0.0
  if not config.rope_scaling:  # a base of its own that is the model's is none
    same = {0.0: config.rope_theta}
    kinds = [
      tuple((k.window, k.rotary, same.get(k.rope_theta, k.rope_theta)) for k in c)
      for c in (back.layer_kinds, config.layer_kinds)
    ]
    if kinds[0] == kinds[1]:
      fields["layer_kinds"] = config.layer_kinds
  return fields


def _projection(path: str) -> str:
  return path.removeprefix("layers/").removesuffix("/kernel")


def whole_heads(config: ModelConfig) -> dict[str, Any]:
  """Nothing to write; transformers refuses any other model, even with a head_dim."""
  heads = config.num_heads
  require(config, hidden_size=config.hidden_size // heads * heads)
  return {}


# The configuration that LLaMA brought; later families add to it.
LLAMA_KEYS = (
  Key("vocab_size", "vocab_size"),
  Key("hidden_size", "hidden_size"),
  Key("num_layers", "num_hidden_layers"),
  Key("num_heads", "num_attention_heads"),
  Key("num_kv_heads", "num_key_value_heads", 0),
  Key("head_dim", "head_dim", 0),
  Key("mlp_size", "intermediate_size"),
  Key("max_length", "max_position_embeddings", 2048),
  Key("norm_eps", "rms_norm_eps", 1e-6),
  Key("activation", "hidden_act", "silu"),
  Key("tie_embeddings", "tie_word_embeddings", False),
  Key("init_std", "initializer_range", 0.02),
)


def keys(*changed: Key, without: Sequence[str] = ()) -> tuple[Key, ...]:
  """`LLAMA_KEYS` with these in the place of those of the same field, or added."""
  table = {key.ours: key for key in LLAMA_KEYS if key.ours not in without}
  return tuple({**table, **{key.ours: key for key in changed}}.values())


# The weights likewise.
ATTENTION = tuple(
  row
  for path, name in zip(QKV, ("q_proj", "k_proj", "v_proj"), strict=True)
  for row in linear(f"layers.{{}}.self_attn.{name}", path)
) + linear("layers.{}.self_attn.o_proj", "attention/out")
MLP = tuple(
  row
  for name in ("gate", "up", "down")
  for row in linear(f"layers.{{}}.mlp.{name}_proj", f"mlp/{name}")
)
OUTER = (
  Weight("embed/embedding", "embed_tokens.weight"),
  Weight("norm/scale", "norm.weight"),
  Weight("head", "lm_head.weight"),
)
NORMS = (
  Weight("layers/attention_norm/scale", "layers.{}.input_layernorm.weight"),
  Weight("layers/mlp_norm/scale", "layers.{}.post_attention_layernorm.weight"),
)
QK_NORMS = (
  Weight("layers/attention/query_norm/scale", "layers.{}.self_attn.q_norm.weight"),
  Weight("layers/attention/key_norm/scale", "layers.{}.self_attn.k_norm.weight"),
)


def sliding(raw: Raw, usual: Sequence[bool]) -> list[bool]:
  """Which layers have a window: as layer_types says, or as is usual.

  Raises:
    UserError: for other kinds of layers, or more or fewer than there are.
  """
  types, layers = raw.get("layer_types"), raw["num_hidden_layers"]
  if types is None:
    return [*usual]
  if unknown := sorted({*types} - {_SLIDING, _FULL}):
    raise UserError(
      f"layer_types {unknown[0]!r} is not supported, only {_SLIDING}, {_FULL}"
    )
  if len(types) != layers:
    raise UserError(f"layer_types has {len(types)} of them for {layers} layers")
  return [name == _SLIDING for name in types]


def biases(raw: Raw) -> Fields:
  """Of attention: all its projections have them or none."""
  bias = raw.get("attention_bias", False)
  return {"qkv_bias": bias, "out_bias": bias}


def window_of(config: ModelConfig) -> int | None:
  """The one window of a model's layers, None where there is none; else a UserError."""
  windows = {kind.window for kind in config.kinds if kind.window}
  if len(windows) > 1:
    raise UserError(
      f"the {config.family} layout cannot hold this model: it has windows of "
      f"{', '.join(map(str, sorted(windows)))} tokens, and not one for all"
    )
  return windows.pop() if windows else None


def layer_types(config: ModelConfig) -> list[str]:
  """transformers' names for the layers with a window and without."""
  kinds = config.layer_kinds or (LayerKind(),) * config.num_layers
  return [_SLIDING if kind.window else _FULL for kind in kinds]
