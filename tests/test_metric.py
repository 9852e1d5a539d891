"""The confusion matrix and its scores against independent referees, and the bootstrap."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex

from evaluate import ConfusionMatrix, pick_rows
from metrics import bootstrap, interval, p_value, scores

CPU = torch.device("cpu")


def random_pair(seed, classes=6, absent=(2, 5)):
    rng = np.random.default_rng(seed)
    present = np.setdiff1d(np.arange(classes), absent)
    truth = rng.choice(present, (40, 30)).astype(np.uint8)
    prediction = np.where(rng.random((40, 30)) < 0.6, truth, rng.choice(present, (40, 30)))
    truth[rng.random((40, 30)) < 0.2] = 255
    return torch.from_numpy(prediction.astype(np.int64)), torch.from_numpy(truth)


def counted(pairs, classes=6):
    confusion = ConfusionMatrix(len(pairs), classes, CPU)
    for index, (prediction, truth) in enumerate(pairs):
        confusion.update(index, prediction, truth)
    return confusion.matrices()


def test_equals_scikit_learn_and_torchmetrics():
    pairs = [random_pair(seed) for seed in range(4)]
    confusion = counted(pairs).sum(axis=0)
    truth = torch.stack([t for _, t in pairs]).numpy().ravel()
    prediction = torch.stack([p for p, _ in pairs]).numpy().ravel()
    valid = truth != 255
    expected = sklearn_confusion(truth[valid], prediction[valid], labels=range(6))
    np.testing.assert_array_equal(confusion, expected)

    result = scores(confusion)
    assert np.isnan(result["iou"][[2, 5]]).all()
    present = [0, 1, 3, 4]
    referee = jaccard_score(truth[valid], prediction[valid], labels=present, average=None)
    np.testing.assert_allclose(result["iou"][present], referee)
    assert result["miou"] == pytest.approx(referee.mean())
    assert result["foreground_miou"] == pytest.approx(referee[1:].mean())

    metric = MulticlassJaccardIndex(6, average="none", ignore_index=255)
    for p, t in pairs:
        metric.update(p[None], t[None].long())
    np.testing.assert_allclose(result["iou"][present], metric.compute().numpy()[present], rtol=1e-6)


def test_scores_by_hand():
    confusion = np.array([[50, 10, 0, 0], [5, 20, 0, 0], [0, 3, 0, 0], [0, 0, 0, 0]])
    result = scores(confusion)
    np.testing.assert_allclose(result["iou"], [50 / 65, 20 / 38, 0, np.nan])
    np.testing.assert_allclose(result["precision"], [50 / 55, 20 / 33, np.nan, np.nan])
    np.testing.assert_allclose(result["recall"], [50 / 60, 20 / 25, 0, np.nan])
    assert result["miou"] == pytest.approx((50 / 65 + 20 / 38 + 0) / 3)
    assert result["foreground_miou"] == pytest.approx((20 / 38) / 2)
    assert result["pixel_accuracy"] == pytest.approx(70 / 88)


def test_ignored_pixels_count_nowhere():
    prediction, truth = random_pair(0)
    everything = counted([(prediction, truth)])
    changed = torch.where(truth == 255, 1, prediction)
    np.testing.assert_array_equal(counted([(changed, truth)]), everything)
    assert everything.sum() == (truth != 255).sum()
    nothing = counted([(prediction, torch.full_like(truth, 255))])
    assert nothing.sum() == 0
    assert np.isnan(scores(nothing[0])["miou"])


def test_bootstrap_equals_a_plain_loop():
    rng = np.random.default_rng(1)
    matrices = rng.integers(0, 50, (7, 3, 3))
    fast = bootstrap(matrices, resamples=20, seed=5)
    draws = np.random.default_rng(5).integers(7, size=(20, 7))
    for resample, images in enumerate(draws):
        slow = scores(sum(matrices[image] for image in images))
        np.testing.assert_allclose(fast["iou"][resample], slow["iou"])
        np.testing.assert_allclose(fast["miou"][resample], slow["miou"])


def test_interval_and_p_value():
    assert interval(np.array([np.nan, np.nan])) == [None, None]
    low, high = interval(np.append(np.arange(1001) / 1000, np.nan))
    assert (low, high) == pytest.approx((0.025, 0.975))
    assert p_value(np.full(999, 0.1)) == pytest.approx(2 / 1000)
    assert p_value(np.zeros(999)) == 1
    assert p_value(np.linspace(-1, 1, 999)) == pytest.approx(1, abs=0.01)


def test_pick_rows():
    matrices = np.zeros((4, 3, 3), dtype=np.int64)
    matrices[0, 1] = [0, 9, 0]  # perfect on class 1
    matrices[1, 1] = [9, 1, 0]  # bad on class 1
    matrices[2, 2] = [0, 5, 5]  # half right on class 2
    matrices[3, 0] = [9, 0, 0]  # background only: no foreground IoU
    rows, classes = np.array([10, 20, 30, 40]), ["background", "person", "car"]
    assert pick_rows("worst", 1, rows, matrices, classes) == [20]
    assert pick_rows("best", 1, rows, matrices, classes) == [10]
    assert pick_rows("best", 9, rows, matrices, classes) == [10, 30, 20]
    assert pick_rows("car", 9, rows, matrices, classes) == [30]
    assert sorted(pick_rows("random", 9, rows, matrices, classes)) == [10, 20, 30]
    assert len(pick_rows("random", 2, rows, matrices, classes)) == 2


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Of 95% intervals of samples from a known population, 92 to 98% hold its IoU."""
    rng = np.random.default_rng(0)
    population = rng.gamma(2, 50, (20_000, 2, 2)) * rng.beta(2, 2, (20_000, 1, 1))
    population[rng.random(20_000) < 0.4, 1] = 0  # images without the class
    truth = scores(population.sum(axis=0))
    held = {"iou": 0, "miou": 0, "foreground_miou": 0}
    trials = 600
    for trial in range(trials):
        sample = population[rng.integers(len(population), size=150)]
        samples = bootstrap(sample, resamples=400, seed=trial)
        for key in held:
            low, high = interval(samples[key][..., 1] if key == "iou" else samples[key])
            held[key] += low <= (truth[key][1] if key == "iou" else truth[key]) <= high
    for key, count in held.items():
        assert 0.92 <= count / trials <= 0.98, (key, count / trials)


def test_p_values_of_equal_models_are_uniform():
    """Two models of the same quality differ at p < 0.05 in about one comparison of twenty."""
    rng = np.random.default_rng(1)
    low = 0
    for trial in range(400):
        pair = rng.gamma(2, 50, (2, 100, 2, 2))
        one, other = (bootstrap(m, 300, seed=trial)["miou"] for m in pair)
        low += p_value(one - other) < 0.05
    assert 0.025 <= low / 400 <= 0.085
