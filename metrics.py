"""Confusion matrix, scores with jackknife intervals, and tables of them.

confusion = ConfusionMatrix(images=100, classes=5, device=device)
confusion.update(0, prediction, mask)
values = scores(confusion.counts.cpu().numpy().sum(axis=0))
"""

import numpy as np
import torch
from torch import Tensor

from common import IGNORE_INDEX

MEANS = {"miou": "mean", "foreground_miou": "foreground mean"}
FEWEST, FEWEST_HIT = 4, 2  # images that hold a class, and with a hit, for an interval of its IoU
MATRIX_LABELS = 12  # up to this many, the whole confusion matrix is printed
LARGEST = 20  # confusions that are printed of more labels

Table = tuple[str, list[list[str]]]  # a title, and rows of cells of which the first is the head


class ConfusionMatrix:
    """Pixel counts, int64, on the device: `total` (C, C) over all images, truth in rows and
    prediction in columns; and `counts` (images, 3, C), what the scores of each image need: hits,
    truth and prediction by class. `loss` (2,) is for callers that also sum up a loss and its
    pixels.

    `update` never waits for the device: ignored pixels go to a bin of their own instead of being
    filtered out, and scatter_add_, unlike bincount, need not know the largest index.
    """

    def __init__(self, images: int, classes: int, device: torch.device):
        self.classes = classes
        self.total = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        self.counts = torch.zeros(images, 3, classes, dtype=torch.int64, device=device)
        self.loss = torch.zeros(2, device=device)

    def update(self, image: int, prediction: Tensor, mask: Tensor) -> None:
        """Count the pixels of one image. Both are (H, W) integer; the mask may hold 255."""
        bins = mask.int() * self.classes + prediction  # int64 would take five times as long
        bins = torch.where(mask == IGNORE_INDEX, self.classes**2, bins).flatten().long()
        matrix = bins.new_zeros(self.classes**2 + 1)
        matrix.scatter_add_(0, bins, bins.new_ones(1).expand(len(bins)))
        matrix = matrix[:-1].view(self.classes, self.classes)
        self.total += matrix
        self.counts[image] = torch.stack([matrix.diagonal(), matrix.sum(dim=1), matrix.sum(dim=0)])


