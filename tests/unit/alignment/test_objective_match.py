"""`match="exact"`: only words that the student predicts itself count in the alignment loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_outputs import CausalLMOutput
from trl.trainer.utils import FusedCausalLMOutput

from lavender.alignment.objective import AlignmentHead, AlignmentRequest, attach, detach
from lavender.config import AlignmentConfig
from lavender.errors import ConfigError
from lavender.students.capture import row_tensors
from lavender.students.registry import adapter_for
from lavender.students.word_maps import AnsweredPicture
from lavender.training.trainer import LavenderConfig, LavenderTrainer
from lavender.words import same_root, words_of

GRID, VOCABULARY, LENGTH = (11, 13), 17, 11
PROMPT = "what is it?"
# rows of each word: two of two tokens; one of one, which is the last of its sample
WORDS = ([(3, 4), (6, 7)], [(9,)])


def request_of(words=WORDS, **more: torch.Tensor) -> AlignmentRequest:
    tensors = row_tensors(words)
    unused = {
        "boxes": torch.zeros(len(words), 1, 4),
        "pictures": torch.zeros(len(words), 1, dtype=torch.long),
        "targets": torch.zeros(*tensors["present"].shape, *GRID),
    }
    return AlignmentRequest((3,), tensors | unused | more)


def outputs_of(hits: torch.Tensor, ids: torch.Tensor) -> tuple[CausalLMOutput, FusedCausalLMOutput]:
    """Both kinds of output of a model whose first choice at a row (sample, row) is right or wrong."""
    chosen = torch.where(hits, ids[:, 1:], (ids[:, 1:] + 5) % VOCABULARY)
    logits = F.one_hot(F.pad(chosen, (0, 1)), VOCABULARY).float().requires_grad_()
    return CausalLMOutput(logits=logits), FusedCausalLMOutput(loss=torch.tensor(0.3), is_top1=hits)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, LENGTH))


@pytest.mark.parametrize(
    ("right", "matched"),
    [
        ([(0, 3), (0, 4), (0, 6), (0, 7), (1, 9)], [[True, True], [True, False]]),
        ([(0, 3), (0, 4), (0, 6), (1, 9)], [[True, False], [True, False]]),
        ([(0, 4), (0, 7)], [[False, False], [False, False]]),
        ([(0, 6), (0, 7)], [[False, True], [False, False]]),
        ([(1, 9), (1, 3), (1, 4), (0, 9), (0, 5)], [[False, False], [True, False]]),
        ([], [[False, False], [False, False]]),
    ],
)
def test_a_word_counts_if_all_its_tokens_are_the_first_choice(ids, right, matched):
    """The row before a token predicts it. The second sample has one word: what is not there never counts."""
    hits = torch.zeros(2, LENGTH - 1, dtype=torch.bool)
    for sample, row in right:
        hits[sample, row] = True
    for output in outputs_of(hits, ids):
        request = request_of()
        assert request.matched.tolist() == [[True, True], [True, False]]
        request.match_predicted(output, ids)
        assert request.matched.tolist() == matched
        assert request.present.tolist() == [[True, True], [True, False]]


def test_both_kinds_of_output_agree():
    found = []
    for _ in range(29):
        hits, ids = torch.rand(2, LENGTH - 1) < 0.7, torch.randint(VOCABULARY, (2, LENGTH))
        requests = [request_of(), request_of()]
        for request, output in zip(requests, outputs_of(hits, ids), strict=True):
            request.match_predicted(output, ids)
        assert torch.equal(requests[0].matched, requests[1].matched)
        found.append(requests[0].matched)
    assert 0.2 < torch.stack(found)[..., 0].float().mean() < 0.8


@pytest.mark.parametrize(
    ("said", "matched"),
    [
        ("the dogs chase", [True, True]),
        ("the dog chase", [True, True]),
        ("the dog chases", [True, True]),
        ("the cats chase", [False, True]),
        ("the dog eats", [True, False]),
        ("a cat eats", [False, False]),
    ],
)
def test_root_match_counts_another_form_of_the_word(said, matched):
    """The tokens of the words stand for themselves; exact match wants them all, root match a form of the word."""
    spelled = ["the", "a", "dogs", "dog", "cats", "cat", "chases", "chase", "eats"]
    tokens = {text: index for index, text in enumerate(spelled)}

    def same_word(predicted: list[int], true: list[int]) -> bool:
        return same_root("".join(spelled[one] for one in predicted), "".join(spelled[one] for one in true))

    true = torch.tensor([[tokens[one] for one in ("a", "dogs", "chase")]])
    chosen = torch.tensor([[tokens[one] for one in said.split()[1:]] + [0]])
    tensors = row_tensors([[(0,), (1,)]])
    unused = {"boxes": torch.zeros(1, 1, 4), "pictures": torch.zeros(1, 1), "targets": torch.zeros(1, 2, *GRID)}
    request = AlignmentRequest((3,), tensors | unused, same_word)
    request.match_predicted(CausalLMOutput(logits=F.one_hot(chosen, len(tokens)).float()), true)
    assert request.matched.tolist() == [matched]
    exact = AlignmentRequest((3,), tensors | unused)
    exact.match_predicted(CausalLMOutput(logits=F.one_hot(chosen, len(tokens)).float()), true)
    assert exact.matched.tolist() == [[said.split()[1] == "dogs", said.split()[2] == "chase"]]


def test_the_tokens_of_a_root_are_spelled_in_order():
    """A word of two tokens whose rows stand in another order: what is said is read from left to right."""
    spelled = []
    tensors = row_tensors([[(5, 2)]])
    unused = {"boxes": torch.zeros(1, 1, 4), "pictures": torch.zeros(1, 1), "targets": torch.zeros(1, 1, *GRID)}
    request = AlignmentRequest((3,), tensors | unused, lambda *both: bool(spelled.append(both)))
    logits = F.one_hot(torch.arange(7)[None] + 9, VOCABULARY).float()
    request.match_predicted(CausalLMOutput(logits=logits), torch.arange(7)[None])
    assert spelled == [([11, 14], [3, 6])]


def test_root_match_needs_to_know_what_is_said(ids):
    request = request_of()
    request.same_word = lambda predicted, true: True
    with pytest.raises(ConfigError, match="match='root' with a model output that has"):
        request.match_predicted(outputs_of(torch.ones(2, LENGTH - 1, dtype=torch.bool), ids)[1], ids)


def test_an_output_without_predictions_is_refused(ids):
    with pytest.raises(ConfigError) as caught:
        request_of().match_predicted(CausalLMOutput(loss=torch.tensor(0.3)), ids)
    assert str(caught.value) == (
        "Got match='exact' with a model output that has ['loss']. Expected the model's predictions. "
        "Do this: set match='label', or switch off the fused loss that hides them."
    )


def test_another_match_is_refused():
    assert AlignmentConfig().match == "label"
    with pytest.raises(ConfigError, match=r"Got match='close'\. Expected one of \('label', 'exact', 'root'\)\."):
        AlignmentConfig(match="close")  # ty: ignore[invalid-argument-type]


# with a model


@pytest.fixture
def model(make_student) -> Any:
    return make_student()


@pytest.fixture
def batch(processor, some_scenes, captions) -> dict[str, torch.Tensor]:
    chosen = [
        AnsweredPicture(some_scenes[index].image, PROMPT, captions[index], words_of(captions[index]))
        for index in (0, 3)
    ]
    texts = [processor.apply_chat_template(one.messages(), tokenize=False) for one in chosen]
    pictures = [[one.image] for one in chosen]
    return dict(processor(images=pictures, text=texts, padding=True, add_special_tokens=False, return_tensors="pt"))


def make_predicted(model, batch: dict[str, torch.Tensor], sample: int, rows: tuple[int, ...]) -> None:
    """Write the model's own first choices behind these rows; what comes before a token does not change by it."""
    for row in rows:
        with torch.no_grad():
            batch["input_ids"][sample, row + 1] = model(**batch).logits[sample, row].argmax()


