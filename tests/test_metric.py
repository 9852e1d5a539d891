"""The confusion matrix and its scores against independent referees, and the jackknife."""

import coverage
import numpy as np
import pytest
import torch

import metrics
from metrics import (
    ConfusionMatrix,
    add_differences,
    class_interval,
    jackknife,
    judged,
    leave_one_out,
    pick,
    report,
    scores,
    student_t,
)

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
    return confusion


def counts_of(matrix):
    """Hits, truth and prediction by class of a (..., C, C) confusion matrix."""
    matrix = np.asarray(matrix)
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    return np.stack([hits, matrix.sum(axis=-1), matrix.sum(axis=-2)], axis=-2)


def confusion_of(matrices):
    """A ConfusionMatrix that holds (N, C, C) matrices."""
    confusion = ConfusionMatrix(len(matrices), len(matrices[0]), CPU)
    confusion.total = torch.from_numpy(np.sum(matrices, axis=0))
    confusion.counts = torch.from_numpy(counts_of(matrices))
    return confusion


def test_equals_scikit_learn_and_torchmetrics():
    sklearn = pytest.importorskip("sklearn.metrics")
    torchmetrics = pytest.importorskip("torchmetrics.classification")
    pairs = [random_pair(seed) for seed in range(4)]
    found = counted(pairs)
    confusion, counts = found.total.numpy(), found.counts.numpy()
    np.testing.assert_array_equal(counts.sum(axis=0), counts_of(confusion))
    for pair, own in zip(pairs, counts):
        np.testing.assert_array_equal(own, counts_of(counted([pair]).total.numpy()))
    truth = torch.stack([t for _, t in pairs]).numpy().ravel()
    prediction = torch.stack([p for p, _ in pairs]).numpy().ravel()
    valid = truth != 255
    expected = sklearn.confusion_matrix(truth[valid], prediction[valid], labels=range(6))
    np.testing.assert_array_equal(confusion, expected)

    result = scores(counts.sum(axis=0))
    assert np.isnan(result["iou"][[2, 5]]).all()
    present = [0, 1, 3, 4]
    referee = sklearn.jaccard_score(truth[valid], prediction[valid], labels=present, average=None)
    np.testing.assert_allclose(result["iou"][present], referee)
    assert result["miou"] == pytest.approx(referee.mean())
    assert result["foreground_miou"] == pytest.approx(referee[1:].mean())

    metric = torchmetrics.MulticlassJaccardIndex(6, average="none", ignore_index=255)
    for p, t in pairs:
        metric.update(p[None], t[None].long())
    np.testing.assert_allclose(result["iou"][present], metric.compute().numpy()[present], rtol=1e-6)


def test_scores_by_hand():
    # The last class is in no truth: a stray pixel of it does not halve the mean.
    confusion = np.array([[50, 9, 0, 1], [5, 20, 0, 0], [0, 3, 0, 0], [0, 0, 0, 0]])
    result = scores(counts_of(confusion))
    np.testing.assert_allclose(result["iou"], [50 / 65, 20 / 37, 0, np.nan])
    np.testing.assert_allclose(result["precision"], [50 / 55, 20 / 32, np.nan, 0])
    np.testing.assert_allclose(result["recall"], [50 / 60, 20 / 25, 0, np.nan])
    assert result["miou"] == pytest.approx((50 / 65 + 20 / 37 + 0) / 3)
    assert result["foreground_miou"] == pytest.approx((20 / 37) / 2)
    assert result["pixel_accuracy"] == pytest.approx(70 / 88)


def test_ignored_pixels_count_nowhere():
    prediction, truth = random_pair(0)
    everything = counted([(prediction, truth)]).total
    changed = torch.where(truth == 255, 1, prediction)
    assert torch.equal(counted([(changed, truth)]).total, everything)
    assert everything.sum() == (truth != 255).sum()
    nothing = counted([(prediction, torch.full_like(truth, 255))])
    assert nothing.total.sum() == 0
    assert np.isnan(scores(nothing.counts[0].numpy())["miou"])


def test_leaving_one_out_equals_a_plain_loop():
    counts = counts_of(np.random.default_rng(1).integers(0, 50, (7, 3, 3)))
    counts[1:, :, 2] = 0  # a class of one image
    fast = leave_one_out(counts)
    for image in range(7):
        slow = scores(np.delete(counts, image, axis=0).sum(axis=0))
        kept = slow["iou"] if image else np.append(slow["iou"][:2], 0)
        np.testing.assert_allclose(fast["iou"][image], kept)
        assert fast["miou"][image] == pytest.approx(kept.mean())
        assert fast["foreground_miou"][image] == pytest.approx(kept[1:].mean())


def test_students_distribution_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 1.7, 3, 12, 250.5, 118_000):
        t, share = student_t(degrees)
        for value in (0.1, 1, 2.5):
            expected = 1 - 2 * stats.t.sf(value, degrees)
            assert np.interp(value, t, share) == pytest.approx(expected, abs=2e-3)
        assert np.interp(0.95, share, t) == pytest.approx(stats.t.ppf(0.975, degrees), rel=5e-3)


