"""What can be wrong between the parts of a run, before anything is loaded and after."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from okd_jax.config.schema import Settings
from okd_jax.data import Example, rows
from okd_jax.errors import UserError
from okd_jax.evaluation import figures
from okd_jax.evaluation.answers import judged
from okd_jax.methods import Method
from okd_jax.methods.base import Linear
from okd_jax.models import Decoder, kernels
from okd_jax.run import checks_data

_log = logging.getLogger(__name__)

# Figures are named after teachers, beside those of these.
_TEACHER_NAME = re.compile(r"(?!(student|teacher|.*adapted)$)\w[\w-]*")


def before(settings: Settings, method: Method) -> None:
  """Raises a UserError that names all that is wrong before anything is loaded."""
  problems = [
    *_teacher_problems(settings, method),
    *_several_problems(settings, method),
    *_packing_problems(settings, method),
    *_token_problems(settings, method),
    *_length_problems(settings, method),
    *_share_problems(settings, method),
    *_int8_problems(settings, method),
    *_itself_problems(settings, method),
    *checks_data.prepared_problems(settings, method),
    *checks_data.stream_problems(settings, method),
  ]
  if settings.teacher.trunk:
    problems += _trunk_problems(settings, method)
  if settings.teacher.cache:
    problems += _stored_problems(settings, method)
  if problems:
    raise UserError("; ".join(problems))


def after(
  settings: Settings,
  method: Method,
  train: Sequence[Example],
  held_out: Sequence[Example],
  decoders: Mapping[str, Decoder],
  compared: bool,
) -> None:
  """Raises a UserError for what only data and models can show.

  decoders: of all models, by what a message calls them.
  compared: whether evaluation has a teacher, or what it said, in the student's tokens.
  """
  if method.sequences.sampled or method.sequences.beforehand:
    _check_prompts(settings, train)
  _check_best(settings, held_out, compared)
  _check_lengths(settings, decoders)
  check_attention(settings.train.attention, settings.data.max_length, decoders)


def _teacher_problems(settings: Settings, method: Method) -> Iterator[str]:
  if settings.teacher.named or method.several:
    return
  if settings.student.from_teacher:
    yield "student.layers, which_layers and width need a teacher, such as teacher.path"
  if method.taught:
    yield f"method {settings.method.name} needs teacher.path"


def _itself_problems(settings: Settings, method: Method) -> Iterator[str]:
  """What is wrong with a teacher that is the student itself."""
  if not settings.teacher.itself:
    return
  where = "teacher.path=student"
  if settings.student.from_teacher:
    yield f"{where}: student.layers and width take from another model; set student.path"
  if settings.student.frozen:
    yield f"{where}: student.frozen cannot be told from the teacher; train LoRA or all"
  if method.sequences.own_tokens:
    yield f"{where}: under method.cross_tokenizer the teacher has tokens of its own"
  if ((settings.adapter.kind or method.adapter) if method.adapts else "") == "blocks":
    yield f"{where}: the teacher's blocks are the student's; set adapter.kind=lora"


def _int8_problems(settings: Settings, method: Method) -> Iterator[str]:
  kind = (settings.adapter.kind or method.adapter) if method.adapts else ""
  if settings.quantizes and kind == "blocks":
    yield (
      "teacher.dtype=int8: blocks of the teacher would be trained, and int8 is for "
      "weights that stay; set adapter.kind=lora or another dtype"
    )


def _share_problems(settings: Settings, method: Method) -> Iterator[str]:
  """What is wrong with adapters that learn from some rows, or in some steps, alone.

  Of a method without adapters nothing: like their rank, these keys are then idle, so
  that a recipe that has them serves every method. Recipes set `rows`, which is idle
  for any method that cannot do it.
  """
  adapter, name = settings.adapter, settings.method.name
  if not method.adapts or method.takes_rows:
    return
  why = f"{name}'s module learns from all it reads, always"
  if adapter.rows != 1:
    _log.info("adapter.rows=%s is idle: %s", adapter.rows, why)
  set_to = {"every": adapter.every, "until": adapter.until}
  changed = [f"adapter.{key}={value}" for key, value in set_to.items() if value != 1]
  changed += [f"adapter.tokens={adapter.tokens}"] if adapter.tokens else []
  if changed:
    yield f"{', '.join(changed)}: {why}"


def _trunk_problems(settings: Settings, method: Method) -> Iterator[str]:
  """Why there is no trunk to keep, as far as no model's depth is needed to know."""
  plan, name, adapter = method.sequences, settings.method.name, settings.adapter
  where = f"teacher.trunk={settings.teacher.trunk}"
  if method.several:
    yield f"{where}: method {name} keeps no trunk"
  elif not method.adapts:
    yield f"{where}: {name} has no adapter here"
  elif plan.sampled and not plan.gold:
    yield f"{where}: {name} trains on sampled rows alone"
  elif not adapter.layers and (adapter.kind or method.adapter) != "blocks":
    yield (
      f"{where}: no layer is below the adapters; set adapter.layers=k for the top k"
    )


