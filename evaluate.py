"""Class-wise IoU of checkpoints on their validation images, and pictures of what they get wrong.

    python evaluate.py --ckpt runs/unet/best.pt runs/deeplab/best.pt --html report.html

One confusion matrix over the whole split, at the native size of the masks. Ignored pixels count
nowhere. A class that no image holds has no IoU and is left out of the means.
"""

import argparse
import json
import math
import os
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

import common
import metrics
from common import IGNORE_INDEX, Manifest, UserError, write_text
from dataset import evaluation_loader, load_image, normalize, resized_size, to_device
from metrics import ConfusionMatrix, percent, plain, scores
from models import (
    amp_dtype,
    command_line,
    load_checkpoint,
    model_from_checkpoint,
    pick_device,
    supports,
)
from report import Example, Shown, draw_panels, figure, page
from tiles import Tiling, best_labels, tiled_labels

GALLERY = 24  # images on a page, shared by its checkpoints
# Arguments in which runs of one setting may differ.
ANY = {"seed", "out", "resume", "data", "coco_root", "workers", "device", "wandb", "save_every"}


class Predictor(NamedTuple):
    """A network and how it is run: at which `size`, on which device, in which autocast dtype,
    whether on the mirror image as well (`flip`), and in which windows, if not on whole images."""

    model: nn.Module
    size: int
    device: torch.device
    dtype: torch.dtype | None = None
    flip: bool = False
    tiling: Tiling | None = None

    def logits(self, images: Tensor, widths: list[int]) -> Tensor:
        """(N, C, h, w) logits, on the device, of (N, 3, h, w) uint8 images, which are padded to the
        right of their `widths`. With `flip`, the probabilities of image and mirror image are
        averaged, and the logits are the logarithms of the mean."""
        images = to_device(images, self.device)
        if not self.flip:
            return self.run(images)

        def mirrored(batch: Tensor) -> Tensor:  # but for the padding, which stays to the right
            pairs = ((x[..., :w].flip(-1), x[..., w:]) for x, w in zip(batch, widths))
            return torch.stack([torch.cat(pair, dim=-1) for pair in pairs])

        both = torch.stack([self.run(images), mirrored(self.run(mirrored(images)))])
        return both.float().log_softmax(dim=2).logsumexp(dim=0) - math.log(2)

    def run(self, images: Tensor) -> Tensor:
        """The network's logits of (N, 3, h, w) uint8 images on the device."""
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            return self.model(normalize(images))["out"]

    def planes(self, logits: Tensor, height: int, width: int) -> Iterator[Tensor]:
        """The (C, h, w) logits of an image, class by class, without the padding and at the native
        size (H, W): the logits are resized, not the labels."""
        h, w = resized_size(height, width, self.size)
        for plane in logits[:, None, None, :h, :w].float():
            yield F.interpolate(plane, (height, width), mode="bilinear")[0, 0]

    def labels(self, logits: Tensor, height: int, width: int) -> Tensor:
        """(H, W) uint8 labels of an image of that native size from its (C, h, w) logits."""
        return best_labels(self.planes(logits, height, width))[0]

    def tiled(self, picture: Image.Image, probs: bool = False) -> tuple[Tensor, Tensor | None]:
        """`best_labels` of an RGB picture, by windows."""
        width = min(self.size, max(1, round(self.tiling.scale * picture.width)))
        widths = [width] * self.tiling.batch_size
        return tiled_labels(lambda x: self.logits(x, widths), self.tiling, picture, probs)

    def loss(self, logits: Tensor, mask: Tensor) -> Tensor:
        """(2,) float32: the cross entropy summed over the valid pixels, and their number. The (H,
        W) mask is resized to the (C, h, w) logits."""
        h, w = resized_size(*mask.shape, self.size)
        mask = F.interpolate(mask[None, None], size=(h, w), mode="nearest-exact")[0].long()
        options = {"ignore_index": IGNORE_INDEX, "reduction": "sum"}
        loss = F.cross_entropy(logits[None, :, :h, :w].float(), mask, **options)
        return torch.stack([loss, (mask != IGNORE_INDEX).sum().float()])

    def predict(self, loader: DataLoader) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
        """For every image, on the device: its index, (H, W) uint8 labels and mask, and, unless it
        is processed in windows, its (C, h, w) logits."""
        self.model.eval()
        for images, masks, indices in loader:
            masks = to_device(masks, self.device)
            if self.tiling:
                yield indices[0], self.tiled(to_pil_image(images[0]))[0], masks[0], None
                continue
            sizes = loader.dataset.manifest.sizes[indices].tolist()
            batch = self.logits(images, [resized_size(*size, self.size)[1] for size in sizes])
            for index, logits, mask, (height, width) in zip(indices, batch, masks, sizes):
                yield index, self.labels(logits, height, width), mask[:height, :width], logits


