"""Lavender's checkpoints as models of lmms-eval: base models, run folders, LoRA adapters, exports, of all families.

`ChatModel` answers. `RankingModel` gives the loss of continuations, for tasks that compare options. lmms-eval gives the
two kinds different requests, and takes the second by `--force_simple`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from lavender.errors import ConfigError, ModelError
from lavender.evaluation.answers import answer_batch, answering, continuation_loss
from lavender.evaluation.harness.answer_log import AnswerLog, request_key
from lavender.evaluation.harness.benchmarks import benchmark_of, scores_in
from lavender.evaluation.harness.task_index import RANKING, of_task
from lavender.students.loading import load_run, load_run_processor

MAX_NEW_TOKENS = 1024
"""Where an answer ends if a task does not say it, as in most of lmms-eval's models."""

_BLANK_LINE = "\n\n"
_SAMPLING = ("do_sample", "num_beams", "temperature", "top_p", "top_k")
# what tasks set for other models, or what is read elsewhere
_OTHER = ("max_new_tokens", "until", "image_aspect_ratio", "image_sizes")


class Student(NamedTuple):
    """A loaded checkpoint. lmms-eval deletes modules that a model holds directly, before it scores the answers."""

    model: Any
    processor: Any


class _LavenderModel(lmms):
    """Loading, batches, and answers on disk.

    Args:
        pretrained: a run folder, a model folder (base, export, adapter) or a Hub id.
        batch_size: requests per pass.
        device: such as "cuda:0" or "cpu"; None for the process's GPU if there is one.
        dtype: type of the weights; "auto" is theirs on disk.
        trust_remote_code: run the Python code that comes with the model.
        log: where answers are kept; None keeps none.
        max_batch_size: not used; lmms-eval passes it to every model.
        student: what gives a loaded checkpoint, instead of `pretrained`; called when the first answer is generated.

    Raises:
        ModelError: see `lavender.students.loading.load_run`; or the model has no chat template.
    """

    def __init__(
        self,
        pretrained: str | Path = "",
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        log: AnswerLog | None = None,
        max_batch_size: int | None = None,
        student: Callable[[], Student] | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"batch_size={batch_size!r}", "a number of requests, at least 1", "change batch_size")
        self.batch_size = int(batch_size)
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(device or default_device())
        self._load = student
        self._student = None if student else load_student(pretrained, self.device, dtype, trust_remote_code)
        self.log = log
        self.pictures: dict[str, dict[int, str]] = defaultdict(dict)
        """Task → document → digest of its pictures, of those that have pictures."""
        self.generated = 0
        self.reused = 0

    @property
    def student(self) -> Student:
        """The checkpoint, loaded at the first call."""
        if self._student is None:
            assert self._load is not None
            self._student = self._load()
        return self._student

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests, from the log where it has them."""
        plans = _numbered([self._plan(request) for request in requests])
        answers: list[Any] = [self._known(plan) for plan in plans]
        groups: dict[str, list[int]] = defaultdict(list)
        for place, plan in enumerate(plans):
            if answers[place] is None:
                groups[json.dumps(plan.settings, sort_keys=True, default=str)].append(place)
        with tqdm(
            total=len(plans),
            initial=len(plans) - answers.count(None),
            desc=plans[0].task if plans else "answers",
            disable=self._rank != 0,
        ) as bar:
            for places in groups.values():
                settings = plans[places[0]].settings
                for batch in _batches(places, self.batch_size):
                    for place, text in zip(batch, self._generate([plans[at] for at in batch], settings), strict=True):
                        answers[place] = text
                        self._keep(plans[place], text)
                    bar.update(len(batch))
        return answers

    def _generate(self, plans: Sequence[_Plan], settings: dict[str, Any]) -> list[str]:
        length = int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)
        conversations = [plan.conversation() for plan in plans]  # here the pictures are loaded
        for plan, conversation in zip(plans, conversations, strict=True):
            self._note_pictures(plan, digest_of_pictures(conversation))
        texts = [""] * len(plans)
        for images in (True, False):  # processors take batches in which all have pictures, or none
            places = [place for place, one in enumerate(conversations) if _has_images(one) == images]
            if places:
                with answering(*self.student):
                    batch = [conversations[place] for place in places]
                    answers = answer_batch(*self.student, batch, length, **sampling(settings))
                for place, text in zip(places, answers, strict=True):
                    texts[place] = _before_stops(text, settings.get("until"))
        return texts

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise _unsupported(requests, "rounds of questions")

    def generate_until_agentic(self, requests: list[Instance]) -> list[str]:
        raise _unsupported(requests, "rounds with tools")

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        raise _unsupported(requests, "losses of options from the chat model; pass --force_simple to lmms-eval")

    def _plan(self, request: Instance) -> _Plan:
        raise NotImplementedError

    def _known(self, plan: _Plan) -> Any | None:
        found = None if self.log is None else self.log.known(plan.key)
        if self.log is not None and found is not None:
            self.reused += 1
            self._note_pictures(plan, self.log.pictures(plan.key))
        return found

    def _keep(self, plan: _Plan, answer: Any) -> None:
        self.generated += 1
        if self.log is not None:
            self.log.add(plan.key, answer, self.pictures[plan.task].get(plan.doc, ""))

    def _note_pictures(self, plan: _Plan, digest: str) -> None:
        if digest:
            self.pictures[plan.task][plan.doc] = digest

    def _data(self, task: str, split: str) -> str:
        """The fingerprint of a task's split, which identifies its content."""
        return str(self.task_dict[task][split]._fingerprint)


