"""A trained student as a Hugging Face folder, its online module as a PEFT folder.

A teacher whose own blocks learned is no PEFT adapter; it becomes a folder like the
student's.
"""

from pathlib import Path

from okd_jax import models
from okd_jax.models.adapters import replace_blocks
from okd_jax.run.build import Run
from okd_jax.run.state import named


def module_folder(parts: Run) -> str:
  """The name of the folder of a workdir that the online module goes to."""
  return "teacher" if parts.choice else "adapter"


def export_run(parts: Run, params, student: Path, adapter: Path | None) -> None:
  """Writes the student to a folder and, if there is one, its module to another."""
  config = parts.config
  models.save(
    student,
    params["student"],
    parts.decoders["student"].config,
    parts.tokenizer,
    dtype=config.export.dtype,
    card=_card(config),
  )
  if not (parts.adapter and adapter):
    return
  if parts.choice:
    new = replace_blocks(
      parts.frozen["layers"], params["adapter"]["layers"], parts.adapter
    )
    models.save(
      adapter,
      parts.frozen | {"layers": new},
      parts.decoders["teacher"].config,
      parts.tokenizer,
      dtype=config.export.dtype,
      card=_card(config)
      | {"Trained blocks": ", ".join(map(str, parts.adapter.blocks))},
    )
    return
  for name in named(parts.decoders, "adapted") or [""]:
    models.save_adapter(
      adapter / name,
      params["adapter"][name] if name else params["adapter"],
      parts.adapter,
      parts.decoders[f"adapted:{name}" if name else "adapted"].config,
      config.teachers.get(name, config.teacher.path),
    )


def _card(config) -> dict[str, str]:
  return {
    "Teacher": ", ".join(config.teachers.to_dict().values()) or config.teacher.path,
    "Method": config.method.name,
    "Data": config.data.train,
  }
