"""What can be wrong with a configuration, told before anything is trained."""

import re

from ml_collections import ConfigDict

from okd_jax.errors import UserError
from okd_jax.evaluation.answers import answerable
from okd_jax.methods import Method
from okd_jax.methods.base.knobs import Linear
from okd_jax.models import kernels
from okd_jax.run import optim

DTYPES = ("float32", "bfloat16", "float16")


def check_settings(config: ConfigDict, method: Method) -> None:
  """Raises a UserError that names all that is wrong before anything is loaded."""
  problems = list(_value_problems(config))
  student = config.student
  given = [
    key
    for key, wanted in (
      ("student.path", student.path),
      ("student.layers", student.layers),
      ("student.model.hidden_size", student.model.hidden_size),
    )
    if wanted
  ]
  if len(given) != 1:
    problems.append(
      "say where the student starts by exactly one of student.path, student.layers "
      f"and student.model.hidden_size (set: {', '.join(given) or 'none'})"
    )
  if config.teacher.adapter and not config.teacher.path:
    problems.append("teacher.adapter adapts what teacher.path names; set it, too")
  if config.teacher.path and config.teacher.model.hidden_size:
    problems.append("set teacher.path or teacher.model.hidden_size, not both")
  problems += _several_problems(config, method)
  problems += _packing_problems(config, method)
  teacher = config.teacher
  named = teacher.path or teacher.model.hidden_size or teacher.cache
  if not (named or method.teacher == "several"):
    if student.layers:
      problems.append("student.layers needs teacher.path")
    if method.teacher != "none":
      problems.append(f"method {config.method.name} needs teacher.path")
  if method.sequences.own_tokens and student.layers:
    problems.append(
      "student.layers takes the teacher's embeddings, but under method.cross_tokenizer "
      "the student has tokens of its own; set student.path or student.model.hidden_size"
    )
  if method.sequences.own_tokens and not (student.path or config.data.tokenizer):
    problems.append(
      "under method.cross_tokenizer a new student needs a tokenizer: set "
      "data.tokenizer to a model, to 'bytes' or to 'bpe:N'"
    )
  if problems:
    raise UserError("; ".join(problems))


def check_values(config: ConfigDict) -> None:
  """Raises a UserError for values that no run could use, whatever else is set."""
  if problems := list(_value_problems(config)):
    raise UserError("; ".join(problems))


def _value_problems(config):
  """What is wrong with single keys, whatever the others say."""
  for key, value, allowed in (
    ("train.dtype", config.train.dtype, DTYPES),
    ("teacher.dtype", config.teacher.dtype or config.train.dtype, DTYPES),
    ("export.dtype", config.export.dtype, DTYPES),
    ("optim.dtype", config.optim.dtype or "float32", optim.DTYPES),
  ):
    if value not in allowed:
      yield f"{key}={value!r} must be one of {', '.join(allowed)}"
  if config.train.attention not in ("", *kernels.KERNELS):
    yield (
      f"train.attention={config.train.attention!r} must be one of "
      f"{', '.join(kernels.KERNELS)} or empty"
    )
  for key, value, least in (
    ("train.steps", config.train.steps, 0),
    ("train.batch_size", config.train.batch_size, 1),
    ("train.loss_chunk", config.train.loss_chunk, 0),
    ("train.log_every", config.train.log_every, 1),
    ("checkpoint.every", config.checkpoint.every, 1),
    ("checkpoint.keep", config.checkpoint.keep, 1),
    ("eval.every", config.eval.every, 0),
    ("eval.batch_size", config.eval.batch_size, 1),
    ("data.max_length", config.data.max_length, 2),
    ("train.seed", config.train.seed, 0),
    ("optim.lr", config.optim.lr, 0),
    ("optim.clip", config.optim.clip, 0),
    ("optim.weight_decay", config.optim.weight_decay, 0),
    ("adapter.lr_scale", config.adapter.lr_scale, 0),
    ("eval.limit", config.eval.limit, 0),
    ("eval.patience", config.eval.patience, 0),
    ("eval.generate_limit", config.eval.generate_limit, 0),
    ("eval.max_new_tokens", config.eval.max_new_tokens, 1),
    ("eval.temperature", config.eval.temperature, 0),
  ):
    if not value >= least:  # so that NaN is caught, too
      yield f"{key}={value} must be at least {least}"
  if not config.train.steps and config.train.epochs <= 0:
    yield "set train.steps or train.epochs above 0"
  if not 0 <= config.train.dropout < 1:
    yield f"train.dropout={config.train.dropout} must lie in [0, 1)"
  if not 0 < config.adapter.share <= 1:
    yield (
      f"adapter.share={config.adapter.share} must be above 0 and at most 1 (where "
      "nothing of the teacher is to learn, use method.name=kd)"
    )


