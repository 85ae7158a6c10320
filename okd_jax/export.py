"""A trained student as a Hugging Face folder, its online module as a PEFT folder.

A teacher whose own blocks learned is no PEFT adapter; it becomes a folder like the
student's.

python -m okd_jax.export --workdir=DIR --output=OUT [--step=N]
"""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from okd_jax import checkpoint, cli, configuration, models, setup
from okd_jax.adapters import replace_blocks
from okd_jax.errors import UserError
from okd_jax.initial import named
from okd_jax.metrics import score_by
from okd_jax.setup import Run


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


def main(arguments: list[str]) -> None:
  """Exports as the arguments say; a UserError if there is no such checkpoint."""
  args = _parser().parse_args(arguments)
  workdir = Path(args.workdir)
  path = workdir / "config.json"
  if not (workdir / "checkpoints").is_dir() or not path.exists():
    raise UserError(f"{workdir} is no run: it has no checkpoints/ or no config.json")
  config = ConfigDict(configuration.saved(path))
  parts = setup.build(config, workdir)
  keep = config.checkpoint.keep
  with (
    jax.set_mesh(parts.mesh),
    checkpoint.opened(
      workdir / "checkpoints", keep, score_by(config.eval.best), read_only=True
    ) as checkpoints,
  ):
    steps = checkpoints.steps()
    if not steps:
      raise UserError(f"{workdir}/checkpoints holds no whole checkpoint yet")
    step = args.step if args.step is not None else checkpoints.best_step()
    if step not in steps:
      raise UserError(f"--step={step}: the checkpoints at hand are {steps}")
    state = checkpoints.restore_step(step, parts.abstract, None, parts.mesh)
  export_run(
    parts, state.params, Path(args.output), Path(args.adapter) if args.adapter else None
  )


def _card(config) -> dict[str, str]:
  return {
    "Teacher": ", ".join(config.teachers.to_dict().values()) or config.teacher.path,
    "Method": config.method.name,
    "Data": config.data.train,
  }


def _parser() -> cli.Parser:
  parser = cli.Parser(
    prog="okd_jax.export",
    description="Writes the student of one checkpoint as a Hugging Face folder.",
  )
  parser.add_argument("--workdir", required=True, help="of the run")
  parser.add_argument("--output", required=True, help="the folder to write")
  parser.add_argument(
    "--adapter",
    default="",
    help="a folder for the online module or the teacher whose own blocks learned",
  )
  parser.add_argument(
    "--step",
    type=int,
    default=None,
    help="default: the best by eval.best, else the newest",
  )
  return parser


if __name__ == "__main__":
  cli.run(main)
