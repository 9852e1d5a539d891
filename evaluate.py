"""Class-wise IoU of checkpoints on their validation images, and pictures of what they get wrong.

    python evaluate.py --ckpt runs/unet/best.pt runs/deeplab/best.pt --json report.json --panels 6

One confusion matrix over the whole split, at the native size of the masks; ignored pixels count
nowhere; a class that neither truth nor prediction holds has no IoU and enters no mean.
"""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from common import (
    DataError,
    Manifest,
    command_parser,
    default_workers,
    load_manifest,
    run_command,
    write_json,
    write_text,
)
from dataset import evaluation_loader, normalize, resized_size
from metrics import (
    ConfusionMatrix,
    add_differences,
    as_markdown,
    as_text,
    percent,
    plain,
    report,
    scores,
    tables,
)
from models import ModelError, amp_dtype, load_checkpoint, model_from_checkpoint, pick_device
from report import Example, draw_panels

IMAGES = ["validation", "training", "all"]
# Logits of native size are built at once up to this many numbers (256 MB), else class by class.
WHOLE_LOGITS = 2**26


class Subject(NamedTuple):
    """A checkpoint to evaluate on `rows` of a manifest."""

    path: str
    state: dict
    manifest: Manifest
    rows: np.ndarray


# --- running a model -----------------------------------------------------------------------------


