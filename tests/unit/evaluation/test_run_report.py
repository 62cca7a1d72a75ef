"""`lavender eval` and `lavender report` of three models on real pictures: a base, a plain run and an aligned one."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from command_line import complaint, lavender, write_scenes
from lavender.cli.main import DONE, FAILED, WRONG_USAGE
from lavender.data.store import MapStore
from lavender.errors import DataError
from lavender.evaluation import runs
from lavender.evaluation.eval_files import SCORES, read_evaluation
from lavender.evaluation.intervals import ratio
from lavender.evaluation.run_report import Options, _compared, _reason_to_score, report_run
from lavender.maps import entropy
from lavender.training.run_folder import COVERAGE, read_config


@pytest.fixture(scope="module")
def folder(some_scenes, captions, make_student, processor, store_path, tmp_path_factory) -> Path:
    """Six pictures, five of them with maps; a base and two runs, which are the base with other weights."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "data").mkdir()
    write_scenes(folder / "data", some_scenes, captions)
    make_student().save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for seed, (name, weight) in enumerate((("plain", 0.0), ("aligned", 0.5))):
        student = make_student()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        student.save_pretrained(folder / name / "checkpoint")
        processor.save_pretrained(folder / name / "checkpoint")
        config: dict[str, Any] = {"model": str(folder / "model"), "data": str(folder / "data"), "maps": str(store_path)}
        config |= {"prompt": "What?", "training": {"attention_loss": "mass", "align_weight": weight, "match": "exact"}}
        (folder / name / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / name / COVERAGE).write_text("{}")  # it is finished
    lines = [json.dumps({"step": step, "vlm_loss": 2 - step, "attention_loss": 1.0}) for step in range(3)]
    (folder / "aligned" / "metrics.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def evaluated(folder) -> dict[str, Any]:
    ran = lavender("eval", folder / "aligned", "--against", folder / "plain")
    assert ran.code == DONE, ran.err
    return {"said": ran.out, "result": json.loads((folder / "aligned" / "eval.json").read_text())}


@pytest.fixture
def observations(monkeypatch) -> list[list[str]]:
    """The models of each evaluation that is made; it is made as always."""
    seen, real = [], runs._observe_arms

    def observe(arms, *arguments):
        seen.append(list(arms))
        return real(arms, *arguments)

    monkeypatch.setattr(runs, "_observe_arms", observe)
    return seen


def test_the_samples_add_up_to_the_scores(folder, evaluated):
    result = evaluated["result"]
    assert list(result["arms"]) == ["base", "plain", "aligned"]
    found = read_evaluation(folder / "aligned")
    assert found is not None
    assert found.samples is not None
    assert len(found.samples) == result["samples"] == 6
    for arm, scores in result["arms"].items():
        for name in ("answer_nll", "entropy", "map_agreement"):
            assert ratio([one.judged[arm].tallies[name] for one in found.samples]) == pytest.approx(scores[name])
    assert len({scores["answer_nll"] for scores in result["arms"].values()}) == 3
    words = {arm: sum(one.judged[arm].tallies["entropy"][1] for one in found.samples) for arm in result["arms"]}
    assert len(set(words.values())) == 1  # the same words for every model, whatever `match` was
    assert "samples without a map in the store: 1 of 6" in result["notes"]


def test_eval_shows_the_teacher_and_says_what_scores_mean(evaluated, store_path):
    maps = torch.cat([record.maps for record in MapStore.open(store_path)])
    teacher = evaluated["result"]["teacher"]["entropy"]
    assert teacher == pytest.approx(entropy(maps).mean().item())
    line = next(line for line in evaluated["said"].splitlines() if line.startswith("teacher's maps"))
    assert line.split()[2:] == ["–", "–", f"{teacher:.4f}", "–"]
    for name, direction in (("answer_nll", "lower"), ("content_f1", "higher"), ("map_agreement", "higher")):
        assert f"{name} ({direction} is better): " in evaluated["said"]


def test_the_page_has_all_models(folder, evaluated, observations, tmp_path):
    options = Options(num_pictures=4)
    out = report_run(folder / "aligned", tmp_path / "page.html", options, pdf=tmp_path / "figures.pdf")
    page = out.read_text()
    assert observations == []  # the scores are those of eval
    texts = re.sub(r"<[^>]*>", " ", page)
    assert page.index("Differences, on 6 samples") < page.index('id="pictures"') < page.index('id="curves"')
    assert re.search(r"aligned − plain\s+aligned − base\s+plain − base", texts)
    assert re.findall(r'<h3 class="group">(\w+)</h3>', page) == ["best", "typical", "worst"]
    assert "4 of 6 samples, ordered by how much better aligned is than plain by answer_nll" in texts
    assert len(re.findall(r'<article class="card panel', page)) == 4
    for head in re.findall(r'<thead role="rowgroup">(.*)</thead>', page):
        assert re.findall(r">([^<>]+)</th>", head)[1:] in (
            ["teacher", "base", "plain", "aligned"],
            ["base", "plain", "aligned"],
        )
    assert "plain: no curves, for there is no metrics.jsonl" in texts
    assert re.search(r"align_weight\s+0.0\s+0.5", texts)
    for command in ("lavender train ", "lavender eval ", "lavender report "):
        assert f"<code>{command}" in page
    assert "--against" in texts
    assert (tmp_path / "figures.pdf").read_bytes().startswith(b"%PDF")
    gains = [float(value) * (1 if word == "better" else -1) for value, word in GAIN.findall(texts)]
    assert gains == sorted(gains, reverse=True)
    assert len(gains) == 4


GAIN = re.compile(r"aligned is (\d+\.\d+) (better|worse)\.")


def test_a_page_of_other_models_scores_them(folder, evaluated, observations, tmp_path):
    """And notes of its teacher are on a page with its maps alone."""
    with MapStore.writer(tmp_path / "maps", {"teacher": "world"}, {}, (5, 7)):
        pass
    run = folder / "plain"
    assert read_evaluation(run) is None
    ran = lavender("report", run, "--maps", tmp_path / "maps", "--limit", "2", "--pictures", "1")
    assert ran.code == DONE, ran.err
    assert "MB)" in ran.out
    page = (run / "report.html").read_text()
    assert observations == [["base", "plain"]]
    assert "these scores were computed by this command: the run had none" in page
    assert "drawings over textures" in page
    assert "plain is" in page
    report_run(run, tmp_path / "same.html", Options(num_pictures=1))
    assert len(observations) == 1
    page = report_run(run, tmp_path / "other.html", Options(against=(folder / "aligned",), limit=2)).read_text()
    assert observations[1:] == [["base", "aligned", "plain"]]
    assert "those in eval.json are of other against" in page
    (run / "eval.jsonl").unlink()
    page = report_run(run, tmp_path / "again.html").read_text()
    assert len(observations) == 3
    assert "those of an earlier version have no scores per sample" in page
    assert json.loads((run / "eval.json").read_text())["samples"] == 2


def test_scores_with_numbers_of_16_bits(folder, evaluated, observations, tmp_path):
    """As on a GPU by default; the files and the page's commands say so."""
    run = shutil.copytree(folder / "aligned", tmp_path / "aligned")
    ran = lavender("eval", run, "--dtype", "bfloat16", "--device", "cpu")
    assert ran.code == DONE, ran.err
    assert "6 samples of" in ran.out
    assert "; bfloat16 on cpu" in ran.out
    result = json.loads((run / "eval.json").read_text())
    assert (result["device"], result["dtype"]) == ("cpu", "bfloat16")
    assert result["command"].endswith("--device cpu --dtype bfloat16")
    for arm in ("base", "aligned"):
        exact, rounded = (scored["arms"][arm]["answer_nll"] for scored in (evaluated["result"], result))
        assert exact != rounded
        assert rounded == pytest.approx(exact, rel=0.02)  # logits of bfloat16 are rounded by up to 0.4 %
    assert lavender("report", run, "--pictures", "1", "--dtype", "bfloat16", "--device", "cpu").code == DONE
    page = (run / "report.html").read_text()
    assert page.count("--device cpu --dtype bfloat16</code>") == 2
    assert len(observations) == 1
    assert lavender("report", run, "--pictures", "1", "--device", "cpu").code == DONE  # no type is asked for
    assert len(observations) == 1
    assert lavender("report", run, "--pictures", "1", "--dtype", "float32", "--device", "cpu").code == DONE
    assert len(observations) == 2
    assert "those in eval.json are of other dtype" in (run / "report.html").read_text()
    assert json.loads((run / "eval.json").read_text())["dtype"] == "float32"


def test_scores_of_a_store_that_has_grown_are_made_again(folder, observations, store_path, tmp_path):
    run, maps = folder / "plain", tmp_path / "maps"
    known = list(MapStore.open(store_path))
    with MapStore.writer(maps, {"teacher": "t"}, {}, (5, 7)) as writer:
        writer.add(replace(known[0], maps=known[0].maps[:, :5, :7]))
    before = MapStore.open(maps).fingerprint
    report_run(run, tmp_path / "page.html", Options(maps=[maps], limit=6, num_pictures=1))
    scored = json.loads((run / "eval.json").read_text())
    assert scored["fingerprints_of_maps"] == [before]
    page = report_run(run, tmp_path / "page.html", Options(num_pictures=1)).read_text()
    assert len(observations) == 1
    assert "samples without a map in the store: 5 of 6" in page

    with MapStore.writer(maps, {"teacher": "t"}, {}, (5, 7)) as writer:
        for one in known[1:]:
            writer.add(replace(one, maps=one.maps[:, :5, :7]))
    page = report_run(run, tmp_path / "page.html", Options(num_pictures=1)).read_text()
    assert len(observations) == 2
    assert (
        f"these scores were computed by this command: the map store {maps} has changed since eval.json was written"
        in page
    )
    assert "samples without a map in the store: 1 of 6" in page
    again = json.loads((run / "eval.json").read_text())
    assert again["fingerprints_of_maps"] == [MapStore.open(maps).fingerprint] != [before]

    (run / "eval.json").write_text(json.dumps(again | {"fingerprints_of_maps": []}))
    with pytest.raises(DataError, match="which is damaged"):
        read_evaluation(run)
    del again["fingerprints_of_maps"]
    (run / "eval.json").write_text(json.dumps(again))
    found = read_evaluation(run)
    assert found is not None
    reason = _reason_to_score(found, run, read_config(run), Options())
    assert reason == "those in eval.json do not say of which maps they are, being of an earlier version"


def test_a_page_without_maps_says_so(folder, evaluated, some_scenes, captions, tmp_path):
    """Held-out data without a store: no teacher, no agreement."""
    (tmp_path / "held-out").mkdir()
    write_scenes(tmp_path / "held-out", some_scenes[:2], captions[:2])
    ran = lavender("report", folder / "aligned", "--data", tmp_path / "held-out", "--out", tmp_path / "page.html")
    assert ran.code == DONE, ran.err
    page = (tmp_path / "page.html").read_text()
    assert "no map store: no maps of a teacher, and no map_agreement" in page
    assert ">teacher</th>" not in page


def test_scores_of_data_that_have_changed_are_made_again(folder, some_scenes, captions, observations, tmp_path):
    """Also where the change is in a sample that the page does not show."""
    run, data = tmp_path / "run", tmp_path / "held-out"
    shutil.copytree(folder / "plain", run)
    (run / SCORES).unlink(missing_ok=True)
    data.mkdir()
    write_scenes(data, some_scenes[:3], captions[:3])

    def reason() -> str:
        found = read_evaluation(run)
        assert found is not None
        return _reason_to_score(found, run, read_config(run), Options())

    report_run(run, tmp_path / "page.html", Options(data=data, num_pictures=1))
    assert reason() == ""
    changed = f"the data {data} have changed since eval.json was written"
    for index in range(3):
        other = [*captions[:index], "a bird.", *captions[index + 1 : 3]]
        write_scenes(data, some_scenes[:3], other)
        assert reason() == changed
        write_scenes(data, some_scenes[:3], captions[:3])
        some_scenes[4].image.save(data / f"{index}.png")
        assert reason() == changed
        write_scenes(data, some_scenes[:3], captions[:3])
        assert reason() == ""
    write_scenes(data, some_scenes[:4], captions[:4])
    assert reason() == changed
    page = report_run(run, tmp_path / "page.html", Options(num_pictures=1)).read_text()
    assert observations == [["base", "run"]] * 2
    assert changed in page
    assert "1 of 4 samples" in page
    assert reason() == ""

    scored = json.loads((run / SCORES).read_text())
    (run / SCORES).write_text(json.dumps({name: one for name, one in scored.items() if name != "limit"}))
    with pytest.raises(DataError, match="which is damaged"):
        read_evaluation(run)
    del scored["fingerprint_of_data"]
    (run / SCORES).write_text(json.dumps(scored))
    assert reason() == "those in eval.json do not say of which samples they are, being of an earlier version"


@pytest.mark.parametrize(
    ("option", "words"), [(("--by", "entropy"), "one of answer_nll, content_f1"), (("--pictures", "0"), "at least 1")]
)
def test_options_out_of_range_are_refused_before_any_work(option, words, folder, observations):
    assert words in complaint(lavender("report", folder / "plain", *option), WRONG_USAGE)
    assert observations == []


@pytest.mark.parametrize("option", ["--out", "--pdf"])
def test_a_place_that_cannot_hold_a_file_is_refused_before_any_work(option, folder, observations):
    assert f"Got {folder}: Is a directory" in complaint(lavender("report", folder / "plain", option, folder), FAILED)
    assert observations == []


def test_a_wrong_model_is_found_before_any_model_is_scored(folder, observations):
    ran = lavender("report", folder / "plain", "--against", folder / "no-run")
    assert f"the model {folder / 'no-run'}, which cannot be loaded" in complaint(ran, FAILED)
    assert observations == []


def test_scores_from_before_a_training_are_made_again(folder, evaluated):
    run, trained = folder / "aligned", folder / "aligned" / COVERAGE
    found = read_evaluation(run)
    assert found is not None
    assert _reason_to_score(found, run, read_config(run), Options()) == ""
    trained.write_text("{}")
    later = (run / SCORES).stat().st_mtime + 10
    os.utime(trained, (later, later))
    reason = _reason_to_score(found, run, read_config(run), Options())
    trained.unlink()
    assert reason == "a run was trained after eval.json was written"


def test_pictures_are_compared_with_the_first_other_run_or_the_base():
    assert _compared(dict.fromkeys(["base", "first", "second", "run"])) == ("run", "first")
    assert _compared(dict.fromkeys(["base", "run"])) == ("run", "base")
