"""Two processes have the gradients of one: DDP, FSDP2, ZeRO-2 and ZeRO-3, each a real step under `accelerate launch`.

The four captions have 1 to 4 mapped words, so that the processes differ in words; in some cases one has none.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from lavender.alignment.objective import is_alignment_part
from scale.launching import Gradients, gradients
from scale.worker import Case, run_case

PUBLISHED: dict[str, Any] = {"attention_loss": "published"}
LEARN: dict[str, Any] = PUBLISHED | {"pooling": "learn"}
CHECKPOINTED: dict[str, Any] = {"activation_checkpointing": True}
PARTS: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
NO_WORD = (0, 1, 5, 5)  # the second process has pictures, but no word with a map

KL: dict[str, Any] = {"attention_loss": "kl"}
FORCED: dict[str, Any] = {"attention_forcing": 0.6}  # at the first step

EXACT_IN_PARTS = Case("exact match, two micro-batches", model="taught", settings={"match": "exact"} | PARTS)
FORMS = [
    Case("forced, two micro-batches", settings=FORCED | PARTS),
    Case("kl, lora, checkpointed", lora=True, settings=KL | CHECKPOINTED),
    Case("kl, forced, no word", samples=NO_WORD, settings=KL | FORCED),
    Case("forced, llava", model="llava", settings=FORCED),
    Case("both rows, weighted words", settings={"rows": "both", "weight_by_confidence": True}),
]
"""Other forms of the losses of the attention itself than the default."""
QUICK = [
    Case("full"),
    FORMS[0],
    EXACT_IN_PARTS,
    Case("lora, learn, checkpointed", lora=True, settings=LEARN | CHECKPOINTED),
]
EVERYWHERE = [
    Case("full"),
    Case("full, checkpointed", settings=CHECKPOINTED),
    Case("lora", lora=True),
    Case("lora, checkpointed", lora=True, settings=CHECKPOINTED),
    Case("published, checkpointed", settings=PUBLISHED | CHECKPOINTED),
    Case("published, lora", lora=True, settings=PUBLISHED),
    Case("learn", settings=LEARN),
    Case("learn, lora", lora=True, settings=LEARN),
    Case("learn, checkpointed", settings=LEARN | CHECKPOINTED),
    Case("no word", samples=NO_WORD),
    Case("no word, published", samples=NO_WORD, settings=PUBLISHED),
    Case("no word, learn", samples=NO_WORD, settings=LEARN),
    Case("no word on the first, learn, checkpointed", samples=NO_WORD[::-1], settings=LEARN | CHECKPOINTED),
    Case("no word, lora", lora=True, samples=NO_WORD),
    Case("no word, published, lora", lora=True, samples=NO_WORD, settings=PUBLISHED),
    Case("two micro-batches", settings=PARTS),
    Case("flow, two micro-batches", settings=PUBLISHED | {"pooling": "flow-sum"} | PARTS),
    Case("exact match", model="taught", settings={"match": "exact"}),
    EXACT_IN_PARTS,
    Case("root match in parts, lora, learn", lora=True, model="taught", settings={"match": "root"} | PARTS | LEARN),
    Case(
        "root match, λ estimated",
        model="taught",
        settings=PUBLISHED | {"match": "root", "align_weight": "estimated"},
    ),
    *FORMS,
    Case("llava", model="llava"),
    Case("llava, learn", model="llava", settings=LEARN),
    Case("llava, tied embeddings", model="llava_tied"),
]
STAGE = PUBLISHED | {"aligner_pretraining": 1.0, "max_grad_norm": 0.5, "weight_decay": 0.1, "max_steps": 2}
STAGES = [Case("stage", settings=STAGE), Case("stage, learn, lora", lora=True, settings=STAGE | LEARN)]
TEXT = (0, 1, 6, 7)  # the second process has text alone, and does not run the layers that see pictures
TEXTS = [
    Case("text", samples=TEXT),
    Case("text, learn", samples=TEXT, settings=LEARN),
    Case("text, llava", samples=TEXT, model="llava"),
]

CASES = {
    "ddp": [*EVERYWHERE, *STAGES, *TEXTS],
    "fsdp2": [*EVERYWHERE, *STAGES],
    "zero2": EVERYWHERE,
    # LoRA with checkpointing is refused there
    "zero3": [case for case in EVERYWHERE if not (case.lora and case.settings.get("activation_checkpointing"))],
}
"""Of each kind of run, all in one launch."""

pytestmark = pytest.mark.timeout(1200)  # for the launch of all cases


@pytest.fixture(scope="session")
def of_two_processes(request, workspace, tmp_path_factory) -> tuple[str, Gradients]:
    """A kind of run, and the gradients of its `CASES` with what was logged."""
    kind = request.param
    return kind, gradients(kind, CASES[kind], workspace, tmp_path_factory.mktemp("two") / kind)


@pytest.fixture(scope="session")
def of_one_process(workspace, tmp_path_factory):
    """Gradients of a case in this process."""
    known: dict[str, dict[str, Tensor]] = {}

    def run(case: Case, parts: int = 1) -> dict[str, Tensor]:
        """As one batch, or as several micro-batches."""
        if case.name not in known:
            batches = {
                "per_device_train_batch_size": len(case.samples) // parts,
                "gradient_accumulation_steps": parts,
            }
            whole = case.settings | batches
            one = Case(case.name, case.samples, case.lora, case.model, whole)
            _, known[case.name] = run_case(one, workspace, 1, tmp_path_factory.mktemp("one"), use_cpu=True)
        return known[case.name]

    return run


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], case: Case, rtol: float = 1e-5) -> None:
    """Equal to 1e-5 of a parameter's gradient; where that is 0 but for rounding, to 1e-7 of the largest."""
    found = {name.replace("_checkpoint_wrapped_module.", ""): one for name, one in found.items()}  # FSDP's own
    assert found.keys() >= expected.keys(), case.name
    # DeepSpeed gives zeros for what has no gradient, such as LLaVA's last vision layer
    assert [name for name in found.keys() - expected.keys() if found[name].any()] == [], case.name
    largest = max(float(one.norm()) for one in expected.values())
    assert largest > 0.01, case.name
    for name, one in expected.items():
        error = float((found[name] - one).norm())
        assert error <= rtol * (float(one.norm()) + 1e-2 * largest), f"{case.name}: {name}: {error} of {one.norm()}"