def attention_loss(model, batch, processor, some_scenes, words, match, targets, kind) -> tuple[Any, AlignmentRequest]:
    """Output and request of a forward pass; an Aligner is the same each time."""
    torch.manual_seed(7)
    head = attach(model, AlignmentConfig(attention_loss=kind, match=match)).train()
    sizes = [[(some_scenes[index].image.height, some_scenes[index].image.width)] for index in (0, 3)]
    keys = adapter_for(model.config).key_tensors(batch, sizes, processor)
    request = AlignmentRequest(head.layers, row_tensors(words) | keys | {"targets": targets})
    output = model(**batch, attention_request=request)
    detach(model)
    return output, request


@pytest.mark.parametrize("kind", ["mass", "published"])
def test_the_loss_is_that_of_the_matched_words_alone(kind, model, batch, processor, some_scenes):
    end = int(batch["attention_mask"].sum(1).min()) - 2
    first, second, third = (end - 5, end - 4), (end - 2, end - 1), (end - 3,)
    make_predicted(model, batch, 0, first)
    make_predicted(model, batch, 0, second[:1])  # half a word
    make_predicted(model, batch, 1, third)
    targets = torch.rand(2, 2, *GRID)
    common = (model, batch, processor, some_scenes)
    output, request = attention_loss(*common, [[first, second], [third]], "exact", targets, kind)
    assert request.matched.tolist() == [[True, False], [True, False]]
    assert request.present.tolist() == [[True, True], [True, False]]
    alone, _ = attention_loss(*common, [[first], [third]], "label", targets[:, :1], kind)
    every, _ = attention_loss(*common, [[first, second], [third]], "label", targets, kind)
    assert alone.attention_loss.item() > 0.01
    torch.testing.assert_close(output.attention_loss, alone.attention_loss, rtol=1e-4, atol=0)  # other shapes
    assert every.attention_loss > output.attention_loss + 0.01
    assert torch.equal(output.logits, every.logits)


