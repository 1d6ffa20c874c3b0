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
    assert iou[:3].tolist() == [1 / 3, 1 / 3, 1.0] and math.isnan(iou[3])     # in neither: not scored
    assert metrics.pixel_accuracy(matrix) == pytest.approx(3 / 5)
    assert metrics.iou(metrics.confusion([0, 0], [0, 2], 3))[2] == 0          # only predicted: scored
    missed = metrics.confusion([1, 1, 0, 0], [1, 255, 0, 0], 2)   # a 255 is a miss, charged to its own class
    assert missed.tolist() == [[2, 0, 0], [0, 1, 1]] and metrics.iou(missed).tolist() == [1.0, 0.5]
    with pytest.raises(ValueError, match="label 7"):
        metrics.confusion([0, 7], [0, 0], 2)


def test_sums_over_images_equal_a_loop_over_pixels():
    rng, total = np.random.default_rng(0), torch.zeros(5, 6, dtype=torch.int64)
    truth = rng.choice([0, 1, 2, 3, 4, 255], (40, 37))
    guesses = rng.choice([0, 1, 2, 3, 255], (40, 37)), rng.integers(0, 5, (40, 37))
    for guess in guesses:
        metrics.add(total, metrics.confusion(truth, guess, 5))
    assert np.array_equal(total.numpy(), sum(loop(truth, guess, 5) for guess in guesses))


def test_sweep_is_one_pass_a_threshold():
    rng = np.random.default_rng(1)
    truth, label = rng.choice([0, 1, 2, 255], (30, 20)), rng.integers(1, 3, (30, 20))
    score = rng.integers(0, 11, (30, 20)) / 10                    # scores that equal a threshold too
    thresholds = torch.tensor([0.1, 0.3, 0.5, 0.95], dtype=torch.float64)
    swept = metrics.sweep(truth, label, torch.from_numpy(score), thresholds, 3)
    for matrix, t in zip(swept, thresholds):
        assert np.array_equal(matrix.numpy(), loop(truth, np.where(score > t.item(), label, 0), 3)[:, :3])
