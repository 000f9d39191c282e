"""Writes survey_metrics.npz: metrics of images, detections and texts from the packages for them.

Run once with scikit-image 0.26.0, pycocotools 2.0.11, nltk 3.10.4 and rouge-score 0.1.2:
`python tests/oracles/survey_metrics.py`. METEOR is nltk's without stems and synonyms.
"""

import contextlib
import io
from pathlib import Path

import numpy as np
from nltk.metrics.distance import edit_distance
from nltk.translate.bleu_score import corpus_bleu
from nltk.translate.meteor_score import _count_chunks, exact_match
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rouge_score import rouge_scorer
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

CANDIDATES = (
    "the quick brown fox jumped over a lazy dog today",
    "there is a cat on the mat and it sleeps well",
    "he read the book because he was interested in world history",
)
REFERENCES = (
    ("a quick brown fox jumps over the lazy dog", "the quick fox jumped over one lazy dog today"),
    ("a cat is on the mat and it sleeps", "there is a cat that sleeps well on the mat and purrs"),
    ("he was interested in world history because he read the book", "he read a book"),
)
DISTINCT = (
    "today some quick brown fox jumped over one lazy dog",
    "one quick brown fox jumps over some lazy dog again",
)


def coco(scores, boxes, truth):
    """COCO's AP, AP at 0.5, and AR at 1 and 100 detections."""

    def corner_and_size(box):
        return [*map(float, box[:2]), *map(float, box[2:] - box[:2])]

    images = [{"id": i} for i in range(len(truth))]
    objects = [
        {"image_id": i, "category_id": 1, "iscrowd": 0, "bbox": corner_and_size(box), "area": 1.0}
        for i, of_image in enumerate(truth)
        for box in of_image
    ]
    for number, thing in enumerate(objects, 1):
        thing["id"] = number
    found = [
        {"image_id": i, "category_id": 1, "bbox": corner_and_size(box), "score": float(score)}
        for i in range(len(truth))
        for box, score in zip(boxes[i], scores[i])
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO()
        dataset.dataset = {
            "info": {},
            "images": images,
            "annotations": objects,
            "categories": [{"id": 1, "name": "thing"}],
        }
        dataset.createIndex()
        evaluation = COCOeval(dataset, dataset.loadRes(found), "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = (evaluation.eval[key] for key in ("precision", "recall"))
    ours = precision[:, :, 0, 0, 2]
    return [ours.mean(), ours[0].mean(), recall[:, 0, 0, 0].mean(), recall[:, 0, 0, 2].mean()]


def main():
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(2, 13, 12, 2)).astype(np.float32)
    ssim = {"channel_axis": -1, "data_range": 1.0, "use_sample_covariance": False}
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "truncate": 3.5}
    _, gaussian_map = structural_similarity(*images, **ssim, **gaussian, full=True)
    _, even_map = structural_similarity(*images, **ssim, win_size=7, full=True)
    low, sides = rng.uniform(0, 4, size=(5, 6, 2)), rng.uniform(1, 3, size=(5, 6, 2))
    truth = np.concatenate([low, low + sides], axis=-1)
    shift = rng.normal(scale=0.15, size=(5, 9, 4))
    boxes = truth[:, rng.integers(6, size=9)] + shift
    scores = rng.uniform(size=(5, 9))
    tokens = [text.split() for text in CANDIDATES]
    alternatives = [[text.split() for text in texts] for texts in REFERENCES]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"])
    rouge = [
        [score.fmeasure for score in scorer.score(texts[0], text).values()]
        for text, texts in zip(CANDIDATES, REFERENCES)
    ]
    a, b = (text.split() for text in DISTINCT)
    matches, _, _ = exact_match(a, b)
    precision, recall = len(matches) / len(a), len(matches) / len(b)
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    meteor = mean * (1 - 0.5 * (_count_chunks(sorted(matches)) / len(matches)) ** 3)
    edits = [edit_distance(a, b[0]) for a, b in zip(tokens, alternatives)]
    np.savez_compressed(
        Path(__file__).with_suffix(".npz"),
        images=images,
        psnr=peak_signal_noise_ratio(images[1], images[0], data_range=1.0),
        ssim_gaussian=gaussian_map[5:-5, 5:-5],
        ssim_even=even_map[3:-3, 3:-3],
        scores=scores,
        boxes=boxes,
        truth=truth,
        coco=coco(scores, boxes, truth),
        candidates=CANDIDATES,
        references=REFERENCES,
        distinct=DISTINCT,
        bleu=[corpus_bleu(alternatives, tokens), corpus_bleu(alternatives, tokens, (0.5, 0.5))],
        rouge=rouge,
        meteor=meteor,
        error_rate=sum(edits) / sum(len(texts[0]) for texts in alternatives),
    )


if __name__ == "__main__":
    main()