def scores(counts: np.ndarray, held: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Scores of (..., 3, C) counts, as fractions, NaN where there is nothing to divide by: (..., C)
    by class, and (...) means, which leave out NaN (foreground_miou leaves out label 0 too).

    A class has an IoU where it is `held`, by default where the counts have truth."""
    hits, truth, predicted = np.moveaxis(np.asarray(counts, dtype=np.float64), -2, 0)
    held = truth > 0 if held is None else held
    iou = np.where(held, _divide(hits, truth + predicted - hits), np.nan)
    return {
        "iou": iou,
        "precision": _divide(hits, predicted),
        "recall": _divide(hits, truth),
        "miou": _mean(iou),
        "foreground_miou": _mean(iou[..., 1:]),
        "pixel_accuracy": _divide(hits.sum(axis=-1), truth.sum(axis=-1)),
    }


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    return _divide(np.nansum(values, axis=-1), (~np.isnan(values)).sum(axis=-1))


def leave_one_out(counts: np.ndarray) -> dict[str, np.ndarray]:
    """The pooled "iou" (N, C), "miou" and "foreground_miou" (N,) without each of N images in turn.

    Without its only image a class counts as an IoU of 0. That makes the intervals of means wide,
    since nothing else is known about such a class."""
    pooled = counts.sum(axis=0)
    iou, held = scores(pooled - counts)["iou"], pooled[1] > 0
    iou[:, held] = np.nan_to_num(iou[:, held])
    return {"iou": iou, "miou": _mean(iou), "foreground_miou": _mean(iou[:, 1:])}


def student_t(degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Values t from 0 up, and the share of Student's distribution between -t and t: the integral of
    cos(phi) ** (degrees - 1), with t = sqrt(degrees) * tan(phi)."""
    phi = np.linspace(0, np.pi / 2, 20_001)[:-1]
    density = np.cos(phi) ** (degrees - 1)
    share = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return np.sqrt(degrees) * np.tan(phi), share / (share[-1] + density[-1])


def jackknife(value: float, others: np.ndarray) -> tuple[list[float], float]:
    """The 95% interval of a `value`, and its two-sided p-value against 0, from `others` (N,), the
    values without each of the N images.

    Source: the delete-one jackknife of Efron and Tibshirani 1993, chapter 11, with Student's t and
    Satterthwaite's degrees of freedom, sum(d^2)^2 / sum(d^4) of the deviations d.
    """
    deviations = others - others.mean()
    squares = deviations**2
    if not squares.sum():
        return [value, value], float(value == 0)
    error = np.sqrt((len(others) - 1) / len(others) * squares.sum())
    t, share = student_t(squares.sum() ** 2 / (squares**2).sum())
    margin = np.interp(0.95, share, t) * error
    p = 1 - float(np.interp(abs(value) / error, t, share))
    return [float(value - margin), float(value + margin)], p


def judged(counts: np.ndarray) -> np.ndarray:
    """Whether counts (N, 3, ...) are enough for an interval: `FEWEST` images hold the class, and
    `FEWEST_HIT` have a hit. If a class is never hit, all images say 0, which is no certainty."""
    hit, held = ((counts[:, row] > 0).sum(axis=0) for row in (0, 1))
    return (held >= FEWEST) & (hit >= FEWEST_HIT)


def class_interval(counts: np.ndarray, others: np.ndarray) -> list[float] | None:
    """Interval of the IoU of a class from its counts (N, 3), on the logit scale, where it is closer
    to normal and stays between 0 and 1. None if the class is not `judged`."""
    if not judged(counts):
        return None
    union = (counts[:, 1:].sum(axis=1) - counts[:, 0]).sum()
    clip = 0.5 / union  # half a pixel, since 0 and 1 have no logit
    value, others = (np.clip(x, clip, 1 - clip) for x in (counts[:, 0].sum() / union, others))
    ends, _ = jackknife(np.log(value / (1 - value)), np.log(others / (1 - others)))
    return [float(1 / (1 + np.exp(-end))) for end in ends]


def mean_interval(value: float | None, others: np.ndarray) -> list[float] | None:
    """Interval of a mean IoU, or of its mean over seeds, from the values without each of the
    images. None if the value is 0, as nothing is hit, or of fewer than `FEWEST` images."""
    if value is None or not value > 0 or len(others) < FEWEST:  # NaN is not above 0 either
        return None
    return np.clip(jackknife(value, others)[0], 0, 1).tolist()


def report(
    ckpt: str, classes: list[str], confusion: ConfusionMatrix, intervals: bool, images: str
) -> dict:
    """The JSON entry of a checkpoint: plain types, fractions, None for what does not exist.
    `images` says on which it was evaluated: validation, training or all. Waits for the device."""
    counts, total = confusion.counts.cpu().numpy(), confusion.total.tolist()
    pooled = counts.sum(axis=0)
    entry = {"ckpt": ckpt, "classes": classes, "confusion": total}
    for key, values in scores(pooled).items():
        by_class = values.ndim > 0
        entry[key] = dict(zip(classes, map(plain, values))) if by_class else plain(values)
    holding = (counts[:, 1] > 0).sum(axis=0).tolist()
    entry |= {"images": len(counts), "evaluated_on": images}
    entry["images_with_class"] = dict(zip(classes, holding))
    only = np.where(pooled[1] > 0, 0, pooled[2]).tolist()
    entry["false_positives"] = {name: pixels for name, pixels in zip(classes, only) if pixels}
    if intervals:
        others = leave_one_out(counts)
        by_class = map(class_interval, np.moveaxis(counts, -1, 0), others["iou"].T)
        entry["interval"] = {"iou": dict(zip(classes, by_class))}
        for key in MEANS:
            entry["interval"][key] = mean_interval(entry[key], others[key])
    return entry


def add_differences(entries: list[dict], all_counts: list[np.ndarray]) -> None:
    """Add to all entries but the first the difference of their means to those of the first: value,
    interval and p-value, the last two None for fewer than `FEWEST` images. all_counts: (N, 3, C) of
    each, with the same images in the same order."""
    first = leave_one_out(all_counts[0])
    for entry, counts in zip(entries[1:], all_counts[1:]):
        others, entry["difference"] = leave_one_out(counts), {}
        for key in MEANS:
            if entry[key] is not None and entries[0][key] is not None:
                value, interval, p = entry[key] - entries[0][key], None, None
                if len(counts) >= FEWEST:
                    interval, p = jackknife(value, others[key] - first[key])
                entry["difference"][key] = {"value": value, "interval": interval, "p": p}


def winners(all_counts: list[np.ndarray]) -> list[int | None]:
    """For each class, and then for each of `MEANS`, the number of the checkpoint whose IoU is
    highest, if the intervals of its paired differences to all others exclude 0; else None."""
    values = np.stack([_columns(scores(counts.sum(axis=0))) for counts in all_counts])
    others = np.stack([_columns(leave_one_out(counts)) for counts in all_counts])
    images = [*(all_counts[0][:, 1] > 0).sum(axis=0), *[len(all_counts[0])] * len(MEANS)]
    result = []
    for value, other, count in zip(values.T, np.moveaxis(others, -1, 0), images):
        best, lows = int(value.argmax()), []
        if count >= FEWEST and not np.isnan(value).any():
            rivals = [number for number in range(len(value)) if number != best]
            pairs = ((value[best] - value[n], other[best] - other[n]) for n in rivals)
            lows = [jackknife(gain, without)[0][0] for gain, without in pairs]
        result.append(best if lows and min(lows) > 0 else None)
    return result


def _columns(found: dict[str, np.ndarray]) -> np.ndarray:
    """(..., C + 2): IoU of each class, and the means."""
    return np.concatenate([found["iou"], *(found[key][..., None] for key in MEANS)], axis=-1)


def gallery(number: int, counts: np.ndarray, classes: list[str]) -> dict[int, str]:
    """Up to `number` images of (N, 3, C) counts, each with the reason for its choice: a quarter at
    random, the rest in turns the worst and those with most pixels of each of the four rarest
    classes.
    """
    images = (counts[:, 1] > 0).sum(axis=0)
    rare = sorted((label for label in range(1, len(classes)) if images[label]), key=images.take)
    hows = {"worst": "worst"} | {classes[label]: f"most of {classes[label]}" for label in rare[:4]}
    queues = {t: pick(how, len(counts), counts, classes).tolist() for how, t in hows.items()}
    drawn = pick("random", number // 4, counts, classes).tolist()
    chosen = dict.fromkeys(drawn, "random")
    while len(chosen) < number and any(queues.values()):
        for title, queue in queues.items():
            queue[:] = [image for image in queue if image not in chosen]
            if queue and len(chosen) < number:
                chosen[queue[0]] = title
    return chosen


def plain(value: np.ndarray) -> float | None:
    """A Python float, None for NaN."""
    return None if np.isnan(value) else float(value)


def pick(how: str, count: int, counts: np.ndarray, classes: list[str]) -> np.ndarray:
    """Numbers of up to `count` of the images of (N, 3, C) counts: the "worst" or "best" by their
    own foreground mIoU, "random" ones, or those with most pixels of a class. Images without a class
    in truth and prediction have no such mIoU and are left out."""
    if how in classes:
        area = counts[:, 1, classes.index(how)]
        return np.argsort(-area, kind="stable")[: min(count, np.count_nonzero(area))]
    value = scores(counts, held=counts[:, 1:].any(axis=1))["foreground_miou"]
    order = np.argsort(-value if how == "best" else value, kind="stable")  # NaN sorts last
    order = order[: np.count_nonzero(~np.isnan(value))]
    order = np.random.default_rng(0).permutation(order) if how == "random" else order
    return order[:count]


def comparison(entries: list[dict]) -> list[Table]:
    """Several checkpoints side by side, and their paired differences; nothing for a single one."""
    result = [comparison_table(entries)] if len(entries) > 1 else []
    return result + ([difference_table(entries)] if "difference" in entries[-1] else [])


def tables(entries: list[dict]) -> list[Table]:
    """Each checkpoint in detail."""
    return [table(entry) for entry in entries for table in (class_table, confusion_table)]


def evaluated(entry: dict) -> str:
    """On which images a checkpoint was evaluated, and how, in words."""
    count, which = entry["images"], entry["evaluated_on"]
    words = f"all {count} images" if which == "all" else f"{count} {which} images"
    words += ", with their mirror images" if entry.get("flip") else ""
    return words + (", in tiles" if entry.get("tile") else "")


def comparison_table(entries: list[dict]) -> Table:
    """IoU of every class and the means: a row per checkpoint, with the intervals below it."""
    first = entries[0]
    rows = [["", *first["classes"], "mean", "fg mean", "accuracy"]]
    for entry in entries:
        cells = [*entry["iou"].values(), *(entry[key] for key in (*MEANS, "pixel_accuracy"))]
        rows.append([entry["ckpt"], *map(percent, cells)])
        if "interval" in entry:
            pairs = [*entry["interval"]["iou"].values(), *(entry["interval"][k] for k in MEANS)]
            rows.append(["", *map(span, pairs), ""])
    rows.append(["images with it", *map(str, first["images_with_class"].values()), "", "", ""])
    note = "; below each its 95% interval over images" if "interval" in first else ""
    return f"IoU in % on {evaluated(first)}{note}", rows


def seeds_table(entries: list[dict], all_counts: list[np.ndarray], settings: list[str]) -> Table:
    """The mean over the checkpoints that share one of the `settings`; below it their lowest and
    highest, and if the entries have intervals, that of the mean over images."""
    rows = [["", *entries[0]["classes"], "mean", "fg mean"]]
    for setting in dict.fromkeys(settings):
        runs = [number for number, own in enumerate(settings) if own == setting]
        values = np.stack([_columns(scores(all_counts[run].sum(axis=0))) for run in runs])
        others = np.mean([_columns(leave_one_out(all_counts[run])) for run in runs], axis=0)
        mean = values.mean(axis=0)
        pairs = list(map(mean_interval, mean, others.T))
        for label in np.flatnonzero(~np.all([judged(all_counts[run]) for run in runs], axis=0)):
            pairs[label] = None
        more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
        rows.append([entries[runs[0]]["ckpt"] + more, *map(percent, map(plain, mean))])
        ends = zip(values.min(axis=0).tolist(), values.max(axis=0).tolist())
        rows.append(["lowest to highest", *(span(pair) for pair in ends)])
        if "interval" in entries[0]:
            rows.append(["95% interval over images", *map(span, pairs)])
    return "Mean over seeds, IoU in %", rows


def difference_table(entries: list[dict]) -> Table:
    """Paired differences of the means from the first checkpoint."""
    rows = [["", "of", "points", "95% interval", "p"]]
    for entry in entries[1:]:
        for key, found in entry["difference"].items():
            values = [found["value"], *(found["interval"] or [])]
            points, *ends = (f"{100 * value:+.1f}" for value in values)
            p = "" if found["p"] is None else f"{found['p']:.3f}"
            rows.append([entry["ckpt"], MEANS[key], points, " to ".join(ends), p])
    return f"Difference to {entries[0]['ckpt']} on the same images", rows


def class_table(entry: dict) -> Table:
    """IoU, precision, recall and images of each class of a checkpoint."""
    intervals = entry.get("interval", {"iou": {}})
    rows = [["", "IoU", "95% interval", "precision", "recall", "images with it"]]
    for name in entry["classes"]:
        cells = [percent(entry["iou"][name]), span(intervals["iou"].get(name))]
        cells += [percent(entry[key][name]) for key in ("precision", "recall")]
        rows.append([name, *cells, str(entry["images_with_class"][name])])
    for key, name in MEANS.items():
        rows.append([name, percent(entry[key]), span(intervals.get(key)), "", "", ""])
    rows.append(["pixel accuracy", percent(entry["pixel_accuracy"]), "", "", "", ""])
    for name, pixels in entry["false_positives"].items():
        rows.append([f"{name}: {pixels} pixels, though no image holds it", *[""] * 5])
    return f"{entry['ckpt']} on {evaluated(entry)}, in %", rows


def confusion_table(entry: dict) -> Table:
    """Where the pixels of each true class went; for many classes only the largest confusions."""
    classes, confusion = entry["classes"], np.array(entry["confusion"])
    share = _divide(confusion, confusion.sum(axis=1, keepdims=True))
    title = f"{entry['ckpt']}: what the pixels of a class are taken for, in %"
    if len(classes) <= MATRIX_LABELS:
        rows = [["", *classes]]
        return title, rows + [[n, *(percent(plain(v)) for v in r)] for n, r in zip(classes, share)]
    share = np.where(np.eye(len(classes), dtype=bool), 0, np.nan_to_num(share))
    rows = [["", "taken for", "share"]]
    for place in np.argsort(-share, axis=None, kind="stable")[:LARGEST]:
        truth, label = divmod(int(place), len(classes))
        rows.append([classes[truth], classes[label], percent(share[truth, label])])
    return title, rows


def as_text(table: Table) -> str:
    """The table in aligned columns: the first to the left, the others to the right."""
    title, rows = table
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [title]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join([f"{row[0]:<{widths[0]}}", *cells]).rstrip())
    return "\n".join(lines)


def as_markdown(table: Table) -> str:
    """The table in Markdown."""
    title, rows = table
    head, *rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(r)} |" for r in (head, rule, *rows))])


def percent(value: float | None) -> str:
    """A fraction as a percentage with one digit, "-" for none or NaN."""
    return "-" if value is None or value != value else f"{100 * value:.1f}"


def span(bounds: list[float | None] | None) -> str:
    """An interval in percent; empty if there is none."""
    return "" if bounds is None else " to ".join(map(percent, bounds))
