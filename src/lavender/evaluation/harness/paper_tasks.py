"""What our tasks of the paper's benchmarks call: those that lmms-eval lacks, or scores with a judge model or Java.

The YAML files in tasks/paper name these functions. Data sets and prompts are lmms-eval's where it has the benchmark,
the scorers those of `lavender.evaluation.scorers`. `doc` is always a row of the data set.
"""

from __future__ import annotations

import base64
import io
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from PIL import Image

from lavender.errors import DataError
from lavender.evaluation.scorers import (
    auroc,
    cider,
    exact_match,
    hallusion_bench,
    multiple_choice,
    read_yes_no,
    refusals,
    yes_no,
)
from lavender.evaluation.scorers.scores import Scores, mean
from lavender.files import write_whole
from lavender.model_files import one_line

if TYPE_CHECKING:
    import requests

Doc = Mapping[str, Any]
_PAUSE = 1.0  # seconds before the second attempt to download again; each further one waits twice as long
_CIRCLE = 1_000_000  # MMBench: rotations of a question's options have its index plus multiples of this


# Aggregations: from the values of all samples to the number that is reported


def mean_score(items: Sequence[Mapping[str, Any]]) -> float:
    """The mean of the samples' scores."""
    return mean([item["score"] for item in items])


def circular_accuracy(items: Sequence[Mapping[str, Any]]) -> float:
    """The share of questions that are right in every rotation of their options, as MMBench's CircularEval counts."""
    by_question: dict[int, list[float]] = defaultdict(list)
    for item in items:
        by_question[int(item["index"]) % _CIRCLE].append(item["score"])
    return mean([min(scores) for scores in by_question.values()])


def mean_cider(items: Sequence[Mapping[str, Any]]) -> float:
    """CIDEr of all captions; papers often give it times 100."""
    return _first(cider([item["prediction"] for item in items], [item["references"] for item in items]))


def refusal_rate(items: Sequence[Mapping[str, Any]]) -> float:
    """The share of answers that refuse, which Table 3 of the paper counts apart."""
    return _first(refusals([item["prediction"] for item in items]))


def share_without_choice(items: Sequence[Mapping[str, Any]]) -> float:
    """The share of answers in which the rules find no option: they are wrong here, and VLMEvalKit asks its judge."""
    return mean([item["without_choice"] for item in items])


def area_under_curve(items: Sequence[Mapping[str, Any]]) -> float:
    """AUROC of the samples' probabilities."""
    return _first(auroc([item["probability"] for item in items], [item["label"] for item in items]))


