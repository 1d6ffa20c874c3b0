"""Confusion and IoU by hand and against a loop over pixels, the sweep against one pass a threshold."""
import math

import numpy as np
import pytest
import torch

from wsss import metrics


def loop(truth, prediction, count):
    matrix = np.zeros((count, count + 1), np.int64)
    for t, p in zip(truth.ravel(), prediction.ravel()):
        if t != 255:
            matrix[t, p if p < count else count] += 1
    return matrix


def test_by_hand():
    truth = np.array([[0, 0, 1], [1, 2, 255]])
    guess = np.array([[0, 1, 1], [0, 2, 2]])
    matrix = metrics.confusion(truth, guess, 4)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    iou = metrics.iou(matrix)
    assert iou[:3].tolist() == [1 / 3, 1 / 3, 1.0] and math.isnan(iou[3])
    assert iou.nanmean().item() == pytest.approx(5 / 9)
    assert metrics.pixel_accuracy(matrix) == pytest.approx(3 / 5)


def test_a_255_in_the_prediction_is_a_miss():
    truth, guess = np.array([1, 1, 0, 0]), np.array([1, 255, 0, 0])
    matrix = metrics.confusion(truth, guess, 2)
    assert matrix.tolist() == [[2, 0, 0], [0, 1, 1]]
    assert metrics.iou(matrix).tolist() == [1.0, 0.5]             # background is not charged for it
    assert metrics.pixel_accuracy(matrix) == 0.75


def test_a_class_only_predicted_scores_zero():
    iou = metrics.iou(metrics.confusion([0, 0], [0, 2], 3))
    assert iou[0] == 0.5 and math.isnan(iou[1]) and iou[2] == 0.0


def test_random_maps_against_a_loop():
    rng = np.random.default_rng(0)
    truth = rng.choice([0, 1, 2, 3, 4, 255], (40, 37))
    total = torch.zeros(5, 6, dtype=torch.int64)
    guesses = rng.choice([0, 1, 2, 3, 255], (40, 37)), rng.integers(0, 5, (40, 37))       # 255: misses
    for guess in guesses:
        metrics.add(total, metrics.confusion(truth, guess, 5))
    assert np.array_equal(total.numpy(), sum(loop(truth, guess, 5) for guess in guesses))


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="prediction"):
        metrics.confusion([0, 1], [0], 2)
    with pytest.raises(ValueError, match="label 7"):
        metrics.confusion([0, 7], [0, 0], 2)


def test_sweep_is_one_pass_a_threshold():
    rng = np.random.default_rng(1)
    truth = rng.choice([0, 1, 2, 255], (30, 20))
    label = rng.integers(1, 3, (30, 20))
    score = rng.integers(0, 11, (30, 20)) / 10                    # scores that equal a threshold too
    thresholds = torch.tensor([0.1, 0.3, 0.5, 0.95], dtype=torch.float64)
    swept = metrics.sweep(truth, label, torch.from_numpy(score), thresholds, 3)
    for matrix, t in zip(swept, thresholds):
        assert np.array_equal(matrix.numpy(), loop(truth, np.where(score > t.item(), label, 0), 3)[:, :3])