class _Plan(NamedTuple):
    """What a request needs: its name in the log, its settings, and its conversation, whose pictures load on demand."""

    task: str
    doc: int
    key: str
    settings: dict[str, Any]
    conversation: Callable[[], list[dict]]


class ChatModel(_LavenderModel):
    """lmms-eval's `lavender`: answers by the model's own chat template."""

    is_simple = False

    def _plan(self, request: Instance) -> _Plan:
        context, to_messages, settings, doc, task, split = request.args
        key = request_key(task, doc, request.idx, context, settings, self._data(task, split))

        def conversation() -> list[dict]:
            return as_conversation(to_messages(self.task_dict[task][split][doc]))

        return _Plan(task, doc, key, settings, conversation)


class RankingModel(_LavenderModel):
    """lmms-eval's `lavender` with `--force_simple`: the loss of options; it also answers."""

    is_simple = True

    def _plan(self, request: Instance) -> _Plan:
        context, settings, to_visual, doc, task, split = request.args
        key = request_key(task, doc, request.idx, context, settings, self._data(task, split))

        def conversation() -> list[dict]:
            return _question(context, to_visual(self.task_dict[task][split][doc]))

        return _Plan(task, doc, key, settings, conversation)

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        """Per request the loss of its continuation, and whether greedy decoding would write it: `continuation_loss`.

        lmms-eval takes the option with the smallest loss, in spite of the method's name.
        """
        found = []
        for request in tqdm(requests, desc=requests[0].task_name if requests else "options", disable=self._rank != 0):
            plan = self._option(request)
            known = self._known(plan)
            if known is None:
                [*question, answer] = plan.conversation()
                self._note_pictures(plan, digest_of_pictures(question))
                known = list(continuation_loss(*self.student, question, answer["content"][0]["text"]))
                self._keep(plan, known)
            # bare, lmms-eval 0.7.3 makes a text of the pair, and scoring fails
            found.append(GenerationResult(cast(Any, (float(known[0]), bool(known[1])))))
        return found

    def _option(self, request: Instance) -> _Plan:
        """The question with an option as its answer."""
        context, continuation, to_visual, doc, task, split = request.args
        rows = self.task_dict[task][split]
        text = continuation if isinstance(continuation, str) else str(continuation(rows[doc]))
        key = request_key(task, doc, request.idx, context + "\n" + text, {}, self._data(task, split))

        def conversation() -> list[dict]:
            answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
            return [*_question(context, to_visual(rows[doc])), answer]

        return _Plan(task, doc, key, {}, conversation)


def load_student(path: str | Path, device: torch.device, dtype: str, trust_remote_code: bool) -> Student:
    """A checkpoint, ready to answer. Raises as `load_run` and `check_student` do."""
    check_student(path, trust_remote_code is True)
    model, processor = load_run(path, dtype, trust_remote_code is True, str(device))
    return Student(model, processor)


def check_student(path: str | Path, trust_remote_code: bool = False) -> None:
    """All that can be known of a checkpoint before its weights are read.

    Raises:
        ModelError: the model has no chat template; or as `lavender.students.loading.load_run`.
    """
    if not load_run_processor(path, trust_remote_code).chat_template:
        raise ModelError(
            f"the model {path}, which has no chat template",
            "a processor that knows how its model is asked",
            "put the template of its model card into chat_template.jinja in the model's folder",
        )