def hallusion(items: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """HallusionBench's aAcc, fAcc and qAcc of the samples' answers."""
    answers, golds = [item["prediction"] for item in items], [str(item["gt_answer"]) for item in items]
    return hallusion_bench(answers, golds, items).aggregate


def hallusion_average(items: Sequence[Mapping[str, Any]]) -> float:
    """The mean of aAcc, fAcc and qAcc, which VLMEvalKit's leaderboard shows; of two where no question has a figure."""
    return mean([score for score in hallusion(items).values() if score is not None])


def hallusion_questions(items: Sequence[Mapping[str, Any]]) -> float | None:
    """aAcc: the share of right questions."""
    return hallusion(items)["aAcc"]


def hallusion_figures(items: Sequence[Mapping[str, Any]]) -> float | None:
    """fAcc: the share of figures whose questions are all right."""
    return hallusion(items)["fAcc"]


def hallusion_pairs(items: Sequence[Mapping[str, Any]]) -> float | None:
    """qAcc: the share of questions that are right for all their figures."""
    return hallusion(items)["qAcc"]


def hallusion_share_of_other(items: Sequence[Mapping[str, Any]]) -> float:
    """The share of answers that are neither yes nor no by the rule: VLMEvalKit asks its judge about them."""
    return mean([float(read_yes_no(item["prediction"], "vlmevalkit") == "other") for item in items])


def _of_pope(items: Sequence[Mapping[str, Any]], rate: str) -> float | None:
    answers, golds = [item["prediction"] for item in items], [item["answer"] for item in items]
    return yes_no(answers, golds, "vlmevalkit").aggregate[rate]


_POPE = ("f1", "accuracy", "precision", "recall", "share_of_yes", "share_of_other")
pope_f1, pope_accuracy, pope_precision, pope_recall, pope_share_of_yes, pope_share_of_other = (
    partial(_of_pope, rate=rate) for rate in _POPE
)


# Multiple choice: MMBench, CCBench, WorldMedQA-V


def lettered(doc: Doc) -> dict[str, str]:
    """The question's options by letter, from the columns A to E. Empty ones and "nan" are none."""
    found = {letter: doc.get(letter) for letter in "ABCDE"}
    return {letter: str(text) for letter, text in found.items() if not _is_empty(text)}


def mmbench_text(doc: Doc, lmms_eval_specific_kwargs: Mapping[str, str]) -> str:
    """MMBench's question as lmms-eval writes it: hint, question, options, and what to answer."""
    options = "\n".join(f"{letter}. {text}" for letter, text in lettered(doc).items())
    hint = "" if _is_empty(doc.get("hint")) else f"{doc['hint']} "
    return f"{hint}{doc['question']} There are several options:\n{options}\n{lmms_eval_specific_kwargs['post_prompt']}"


def mmbench_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """Whether the answer chooses the right option, by VLMEvalKit's rules without a judge."""
    value = _choice(doc, str(doc["answer"]), results[0]) | {"index": int(doc["index"])}
    return dict.fromkeys(("accuracy", "share_without_choice", "refusals"), value)


def mmbench_chinese_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """As `mmbench_results`, with the wordings of other languages; refusals are known in English only."""
    value = _choice(doc, str(doc["answer"]), results[0], other_languages=True) | {"index": int(doc["index"])}
    return dict.fromkeys(("accuracy", "share_without_choice"), value)


def worldmedqa_text(doc: Doc) -> str:
    """WorldMedQA-V's question and options, in the language of the data set's file."""
    options = "\n".join(f"{letter}. {text}" for letter, text in lettered(doc).items())
    return f"{doc['question']}\n{options}\nAnswer with the option's letter from the given choices directly."


def worldmedqa_target(doc: Doc) -> str:
    """The right option's letter. The column `answer` is empty in parts of the data set."""
    return str(doc["correct_option"]).strip().upper()


def worldmedqa_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """Whether the answer chooses the right option, by VLMEvalKit's rules without a judge."""
    value = _choice(doc, worldmedqa_target(doc), results[0])
    return dict.fromkeys(("accuracy", "share_without_choice", "refusals"), value)


def worldmedqa_local_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """As `worldmedqa_results`, with the wordings of other languages; refusals are known in English only."""
    value = _choice(doc, worldmedqa_target(doc), results[0], other_languages=True)
    return dict.fromkeys(("accuracy", "share_without_choice"), value)


# Short answers, captions, yes and no


def ocrvqa_questions(split: Any) -> Any:
    """One row per question, from OCR-VQA's rows of one cover with several. The pictures stay encoded."""
    from datasets import Image as ImageFeature

    encoded = split.cast_column("image", ImageFeature(decode=False))
    rows = encoded.map(
        _ocrvqa_rows, batched=True, batch_size=64, remove_columns=encoded.column_names, desc="one row per question"
    )
    return rows.cast_column("image", ImageFeature())


def ocrvqa_text(doc: Doc) -> str:
    """The question, and how to answer, as VLMEvalKit asks it."""
    return f"{doc['question']}\nAnswer the question using a single word or phrase."


def ocrvqa_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Whether the answer is the right one, in any case: VLMEvalKit's accuracy."""
    return {"exact_match": exact_match([results[0]], [str(doc["answer"])]).per_sample[0]}


def caption_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """The caption and the people's: Flickr30k has them in `caption`, the Karpathy split of COCO in `sentences`."""
    references = doc["sentences"] if "sentences" in doc else doc["caption"]
    return {"cider": {"prediction": results[0], "references": list(references)}}


def hallusion_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """The answer with the columns by which HallusionBench groups questions."""
    columns = ("category", "subcategory", "set_id", "figure_id", "question_id", "gt_answer")
    value = {name: doc[name] for name in columns} | {"prediction": results[0]}
    value["score"] = hallusion_bench([results[0]], [str(doc["gt_answer"])], [doc]).per_sample[0]
    return dict.fromkeys(("average", "aAcc", "fAcc", "qAcc", "share_of_other"), value)


def pope_results(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """The answer, and whether it is right by VLMEvalKit's rule."""
    value = {"prediction": results[0], "answer": str(doc["answer"])}
    score = yes_no([value["prediction"]], [value["answer"]], "vlmevalkit").per_sample[0]
    return dict.fromkeys(_POPE, value | {"score": score})


def seed_images(split: Any) -> Any:
    """SEED's questions about images; those about videos have several frames each."""
    return split.filter(_is_image, input_columns="data_type", desc="questions about images")


def memes_text(doc: Doc) -> str:
    """OpenFlamingo's question about a meme."""
    return f"is an image with: '{doc['text']}' written on it. Is it hateful? Answer:"


def memes_results(doc: Doc, results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """P(yes) among yes and no, from the losses of the two options in this order, in nats."""
    yes, no = (loss for loss, _ in results)
    return {"auroc": {"probability": 1 / (1 + math.exp(min(yes - no, 700.0))), "label": int(doc["label"])}}


# Pictures


def picture(doc: Doc) -> list[Image.Image]:
    """The picture of the column `image`."""
    return [doc["image"].convert("RGB")]


def pictures_from_base64(split: Any) -> Any:
    """WorldMedQA-V's split, whose pictures are base64 text, with a column of pictures that `datasets` decodes."""
    from datasets import Image as ImageFeature
    from datasets import Value

    features = split.features.copy()
    features["image"] = {"bytes": Value("binary"), "path": Value("string")}
    decoded = split.map(_decoded, features=features, desc="pictures from base64")
    return decoded.cast_column("image", ImageFeature())


def coco_picture(doc: Doc) -> list[Image.Image]:
    """The picture at the row's `url`: the data set of Karpathy's split has no pictures. The file is kept on disk.

    Raises:
        DataError: the picture cannot be downloaded.
    """
    path = _coco_folder() / "-".join(urlsplit(doc["url"]).path.split("/")[-2:])  # val2014-COCO_val2014_….jpg
    is_kept = path.is_file()
    content = path.read_bytes() if is_kept else _download(doc["url"])
    image = Image.open(io.BytesIO(content)).convert("RGB")
    if not is_kept:
        write_whole(path, content)
    return [image]


def _coco_folder() -> Path:
    """Part of the Hub's cache, whose variables and commands count for it too."""
    from huggingface_hub import cached_assets_path

    return cached_assets_path("lavender", "coco", "pictures")


def _download(url: str) -> bytes:
    import requests

    try:
        answer = _session().get(url, timeout=60)
        answer.raise_for_status()
    except requests.RequestException as error:
        do = "run the same command again: the pictures and answers so far are kept"
        raise DataError(f"{url}: {one_line(error)}", "a picture of COCO", do) from error
    return answer.content


@cache
def _session() -> requests.Session:
    """One for all pictures: it keeps its connection, and tries again when the server fails or is busy."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    session = requests.Session()
    retry = Retry(total=4, backoff_factor=_PAUSE, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False)
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def meme_picture(doc: Doc) -> list[Image.Image]:
    """The file that the row names in `img`, from the Hub's copy of the data set."""
    from huggingface_hub import hf_hub_download

    with Image.open(hf_hub_download("neuralcatcher/hateful_memes", doc["img"], repo_type="dataset")) as image:
        return [image.convert("RGB")]


def _choice(doc: Doc, answer: str, prediction: str, other_languages: bool = False) -> dict[str, Any]:
    options = lettered(doc)
    texts = [options.get(letter, "") for letter in "ABCDE"[: "ABCDE".index(max(options, default="A")) + 1]]
    found = multiple_choice([prediction], [answer], [texts], other_languages=other_languages)
    without = found.aggregate["share_without_choice"]
    return {"score": found.per_sample[0], "prediction": prediction, "without_choice": without}


def _is_image(data_type: str) -> bool:
    return data_type == "image"


def _decoded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"image": {"bytes": base64.b64decode(row["image"].rpartition(",")[2]), "path": None}}


def _ocrvqa_rows(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = {"image": [], "image_id": [], "question": [], "answer": []}
    for image, name, questions, answers in zip(
        batch["image"], batch["image_id"], batch["questions"], batch["answers"], strict=True
    ):
        for question, answer in zip(questions, answers, strict=True):
            for column, value in zip(rows.values(), (image, name, question, answer), strict=True):
                column.append(value)
    return rows


def _first(scores: Scores) -> float:
    """The number that a scorer reports."""
    value = next(iter(scores.aggregate.values()))
    assert value is not None
    return value


def _is_empty(text: Any) -> bool:
    return text is None or str(text).strip() in ("", "nan")