def _several_problems(config, method: Method):
  """What is wrong between `teachers`, the method and the keys of a single teacher."""
  names, several = sorted(config.teachers), method.teacher == "several"
  one = config.teacher
  if several and not (names or one.path or one.model.hidden_size):
    yield f"method {config.method.name} needs --config.teachers.NAME=PATH for each one"
  # Figures are named after teachers, beside those of these roles.
  legal = re.compile(r"(?!(student|teacher|.*adapted)$)\w[\w-]*")
  if wrong := [name for name in names if not legal.fullmatch(name)]:
    yield (
      f"teachers: {wrong[0]!r} cannot be a name; use letters, digits, - and _, and "
      "neither 'student' nor 'teacher' nor an end in 'adapted'"
    )
  if names and not several:
    yield (
      f"method {config.method.name} has one teacher, teacher.path; several "
      f"({', '.join(names)}) are for method ensemble"
    )
  if several and names:
    for key in ("path", "adapter", "cache"):
      if one[key]:
        yield f"teacher.{key} is of a single teacher; leave it out beside teachers"
    if config.student.layers:
      yield "student.layers takes layers from a single teacher; set student.path"
  if several:
    if one.trunk:
      yield f"teacher.trunk={one.trunk}: method {config.method.name} keeps no trunk"
    if config.adapter.text or config.adapter.kind == "blocks":
      yield "adapter.text and adapter.kind=blocks are for a single teacher"
  if unknown := sorted(set(config.adapter.teachers) - set(names)):
    yield f"adapter.teachers names {unknown[0]!r}, which is none of teachers"
  weights = config.method.teacher_weights
  if several and weights and len(weights) != max(len(names), 1):
    yield (
      f"method.teacher_weights={weights} must hold a weight for each of the teachers "
      f"{', '.join(names) or 'teacher'}, in this order"
    )


def _packing_problems(config, method: Method):
  """Why rows cannot hold several texts."""
  plan, name = method.sequences, config.method.name
  if not config.data.pack:
    return
  if plan.sampled or plan.beforehand:
    yield f"data.pack: {name} answers prompts, one in a row; set data.pack=False"
  elif plan.own_tokens:
    yield "data.pack: under method.cross_tokenizer rows are paired; set data.pack=False"
  elif not method.takes_packed:
    yield f"data.pack: {name} here looks at rows as wholes; set data.pack=False"


def check_stored(config, method: Method) -> None:
  """Raises a UserError unless a stored teacher is all that the method needs."""
  plan, problem = method.sequences, ""
  if method.teacher == "none":
    problem = f"method {config.method.name} has no use for a teacher"
  elif not method.takes_stored or plan.sampled or plan.beforehand:
    problem = (
      f"method {config.method.name} needs the teacher itself, not what it said; use "
      "kd or one of its named forms, with method.top_k=0 and no adapter.kind"
    )
  elif isinstance(method.knobs["temperature"], Linear):
    problem = "method.end.temperature: what is stored has one temperature"
  elif config.student.layers:
    problem = (
      f"student.layers={config.student.layers} takes layers from the teacher; name the "
      "start by student.path or student.model"
    )
  if problem:
    raise UserError(f"teacher.cache={config.teacher.cache}: {problem}")


def check_sequences(config, method: Method, train) -> None:
  """Raises a UserError unless there are prompts to answer, and room for answers."""
  plan = method.sequences
  if not plan.sampled and not plan.beforehand:
    return
  for example in train:
    if not example.prompt_length:
      raise UserError(
        f"{example.where}: {config.method.name} trains on answers to prompts, but this "
        "row is text without one"
      )
  data = config.data
  space = data.max_length - data.max_prompt_length
  if space < 1:
    raise UserError(
      f"data.max_prompt_length={data.max_prompt_length} leaves no room for an answer: "
      f"it must be below data.max_length={data.max_length}"
    )
  if plan.max_new_tokens > space:
    raise UserError(
      f"method.max_new_tokens={plan.max_new_tokens} does not fit: data.max_length="
      f"{data.max_length} leaves {space} tokens beside data.max_prompt_length="
      f"{data.max_prompt_length}"
    )


def check_best(config, held_out, beside: bool) -> None:
  """Raises a UserError unless evaluation measures what is to choose the best step.

  beside: whether there is a teacher, or what it said, in the student's own tokens.
  """
  names = ["loss", "perplexity"]
  if beside and not (config.teacher.cache and config.method.temperature != 1):
    names += ["forward_kl", "reverse_kl"]
  if beside:
    names.append("top1_agreement")
  if config.eval.generate and answerable(held_out):
    names += ["rougeL", "exact_match"]
  if config.eval.patience and not config.eval.best:
    raise UserError(
      f"eval.patience={config.eval.patience} needs eval.best, the metric to go by"
    )
  if config.eval.best and config.eval.best not in names:
    raise UserError(
      f"eval.best={config.eval.best!r} is not measured in this run; use one of "
      f"{', '.join(names)}"
    )


def check_lengths(config, decoders) -> None:
  """Raises a UserError unless every model takes the longest row."""
  longest = config.data.max_length
  if config.eval.generate:
    longest = max(longest, config.data.max_prompt_length + config.eval.max_new_tokens)
  for role, decoder in decoders.items():
    if decoder.config.max_length < longest:
      raise UserError(
        f"the {role} takes {decoder.config.max_length} tokens, but the run needs "
        f"{longest}; lower data.max_length={config.data.max_length}, "
        f"data.max_prompt_length={config.data.max_prompt_length} or "
        f"eval.max_new_tokens={config.eval.max_new_tokens}"
      )


def check_attention(config, decoders) -> None:
  """Raises a UserError unless the kernel of train.attention can do what it is for.

  Whoever names a kernel means it: XLA's must not quietly take its place.
  """
  kernel = config.train.attention
  if kernel in ("", "xla"):
    return
  way_out = "leave it empty to have it wherever it can run, or set it to xla"
  if kernel != (own := kernels.of_platform()):
    raise UserError(
      f"train.attention={kernel} does not run on this machine, where it would be "
      f"{own}; {way_out}"
    )
  length = config.data.max_length
  for role, decoder in decoders.items():
    adapter = decoder.adapter
    prefix = adapter.length if adapter and adapter.kind in ("prefix", "prompt") else 0
    sizes = (decoder.config.head_dim, length, length + prefix)
    if problem := kernels.problem(kernel, decoder.dtype, *sizes):
      raise UserError(f"train.attention={kernel} {problem} (the {role}); {way_out}")