@torch.inference_mode()
def evaluate(
    predictor: Predictor, loader: DataLoader, description: str, between: Callable = bool, loss=False
) -> ConfusionMatrix:
    """Pixel counts of the loader's images, in ascending order of their indices, and if `loss` is
    set the sums of `Predictor.loss`.

    The model is put into evaluation mode and stays there. `between` is called after each image; the
    default, `bool()`, does nothing.
    """
    indices = sorted(index for batch in loader.batch_sampler for index in batch)
    classes = len(loader.dataset.manifest.classes)
    confusion = ConfusionMatrix(len(indices), classes, predictor.device)
    options = {"total": len(indices), "unit": "image", "leave": False, "disable": None}
    seen = []
    for index, labels, mask, logits in tqdm(predictor.predict(loader), description, **options):
        confusion.update(bisect_left(indices, index), labels, mask)
        if loss:
            confusion.loss += predictor.loss(logits, mask)
        seen.append(index)
        between()
    assert sorted(seen) == indices, f"{len(seen)} images evaluated, {len(indices)} expected"
    return confusion


@torch.inference_mode()
def predict_examples(predictor: Predictor, manifest: Manifest, indices) -> list[Example]:
    """A few images with masks, predictions, and captions that give their own IoU."""
    examples = {}
    size = None if predictor.tiling else predictor.size
    loader = evaluation_loader(manifest, indices, size, 1, workers=0)
    for index, labels, mask, _ in predictor.predict(loader):
        confusion = ConfusionMatrix(1, len(manifest.classes), predictor.device)
        confusion.update(0, labels, mask)
        counts = confusion.counts[0].cpu().numpy()
        iou = map(plain, scores(counts, held=counts[1:].any(axis=0))["iou"])
        named = [f"{n} {percent(v)}" for n, v in zip(manifest.classes, iou) if v is not None]
        caption = f"{manifest.files[index]}, IoU in %: {', '.join(named) or 'no pixel counts'}"
        image = to_pil_image(load_image(manifest, index))
        examples[index] = Example(image, labels.cpu().numpy(), mask.cpu().numpy(), caption)
    return [examples[index] for index in indices]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = common.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--ckpt", nargs="+", required=True, metavar="PATH", help="checkpoints; one table for all")
    add("--data", help="data directory, if not the one that the checkpoint was trained on")
    images = ["validation", "training", "all"]
    add("--images", choices=images, default=images[0], help="which images to evaluate on")
    add("--coco-root", metavar="ROOT", help="where the images are now, if they were moved")
    add("--other-data", action="store_true", help="accept masks other than those trained on")
    add("--json", type=Path, metavar="FILE", help="also write the report as JSON")
    html = "write a page with tables, curves and pictures, for a browser"
    add("--html", type=Path, metavar="FILE", help=html)
    add("--markdown", type=Path, metavar="FILE", help="also write the tables as Markdown")
    add("--panels", type=int, default=0, metavar="N", help="draw N images to CKPT_panels.png")
    add("--pick", default="worst", help="which images: worst, best, random, or a class")
    merge = "one row for runs that differ only in --seed: mean, lowest and highest"
    add("--merge-seeds", action="store_true", help=merge)
    add("--no-intervals", action="store_true", help="leave out the 95%% intervals over images")
    add("--batch-size", type=int, default=8, help="images, or windows, at once")
    add("--workers", type=int, default=common.default_workers(), help="loader processes")
    add("--size", type=int, help="short side of images, side of windows (default: as in training)")
    add_running(parser)
    return parser