def _several_problems(settings: Settings, method: Method) -> Iterator[str]:
  """What is wrong between `teachers`, the method and the keys of a single teacher."""
  names, name = list(settings.teachers), settings.method.name
  if method.several:
    yield from _problems_of_several(settings, names)
  elif names:
    yield (
      f"method {name} has one teacher, teacher.path; several ({', '.join(names)}) are "
      "for method ensemble"
    )
  if wrong := [name for name in names if not _TEACHER_NAME.fullmatch(name)]:
    yield (
      f"teachers: {wrong[0]!r} cannot be a name; use letters, digits, - and _, and "
      "neither 'student' nor 'teacher' nor an end in 'adapted'"
    )
  if unknown := sorted(set(settings.adapter.teachers) - set(names)):
    yield f"adapter.teachers names {unknown[0]!r}, which is none of teachers"


def _problems_of_several(settings: Settings, names: list[str]) -> Iterator[str]:
  one, name = settings.teacher, settings.method.name
  if not (names or one.path or one.model.wanted):
    yield f"method {name} needs --config.teachers.NAME=PATH for each one"
  if names:
    for key in ("path", "adapter", "cache"):
      if getattr(one, key):
        yield f"teacher.{key} is of a single teacher; leave it out beside teachers"
    if settings.student.from_teacher:
      yield "student.layers and width take from a single teacher; set student.path"
  if settings.adapter.text or settings.adapter.kind == "blocks":
    yield "adapter.text and adapter.kind=blocks are for a single teacher"
  weights = settings.method.knobs.get("teacher_weights", ())
  if weights and len(weights) != max(len(names), 1):
    yield (
      f"method.teacher_weights={weights} must hold a weight for each of the teachers "
      f"{', '.join(names) or 'teacher'}, in this order"
    )


def _packing_problems(settings: Settings, method: Method) -> Iterator[str]:
  """Why rows cannot hold several texts."""
  plan, name = method.sequences, settings.method.name
  if not settings.data.pack:
    return
  if plan.sampled or plan.beforehand:
    yield f"data.pack: {name} answers prompts, one in a row; set data.pack=False"
  elif plan.own_tokens:
    yield "data.pack: under method.cross_tokenizer rows are paired; set data.pack=False"
  elif not method.takes_packed:
    yield f"data.pack: {name} here looks at rows as wholes; set data.pack=False"


def _token_problems(settings: Settings, method: Method) -> Iterator[str]:
  """What is wrong where the teacher has tokens of its own."""
  if not method.sequences.own_tokens:
    return
  if settings.student.from_teacher:
    yield (
      "student.layers or width takes the teacher's embeddings, but under "
      "method.cross_tokenizer the student has tokens of its own; set student.path or "
      "student.model.hidden_size"
    )
  if not (settings.student.path or settings.data.tokenizer):
    yield (
      "under method.cross_tokenizer a new student needs a tokenizer: set "
      "data.tokenizer to a model, to 'bytes' or to 'bpe:N'"
    )


def _length_problems(settings: Settings, method: Method) -> Iterator[str]:
  """Why there is no room for answers."""
  plan, data = method.sequences, settings.data
  if not (plan.sampled or plan.beforehand):
    return
  space = data.max_length - data.max_prompt_length
  if space < 1:
    yield (
      f"data.max_prompt_length={data.max_prompt_length} leaves no room for an answer: "
      f"it must be below data.max_length={data.max_length}"
    )
  elif plan.max_new_tokens > space:
    yield (
      f"method.max_new_tokens={plan.max_new_tokens} does not fit: data.max_length="
      f"{data.max_length} leaves {space} tokens beside data.max_prompt_length="
      f"{data.max_prompt_length}"
    )


