"""What can be wrong where rows are prepared beforehand, or read as a stream."""

from collections.abc import Iterator

from okd_jax.config.schema import Settings
from okd_jax.methods import Method


def prepared_problems(settings: Settings, method: Method) -> Iterator[str]:
  """Why rows cannot be read that were tokenised before."""
  where = f"data.prepared={settings.data.prepared}"
  if not settings.data.prepared:
    return
  if method.sequences.own_tokens:
    yield (
      f"{where}: under method.cross_tokenizer rows are read in two tokenizers' tokens, "
      "and these are in one's; leave it empty"
    )
  if settings.data.tokenizer.startswith("bpe:"):
    yield (
      f"{where}: data.tokenizer={settings.data.tokenizer} would be trained on "
      "data.train, which is not read; name the folder that okd_jax.prepare kept it in"
    )


def stream_problems(settings: Settings, method: Method) -> Iterator[str]:
  """Why nothing can be streamed, each in a sentence."""
  if not settings.data.stream:
    return
  data, plan, name = settings.data, method.sequences, settings.method.name
  if not settings.train.steps:
    yield "data.stream: nobody knows how long an epoch is; set train.steps"
  if not data.eval_sources:
    yield "data.stream: no rows can be held out of a stream; set data.eval"
  if plan.sampled or plan.beforehand:
    yield f"data.stream: {name} answers prompts, and texts have none"
  elif plan.own_tokens:
    yield "data.stream: method.cross_tokenizer pairs answers, and texts have none"
  elif not method.takes_packed:
    yield f"data.stream: rows hold several texts, and {name} looks at rows as wholes"
  for key in ("cache", "trunk"):
    if getattr(settings.teacher, key):
      yield f"data.stream: teacher.{key} keeps rows by number, and a stream has none"
  if data.prepared:
    yield f"data.stream: data.prepared={data.prepared} is read in place of data.train"
  if data.tokenizer.startswith("bpe:"):
    yield (
      f"data.stream: data.tokenizer={data.tokenizer} would read the whole corpus "
      "first; name a tokenizer"
    )
