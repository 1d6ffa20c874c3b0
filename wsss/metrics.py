"""Scores: the confusion matrix of a data set, int64 so that sums over processes are exact, and its IoU."""
import torch


def confusion(truth, prediction, num_classes):
    """Label maps of one size -> (C, C) int64, rows truth, columns prediction; C counts the background.

    255 in the truth is left out. A prediction outside 0..C-1 (255) is a miss: it counts against its true
    class and for none. Misses stand in one more column, (C, C + 1), which is there only if there are any.
    """
    truth, prediction = (torch.as_tensor(x).long() for x in (truth, prediction))
    if truth.shape != prediction.shape:
        raise ValueError(f"truth is {tuple(truth.shape)}, prediction {tuple(prediction.shape)}")
    truth, prediction = truth.flatten(), prediction.flatten()
    scored = truth != 255
    truth, prediction = truth[scored], prediction[scored]
    if truth.numel() and (truth.max() >= num_classes or truth.min() < 0):
        raise ValueError(f"truth holds label {truth.max()}, there are {num_classes} classes")
    missed = (prediction < 0) | (prediction >= num_classes)
    prediction = torch.where(missed, num_classes, prediction)
    columns = num_classes + 1
    matrix = torch.bincount(truth * columns + prediction, minlength=num_classes * columns)
    matrix = matrix.view(num_classes, columns)
    return matrix if matrix[:, -1].any() else matrix[:, :-1]


def add(total, matrix):
    """Adds a confusion matrix, with or without its column of misses, to `total` (C, C + 1)."""
    total[:, :matrix.shape[1]] += matrix
    return total


def iou(matrix):
    """(C, C) or (C, C + 1) -> (C,) float64, NaN where a class is in neither truth nor prediction.

    mIoU is its nanmean.
    """
    hit = matrix.diagonal().double()
    union = matrix.sum(1) + matrix[:, :len(matrix)].sum(0) - matrix.diagonal()
    return hit / union.double()


def pixel_accuracy(matrix):
    """Share of the scored pixels whose label is right; a miss is wrong."""
    return (matrix.diagonal().sum().double() / matrix.sum().double()).item()


def sweep(truth, label, score, thresholds, num_classes):
    """Confusion matrices (T, C, C) of one image for all ascending thresholds (T,) in one pass.

    label (H, W): the class 1..C-1 a pixel takes as foreground; score (H, W): foreground where score >
    threshold. Pixels are counted once, by how many thresholds they exceed; a suffix sum gives each
    threshold's foreground.
    """
    truth, label, score = (torch.as_tensor(x).flatten() for x in (truth, label, score))
    truth = truth.masked_fill(truth == 255, num_classes)      # a row of their own, dropped below
    exceeded = torch.searchsorted(thresholds, score)          # thresholds below the score: 0..T
    size = (len(thresholds) + 1, num_classes + 1, num_classes)
    index = torch.add(label.long(), truth, alpha=size[2]).add_(exceeded, alpha=size[1] * size[2])
    counts = torch.bincount(index, minlength=size[0] * size[1] * size[2]).view(size)[:, :-1]
    above = counts.flip(0).cumsum(0).flip(0)                  # [t]: exceeds at least t thresholds
    matrices = above[1:].clone()
    matrices[:, :, 0] += (above[0] - above[1:]).sum(-1)       # all others are background
    return matrices
