"""Models: where they come from, and the one decoder that runs them.

model = okd_jax.models.load(path)            # HF folder, hub id, .gguf, workdir
logits = model.logits(model.params, tokens)  # [B, L] -> [B, L, V] float32
"""

from okd_jax.losses import unembed
from okd_jax.models.config import LayerKind, ModelConfig, RopeScaling
from okd_jax.models.formats.card import Card
from okd_jax.models.formats.families import preset
from okd_jax.models.formats.gguf_out import save as save_gguf
from okd_jax.models.formats.hf import save
from okd_jax.models.formats.peft import load_adapter, save_adapter
from okd_jax.models.formats.weights import parameter_shapes
from okd_jax.models.model import (
  Model,
  even_layers,
  fingerprint,
  glance,
  init,
  is_hub_id,
  is_part,
  licence_of,
  load,
  load_tokenizer,
  place_of,
  take_layers,
  template_of,
)
from okd_jax.models.narrow import Kept, choose_kept, narrow_config, narrowed
from okd_jax.models.transformer import (
  Cache,
  Decoder,
  Mix,
  head_kernel,
  init_cache,
  logits,
  output,
  positions_from_segments,
)

__all__ = [
  "Cache",
  "Card",
  "Decoder",
  "Kept",
  "Mix",
  "Model",
  "ModelConfig",
  "LayerKind",
  "RopeScaling",
  "choose_kept",
  "even_layers",
  "fingerprint",
  "glance",
  "head_kernel",
  "init",
  "init_cache",
  "is_hub_id",
  "is_part",
  "licence_of",
  "load",
  "load_adapter",
  "load_tokenizer",
  "logits",
  "narrow_config",
  "narrowed",
  "output",
  "place_of",
  "parameter_shapes",
  "positions_from_segments",
  "preset",
  "save",
  "save_adapter",
  "save_gguf",
  "take_layers",
  "template_of",
  "unembed",
]
