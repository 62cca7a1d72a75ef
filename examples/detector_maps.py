"""Maps from an open-vocabulary detector: box the nouns of each text, and write them as annotations.

Any zero-shot detector of transformers serves, such as OWLv2 or Grounding DINO. Of a segmenter, such as SAM 3, give the
masks to `Segment` in place of boxes.

    python examples/detector_maps.py google/owlv2-base-patch16-ensemble pictures --out boxes
    lavender extract --annotations coco-panoptic --from boxes --pictures pictures --out maps
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import pipeline

from lavender.data.samples import read_samples
from lavender.teachers.annotations.panoptic_writer import Segment, write_panoptic
from lavender.words import content_words


def segments_of(detector: Any, picture: Image.Image, text: str, threshold: float) -> list[Segment]:
    """The boxes of a text's nouns on a picture.

    Args:
        detector: a pipeline "zero-shot-object-detection" of transformers.
        threshold: boxes of a lower score are left out.
    """
    nouns = sorted({word.lemma for word in content_words(text, ("noun",))})
    segments = []
    for box in detector(picture, candidate_labels=nouns, threshold=threshold) if nouns else []:
        edges = box["box"]
        region = edges["ymin"], edges["xmin"], edges["ymax"], edges["xmax"]
        segments.append(Segment(box["label"], box["score"], region))
    return segments


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("pictures", help="a folder of pictures with metadata.jsonl")
    parser.add_argument("--out", required=True)
    parser.add_argument("--threshold", type=float, default=0.2)
    arguments = parser.parse_args()
    detector = pipeline("zero-shot-object-detection", model=arguments.model)
    folder = Path(arguments.pictures).absolute()
    found: dict[str, list[Segment]] = {}
    captions: dict[str, list[str]] = {}
    for sample in read_samples(arguments.pictures):
        picture, name = sample.load()[0], str(Path(str(sample.sources[0])).relative_to(folder))
        for text in sample.answers:
            captions.setdefault(name, []).append(text)
            found.setdefault(name, []).extend(segments_of(detector, picture, text, arguments.threshold))
    print(write_panoptic(arguments.out, arguments.pictures, found, captions))


if __name__ == "__main__":
    main()
