"""Phase 3 for a corpus that is read while it is trained on (data.stream)."""

import logging
from collections.abc import Sequence

from jax.sharding import Mesh

from okd_jax.config.schema import Settings
from okd_jax.data import PAD_ID, rows, show_example
from okd_jax.data.sources import called, shards_of
from okd_jax.data.stream import Corpus, Stream
from okd_jax.run.data import Data, Pack, read_part, sizes
from okd_jax.run.outline import Outline
from okd_jax.runtime import sharding

_log = logging.getLogger(__name__)


class _Endless(Sequence[Pack]):
  """Row n is text n; nobody knows how many there are."""

  def __len__(self) -> int:
    return 2**62

  def __getitem__(self, at: int) -> Pack:
    return (at,)


def stream_data(settings: Settings, outline: Outline, mesh: Mesh) -> Data:
  """A stream to train on and rows to evaluate with; `train` is the first rows' texts.

  Raises:
    UserError: for rows that cannot be used, or tokens that a model does not have.
  """
  data, tokenizer = settings.data, outline.tokenizer
  corpus = Corpus(
    shards_of(data.sources, streamed=True),
    tokenizer,
    data.max_length,
    settings.train.seed,
    sizes(outline, tokenizer),
    data.renames,
  )
  stream = Stream(
    corpus,
    batch_size=settings.train.batch_size,
    pad_id=PAD_ID,
    own=sharding.own_rows(settings.train.batch_size, mesh),
  )
  first = [text for row in stream.first() for text in row]
  _log.info(
    "%s: texts of %d shards, read as they are asked for; the first:\n%s",
    called(data.sources),
    stream.shards,
    show_example(first[0], tokenizer),
  )
  held_out, _ = read_part(data, outline, "eval")
  held_out = held_out[: settings.eval.limit or None]
  return Data(
    tokenizer,
    first,
    held_out,
    _Endless(),
    teacher_length=data.form.teacher_length if rows.privileged(held_out) else 0,
    stream=stream,
  )