def check_task(name: str, task: Any) -> None:
    """What can be known of a task before it is run.

    Raises:
        ConfigError: it asks for what is not supported, or sets a generation setting that is not known.
    """
    if task.OUTPUT_TYPE not in ("generate_until", *RANKING):
        raise ConfigError(
            f"the task {name}, of the output type {task.OUTPUT_TYPE}",
            f"one of generate_until, {', '.join(RANKING)}",
            "leave the task out",
        )
    metrics = scores_in(task.config.metric_list)
    if task.config.metric_list and not metrics:
        raise ConfigError(
            f"the task {name}, whose answers a server scores (lmms-eval's metric `submission`)",
            "a task with a score",
            "name the task of the split that has answers, such as the _val one, and not the group",
        )
    if not metrics and benchmark_of(name) is None:
        raise ConfigError(f"the task {name} without metric_list", "the metric to report", "name it in the task's file")
    try:
        sampling(task.config.generation_kwargs or {})
    except ConfigError as error:
        raise of_task(name, error) from error


def as_conversation(messages: Sequence[dict]) -> list[dict]:
    """lmms-eval's messages as chat templates take them: the picture in its part.

    Raises:
        ConfigError: a part is neither text nor a picture.
    """
    conversation = []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] not in ("text", "image"):
                raise ConfigError(
                    f"a task with a part of type {part['type']!r}",
                    "a task of texts and pictures",
                    "leave this task out; its kind of data is not supported",
                )
            kind = part["type"]
            parts.append({"type": kind, kind: part["text"] if kind == "text" else part["url"]})
        conversation.append({"role": message["role"], "content": parts})
    return conversation


def digest_of_pictures(conversation: Sequence[dict]) -> str:
    """A digest of the pixels of a conversation's pictures in their order; "" if it has none."""
    parts = [part["image"] for message in conversation for part in message["content"] if part["type"] == "image"]
    digest = hashlib.blake2b(digest_size=8)
    for image in parts:
        content = image.tobytes() if isinstance(image, Image.Image) else str(image).encode()
        digest.update(hashlib.blake2b(content + repr(getattr(image, "size", "")).encode()).digest())
    return digest.hexdigest() if parts else ""


def sampling(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's settings of generation as `model.generate` takes them. A temperature of 0 means greedy decoding.

    Raises:
        ConfigError: a setting that is not known, which would silently change what is measured.
    """
    unknown = [name for name in settings if name not in (*_SAMPLING, *_OTHER)]
    if unknown:
        known = ", ".join((*_OTHER[:2], *_SAMPLING))
        raise ConfigError(f"generation_kwargs with {unknown[0]!r}", f"some of {known}", "leave the task out")
    chosen = {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
    chosen["do_sample"] = bool(chosen.get("do_sample", False)) and chosen.get("temperature", 1) > 0
    if not chosen["do_sample"]:
        chosen = {"do_sample": False, "num_beams": int(chosen.get("num_beams", 1))}
    return chosen


def _question(text: str, images: Sequence[Any] | None) -> list[dict]:
    parts = [{"type": "image", "image": image} for image in images or ()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _before_stops(text: str, stops: str | Sequence[str] | None) -> str:
    """The text before the first stop. Nothing stops at a blank line.

    It is lmms-eval's default, also of tasks that name no stop, and lmms-eval's own models ignore it too.
    """
    for stop in [stops] if isinstance(stops, str) else stops or ():
        if stop and stop != _BLANK_LINE:
            text = text.split(stop)[0]
    return text.strip()


def _has_images(conversation: Sequence[dict]) -> bool:
    return any(part["type"] == "image" for message in conversation for part in message["content"])


def _numbered(plans: Sequence[_Plan]) -> list[_Plan]:
    """The plans, with a key of its own for each repeat of a request: a task may ask for several sampled answers."""
    seen: Counter[str] = Counter()
    numbered = []
    for plan in plans:
        numbered.append(plan._replace(key=f"{plan.key}/{seen[plan.key]}") if seen[plan.key] else plan)
        seen[plan.key] += 1
    return numbered


def _batches(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(places), size):
        yield places[start : start + size]


def default_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def _unsupported(requests: Sequence[Instance], what: str) -> ConfigError:
    task = requests[0].task_name if requests else "a task"
    return ConfigError(f"the task {task}, which asks for {what}", "a task of single answers", "leave this task out")