def add_running(parser: argparse.ArgumentParser) -> None:
    """Arguments of how a network is run."""
    add = parser.add_argument
    add("--flip", action="store_true", help="average with the prediction for the mirror image")
    tile = "run overlapping windows over each picture, for those far larger than in training"
    add("--tile", action="store_true", help=tile)
    scale = "with --tile, pixels of a window per pixel of the picture (default: median in training)"
    add("--scale", type=float, help=scale)
    add("--amp", choices=["auto", "off", "bf16", "fp16"], help="autocast (default: as in training)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def check_running(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse a scale without windows."""
    if args.scale is not None and not args.tile:
        parser.error(f"--scale {args.scale:g} needs --tile: give both")


class Subject(NamedTuple):
    """A checkpoint's path and its content without the tensors, its data, the ascending indices of
    the images to evaluate it on, and which those are: validation, training or all."""

    path: str
    state: dict
    manifest: Manifest
    indices: np.ndarray
    images: str

    def compared(self) -> tuple[list, ...]:
        """What must be equal so that two checkpoints can be compared: classes, images and masks."""
        manifest, masks = self.manifest, self.manifest.checksums[self.indices].tolist()
        return manifest.classes, manifest.keys(self.indices), masks

    def predictor(self, args: argparse.Namespace, device: torch.device) -> Predictor:
        """Its network. Raises UserError if a training has replaced the checkpoint meanwhile."""
        state = load_checkpoint(self.path, mmap=True)
        if state.get("progress") != self.state.get("progress"):
            raise UserError(f"{self.path} was replaced meanwhile: evaluate it again")
        return load_predictor(state, device, args, args.size)

    def setting(self) -> str:
        """A text that is equal for runs that differ only in the seed."""
        chosen = {k: v for k, v in self.state["args"].items() if k not in ANY}
        chosen["data"] = self.state["fingerprint"]
        return json.dumps(chosen, sort_keys=True, default=str)


def find_subject(path: str, args: argparse.Namespace) -> Subject:
    """What to evaluate. With --other-data, these are the images that validated the run, or all
    images if none of those is there. Raises UserError if the data has other classes, has other
    masks and --other-data is not given, or lacks some of the images."""
    state = load_checkpoint(path, mmap=True)
    root = args.coco_root or (None if args.data else state["args"].get("coco_root"))
    manifest = common.load_manifest(args.data or state["args"]["data"], root)
    own = f"give the data directory that {path} was trained on with --data"
    if state["classes"] != manifest.classes:
        raise UserError(f"{manifest.data} holds {', '.join(manifest.classes[1:9])}: {own}")
    other = state["fingerprint"] != manifest.fingerprint
    if other and not args.other_data:
        raise UserError(f"{manifest.data} holds other masks: {own}, or use --other-data")
    held, images = validated(state, manifest), args.images
    missing = len({tuple(key) for key in state["val_ids"]}) - held.sum()
    if images == "all" or (other and images == "validation" and not held.any()):
        held, images = np.ones_like(held), "all"
    elif missing or (other and images == "training"):
        unknown = f"does not say which of its images {path} was trained on"
        raise UserError(f"{manifest.data} {unknown}: use --images all")
    elif images == "training":
        held = ~held
    if not held.any():
        raise UserError(f"{manifest.data} holds no {images} images")
    if not manifest.pixels[held, 1:].any():
        print(f"warning: {path}: its images hold no pixel of any class", file=sys.stderr)
    small = {key: value for key, value in state.items() if key not in ("model", "optimizer")}
    return Subject(path, small, manifest, np.flatnonzero(held), images)


def validated(state: dict, manifest: Manifest) -> np.ndarray:
    """(N,) bool: which images of the manifest validated the run that wrote a checkpoint."""
    keys = {tuple(map(str, key)) for key in state["val_ids"]}
    parts = max(map(len, keys), default=0)  # those of older checkpoints have no file names
    return np.array([tuple(key[:parts]) in keys for key in manifest.keys(np.arange(len(manifest)))])


def load_predictor(
    state: dict, device: torch.device, args: argparse.Namespace, size: int | None = None
) -> Predictor:
    """The network of a loaded checkpoint; size, scale and precision as trained, unless given."""
    scale = (args.scale or state.get("scale")) if args.tile else None
    if args.tile and not scale:
        raise UserError("the checkpoint does not say at which scale it was trained: give --scale")
    trained = state.get("precision", state["args"]["amp"])
    trained = trained if supports(trained, device) else "off"
    model, size = model_from_checkpoint(state, device), size or state["args"]["size"]
    dtype = amp_dtype(args.amp or trained, device)
    tiling = Tiling(scale, size, len(state["classes"]), device, args.batch_size) if scale else None
    return Predictor(model, size, device, dtype, args.flip, tiling)


def evaluate_subject(subject: Subject, args, device: torch.device) -> tuple[dict, np.ndarray]:
    """The JSON entry of a checkpoint, and the (N, 3, C) counts of its images."""
    path, state, manifest, indices, images = subject
    predictor = subject.predictor(args, device)
    size = None if args.tile else predictor.size
    loader = evaluation_loader(manifest, indices, size, args.batch_size, args.workers)
    confusion = evaluate(predictor, loader, path)
    entry = metrics.report(path, manifest.classes, confusion, not args.no_intervals, images)
    how = {"origin": state.get("origin", {}), "flip": args.flip, "tile": args.tile}
    return entry | how, confusion.counts.cpu().numpy()


def draw_subject(subject: Subject, counts: np.ndarray, args, device: torch.device) -> None:
    """Write a picture of a few images of a checkpoint, if there are any."""
    manifest = subject.manifest
    chosen = subject.indices[metrics.pick(args.pick, args.panels, counts, manifest.classes)]
    if not len(chosen):
        print(f"no picture of {subject.path}: no image to --pick as {args.pick}")
        return
    examples = predict_examples(subject.predictor(args, device), manifest, chosen)
    picture = draw_panels(examples, manifest.classes, manifest.colors)
    common.write_image(panels_path(subject.path), picture)
    print(f"picture: {panels_path(subject.path)}")


def show_subject(
    number: int, subject: Subject, entry: dict, counts: np.ndarray, args, device: torch.device
) -> Shown:
    """What the page shows of a checkpoint, its `number`-th."""
    predictor, manifest = subject.predictor(args, device), subject.manifest
    chosen = metrics.gallery(max(1, GALLERY // len(args.ckpt)), counts, manifest.classes)
    figures = []
    for image, why in sorted(chosen.items(), key=lambda item: item[1], reverse=True):
        (example,) = predict_examples(predictor, manifest, subject.indices[[image]])
        example = example._replace(caption=f"{why}: {example.caption}")
        figures.append(figure(example, manifest.classes, manifest.colors, f"{number}-{image}"))
    history = subject.state.get("progress", {}).get("history", [])
    tables = [origin_table(subject.state, history), images_table(subject)]
    return Shown(entry, history, manifest.colors, tables, figures)


def origin_table(state: dict, history: list[dict]) -> metrics.Table:
    """How a checkpoint was made."""
    rows = [["", ""], *map(list, state.get("origin", {}).items())]
    if history:
        seconds = sum(line.get("seconds", 0) for line in history)
        rows.append(["trained", f"{history[-1]['epoch']} epochs, {seconds:,.0f} s"])
    arguments = {k: v for k, v in sorted(state["args"].items()) if v is not None and v is not False}
    rows.append(["arguments", ", ".join(f"{name} {value}" for name, value in arguments.items())])
    return "How it was trained", rows


def images_table(subject: Subject) -> metrics.Table:
    """Images and pixels of each class, in training and in this evaluation."""
    state, manifest = subject.state, subject.manifest
    training = ~validated(state, manifest)
    training &= state["fingerprint"] == manifest.fingerprint
    columns = [["", *manifest.classes, "all"]]
    for name, indices in (("training", training), (subject.images, subject.indices)):
        pixels = manifest.pixels[indices]
        holding = [*(pixels > 0).sum(axis=0), len(pixels)]
        shares = 100 * pixels.sum(axis=0) / max(1, pixels.sum())
        columns.append([f"{name}, images", *(f"{count:,}" for count in holding)])
        columns.append([f"{name}, pixels in %", *(f"{share:.2f}" for share in shares), ""])
    split = state["args"].get("val_split") or "a part of the images"
    return f"Images of {manifest.data}, of which {split} validated", [*map(list, zip(*columns))]


def panels_path(path: str) -> Path:
    """Where the picture of a checkpoint goes."""
    return Path(path).with_name(Path(path).stem + "_panels.png")


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse, before the evaluation, what cannot work and what could not be written afterwards."""
    check_running(parser, args)
    pictures = [panels_path(path) for path in args.ckpt] if args.panels else []
    outputs = [*filter(None, (args.json, args.html, args.markdown)), *pictures]
    inputs = {Path(path).resolve() for path in args.ckpt}
    for file in outputs:
        if outputs.count(file) > 1 or file.resolve() in inputs or file.name == "manifest.json":
            raise UserError(f"{file} is an input, or named twice: give another path")
        if file.is_dir() or not (file.parent.is_dir() and os.access(file.parent, os.W_OK)):
            raise UserError(f"cannot write {file}: give a file, in a folder that you can write to")


def main(argv: list[str] | None = None) -> None:
    """Evaluate each checkpoint, print the table, write the report and the pictures."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_args(parser, args)
    device = pick_device(args.device)
    subjects = [find_subject(path, args) for path in args.ckpt]
    compared = [subject.compared() for subject in subjects]
    for path, images in zip(args.ckpt, compared):
        if images != compared[0]:
            what = "other images, masks or classes"
            raise UserError(f"{path} has {what} than {args.ckpt[0]}: evaluate it separately")
    picks = ["worst", "best", "random", *subjects[0].manifest.classes[1:]]
    if args.pick not in picks:
        raise UserError(f"--pick {args.pick}: choose from {', '.join(picks)}")
    found = (evaluate_subject(subject, args, device) for subject in subjects)
    entries, all_counts = map(list, zip(*found))
    merged = []
    if not args.no_intervals:
        metrics.add_differences(entries, all_counts)
    if args.merge_seeds:
        settings = [subject.setting() for subject in subjects]
        merged.append(metrics.seeds_table(entries, all_counts, settings))
    comparison, details = metrics.comparison(entries), metrics.tables(entries)
    # With several checkpoints the terminal shows only the comparison; --markdown has the details.
    print("\n\n".join(map(metrics.as_text, merged + (comparison or details))))
    if args.markdown:
        tables = merged + comparison + details
        write_text(args.markdown, "\n\n".join(map(metrics.as_markdown, tables)) + "\n")
    if args.json:
        write_text(args.json, json.dumps(entries, indent=1) + "\n")
    if args.html:
        rows = zip(range(len(subjects)), subjects, entries, all_counts)
        sections = [show_subject(*row, args, device) for row in rows]
        winners = [] if args.no_intervals else metrics.winners(all_counts)
        write_text(args.html, page(sections, winners, command_line(), merged))
        print(f"page: {args.html}")
    for subject, counts in zip(subjects, all_counts):
        if args.panels:
            draw_subject(subject, counts, args, device)


if __name__ == "__main__":
    common.run_command(main)
