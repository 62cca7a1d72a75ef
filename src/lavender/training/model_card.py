"""The model card of a tuned model: what it was made from, how, its scores, and what to cite."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from lavender.data.store import MapStore, SeveralStores
from lavender.errors import DataError
from lavender.files import printable, read_whole
from lavender.students.loading import goes_on, its_model
from lavender.training.run_folder import COVERAGE, METRICS, read_config, versions

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from lavender.training.mixin import AlignmentMixin

CARD = "README.md"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LOGGED = ("loss", "vlm_loss", "attention_loss", "attention_mass", "eval_loss", "eval_vlm_loss", "eval_attention_loss")
_CITATIONS = """\
The method:

```bibtex
@inproceedings{lavender2025,
  title     = {Diffusion Instruction Tuning},
  booktitle = {International Conference on Machine Learning (ICML)},
  year      = {2025},
  note      = {arXiv:2502.06814}
}
```

The trainer, TRL:

```bibtex
@software{trl,
  title = {TRL: Transformers Reinforcement Learning},
  url   = {https://github.com/huggingface/trl},
  year  = {2020}
}
```
"""


def trainer_card(
    trainer: AlignmentMixin, name: str, is_adapter: bool, data: str | None = None, tags: Sequence[str] = ()
) -> ModelCard:
    """The card of the model that a trainer trains.

    Args:
        name: the model's name.
        is_adapter: whether its weights are an adapter apart from its base.
        data: hub id or name of the training data, which a trainer does not know.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    names = ("align_weight", "attention_loss", "sharpen", "learning_rate")
    training = {one: getattr(trainer.args, one) for one in names}
    config: dict[str, Any] = {"model": model.config._name_or_path or None, "data": data, "training": training}
    config["trust_remote_code"] = any(map(_has_own_code, (model, trainer.processing_class)))
    if isinstance(model, PeftModel):
        config["peft"] = model.peft_config["default"].to_dict()
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    return model_card(config, name, is_adapter, logged, {"teachers": teachers_of(trainer.maps)}, tags=tags)


def _has_own_code(part: Any) -> bool:
    """Whether the code of a model or processor came with it."""
    part = part.get_base_model() if isinstance(part, PeftModel) else part
    return type(part).__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")


def run_card(
    run: Path, is_adapter: bool, repository: str | None = None, coverage: Mapping[str, Any] | None = None
) -> ModelCard:
    """The card of a run's model, with the scores that `lavender eval` has written to the run folder.

    Args:
        run: a run folder. Beside config.yaml no file needs to be there.
        is_adapter: whether the weights are an adapter apart from its base.
        repository: hub id that the example loads; None for a placeholder.
        coverage: what coverage.json will have, if it is not written yet.

    Raises:
        DataError: a file is damaged.
    """
    config = _without_local_ids(read_config(run))
    name = repository.rpartition("/")[2] if repository else run.resolve().name
    try:
        logged: dict[str, Any] = {}
        for line in _text_of(run / METRICS).splitlines():
            logged |= json.loads(line)
        if coverage is None:
            coverage = json.loads(_text_of(run / COVERAGE) or "null")
        scores = json.loads(_text_of(run / "eval.json") or "null")
        return model_card(config, name, is_adapter, logged, coverage, scores, repository)
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        then = "give `lavender train` once more, which writes it again" if goes_on(run) else its_model(run)
        raise DataError(
            f"a run whose {METRICS}, {COVERAGE} or eval.json is damaged: {run} ({error})",
            "what `lavender train` and `lavender eval` wrote",
            f"delete the damaged file; after {COVERAGE} {then}",
        ) from error