def test_the_jackknife_of_a_mean_is_its_textbook_interval():
    stats = pytest.importorskip("scipy.stats")
    values = np.array([1.0, 2, 3, 4, 5])
    others = np.array([np.delete(values, i).mean() for i in range(5)])
    (low, high), p = jackknife(values.mean(), others)
    error, degrees = values.std(ddof=1) / 5**0.5, 10**2 / 34  # of the deviations -2 to 2
    margin = stats.t.ppf(0.975, degrees) * error
    assert (low, high) == pytest.approx((3 - margin, 3 + margin), rel=1e-3)
    assert p == pytest.approx(2 * stats.t.sf(3 / error, degrees), abs=1e-3)


def test_without_any_variation_a_value_is_certain():
    assert jackknife(0.5, np.full(9, 0.5)) == ([0.5, 0.5], 0)
    assert jackknife(0.0, np.zeros(9)) == ([0, 0], 1)


def difference(one, other):
    classes, all_counts = ["background", "person"], [counts_of(m) for m in (one, other)]
    entries = [report("", classes, confusion_of(m), False, "") for m in (one, other)]
    add_differences(entries, all_counts)
    return entries[1]["difference"]["miou"]


def test_differences_of_equal_and_of_unequal_models():
    matrices = np.random.default_rng(0).integers(1, 50, (30, 2, 2))
    assert difference(matrices, matrices) == {"value": 0, "interval": [0, 0], "p": 1}
    worse = difference(matrices, matrices + [[0, 90], [90, 0]])
    assert worse["p"] < 0.001
    assert worse["interval"][0] < worse["value"] < worse["interval"][1] < 0


def test_pick_rows():
    matrices = np.zeros((4, 3, 3), dtype=np.int64)
    matrices[0, 1] = [0, 9, 0]  # perfect on class 1
    matrices[1, 1] = [9, 1, 0]  # bad on class 1
    matrices[2, 2] = [0, 5, 5]  # half right on class 2
    matrices[3, 0] = [9, 0, 0]  # background only: no foreground IoU
    classes, counts = ["background", "person", "car"], counts_of(matrices)
    assert pick("worst", 1, counts, classes).tolist() == [1]
    assert pick("best", 1, counts, classes).tolist() == [0]
    assert pick("best", 9, counts, classes).tolist() == [0, 2, 1]
    assert pick("car", 9, counts, classes).tolist() == [2]
    assert sorted(pick("random", 9, counts, classes)) == [0, 1, 2]
    assert len(pick("random", 2, counts, classes)) == 2
    assert len(pick("car", 2, counts[:2], classes)) == 0
    matrices[3, 0] = [9, 1, 0]  # nothing but a false positive
    assert pick("worst", 1, counts_of(matrices), classes).tolist() == [3]


def test_no_interval_of_a_class_that_three_images_hold():
    counts = np.zeros((20, 3), dtype=np.int64)
    counts[:3] = [6, 10, 8]
    others = np.full(20, 0.5)
    assert class_interval(counts, others) is None
    counts[3] = [1, 10, 8]
    pooled = counts.sum(axis=0)
    rest = pooled - counts
    low, high = class_interval(counts, rest[:, 0] / (rest[:, 1] + rest[:, 2] - rest[:, 0]))
    assert 0 < low < 19 / (40 + 32 - 19) < high < 1


def test_the_interval_of_a_perfect_class_lacks_half_a_pixel():
    counts = np.full((5, 3), 10)
    assert class_interval(counts, np.ones(5)) == pytest.approx([1 - 0.5 / 50] * 2)


def test_no_interval_of_a_class_that_is_hit_in_one_image_or_none():
    """All of the others say 0 then, or all but one the same: that is no certainty."""
    counts = np.zeros((20, 3, 2), dtype=np.int64)
    counts[:, :, 0] = 10
    counts[:8, 1:, 1] = 10
    for hit, known in ((0, False), (1, False), (2, True)):
        counts[:hit, 0, 1] = 4
        assert judged(counts).tolist() == [True, known]
        others = leave_one_out(counts)["iou"][:, 1]
        interval = class_interval(counts[..., 1], others)
        assert (interval is not None) == known
    assert interval[0] < 8 / (160 - 8) < interval[1] < 1


def test_a_class_of_one_image_makes_no_difference_certain():
    """Without that image the class counts 0, whether or not a stray pixel is taken for it."""
    counts = np.zeros((2, 30, 3, 3), dtype=np.int64)
    counts[:, :, :, 0] = 90
    counts[:, :, :, 1] = [60, 100, 80]
    counts[:, 0, :, 2] = [[80, 100, 90], [60, 100, 90]]
    for stray in (0, 1):
        counts[:, 1, 2, 2] = stray
        others = [leave_one_out(each)["iou"] for each in counts]
        assert others[0][0].tolist() == [1, 0.5, 0]
        assert others[0][2, 2] == pytest.approx(80 / (110 + stray))
        pooled = [scores(each.sum(axis=0)) for each in counts]
        entries = [{key: float(found[key]) for key in metrics.MEANS} for found in pooled]
        add_differences(entries, list(counts))
        found = entries[1]["difference"]["foreground_miou"]
        assert found["value"] < -0.1
        assert found["p"] > 0.3
        assert metrics.winners(list(counts)) == [None] * 5


