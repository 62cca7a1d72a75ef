"""`match="exact"` and "root": losses are divided by the words that match, not by those that have a map.

A student that knows part of the answers by heart matches some words and not others.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from invariants.test_trainer import logged, lora, of_kind, run  # noqa: F401
from lavender.alignment.objective import AlignmentRequest
from lavender.errors import NotFiniteError
from lavender.training.metrics import check_choice

NUMBERS = ("loss", "vlm_loss", "attention_loss", "matched_words")
STILL: dict[str, Any] = {"learning_rate": 0.0, "max_steps": 1, "train_sampling_strategy": "sequential"}


@pytest.fixture(scope="module")
def knowing(make_student, processor, dataset, store_path, tmp_path_factory) -> dict[str, torch.Tensor]:
    """Weights of a student that predicts some of the words."""
    from lavender.training.trainer import LavenderConfig, LavenderTrainer

    args = LavenderConfig(
        output_dir=str(tmp_path_factory.mktemp("taught")),
        maps=str(store_path),
        align_weight=0.0,
        max_steps=25,
        seed=3,
        learning_rate=3e-3,
        per_device_train_batch_size=4,
        report_to="none",
        bf16=False,
        use_cpu=True,
        max_length=None,
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
        probe_size=0,
    )
    model = make_student()
    LavenderTrainer(model, args, processing_class=processor, train_dataset=dataset.select(range(4))).train()
    return {name: one.clone() for name, one in model.state_dict().items() if "alignment" not in name}


@pytest.fixture
def taught(make_student, knowing):
    """A fresh copy of that student."""

    def build():
        model = make_student()
        model.load_state_dict(knowing)
        return model

    return build


def by_hand(trainer: Any, examples: list[Any]) -> tuple[float, int, int]:
    """Mean loss of the matched words of all examples together, their number, and that of the mapped words."""
    batch = dict(trainer.data_collator(examples))
    request = AlignmentRequest(trainer._alignment_layers, batch.pop("alignment"), trainer._root_matcher)
    with torch.no_grad():
        trainer.model.train()(**batch, use_cache=False, fused_lm_head=True, attention_request=request)
    matched = request.matched[request.present]
    return request.losses[matched].mean().item(), int(matched.sum()), len(matched)


@pytest.mark.parametrize("match", ["exact", "root"])
def test_the_loss_is_the_mean_over_matched_words(run, taught, dataset, match):  # noqa: F811
    trainer = run(model=taught(), match=match, per_device_train_batch_size=4, **STILL)
    mean, matched, mapped = by_hand(trainer, [dataset[index] for index in range(4)])
    assert 0 < matched < mapped
    assert logged(trainer, "matched_words") == [matched]
    assert logged(trainer, "attention_loss") == [pytest.approx(mean, rel=1e-5)]
    assert logged(trainer, "loss")[0] == pytest.approx(logged(trainer, "vlm_loss")[0] + 10 * mean, rel=1e-4)


@pytest.mark.parametrize(("match", "kind"), [("exact", "full"), ("root", "published, lora"), ("exact", "learn")])
def test_accumulated_batches_are_one_batch(run, taught, dataset, match, kind):  # noqa: F811
    """4 × 1, 2 × 2 and 1 × 4 make the same step. Samples match words in different numbers, some of them none."""
    settings: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 2, "match": match}
    settings["train_sampling_strategy"] = "sequential"
    runs = []
    for size in (4, 2, 1):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        runs.append(run(model=taught(), data=dataset.select(range(4)), **sizes, **settings, **of_kind(kind)))
    whole = runs[0]
    assert all(words > 0 for words in logged(whole, "matched_words"))
    for parts in runs[1:]:
        assert logged(parts, "matched_words") == logged(whole, "matched_words")
        for name in ("loss", "vlm_loss", "attention_loss"):
            assert logged(parts, name) == pytest.approx(logged(whole, name), rel=1e-5), name
        found = parts.model.state_dict()
        for name, one in whole.model.state_dict().items():
            torch.testing.assert_close(found[name], one, rtol=1e-4, atol=2e-6, msg=name)


def test_looking_ahead_draws_what_training_draws(run, taught, dataset):  # noqa: F811
    """With dropout the words that match differ from one forward to the next; those that are counted are those that
    are trained on, so that the weights of the losses of a step sum to 1."""
    peft = lora()
    peft.lora_dropout = 0.3
    trainer = run(
        model=taught(),
        data=dataset.select(range(4)),
        peft=peft,
        match="exact",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        build_only=True,
        max_steps=2,
        learning_rate=0.0,
    )
    with torch.no_grad():  # a fresh adapter adds nothing, whatever is dropped
        for name, one in trainer.model.named_parameters():
            if "lora_B" in name:
                one.normal_(0, 0.1)
    seen, share = [], trainer._divisor.share

    def watched(total: torch.Tensor, request: AlignmentRequest) -> torch.Tensor:
        seen.append((float((request.weights * request.matched).sum()), trainer._divisor._weight))
        return share(total, request)

    trainer._divisor.share = watched
    trainer.train()
    assert len(seen) == 8
    for step in (seen[:4], seen[4:]):
        assert {weight for _, weight in step} == {sum(own for own, _ in step)}
    assert sum(own for own, _ in seen[:4]) != sum(own for own, _ in seen[4:])  # the dropout has an effect


@pytest.mark.parametrize("match", ["exact", "root"])
@pytest.mark.parametrize("size", [1, 3, 6])
def test_an_evaluation_divides_by_all_its_matched_words(run, taught, dataset, match, size):  # noqa: F811
    """Not by batches: with one sample a batch some match nothing."""
    trainer = run(model=taught(), match=match, per_device_eval_batch_size=size, build_only=True)
    found = trainer.evaluate(dataset)
    mean, matched, mapped = by_hand(trainer, [dataset[index] for index in range(6)])
    assert 0 < matched < mapped
    assert found["eval_attention_loss"] == pytest.approx(mean, rel=1e-5)
    assert found["eval_matched_words"] == matched
    assert found["eval_matched_share"] == pytest.approx(matched / mapped)
    assert found["eval_loss"] == pytest.approx(found["eval_vlm_loss"] + 10 * mean, rel=1e-5)


def silent(trainer: Any) -> None:
    """Let the student predict another token everywhere."""
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.zero_()


@pytest.mark.parametrize("match", ["exact", "root"])
def test_a_student_that_predicts_nothing_has_no_attention_loss(run, dataset, match):  # noqa: F811
    trainer = run(match=match, build_only=True)
    silent(trainer)
    found = trainer.evaluate(dataset)
    assert math.isnan(found["eval_attention_loss"])
    assert found["eval_matched_share"] == found["eval_matched_words"] == 0
    assert found["eval_loss"] == found["eval_vlm_loss"]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            "eval_attention_loss",
            "Got eval_attention_loss = nan, where none of the mapped words matched (0%). Expected "
            "a number to choose the best checkpoint by. Do this: set metric_for_best_model: eval_vlm_loss.",
        ),
        ("loss", "with L_att in it. Do this: set metric_for_best_model: eval_vlm_loss."),
        ("eval_vlm_loss", None),
    ],
)
def test_it_is_never_chosen_as_the_best(run, dataset, metric, message, tmp_path):  # noqa: F811
    trainer = run(
        match="exact",
        build_only=True,
        eval_strategy="no",
        save_strategy="best",
        metric_for_best_model=metric,
        learning_rate=0.0,
        output_dir=str(tmp_path),
    )
    trainer.args.eval_strategy, trainer.args.eval_steps, trainer.eval_dataset = "steps", 1, dataset
    silent(trainer)
    if message is None:
        trainer.train()
        assert trainer.state.best_global_step == 1
        return
    with pytest.raises(NotFiniteError) as caught:
        trainer.train()
    assert message in str(caught.value)
    assert trainer.state.best_metric is None
    assert not list(tmp_path.glob("checkpoint-*"))


def test_other_numbers_that_choose():
    check_choice({"eval_loss": 1.0}, None, aligns=True)
    check_choice({"eval_loss": 1.0, "eval_matched_share": 0.1}, "loss", aligns=True)
    check_choice({"eval_loss": 1.0, "eval_matched_share": 0.0}, "loss", aligns=False)
    check_choice({"eval_loss": 1.0}, "eval_loss", aligns=True)  # text alone
    check_choice({"eval_a_vlm_loss": 1.0, "eval_b_matched_share": 0.0}, "eval_a_vlm_loss", aligns=True)
    with pytest.raises(NotFiniteError, match=r"^Got eval_a_loss = 1, where none of the mapped words matched"):
        check_choice({"eval_a_loss": 1.0, "eval_a_matched_share": 0.0}, "a_loss", aligns=True)
    with pytest.raises(NotFiniteError, match=r"^Got eval_vlm_loss = nan\. Expected a number to choose"):
        check_choice({"eval_vlm_loss": math.nan, "eval_matched_share": 0.0}, "vlm_loss", aligns=True)
    with pytest.raises(NotFiniteError, match=r"^Got eval_attention_loss = nan, where no word has a map"):
        check_choice({"eval_attention_loss": math.nan}, "attention_loss", aligns=True)