def predict_batches(
    model: torch.nn.Module, loader: DataLoader, device: torch.device, dtype: torch.dtype | None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Row, prediction (H, W) uint8 and mask (H, W) uint8 of every image, native, on the device."""
    dataset = loader.dataset
    for images, masks, rows in loader:
        masks = masks.to(device, non_blocking=True)
        logits = batch_logits(model, images, device, dtype)
        for row, image_logits, mask in zip(rows, logits, masks):
            height, width = dataset.manifest.sizes[row].tolist()
            prediction = native_prediction(image_logits, height, width, dataset.size)
            yield row, prediction, mask[:height, :width]


def batch_logits(
    model: torch.nn.Module, images: torch.Tensor, device: torch.device, dtype: torch.dtype | None
) -> torch.Tensor:
    """(N, C, h, w) logits, on the device, of (N, 3, h, w) uint8 images."""
    images = normalize(images.to(device, non_blocking=True))
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        return model(images)["out"]


def native_prediction(logits: torch.Tensor, height: int, width: int, size: int) -> torch.Tensor:
    """(H, W) uint8 labels from (C, h, w) logits of an image evaluated at `size`.

    The padding is cut off, and the logits, not the labels, are brought to the native size. Where
    logits are equal the lowest label wins.
    """
    h, w = resized_size(height, width, size)
    # Classes as the batch: how the kernels round depends on the number of channels.
    logits = logits[:, None, :h, :w].float()
    resize = partial(F.interpolate, size=(height, width), mode="bilinear", align_corners=False)
    if len(logits) * height * width <= WHOLE_LOGITS:
        # On a CPU ten times as fast as argmax.
        return resize(logits)[:, 0].max(dim=0).indices.to(torch.uint8)
    best = resize(logits[:1])[0, 0]
    labels = torch.zeros_like(best, dtype=torch.uint8)
    for label in range(1, len(logits)):
        values = resize(logits[label : label + 1])[0, 0]
        labels.masked_fill_(values > best, label)
        torch.maximum(best, values, out=best)
    return labels


@torch.inference_mode()
def evaluate(
    model: torch.nn.Module,
    loader: DataLoader,
    device: torch.device,
    dtype: torch.dtype | None = None,
    description: str = "evaluate",
) -> np.ndarray:
    """Confusion matrices (N, C, C) int64 of the loader's N images, in ascending order of rows.

    The model is put into evaluation mode and left there.
    """
    model.eval()
    rows = sorted(row for batch in loader.batch_sampler for row in batch)
    position = {row: index for index, row in enumerate(rows)}
    confusion = ConfusionMatrix(len(rows), len(loader.dataset.manifest.classes), device)
    seen = 0
    with tqdm(total=len(rows), desc=description, unit="image", leave=False, disable=None) as bar:
        for row, prediction, mask in predict_batches(model, loader, device, dtype):
            confusion.update(position[row], prediction, mask)
            seen += 1
            bar.update()
    assert seen == len(rows), f"{seen} images evaluated, {len(rows)} expected"
    return confusion.matrices()


# --- pictures ------------------------------------------------------------------------------------


def pick_rows(
    pick: str, count: int, rows: np.ndarray, matrices: np.ndarray, classes: list[str]
) -> list[int]:
    """`count` rows to draw: "worst" or "best" by an image's own foreground mIoU, "random" ones of
    those that have one (neither mask nor prediction is all background), or those that hold most of
    a class."""
    if pick in classes:
        area = matrices[:, classes.index(pick)].sum(axis=1)
        order = np.argsort(-area, kind="stable")[: np.count_nonzero(area)]
        return rows[order[:count]].tolist()
    value = scores(matrices)["foreground_miou"]
    order = np.argsort(-value if pick == "best" else value, kind="stable")  # NaN sorts last
    order = order[: np.count_nonzero(~np.isnan(value))]
    if pick == "random":
        order = np.random.default_rng(0).permutation(order)
    return rows[order[:count]].tolist()


@torch.inference_mode()
def save_panels(
    path: Path,
    model: torch.nn.Module,
    manifest: Manifest,
    rows: list[int],
    size: int,
    device: torch.device,
) -> None:
    """Predict the images of `rows` again and draw them. Raises DataError if not writable."""
    examples = {}
    loader = evaluation_loader(manifest, np.array(rows), size, batch_size=1, workers=0)
    for row, prediction, mask in predict_batches(model.eval(), loader, device, None):
        confusion = ConfusionMatrix(1, len(manifest.classes), device)
        confusion.update(0, prediction, mask)
        values = scores(confusion.matrices()[0])["iou"]
        named = [f"{name} {percent(plain(v))}" for name, v in zip(manifest.classes, values)]
        caption = ", ".join(text for text in named if not text.endswith(" -"))
        caption = f"{manifest.files[row]}   IoU in %: {caption or 'no pixel counts'}"
        examples[row] = Example(row, prediction.cpu().numpy(), mask.cpu().numpy(), caption)
    try:
        draw_panels(manifest, [examples[row] for row in rows]).save(path)
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror or error})") from None


# --- command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser(
        "Class-wise IoU of checkpoints on the images that they were validated on.",
        "python evaluate.py --ckpt runs/deeplab/best.pt --panels 6 --pick worst",
    )
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, metavar="PATH", help="checkpoints; one table for all")
    add("--data", help="data directory, if not the one that the checkpoint was trained on")
    add("--images", choices=IMAGES, default="validation", help="validation images, or all others")
    other = "take a data directory with other masks than the checkpoint was trained on"
    add("--other-data", action="store_true", help=other)
    add("--json", type=Path, metavar="FILE", help="write the report here too")
    add("--markdown", type=Path, metavar="FILE", help="write the tables here too")
    add("--panels", type=int, default=0, metavar="N", help="draw N images to CKPT_panels.png")
    add("--pick", default="worst", help="which: worst, best, random, or a class name")
    add("--bootstrap", type=int, default=2000, metavar="N", help="resamples; 0 for no intervals")
    add("--batch-size", type=int, default=8, help="images at once")
    add("--workers", type=int, default=default_workers(), help="loader processes")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="autocast")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    return parser


def chosen_rows(path: str, state: dict, manifest: Manifest, images: str, other: bool) -> np.ndarray:
    """Rows of the manifest to evaluate a checkpoint on.

    Of `other` data, those that the checkpoint was validated on if it holds them, all if it holds
    none. Raises DataError if the classes are not the checkpoint's, or the masks without `other`.
    """
    if state["classes"] != manifest.classes:
        raise DataError(
            f"{path} was trained on {_named(state['classes'])}, but {manifest.data} holds "
            f"{_named(manifest.classes)}: give its own data directory with --data"
        )
    if state["fingerprint"] != manifest.fingerprint and not other:
        raise DataError(
            f"{manifest.data} holds other masks than {path} was trained on: give its own data "
            "directory with --data, or say --other-data"
        )
    everything = np.arange(len(manifest))
    known = set(map(tuple, state["val_ids"]))
    held = np.array([tuple(key) in known for key in manifest.keys(everything)])
    if images == "all" or (other and not held.any()):
        return everything
    return np.flatnonzero(~held) if images == "training" else manifest.rows(state["val_ids"])


def _named(classes: list[str]) -> str:
    more = len(classes) - 8
    return ", ".join(classes[:8]) + f" and {more} more" * (more > 0)


def load_subjects(args: argparse.Namespace) -> list[Subject]:
    """The checkpoints, and the rows of the manifest to evaluate each on, in ascending order.

    Raises DataError if their classes or images are not the same, or if there are no images.
    """
    subjects = []
    for path in args.ckpt:
        state = load_checkpoint(path)
        manifest = load_manifest(args.data or state["args"]["data"])
        rows = np.sort(chosen_rows(path, state, manifest, args.images, args.other_data))
        subjects.append(Subject(path, state, manifest, rows))
    first = subjects[0]
    keys = sorted(first.manifest.keys(first.rows))
    for path, state, manifest, rows in subjects:
        if state["classes"] != first.state["classes"] or sorted(manifest.keys(rows)) != keys:
            raise DataError(
                f"{path} has other validation images or classes than {first.path}: "
                "they cannot stand in one table"
            )
    if not keys:
        raise DataError(f"{first.manifest.data} holds no {args.images} images")
    return subjects


def evaluate_subject(
    subject: Subject, args: argparse.Namespace, device: torch.device
) -> tuple[dict, np.ndarray]:
    """The report entry and the matrices of a checkpoint; draws its panels if asked for."""
    path, state, manifest, rows = subject
    model, size = model_from_checkpoint(state, device), state["args"]["size"]
    loader = evaluation_loader(manifest, rows, size, args.batch_size, args.workers)
    matrices = evaluate(model, loader, device, amp_dtype(args.amp, device), path)
    if args.panels:
        picture = Path(path).with_name(Path(path).stem + "_panels.png")
        chosen = pick_rows(args.pick, args.panels, rows, matrices, manifest.classes)
        save_panels(picture, model, manifest, chosen, size, device)
        print(f"picture: {picture}")
    return report(path, manifest.classes, matrices, args.bootstrap, args.images), matrices


def main(argv: list[str] | None = None) -> None:
    """Evaluate each checkpoint, print the table, write the report and the pictures."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if min(args.panels, args.bootstrap, args.workers) < 0 or args.batch_size < 1:
        parser.error("--panels, --bootstrap and --workers start at 0, --batch-size at 1")
    for file in filter(None, (args.json, args.markdown)):
        if not file.parent.is_dir():  # better now than after the evaluation
            raise DataError(f"no folder {file.parent} to write {file.name} to: make it first")
    device = pick_device(args.device)
    subjects = load_subjects(args)
    classes = subjects[0].manifest.classes
    if args.pick not in ("worst", "best", "random", *classes[1:]):
        raise DataError(
            f"--pick {args.pick}: choose worst, best, random or {', '.join(classes[1:])}"
        )
    entries, all_matrices = zip(*(evaluate_subject(each, args, device) for each in subjects))
    if args.bootstrap:
        add_differences(entries, all_matrices, args.bootstrap)
    found = tables(entries)
    # Of several checkpoints the terminal gets the comparison; --markdown has the details.
    shown = found if len(entries) == 1 else found[: 1 + bool(args.bootstrap)]
    print("\n\n".join(map(as_text, shown)))
    if args.markdown:
        write_text(args.markdown, "\n\n".join(map(as_markdown, found)) + "\n")
    if args.json:
        write_json(args.json, entries)


if __name__ == "__main__":
    run_command(main, DataError, ModelError)