@pytest.mark.parametrize("kind", ["mass", "published"])
def test_no_matched_word_is_zero_with_a_graph(kind, model, batch, processor, some_scenes):
    end = int(batch["attention_mask"].sum(1).min()) - 2
    words, targets = [[(end - 3, end - 2)], [(end - 1,)]], torch.rand(2, 1, *GRID)
    make_predicted(model, batch, 0, (end - 3,))
    torch.manual_seed(7)
    head: AlignmentHead = attach(model, AlignmentConfig(attention_loss=kind, match="exact")).train()
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, 2 * 65, 4)
    keys = {"boxes": boxes, "pictures": torch.zeros(2, 2 * 65, dtype=torch.long)}
    request = AlignmentRequest(head.layers, row_tensors(words) | keys | {"targets": targets})
    loss = model(**batch, attention_request=request).attention_loss
    assert not request.matched.any()
    assert loss.item() == 0
    assert loss.requires_grad
    loss.backward()
    for layer in head.layers:
        projection = adapter_for(model.config).attention_module(model, layer).q_proj
        assert projection.weight.grad.abs().max() == 0
    assert bool(list(head.parameters())) == (kind == "published")
    for parameter in head.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() == 0


# in training


@pytest.mark.parametrize("match", ["exact", "root"])
def test_training_counts_the_words_that_the_student_says(match, model, processor, dataset, store_path, tmp_path):
    """One sample, learned by heart: at first no word is said, at the end each one. TRL's fused head makes no logits."""
    args = LavenderConfig(
        output_dir=str(tmp_path),
        maps=str(store_path),
        match=match,
        max_steps=31,
        learning_rate=3e-3,
        seed=3,
        per_device_train_batch_size=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = LavenderTrainer(model, args, processing_class=processor, train_dataset=dataset.select([1]))
    (count,) = [int(batch["alignment"]["present"].sum()) for batch in trainer.get_train_dataloader()]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "matched_words" in entry]
    words = [entry["matched_words"] for entry in logs]
    assert len(words) == 31
    assert count > 1
    assert words[0] == 0
    assert max(words) == words[-1] == count
    for entry in logs:
        assert (entry["attention_loss"] == 0) == (entry["matched_words"] == 0)