def _without_local_ids(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, with absolute paths for folders that look like hub ids: this may be another folder."""
    record = config.get("record", {})
    model, found = record.get("content", {}).get("model"), dict(config)
    if model is not None and not str(model).startswith("commit "):
        found["model"] = f"/{config['model']}"
    for name in record.get("local", ()):
        found[name] = f"/{config[name]}"
    return found


def _text_of(path: Path) -> str:
    return read_whole(path).decode() if path.is_file() else ""


def model_card(
    config: Mapping[str, Any],
    name: str,
    is_adapter: bool,
    logged: Mapping[str, Any],
    coverage: Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    repository: str | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """A model card. Paths of this computer are not in it, only the names of their last folders.

    Args:
        config: settings as in a run's config.yaml; of those that are missing nothing is said, but for `model`.
        name: the model's name.
        is_adapter: whether the weights are an adapter apart from its base.
        logged: the last of each number that training logged.
        coverage: the content of coverage.json, at least `teachers`.
        scores: the content of eval.json.
        repository: hub id that the example loads; None for a placeholder.
        tags: tags beside our own.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base, data = hub_id(config["model"]), hub_id(config.get("data"))
    card_data = ModelCardData(
        base_model=base,
        base_model_relation=("adapter" if is_adapter else "finetune") if base else None,
        datasets=[data] if data else None,
        library_name="peft" if is_adapter else "transformers",
        model_name=name,
        pipeline_tag="image-text-to-text",
        tags=sorted({"lavender-vlm", "trl", "sft", "diffusion-instruction-tuning", *tags}),
    )
    parts = [_head(config, name, is_adapter), _facts_table(config, logged, coverage)]
    parts.append(_use(config, is_adapter, repository))
    parts += [_score_table(scores)] if scores is not None else []
    packages = ", ".join(f"{package} {number}" for package, number in _versions(config).items())
    parts += [f"## Versions\n\n{packages}", f"## Citation\n\n{_CITATIONS}"]
    return ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n" + "\n\n".join(parts))


def hub_id(name: Any) -> str | None:
    """The name if it is an id of the hub; None for a folder of this computer."""
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def teachers_of(store: MapStore | SeveralStores) -> list[str]:
    """Who made the maps of a store, or of several: each teacher's name once, without the folders above it."""
    stores = store.stores if isinstance(store, SeveralStores) else (store,)
    return list(dict.fromkeys(_shown(one.identity.get("teacher")) for one in stores))


def _shown(name: Any) -> str:
    """A hub id as it is, of a path the last folder."""
    if name is None:
        return "not recorded"
    return str(name) if hub_id(name) else Path(str(name)).name


def _linked(name: Any, kind: str = "") -> str:
    if name is None:
        return "not recorded"
    found = hub_id(name)
    return f"[{found}](https://huggingface.co/{kind}{found})" if found else f"`{printable(_shown(name))}`"


def _head(config: Mapping[str, Any], name: str, is_adapter: bool) -> str:
    plain = config.get("training", {}).get("align_weight") == 0
    what = "An adapter of" if is_adapter else "A fine-tuned version of"
    how = "plain fine-tuning" if plain else "Diffusion Instruction Tuning"
    maps = "" if plain else " Word maps supervised its text-to-image attention."
    return f"# {name}\n\n{what} {_linked(config['model'])}, trained by {how} with `lavender-vlm`.{maps}"


def _facts_table(config: Mapping[str, Any], logged: Mapping[str, Any], coverage: Mapping[str, Any] | None) -> str:
    lines = ["## Training", "", "| | |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in _facts(config, logged, coverage))])


def _facts(
    config: Mapping[str, Any], logged: Mapping[str, Any], coverage: Mapping[str, Any] | None
) -> Iterator[tuple[str, str]]:
    training = config.get("training", {})
    yield "base", _linked(config["model"])
    counted = ""
    if coverage and "samples" in coverage:
        counted = f", {coverage['samples']:,} samples trained on, repeats counted, "
        counted += f"{coverage['mapped_samples']:,} of them with maps"
    if config.get("replay_data"):
        counted += f"; replayed: {_linked(config['replay_data'], 'datasets/')}"
    yield "data", _linked(config.get("data"), "datasets/") + counted
    yield "teacher of the maps", ", ".join(_linked(one) for one in (coverage or {}).get("teachers", ["not recorded"]))
    if training.get("align_weight") == 0:
        yield "loss", "L_VLM (λ = 0)"
    elif "align_weight" in training:
        yield "loss", f"L_VLM + λ · L_att, λ = {training['align_weight']}"
        yield "L_att", f"`{training.get('attention_loss')}`, maps to the power of {training.get('sharpen')}"
    if settings := config.get("lora") or config.get("peft"):
        kind = str(getattr(settings.get("peft_type"), "value", settings.get("peft_type", "LoRA")))
        sizes = "".join(f", {one} {settings[one]}" for one in ("r", "alpha", "lora_alpha") if settings.get(one))
        yield "tuned", f"an adapter: {kind}{sizes}"
    else:
        frozen = ", ".join(config.get("freeze", ()))
        yield "tuned", "the weights" + (f", without {frozen}" if frozen else "")
    if "step" in logged:
        yield "steps", f"{logged['step']:,}, learning rate {training.get('learning_rate', 'not recorded')}"
    numbers = [f"{name} {logged[name]:.4g}" for name in _LOGGED if logged.get(name) is not None]
    if numbers:
        yield "last logged", ", ".join(numbers)


def _use(config: Mapping[str, Any], is_adapter: bool, repository: str | None) -> str:
    where, base = repository or "NAME/REPOSITORY", hub_id(config["model"]) or _shown(config["model"])
    lines = ["from transformers import AutoModelForImageTextToText, AutoProcessor", ""]
    own_code = ", trust_remote_code=True" if config.get("trust_remote_code") else ""
    if is_adapter:
        lines = [
            "from peft import PeftModel",
            *lines,
            f'base = AutoModelForImageTextToText.from_pretrained("{base}"{own_code})',
        ]
        lines.append(f'model = PeftModel.from_pretrained(base, "{where}")')
    else:
        lines.append(f'model = AutoModelForImageTextToText.from_pretrained("{where}"{own_code})')
    lines.append(f'processor = AutoProcessor.from_pretrained("{where}"{own_code})')
    code = "\n".join(lines)
    return f"## Use\n\nIt loads without `lavender-vlm`:\n\n```python\n{code}\n```"


def _score_table(scores: Mapping[str, Any]) -> str:
    arms = scores["arms"]
    names = list(next(iter(arms.values())))
    rows = [["model", *names], ["---"] * (1 + len(names))]
    for arm, found in arms.items():
        rows.append([arm, *("–" if found[one] is None else f"{found[one]:.4f}" for one in names)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    trained_on = scores.get("arguments", {}).get("data") is None
    head = f"`lavender eval` on {scores['samples']} samples of {_linked(scores['data'], 'datasets/')}"
    head += ", which were trained on:" if trained_on else ":"
    return f"## Scores\n\n{head}\n\n{table}"


def _versions(config: Mapping[str, Any]) -> Mapping[str, str]:
    found = config.get("record", {}).get("versions") or versions()
    return {name: number for name, number in found.items() if name != "platform"}
