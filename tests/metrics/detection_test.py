from pathlib import Path

import numpy as np
import pytest

from jaxref import metrics

PEER = np.load(Path(__file__).parents[1] / "oracles" / "survey_metrics.npz")


def test_matches_pycocotools():
    overlaps = [metrics.box_overlaps(*pair) for pair in zip(PEER["boxes"], PEER["truth"])]
    scores = list(PEER["scores"])
    ours = [
        metrics.detection_average_precision(scores, overlaps),
        metrics.detection_average_precision(scores, overlaps, thresholds=0.5),
        metrics.detection_average_recall(scores, overlaps, max_detections=1),
        metrics.detection_average_recall(scores, overlaps),
    ]
    np.testing.assert_allclose(ours, PEER["coco"], rtol=1e-9)


def test_the_curve_of_a_worked_example():
    """Right, wrong, right of three objects: precision 1 to recall 1/3, and 2/3 to 2/3."""
    scores, overlaps = [[0.9, 0.8], [0.7]], [np.array([[0.6, 0], [0.1, 0.3]]), np.array([[0.8]])]
    at_half = {"thresholds": 0.5}
    area = metrics.detection_average_precision(scores, overlaps, **at_half, recall_levels=None)
    assert area == pytest.approx(1 / 3 + 2 / 9)
    eleven = metrics.detection_average_precision(scores, overlaps, **at_half, recall_levels=11)
    assert eleven == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)
    recall = metrics.detection_average_recall(scores, overlaps, thresholds=[0.5, 0.7])
    assert recall == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_an_object_is_found_once_and_the_order_of_input_is_no_matter():
    overlaps = [np.array([[0.9], [0.8]])]
    both = metrics.detection_average_precision([[0.5, 0.6]], overlaps, thresholds=0.5)
    assert both == 1.0
    assert metrics.detection_average_precision([[0.6, 0.5]], overlaps, thresholds=0.85) == 1.0
    late = metrics.detection_average_precision([[0.5, 0.6]], overlaps, thresholds=0.85)
    assert late == pytest.approx(0.5)


def test_edges_and_bad_input():
    for metric in (metrics.detection_average_precision, metrics.detection_average_recall):
        assert metric([], []) == 0
        assert metric([[0.5]], [np.zeros((1, 0))]) == 0
        assert metric([[]], [np.zeros((0, 2))]) == 0
        with pytest.raises(ValueError, match="same images"):
            metric([[0.5]], [])
        with pytest.raises(ValueError, match="overlaps must have shape"):
            metric([[0.5]], [np.zeros((2, 1))])
        with pytest.raises(ValueError, match="thresholds must be in"):
            metric([[0.5]], [np.zeros((1, 1))], thresholds=[0.0, 0.5])
    assert metrics.box_overlaps([[1, 1, 1, 1]], [[1, 1, 1, 1]]) == 0
    with pytest.raises(ValueError, match="true_boxes must have shape"):
        metrics.box_overlaps(np.zeros((2, 4)), np.zeros(4))
    with pytest.raises(ValueError, match="recall_levels must be in"):
        metrics.detection_average_precision([], [], recall_levels=1)
    with pytest.raises(ValueError, match="max_detections must be in"):
        metrics.detection_average_recall([], [], max_detections=0)


def test_panoptic_quality_is_the_mean_overlap_times_f1():
    overlaps = [
        np.array([[0.9, 0.0, 0.1], [0.05, 0.6, 0.0]]),
        np.array([[0.5]]),
        np.zeros((2, 0)),
    ]
    right, wrong, missed = 2, 3, 2
    f1 = right / (right + wrong / 2 + missed / 2)
    assert metrics.panoptic_quality(overlaps) == pytest.approx(0.75 * f1)
    assert metrics.panoptic_quality([np.eye(3)]) == 1
    assert metrics.panoptic_quality([]) == metrics.panoptic_quality([np.zeros((0, 0))]) == 0
    with pytest.raises(ValueError, match="at most once"):
        metrics.panoptic_quality([np.array([[0.6, 0.7]])])
    with pytest.raises(ValueError, match="overlaps must be in"):
        metrics.panoptic_quality([np.array([[1.5]])])
    with pytest.raises(ValueError, match="overlaps must have shape"):
        metrics.panoptic_quality([np.zeros(2)])
