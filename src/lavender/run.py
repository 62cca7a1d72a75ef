"""A training run from a YAML file: read, check, train, write the run folder.

A run folder holds `config.yaml` (resolved), `metrics.jsonl`, `environment.json`, `coverage.json` and
`checkpoint/`, an ordinary checkpoint (or LoRA adapter) with processor.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lavender.config import check_keys, from_mapping
from lavender.errors import ConfigError, LavenderError

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from lavender.alignment_data import Coverage
    from lavender.data import Samples
    from lavender.trainer import LavenderConfig

PACKAGES = ("lavender-vlm", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
DEFAULTS: dict[str, Any] = {"report_to": "none", "max_length": None}  # where they differ from TRL's
EVALUATED = ("loss", "vlm_loss", "attention_loss")
"""What an evaluation gives that can say which checkpoint is best, without `eval_`."""


@dataclass(frozen=True)
class LoraSettings:
    """LoRA as the paper used it (its adapter file's size fits r=8 on q and v)."""

    r: int = 8
    alpha: int = 32
    dropout: float = 0.05
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs.

    Attributes:
        model: path or hub id of the base model.
        data: what `lavender.data.read_samples` reads.
        maps: the map store of that data.
        eval_data: held-out data of the same kind, for `eval_strategy`; or None.
        eval_maps: the map store of that data, if `maps` does not hold its maps too.
        out: the run folder.
        prompt: the question put before captions that come without one.
        lora: LoRA settings, or None for full tuning.
        peft: settings of any PEFT config, `peft_type` first, in the place of `lora`, its short form.
        freeze: parts of which nothing is trained: vision_tower, connector, language_model.
        image_processor: settings that replace the image processor's own, such as its `size`.
        dtype: of the loaded weights, a torch name, or "auto".
        quantization: settings of transformers' BitsAndBytesConfig, for QLoRA: the base's weights in 4 or 8 bits.
        trust_remote_code: run code that comes with the model.
        training: any setting of LavenderConfig, which is TRL's SFTConfig and alignment's.
    """

    model: str
    data: str
    maps: str
    out: str
    eval_data: str | None = None
    eval_maps: str | None = None
    prompt: str = "Describe the image."
    lora: LoraSettings | None = None
    peft: Mapping[str, Any] | None = None
    freeze: Sequence[str] = ()
    image_processor: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    quantization: Mapping[str, Any] | None = None
    trust_remote_code: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)

    def peft_settings(self) -> Mapping[str, Any] | None:
        """Those of `peft`, or of `lora`, its short form; None for full tuning."""
        if self.lora is None:
            return self.peft
        targets = self.lora.target_modules
        return {
            "peft_type": "LORA", "r": self.lora.r, "lora_alpha": self.lora.alpha, "lora_dropout": self.lora.dropout,
            "target_modules": targets if isinstance(targets, str) else list(targets),
        }  # fmt: skip


def read_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """A run's settings from YAML and `key=value` overrides; settings of training need no prefix.

    Raises:
        ConfigError: a missing file or key, a misspelt key (named with the nearest right one).
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no file at {path}", "a YAML file", "see examples/world.yaml")
    settings = _parsed(path.read_text(), str(path)) or {}
    if not isinstance(settings, dict):
        raise ConfigError(f"a {type(settings).__name__} in {path}", "keys and values", "see examples/world.yaml")
    return _run_config(settings | read_overrides(overrides), str(path))


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` settings, values as YAML."""
    settings = {}
    for override in overrides:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"--set {override!r}", "KEY=VALUE", "write for example --set align_weight=5")
        settings[key] = _parsed(value, f"--set {override!r}")
    return settings


class _Loader(yaml.SafeLoader):
    """YAML 1.1, in which 5e-4 is a text, with the numbers of YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where}, which is not YAML: {reason}", "valid YAML", "see examples/world.yaml") from error


def _run_config(settings: dict[str, Any], where: str) -> RunConfig:
    own = [one.name for one in fields(RunConfig) if one.name != "training"]
    check_keys(settings, own + sorted(_training_keys()), where)
    for key in ("model", "data", "maps", "out"):
        if key not in settings:
            raise ConfigError(f"no key {key!r} in {where}", f"{key}: …", "add it")
    run = {key: value for key, value in settings.items() if key in own}
    lora = run.pop("lora", None)
    if lora is not None and lora is not False:
        if lora is not True and not isinstance(lora, dict):
            raise ConfigError(f"lora: {lora!r} in {where}", "true, false or settings", "write for example lora: {r: 8}")
        run["lora"] = from_mapping(LoraSettings, {} if lora is True else lora, f"{where}: lora")
    peft = run.get("peft")
    if peft is not None and (not isinstance(peft, dict) or "lora" in run):
        got = "lora and peft" if "lora" in run else f"peft: {peft!r}"
        raise ConfigError(f"{got} in {where}", "one of them, with its settings", "write peft: {peft_type: LORA, r: 8}")
    return RunConfig(**run, training={key: value for key, value in settings.items() if key not in own})


def _training_keys() -> set[str]:
    from lavender.trainer import LavenderConfig

    return {one.name for one in fields(LavenderConfig) if one.init} - {"output_dir", "maps"}


def train(run: RunConfig) -> Path:
    """Run it; the run folder. With `align_weight: 0` this is plain fine-tuning.

    Under `accelerate launch` every process calls this; the main one writes and prints.
    """
    from lavender.alignment_data import SeveralStores
    from lavender.checkpoints import export, save_head
    from lavender.data import read_samples, readable, to_dataset
    from lavender.processes import last_complete_checkpoint
    from lavender.store import MapStore
    from lavender.trainable import check_trained, freeze, peft_config_of
    from lavender.trainer import LavenderTrainer

    _check_evaluation(run)
    out = Path(run.out)
    out.mkdir(parents=True, exist_ok=True)
    sets = [readable(read_samples(path, prompt=run.prompt)) for path in (run.data, run.eval_data) if path is not None]
    notes = [f"dropped {drop.what}: {drop.reason}" for samples in sets for drop in samples.dropped]
    processor, args, load_model = _prepared(run, out)
    if not args.assistant_only_loss:
        notes.append("the loss covers whole conversations, not the answers alone (assistant_only_loss is false)")
    is_main = args.process_index == 0
    _say(notes, is_main)
    stores = SeveralStores(*(MapStore.open(path) for path in (run.maps, run.eval_maps) if path is not None))
    model, settings = load_model(), run.peft_settings()
    freeze(model, run.freeze)
    trainer = LavenderTrainer(
        model, args, processing_class=processor, train_dataset=to_dataset(sets[0]), maps=stores,
        eval_dataset=to_dataset(sets[1]) if run.eval_data else None,
        peft_config=None if settings is None else peft_config_of(settings, model, run.freeze),
    )  # fmt: skip
    _say([check_trained(trainer.accelerator.unwrap_model(trainer.model), run.freeze)], is_main)
    checkpoint, interrupted = last_complete_checkpoint(out / "trainer")
    _say([f"passed over {path}, which was not written to its end" for path in interrupted], is_main)
    _say([f"going on from {checkpoint}"] if checkpoint else [], is_main)
    if is_main:
        _write_start(run, args, out)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if is_main:
        with (out / "metrics.jsonl").open("w") as lines:
            lines.writelines(json.dumps(entry) + "\n" for entry in trainer.state.log_history)
        coverage = _counted(trainer.coverage, sets[0])
        if run.eval_data:
            own = coverage["evaluation"] = _counted(trainer.eval_coverage, sets[1])
            print(f"maps for {own['mapped_samples']} of {own['samples']} samples of the evaluation")
        (out / "coverage.json").write_text(json.dumps(coverage, indent=1))
    export(trainer, out / "checkpoint")
    save_head(trainer, out / "alignment_head.safetensors")
    trainer.accelerator.wait_for_everyone()
    return out


def _say(lines: list[str], is_main: bool) -> None:
    for line in lines if is_main else ():
        print(line)


def _check_evaluation(run: RunConfig) -> None:
    """Settings of evaluation that do not fit each other, before anything is read."""
    strategy, metric = run.training.get("eval_strategy", "no"), run.training.get("metric_for_best_model")
    evaluates = strategy not in ("no", False, None)
    if run.eval_maps is not None and run.eval_data is None:
        raise ConfigError(f"eval_maps: {run.eval_maps} without eval_data", "the samples of these maps", "add eval_data")
    if evaluates and run.eval_data is None:
        raise ConfigError(f"eval_strategy: {strategy} without eval_data", "samples to evaluate on", "add eval_data")
    if run.eval_data is not None and not evaluates:
        raise ConfigError(
            f"eval_data: {run.eval_data}, of which no use is made", "a time to evaluate",
            "add for example eval_strategy: steps and eval_steps: 100",
        )  # fmt: skip
    if metric is not None and str(metric).removeprefix("eval_") not in EVALUATED:
        names = ", ".join(f"eval_{name}" for name in EVALUATED)
        raise ConfigError(f"metric_for_best_model: {metric}", f"one of {names}", "choose one of them")


def _prepared(run: RunConfig, out: Path) -> tuple[ProcessorMixin, LavenderConfig, Callable]:
    """Processor, settings, and what loads the model: after the settings, which say how that is divided."""
    from transformers import AutoConfig, AutoProcessor

    from lavender.trainable import quantization_config
    from lavender.trainer import LavenderConfig
    from lavender.vlm.registry import adapter_for, auto_class

    common = {"trust_remote_code": run.trust_remote_code}
    with loading("model", run.model):
        config = AutoConfig.from_pretrained(run.model, **common)
        adapter = adapter_for(config)
        processor = adapter.processor(AutoProcessor.from_pretrained(run.model, **common))
    _set_images(processor, run.image_processor)
    quantized = {}
    if run.quantization is not None:
        quantized["quantization_config"] = quantization_config(run.quantization, run.peft_settings() is not None)
    try:
        args = LavenderConfig(output_dir=str(out / "trainer"), maps=run.maps, **_training_settings(run, processor))
    except LavenderError:
        raise
    except (TypeError, ValueError) as error:  # transformers' and TRL's own checks
        got = f"settings of training that LavenderConfig refuses: {error}"
        raise ConfigError(got, "values that it accepts", "change the setting") from error

    def load():
        with loading("model", run.model):
            auto = auto_class(config, run.trust_remote_code)
            return adapter.load(auto, run.model, dtype=run.dtype, use_safetensors=True, **common, **quantized)

    return processor, args, load


def _training_settings(run: RunConfig, processor: ProcessorMixin) -> dict[str, Any]:
    return {**DEFAULTS, "assistant_only_loss": _tells_answers(processor), **run.training}


def _write_start(run: RunConfig, args: LavenderConfig, out: Path) -> None:
    """What is known before the first step."""
    training = {**DEFAULTS, "assistant_only_loss": args.assistant_only_loss, **run.training}
    resolved = asdict(run) | {"training": training}
    (out / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(resolved)), sort_keys=False))
    environment = {"python": platform.python_version(), "platform": platform.platform()}
    environment |= {name: version(name) for name in PACKAGES} | {"device": str(args.device), "seed": str(args.seed)}
    environment["processes"] = str(args.world_size)
    (out / "environment.json").write_text(json.dumps(environment, indent=1))


def _counted(coverage: Coverage, samples: Samples) -> dict[str, Any]:
    return {
        "samples": coverage.samples, "mapped_samples": coverage.mapped_samples, "words": coverage.words,
        "dropped": dict(coverage.dropped), "unreadable": [asdict(drop) for drop in samples.dropped],
    }  # fmt: skip


def _tells_answers(processor: Any) -> bool:
    """Whether the chat template marks the assistant's turns, or TRL has a variant of it that does."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if not processor.chat_template:
        return False
    try:
        return has_generation_markers(processor.chat_template) or get_training_chat_template(processor) is not None
    except ValueError:  # TRL's way of saying that it does not know the template
        return False


def _set_images(processor: Any, settings: Mapping[str, Any]) -> None:
    """Replace settings of the image processor; those of the checkpoint that the run writes too."""
    if settings:
        images = processor.image_processor
        check_keys(settings, list(images.to_dict()), "image_processor")
        processor.image_processor = type(images).from_dict(images.to_dict() | dict(settings))


@contextmanager
def loading(what: str, path: str | Path) -> Iterator[None]:
    """Say in our own words that a model cannot be loaded."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except LavenderError:
        raise
    except StrictDataclassError as error:  # a config that contradicts itself: the second line says how
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"the {what} {path}, whose config is wrong: {reason}", "a config that fits", "repair its config.json"
        ) from error
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"the {what} {path}, which comes with its own code", "your consent to run that code",
                "read it, then add --trust-remote-code, or trust_remote_code: true to a run",
            ) from error  # fmt: skip
        reason = str(error).strip().split("\n")[0].rstrip(".")
        if not Path(path).exists() and not _HUB_ID.fullmatch(str(path)):
            reason = "there is no such folder"
        raise ConfigError(
            f"the {what} {path}, which cannot be loaded: {reason}", "a model folder or a hub id", "check the path"
        ) from error


def load_run(path: str | Path, dtype: str = "float32", trust_remote_code: bool = False):
    """(model, processor) of a run folder's checkpoint, or of a plain model path; LoRA is merged.

    Code that comes with the model runs only if `trust_remote_code`, also where the run was trained so: a run folder
    may come from somebody else.
    """
    from transformers import AutoProcessor

    from lavender.vlm.registry import adapter_for

    checkpoint = Path(path) / "checkpoint"
    folder = checkpoint if checkpoint.is_dir() else Path(path)
    with loading("model", path):
        model = _load_model(folder, dtype, trust_remote_code)
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return model, adapter_for(model.config).processor(processor)


def export_run(run: Path, out: Path, trust_remote_code: bool = False) -> Path:
    """Write a run's tuned model as one ordinary checkpoint with processor, LoRA merged, in the weights' own dtype."""
    if not (run / "checkpoint").is_dir():
        raise ConfigError(f"no checkpoint in {run}", "a run folder that `lavender train` wrote", "name such a folder")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out}, which is not empty", "a new folder", "choose another --out")
    model, processor = load_run(run, dtype="auto", trust_remote_code=trust_remote_code)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


def _load_model(folder: Path, dtype: str, trust_remote_code: bool):
    from peft import PeftConfig, PeftModel
    from transformers import AutoConfig

    from lavender.vlm.registry import adapter_for, auto_class

    lora = PeftConfig.from_pretrained(str(folder)) if (folder / "adapter_config.json").is_file() else None
    base = str(folder) if lora is None else str(lora.base_model_name_or_path)
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    model = adapter_for(config).load(
        auto_class(config, trust_remote_code), base, dtype=dtype, use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if lora is not None:
        lora.task_type = None  # it is merged here, and what PEFT adds for a task is not needed
        model = PeftModel.from_pretrained(model, str(folder), config=lora).merge_and_unload()
    return model.eval()
