"""What knowing where is worth: the three losses of a word, and that the shipped students differ as measured."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lavender.cli import main
from lavender.errors import DataError
from lavender.evaluation.check import KEPT, _Case, _shows, check_model, word_losses
from lavender.maps import to_heat
from lavender.students.word_maps import AnsweredPicture
from lavender.training.run import load_run
from lavender.words import words_of
from lavender.world import STUDENT_PATHS
from lavender.world.language import write_scenes
from lavender.world.scenes import scenes
from lavender.world.student_models import CAPTION_PROMPT


def cases(count: int) -> list[_Case]:
    """Scenes with one thing: "a dog" with the true mask as map."""
    found = []
    for scene in scenes("development", 400):
        if len(found) == count:
            break
        if len(scene.things) == 1:
            thing = scene.things[0]
            text = f"a {thing.name}"
            mask = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(thing.mask).float()[None, None], (32, 32))
            picture = AnsweredPicture(scene.image, CAPTION_PROMPT, text, words_of(text))
            found.append(_Case(picture, words_of(text)[1], to_heat(mask[0, 0])))
    return found


def test_patches_that_show_a_word():
    heat = torch.tensor([[1.0, 0.5], [0.3, 0]])
    boxes = torch.tensor([[0, 0, 0.5, 0.5], [0, 0.5, 0.5, 1], [0.5, 0, 1, 0.5], [0, 0, 1, 1], [0, 0, 0, 0]])
    assert _shows(heat, boxes).tolist() == [True, True, False, True, False]  # the whole has 0.45


@torch.no_grad()
def test_the_loss_of_the_whole_picture_is_the_models_own():
    model, processor = load_run(STUDENT_PATHS["mllama"])
    case = cases(1)[0]
    found = word_losses(model, processor, [case], Counter())
    text = processor.apply_chat_template(case.picture.messages(), tokenize=False)
    inputs = processor(images=[[case.picture.image]], text=[text], add_special_tokens=False, return_tensors="pt")
    logits = model(**inputs).logits[0].log_softmax(-1)
    ids = processor.tokenizer(f" {case.word.text}", add_special_tokens=False)["input_ids"]
    sequence = inputs["input_ids"][0].tolist()
    start = next(at for at in range(len(sequence)) if sequence[at : at + len(ids)] == ids)
    expected = -sum(logits[start + step - 1, token] for step, token in enumerate(ids)) / len(ids)
    torch.testing.assert_close(found["whole"], expected[None], rtol=1e-4, atol=1e-5)
    assert len({round(found[kept].item(), 4) for kept in KEPT}) == 3
    assert not model.model.multi_modal_projector._forward_hooks


def test_the_shipped_students_keep_things_in_different_places():
    """Mllama needs the thing's own patches; LLaVA's tower has gathered the evidence elsewhere."""
    found = {}
    for name, path in STUDENT_PATHS.items():
        model, processor = load_run(path)
        losses = word_losses(model, processor, cases(12), Counter())
        found[name] = {kept: own.mean().item() for kept, own in losses.items()}
    assert found["mllama"]["elsewhere"] > found["mllama"]["whole"] + 1
    assert found["mllama"]["there"] < found["mllama"]["whole"] + 0.2
    assert found["llava"]["elsewhere"] < found["llava"]["whole"] + 0.3
    assert found["llava"]["there"] > found["llava"]["whole"]


def test_check_from_data_and_maps(some_scenes, tmp_path, store_path, capsys):
    write_scenes(tmp_path, some_scenes)
    found = check_model(STUDENT_PATHS["mllama"], tmp_path, store_path)
    assert found["samples"] == 6
    assert found["words"] > 6
    assert found["loss"]["elsewhere"] - found["loss"]["whole"] == pytest.approx(found["cost_without"], abs=1e-5)
    assert found["loss"]["whole"] - found["loss"]["there"] == pytest.approx(found["gain"], abs=1e-5)
    arguments = ["check", str(STUDENT_PATHS["mllama"]), "--data", str(tmp_path), "--maps", str(store_path)]
    assert main([*arguments, "--limit", "3"]) == 0
    said = capsys.readouterr()
    assert '"samples": 3' in said.out
    assert said.err.startswith("Knowing where a word is")  # and no line of what loads it


def test_maps_of_other_data_are_refused(tmp_path, store_path):
    write_scenes(tmp_path, list(scenes("finetune", 2)))
    with pytest.raises(DataError, match="Got no word with a map"):
        check_model(STUDENT_PATHS["mllama"], tmp_path, store_path)
