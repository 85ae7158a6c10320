"""Tasks of lm-evaluation-harness: finding them, running them, and their table."""

import dataclasses
import difflib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml  # as its own command does
from lm_eval.utils import handle_non_serializable, make_table

from okd_jax.errors import UserError
from okd_jax.evaluation.harness import DecoderLM
from okd_jax.models import Model
from okd_jax.runtime.files import local
from okd_jax.runtime.metrics import finite_or_null

_log = logging.getLogger(__name__)

_FILES = ("json", "csv", "parquet", "text")  # dataset_path of tasks over local files
_RESAMPLES = 1000  # of the standard errors that have no formula
_SEEDS = (0, 1234, 1234)  # the harness's own: of random, numpy, few-shot examples

Tasks = tuple["_Manager", list[str | dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Options:
  """How to run tasks.

  limit: first so many rows of each task; 0 is all.
  num_fewshot: solved examples before each question; None is as the task says.
  batch_size: rows at once.
  max_length: tokens of a row; None is the model's context.
  gen_kwargs: what goes before a task's generation_kwargs, as NAME=VALUE,NAME=VALUE.
  apply_chat_template: whether prompts are turns of a chat, examples too.
  add_bos_token: whether texts begin with BOS; None is as the tokenizer does.
  dtype: of activations and matmuls.
  log_samples: whether the results keep every prompt and answer, under `samples`.
  seed: of the choice of examples and of sampling; None is the harness's own.
  """

  limit: int = 0
  num_fewshot: int | None = None
  batch_size: int = 8
  max_length: int | None = None
  gen_kwargs: str = ""
  apply_chat_template: bool = False
  add_bos_token: bool | None = None
  dtype: str = "float32"
  log_samples: bool = False
  seed: int | None = None

  def __post_init__(self):
    for name, least in (
      ("limit", 0),
      ("num_fewshot", 0),
      ("batch_size", 1),
      ("max_length", 2),
      ("seed", 0),
    ):
      value = getattr(self, name)
      if value is not None and value < least:
        raise UserError(f"--{name}={value} must be at least {least}")

  @property
  def seeds(self) -> dict[str, int | None]:
    """The harness's seeds, by its own names."""
    python, numpy, examples = _SEEDS if self.seed is None else (self.seed,) * 3
    return {
      "random_seed": python,
      "numpy_random_seed": numpy,
      "torch_random_seed": None,  # or torch is imported where there is one
      "fewshot_random_seed": examples,
    }


def find_tasks(
  names: Sequence[str], include_path: str = "", data: Sequence[str] = ()
) -> Tasks:
  """The harness's manager of tasks, and what it is to load.

  Args:
    names: of the harness's tasks, groups and tags, with * and ? for several; yaml
      files of tasks; folders of such files. Several by commas.
    include_path: a folder of yaml files whose tasks have names, too.
    data: files for the yaml files' tasks over local files, each written F, the split
      that is scored, or SPLIT=F; they take the place of the tasks' own.

  Raises:
    UserError: for a name, file or folder that is not there, or a file that cannot be
      read.
  """
  if include_path and not local(include_path).is_dir():
    raise UserError(f"--include_path={include_path} is no folder")
  names = [name for some in names for name in some.split(",") if name]
  configs = [c for name in names if _is_path(name) for c in _configs(local(name))]
  # The harness's own take seconds to read.
  own = not all(map(_is_path, names)) or any("group" in config for config in configs)
  if own:
    _log.info("reading the harness's tasks")
  manager = _Manager(include_path=include_path or None, include_defaults=own)
  found: list[str] = []
  for name in names:
    if _is_path(name):
      continue
    if matches := manager.match_tasks([name]):
      found += matches
    elif local(name).is_dir():
      configs += _configs(local(name))
    else:
      raise UserError(f"--tasks: there is no task {name!r}{_near(name, manager)}")
  return manager, [*dict.fromkeys(found), *_with_data(configs, data)]


def run(
  model: Model, tasks: Tasks, options: Options, name: str = "the model"
) -> dict[str, Any]:
  """The harness's results, as JSON can hold them.

  name: what the results call the model.

  Raises:
    UserError: a task cannot be loaded, or asks for what the model cannot do.
  """
  own = ("batch_size", "max_length", "add_bos_token", "dtype")
  given = {key: getattr(options, key) for key in own}
  lm = DecoderLM(model, seed=options.seed or 0, **given)
  chat = options.apply_chat_template
  if chat and not lm.tokenizer.chat_template:
    raise UserError(f"--apply_chat_template: the tokenizer of {name} has no template")
  # It would fork, which may hang once JAX has threads.
  os.environ.setdefault("DISABLE_MULTIPROC", "1")
  manager, specs = tasks
  manager.check = lm.check
  results = simple_evaluate(
    model=lm,
    tasks=specs,
    task_manager=manager,
    batch_size=options.batch_size,
    limit=options.limit or None,
    num_fewshot=options.num_fewshot,
    gen_kwargs=options.gen_kwargs or None,
    apply_chat_template=chat,
    fewshot_as_multiturn=chat,
    log_samples=options.log_samples,
    bootstrap_iters=_RESAMPLES,
    **options.seeds,
  )
  results["config"]["model"] = name
  plain = json.dumps(results, default=handle_non_serializable, ensure_ascii=False)
  return finite_or_null(json.loads(plain))


def table(results: Mapping[str, Any]) -> str:
  """The harness's table of results, and that of groups where there are any."""
  parts = ["results", *(["groups"] if results.get("groups") else [])]
  return "\n".join(make_table(results, part) for part in parts)


class _Manager(TaskManager):
  """A manager whose errors are a user's.

  check: raises a UserError for prompts that the model cannot answer, before any is.
  """

  check: Callable[[Sequence[Instance]], None] = staticmethod(lambda prompts: None)

  def load(self, task_list: Any) -> dict[str, Any]:
    """As the harness's, which calls it.

    Raises:
      UserError: a task cannot be loaded, runs code, or needs more than text.
    """
    try:
      loaded = super().load(task_list)
    except Exception as error:  # from code of tasks and of datasets: of any class
      raise UserError(f"a task cannot be loaded: {_reason(error)}") from error
    for name, task in loaded["tasks"].items():
      if task.config.unsafe_code:
        raise UserError(f"task {name} runs code that the model writes: not done here")
      if task.config.doc_to_image or task.config.doc_to_audio:
        raise UserError(f"task {name} shows images or sounds, but the model reads text")
      # The harness only logs these, and fails once all answers are there.
      metrics = vars(task).get("_metric_fn_list", {})
      if unknown := [metric for metric, function in metrics.items() if not function]:
        raise UserError(f"task {name}: there is no metric {', '.join(unknown)}")
      task.build_all_requests = self._checked(name, task, task.build_all_requests)
    return loaded

  def _checked(
    self, name: str, task: Task, build: Callable[..., None]
  ) -> Callable[..., None]:
    """What makes a task's prompts, with a user's errors."""

    def built(**kwargs: Any) -> None:
      try:
        build(**kwargs)
        self.check(task.instances)
      except UserError as error:
        raise UserError(f"task {name}: {error}") from error
      except Exception as error:  # from code of tasks: too few rows, no such column
        reason = _reason(error)
        raise UserError(f"task {name}: prompts cannot be made: {reason}") from error

    return built


def _reason(error: BaseException) -> str:
  """Why it came to an error, in a line."""
  while error.__cause__:
    error = error.__cause__
  first, *_ = str(error).strip().split("\n")
  return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _is_path(name: str) -> bool:
  """Whether it cannot be the name of a task."""
  return name.endswith(".yaml") or "/" in name or os.sep in name


def _configs(path: Path) -> list[dict[str, Any]]:
  """The tasks of a yaml file, or of all in a folder."""
  files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
  if not files:
    raise UserError(f"--tasks: the folder {path} holds no .yaml files")
  return [_config(file) for file in files]


def _config(file: Path) -> dict[str, Any]:
  if not file.is_file():
    raise UserError(f"--tasks: there is no file or folder {file}")
  try:
    config = load_yaml(file)
  except Exception as error:  # yaml's, and those of functions that it names
    raise UserError(f"{file} is no task: {error}") from error
  if not {"task", "group"} & config.keys():
    raise UserError(f"{file} is no task: it has neither the key task nor group")
  return config


def _near(name: str, manager: TaskManager) -> str:
  near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.6)
  return f"; did you mean {near[0]}?" if near else ", file or folder"


def _with_data(
  configs: Sequence[dict[str, Any]], data: Sequence[str]
) -> list[dict[str, Any]]:
  """The configurations, those over local files with these files."""
  if not data:
    return list(configs)
  splits = _splits(data)
  local = [config.get("dataset_path") in _FILES for config in configs]
  if not any(local):
    raise UserError("--data is for tasks in yaml files with dataset_path: json")
  return [
    _over(config, splits) if own else config
    for config, own in zip(configs, local, strict=True)
  ]


def _splits(data: Sequence[str]) -> dict[str, str]:
  """Files by split, '' for the one that is scored."""
  splits = {}
  for written in data:
    split, _, file = written.rpartition("=")
    if not local(file).is_file():
      raise UserError(f"--data: there is no file {file}")
    splits[split] = str(local(file).resolve())
  return splits


def _over(config: dict[str, Any], splits: Mapping[str, str]) -> dict[str, Any]:
  scored = config.get("test_split") or config.get("validation_split") or "test"
  files = {split or scored: file for split, file in splits.items()}
  return config | {"dataset_kwargs": {"data_files": files}}