def test_three_images_are_no_evidence():
    counts = np.zeros((2, 3, 3, 2), dtype=np.int64)
    counts[:, :, :, 0] = 90
    counts[..., 1] = [[[60, 100, 80]], [[20, 100, 80]]]
    entries = [{key: float(scores(c.sum(axis=0))[key]) for key in metrics.MEANS} for c in counts]
    add_differences(entries, list(counts))
    found = entries[1]["difference"]["miou"]
    assert found == {"value": pytest.approx(0.5 * (1 / 8 - 1 / 2)), "interval": None, "p": None}
    assert metrics.winners(list(counts)) == [None] * 4
    for number, entry in enumerate(entries):
        entry["ckpt"] = f"{number}.pt"
    assert metrics.difference_table(entries)[1][1] == ["1.pt", "mean", "-18.8", "", ""]


def test_no_interval_of_a_mean_that_is_zero():
    """Where nothing is hit, nothing varies."""
    confusion = ConfusionMatrix(9, 3, CPU)
    confusion.counts[:, 1] = 50
    confusion.counts[:, :, 0] = 50
    entry = report("a.pt", ["background", "a", "b"], confusion, True, "all")
    assert entry["foreground_miou"] == 0
    assert entry["interval"]["foreground_miou"] is None


@pytest.mark.parametrize(("value", "images"), [(0.5, 3), (np.nan, 9), (None, 9)])
def test_no_interval_of_a_mean_of_few_images_or_of_no_class(value, images):
    assert metrics.mean_interval(value, np.linspace(0.4, 0.6, images)) is None
    assert metrics.mean_interval(0.5, np.linspace(0.4, 0.6, 4)) is not None


def test_the_intervals_hold_the_truth_as_often_as_they_say():
    """Of 95% intervals of samples from a known population, of which few images hold a class, 93%
    or more hold its IoU, the mean, and the difference of two. RESULTS.md has the whole table."""
    shares = coverage.simulate([4, 6], trials=500)
    assert len(shares) == 4
    assert all(0.93 <= share < 1 for share in shares.values()), shares


def test_the_interval_of_a_mean_ends_where_iou_does():
    confusion = ConfusionMatrix(6, 3, torch.device("cpu"))
    masks = torch.randint(0, 3, (6, 9, 9), generator=torch.Generator().manual_seed(0))
    for image, mask in enumerate(masks):
        confusion.update(image, mask if image == 0 else torch.zeros_like(mask), mask)
    interval = report("a", list("abc"), confusion, True, "validation")["interval"]
    assert interval["foreground_miou"][0] == 0
    assert interval["foreground_miou"][1] > 0.3


def test_runs_that_differ_in_the_seed_share_a_row():
    """Three runs of one setting and one of another. By hand: the class has 10 pixels in each of
    five images; the runs hit 2, 4 and 6 of them in each, without a wrong one, so IoU 0.2, 0.4, 0.6.
    """
    hits = (2, 4, 6, 9)
    all_counts = np.zeros((4, 5, 3, 2), dtype=np.int64)
    for counts, hit in zip(all_counts, hits):
        counts[:, :, 1] = hit, 10, hit
        counts[:, :, 0] = 90, 90, 100 - hit
    same = {"classes": ["background", "a"], "interval": {}}
    entries = [{"ckpt": f"{name}.pt", **same} for name in "wxyz"]
    title, rows = metrics.seeds_table(entries, list(all_counts), ["one", "one", "one", "two"])
    assert "seeds" in title
    assert [row[0] for row in rows] == [
        "", "w.pt and 2 more", "lowest to highest", "95% interval over images",
        "z.pt", "lowest to highest", "95% interval over images",
    ]  # fmt: skip
    assert [row[2] for row in rows[1:]] == [
        "40.0", "20.0 to 60.0", "40.0 to 40.0", "90.0", "90.0 to 90.0", "90.0 to 90.0"
    ]  # fmt: skip
    assert rows[1][4] == "40.0"  # the foreground mean of one class
    once = all_counts.copy()
    once[0, 1:, 0, 1] = 0  # one of the runs hits the class in a single image
    assert metrics.seeds_table(entries, list(once), ["one"] * 4)[1][3][2] == ""
    all_counts[..., 1, 1] = 0  # no truth: no value, no interval
    _, rows = metrics.seeds_table(entries, list(all_counts), ["one"] * 4)
    assert [row[2] for row in rows[1:]] == ["-", "- to -", ""]
    without = [{k: v for k, v in entry.items() if k != "interval"} for entry in entries]
    _, rows = metrics.seeds_table(without, list(all_counts), ["one"] * 4)
    assert [row[0] for row in rows[1:]] == ["w.pt and 3 more", "lowest to highest"]
