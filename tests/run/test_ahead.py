"""The step, compiled from shapes alone, and what its program sends."""

import pytest

from okd_jax.bench.collectives import collectives
from okd_jax.config import read
from okd_jax.config.unstaged import without_stages
from okd_jax.run import ahead
from okd_jax.run.job import check
from okd_jax.runtime import sharding

SHAPE = {
  "teacher.model.hidden_size": 96,
  "teacher.model.num_layers": 3,
  "teacher.model.num_heads": 4,
  "student.model.hidden_size": 32,
  "student.model.num_heads": 4,
  "train.batch_size": 8,
  "data.max_length": 32,
  "data.max_prompt_length": 16,
}


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["replicate", "fsdp"])
def test_a_teacher_that_lies_whole_is_gathered_nowhere(teacher):
  """Guards mesh.teacher: a frozen kernel of 96 x 384 numbers is the teacher's alone,
  and so is a table of 256 x 96."""
  job = check(without_stages(read.from_keys(SHAPE, "default")))
  run = ahead.ahead(job, ahead.outline(job.settings, 256))
  program = run.compiled(sharding.make_mesh(1, 8, 1), teacher)
  found = collectives(program.as_text())
  gathered = {each.bytes for each in found if each.kind == "all-gather"}
  looped = {each.bytes for each in found if each.kind == "all-gather" and each.in_loop}
  assert looped  # the student's layers
  assert (4 * 96 * 4 * 96 in looped) == (teacher == "fsdp"), looped
  assert (4 * 256 * 96 in gathered) == (teacher == "fsdp"), gathered