def _stored_problems(settings: Settings, method: Method) -> Iterator[str]:
  """Why a stored teacher is not all that the method needs."""
  plan, problem, name = method.sequences, "", settings.method.name
  if not method.taught:
    problem = f"method {name} has no use for a teacher"
  elif not method.takes_stored or plan.sampled or plan.beforehand:
    problem = (
      f"method {name} needs the teacher itself, not what it said; use kd or one of its "
      "named forms, without method.top_k, token_weight, student_mix and adapter.kind"
    )
  elif isinstance(method.knobs["temperature"], Linear):
    problem = "method.end.temperature: what is stored has one temperature"
  elif settings.student.from_teacher:
    problem = (
      "student.layers, which_layers and width take weights of the teacher; name the "
      "start by student.path or student.model"
    )
  if problem:
    yield f"teacher.cache={settings.teacher.cache}: {problem}"


def check_itself(settings: Settings, method: Method, own_prompts: bool) -> None:
  """Raises a UserError where the student would be taught what it says."""
  itself = settings.teacher.itself and not settings.student.in_part
  if itself and method.taught and not (method.adapts or own_prompts):
    raise UserError(
      "teacher.path=student: the teacher says what the student says; give it another "
      "prompt (teacher_prompt, teacher_messages, data.teacher_template) or a module, "
      "such as method.name=okd"
    )


def check_own_prompts(settings: Settings, method: Method) -> None:
  """Raises a UserError where a teacher that reads other prompts is of no use."""
  plan, name = method.sequences, settings.method.name
  problem = ""
  if not method.taught:
    problem = f"{name} has no teacher"
  elif plan.source in ("mixture", "interleaved"):
    problem = f"{name} has both models write one text after one prompt"
    if name == "minillm":
      problem += "; set method.teacher_mix=0"
  elif plan.own_tokens or not method.takes_own_prompts:
    problem = f"{name} here compares whole rows"
  elif settings.teacher.trunk:
    problem = "teacher.trunk keeps what enters the student's rows"
  if problem:
    raise UserError(
      f"rows hold a prompt for the teacher alone (teacher_prompt, teacher_messages or "
      f"data.teacher_template), but {problem}"
    )


def _check_prompts(settings: Settings, train: Sequence[Example]) -> None:
  without = np.flatnonzero(rows.column(train, "prompt_length") == 0)
  if len(without):
    raise UserError(
      f"{train[int(without[0])].where}: {settings.method.name} trains on answers to "
      "prompts, but this row is text without one"
    )


def _check_best(
  settings: Settings, held_out: Sequence[Example], compared: bool
) -> None:
  """Raises a UserError unless evaluation measures what is to choose the best step."""
  # What is stored at another temperature is no distribution to compare with at 1.
  told = not (settings.teacher.cache and settings.method.temperature != 1)
  there = {
    "": True,
    "teacher": compared,
    "distribution": compared and told,
    "answers": bool(settings.eval.generate and any(map(judged, held_out))),
  }
  names = [name for name, f in figures.columns().items() if there[f.needs]]
  best = settings.eval.best
  if best and best not in names:
    raise UserError(
      f"eval.best={best!r} is not measured in this run; use one of {', '.join(names)}"
    )


def _check_lengths(settings: Settings, decoders: Mapping[str, Decoder]) -> None:
  """Raises a UserError unless every model takes the longest row."""
  data, new = settings.data, settings.eval.max_new_tokens
  longest = data.max_length
  if settings.eval.generate:
    longest = max(longest, data.max_prompt_length + new)
  for name, decoder in decoders.items():
    if name != "student":
      longest = max(longest, data.max_teacher_length)
    if decoder.config.max_length < longest:
      raise UserError(
        f"the {name} takes {decoder.config.max_length} tokens, but the run needs "
        f"{longest}; lower data.max_length={data.max_length}, "
        f"data.max_prompt_length={data.max_prompt_length} or eval.max_new_tokens={new}"
      )


def check_attention(kernel: str, length: int, decoders: Mapping[str, Decoder]) -> None:
  """Raises a UserError unless a kernel that was named can do what it is for.

  Whoever names a kernel means it: XLA's must not quietly take its place.

  Args:
    kernel: train.attention.
    length: of a row, in tokens.
    decoders: of all models, by what a message calls them.
  """
  if kernel in ("", "xla"):
    return
  way_out = "leave it empty to have it wherever it can run, or set it to xla"
  if kernel != (own := kernels.of_platform()):
    raise UserError(
      f"train.attention={kernel} does not run on this machine, where it would be "
      f"{own}; {way_out}"
    )
  for name, decoder in decoders.items():
    prefix = decoder.adapter.prefix_length if decoder.adapter else 0
    form = kernels.form(decoder.config, decoder.dtype, length, prefix)
    if problem := kernels.problem(kernel, form):
      raise UserError(f"train.attention={kernel} {problem} (the {name}); {way_out}")