def compare(found: Gradients, cases: list[Case], of_one_process, parts: int = 1) -> dict:
    for case in cases:
        assert_equal(found[case.name][0], of_one_process(case, parts), case)
        has_aligner = case.settings.get("attention_loss") == "published"
        assert any(is_alignment_part(name) for name in of_one_process(case, parts)) == has_aligner, case.name
    return {case.name: found[case.name][1] for case in cases}


def test_two_processes_are_one(workspace, of_one_process, tmp_path):
    about = compare(gradients("ddp", QUICK, workspace, tmp_path / "ddp"), QUICK, of_one_process)
    assert {one["wrapped"] for one in about.values()} == {"DistributedDataParallel"}
    logged = about["full"]["log"][0]
    assert logged["matched_words"] == 15  # of both
    assert 0 < about["exact match, two micro-batches"]["log"][0]["matched_words"] < 15


@pytest.mark.slow
@pytest.mark.parametrize("of_two_processes", CASES, indirect=True)
def test_every_kind_of_run_has_the_gradients_of_one_process(of_two_processes, of_one_process):
    kind, found = of_two_processes
    about = compare(found, [case for case in CASES[kind] if case in EVERYWHERE], of_one_process)
    names = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert {one["type"] for one in about.values()} == {f"DistributedType.{names[kind]}"}


@pytest.mark.slow
def test_fsdp_checkpoints_activations_itself(workspace, of_one_process, tmp_path):
    cases = [case for case in EVERYWHERE if "activation_checkpointing" not in case.settings]
    options = ["--fsdp_activation_checkpointing", "true"]
    compare(gradients("fsdp2", cases, workspace, tmp_path / "fsdp2", options), cases, of_one_process)


@pytest.mark.slow
@pytest.mark.parametrize("of_two_processes", ["ddp", "fsdp2"], indirect=True)
def test_the_stage_of_the_aligner_alone(of_two_processes, of_one_process):
    """Clipped by the Aligner's own norm, at its second step too; the VLM has no gradient."""
    _, found = of_two_processes
    about = compare(found, STAGES, of_one_process)
    for case in STAGES:
        assert about[case.name]["unchanged"], case.name
        assert all("alignment_" in name for name in of_one_process(case))


@pytest.mark.slow
@pytest.mark.parametrize("of_two_processes", ["ddp"], indirect=True)
def test_text_alone_on_one_process(of_two_processes, of_one_process):
    """DDP waits for no gradient of layers that did not run.

    Compared with two micro-batches: beside pictures, Mllama's text-only samples attend to padding in their place.
    """
    _, found = of_two_processes
    compare(found, TEXTS, of_one_process, parts=2)
