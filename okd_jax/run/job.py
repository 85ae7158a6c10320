"""Phase 1, the job: settings and method, checked as far as nothing need be loaded."""

import dataclasses

from ml_collections import ConfigDict

from okd_jax import methods
from okd_jax.config import schema
from okd_jax.config.schema import Settings
from okd_jax.methods import Method
from okd_jax.run import checks


@dataclasses.dataclass(frozen=True)
class Job:
  """Settings and the method that they name."""

  settings: Settings
  method: Method

  @property
  def adapter_kind(self) -> str:
    """The kind of the teachers' adapters, '' where no teacher adapts."""
    if not self.method.adapts:
      return ""
    return self.settings.adapter.kind or self.method.adapter

  @property
  def one_row_in(self) -> int:
    """One row in so many teaches the adapters; 1 where none learns from some rows."""
    some = self.method.adapts and self.method.takes_rows
    return self.settings.adapter.one_row_in if some else 1


def check(config: ConfigDict) -> Job:
  """The job that a resolved configuration describes.

  Raises:
    UserError: that names all that is wrong with it.
  """
  settings = schema.settings(config)
  if settings.method.file:
    methods.load_file(settings.method.file)
  knobs = settings.method.knobs
  method = methods.build(settings.method.name, knobs, settings.adapter.kind)
  checks.before(settings, method)
  return Job(settings, method)
