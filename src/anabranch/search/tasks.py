"""Tasks of lm-eval on a model that is loaded already, and on one half of their documents."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from anabranch.errors import RecipeError, closest
from anabranch.model import device
from anabranch.search.settings import TaskSetting

Half = Literal["searched", "guard"]
Documents = dict[str, list[int]]
FEWSHOT_SEED = 1234
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function: another one in each process
By = dict[str, np.ndarray]


@dataclass
class TaskScorer:
    """The tasks of a search. `limit`: documents of a task, both halves together; the first, or the lowest hashes if
    `shuffle`."""

    tasks: Sequence[TaskSetting]
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    shuffle: bool = False
    batch_size: int = 8
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True
    loaded: Any = None
    halves: dict[Half, Documents] | None = None
    documents: dict[str, list[list[str]]] | None = None

    def measure(self, model: Any, tokenizer: Any, half: Half) -> tuple[By, By, dict[str, float]]:
        """(sums, counts) [documents] by task, and the metrics that are no means over documents.

        Raises RecipeError: lm-eval is not installed, knows no such task, or gives no such metric.
        """
        halves = self._halves()
        chat = self.apply_chat_template and bool(getattr(tokenizer, "chat_template", None))  # without one it would fail
        found = self._evaluated(model, tokenizer, halves[half], chat)
        sums: By = {}
        counts: By = {}
        whole = {}
        for task in self.tasks:
            metrics = found["results"][task.name]
            if not isinstance(metrics.get(task.metric), (int, float)):
                names = [name for name, value in metrics.items() if isinstance(value, (int, float)) and "stderr" not in name]
                raise RecipeError(f"task {task.name}: no metric {task.metric!r}.{closest(task.metric, names)}")
            value = float(metrics[task.metric])
            each = [sample.get(task.metric.partition(",")[0]) for sample in found["samples"][task.name]
                    if sample["filter"] == task.metric.partition(",")[2]]
            plain = bool(each) and all(isinstance(v, (int, float, np.number)) for v in each)
            if plain and np.isclose(np.mean([float(v) for v in each]), value, rtol=1e-6, atol=1e-9):
                sums[task.name], counts[task.name] = np.array(each, dtype=np.float64), np.ones(len(each))
            else:
                whole[task.name] = value
        return sums, counts, whole

    def _evaluated(self, model: Any, tokenizer: Any, documents: Documents, chat: bool) -> Any:
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        # not `simple_evaluate`, which lists the machine's packages each time, for seconds
        with _silence():
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size, device=str(device()))
        try:
            for task in self.loaded["tasks"].values():
                task.set_fewshot_seed(seed=FEWSHOT_SEED)  # each candidate gets the same examples
            with _silence():
                return evaluate(lm=wrapped, task_dict=self.loaded, samples=documents, bootstrap_iters=0, log_samples=True,
                                apply_chat_template=chat,
                                fewshot_as_multiturn=chat and self.fewshot_as_multiturn and bool(self.num_fewshot))
        except Exception as error:  # the harness raises any type, an assertion for an empty prompt
            raise _cannot(self.tasks, error) from error

    def _halves(self) -> dict[Half, Documents]:
        if self.halves is not None:
            return self.halves
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise RecipeError("the harness is not installed: pip install 'anabranch[lm-eval]'.") from error
        names = [task.name for task in self.tasks]
        try:
            with _silence():
                manager = TaskManager(include_path=str(self.include_path) if self.include_path else None,
                                      include_defaults=self.include_path is None)
                self.loaded = manager.load(names)
        except Exception as error:  # as above: of the harness, of `datasets`, of the network
            raise _cannot(self.tasks, error) from error
        halves: dict[Half, Documents] = {"searched": {}, "guard": {}}
        known: dict[str, dict[int, set[str]]] = {}
        for name in names:
            task = self.loaded["tasks"].get(name)
            if task is None:
                raise RecipeError(f"task {name}: a group of tasks. Name its tasks one by one.")
            own = task.get_config("num_fewshot")
            if own != 0:  # a task that says 0 means it
                task.set_config(key="num_fewshot", value=self.num_fewshot if self.num_fewshot is not None else own or 0)
            documents = list(task.eval_docs)
            hashes = [_hash(document) for document in documents]
            chosen = sorted(range(len(hashes)), key=lambda i: hashes[i]) if self.shuffle else list(range(len(hashes)))
            chosen = sorted(chosen[: self.limit], key=lambda i: (hashes[i], i))
            border = (len(chosen) + 1) // 2
            halves["searched"][name], halves["guard"][name] = sorted(chosen[:border]), sorted(chosen[border:])
            known[name] = _marks(task, {i: documents[i] for i in chosen})
        self.halves = _apart(halves, known)
        self.documents = {name: [sorted(marks) for marks in by_number.values()] for name, by_number in known.items()}
        return self.halves

    @property
    def identity(self) -> Any:
        """What the journal knows the documents by, and how the tasks ask and count."""
        import importlib.metadata

        halves = self._halves()
        settings = {name: ADDRESS.sub("", json.dumps(task.dump_config(), sort_keys=True, default=repr))
                    for name, task in self.loaded["tasks"].items()}
        return [halves, self.documents, settings, importlib.metadata.version("lm_eval")]


def _apart(halves: dict[Half, Documents], known: dict[str, dict[int, set[str]]]) -> dict[Half, Documents]:
    """Without the guard documents that a searched one equals, in its own task or in another: in everything, or in what is
    asked. `known`: task -> number of a document -> its hashes. Raises RecipeError where a task has none left."""
    seen = {mark for name, numbers in halves["searched"].items() for i in numbers for mark in known[name][i]}
    guard = {name: [i for i in numbers if not known[name][i] & seen] for name, numbers in halves["guard"].items()}
    for name, numbers in guard.items():
        if not numbers:
            raise RecipeError(f"task {name}: of {len(known[name])} documents, no half can be kept from the search: the others "
                              "are searched on, here or in another task. Give it more documents.")
    return {"searched": halves["searched"], "guard": guard}


def _marks(task: Any, documents: dict[int, Any]) -> dict[int, set[str]]:
    """Hashes of each document: of all of it, and of what is asked. The latter only where that is text (winogrande's is a
    number) and not the same for all."""
    asked: dict[int, Any] = {i: task.doc_to_text(document) for i, document in documents.items()}
    told = len({text for text in asked.values() if isinstance(text, str)}) > 1
    return {i: {_hash(document)} | ({_hash(asked[i])} if told and isinstance(asked[i], str) and asked[i].strip() else set())
            for i, document in documents.items()}


@contextmanager
def _silence() -> Iterator[None]:
    """The harness's bars and warnings would stand between our lines, once for every candidate."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


def _hash(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=repr).encode()).hexdigest()


def _cannot(tasks: Sequence[TaskSetting], error: Exception) -> RecipeError:
    return RecipeError(f"lm-eval cannot run {', '.join(t.name for t in tasks)}: {type(error).__name__}: {str(error)[:300]}. "
                       "Check the task's name, `task_path`, and that its data is here.")
