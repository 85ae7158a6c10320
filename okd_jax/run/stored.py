"""The teacher cache of a run: who speaks of which rows, as its configuration says."""

from pathlib import Path

import jax

from okd_jax.errors import UserError
from okd_jax.run.build import Run
from okd_jax.teachers import record
from okd_jax.teachers.store import Store


def write(run: Run, folder: Path, k: int, dtype: str) -> dict[str, Store]:
  """Stores what the run's one teacher says about its rows; see `record.write`.

  Raises:
    UserError: for a run that has no such teacher or rows.
  """
  if run.method.several or run.data.other:
    raise UserError(
      "a store holds the words of one teacher in the student's own tokens; set "
      "method.name=kd and teacher.path, and leave out method.cross_tokenizer"
    )
  if run.data.stream or run.settings.teacher.itself or not run.cast.teachers:
    raise UserError("only another teacher's words on rows, no data.stream, are stored")
  [(name, teacher)] = run.cast.teachers.items()
  parts = {"train": run.data.train} | ({"eval": run.data.eval} if run.data.eval else {})
  size = min(run.cast.vocab_sizes)
  given = teacher, run.cast.frozen[name], run.settings, run.mesh
  options = {"k": k, "dtype": dtype, "vocab_size": size, "heard": run.stop.heard}
  with jax.set_mesh(run.mesh):
    return record.write(parts, *given, folder, **options)
