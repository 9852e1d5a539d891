"""Train U-Net or DeepLabV3 on prepared masks: one hand-written loop, for a GPU or a laptop.

    python train.py --data data --model deeplab --focal --oversample 4
    python train.py --resume runs/deeplab-focal-oversample4/last.pt

A run directory holds args.json, metrics.jsonl (a line an epoch), last.pt and best.pt (highest
foreground mIoU). Ctrl-C saves and says how to go on.
"""

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dataset import evaluation_loader, holds_any, mixed_seed, normalize, read_pair
from evaluate import evaluate, pick_rows, predict_batches
from losses import pixel_weights, total_loss
from manifest import DataError, command_parser, default_workers, run_command
from models import ModelError, load_checkpoint, pick_device
from ranks import joined, mean_over_ranks, own_device, process_group, rank, restarted, world
from report import percent, report
from run import (
    PREVIOUS,
    Run,
    append_metrics,
    build_run,
    catch_signals,
    leave,
    mean_loss,
    named_weights,
    open_directory,
    restore,
    save,
    skipped_steps,
    stop_here,
)
from track import WandbLog

WARMUP = 0.03  # share of all steps
POWER = 0.9
LOG_EVERY = 20  # steps between two readings of the loss
LOGGED_IMAGES = 4
# What a resumed run may change; all the rest decides what the run computes.
FREE_ARGUMENTS = {
    "data",
    "epochs",
    "batch_size",  # the images of a step are checked instead
    "accumulate",
    "workers",
    "device",
    "compile",
    "save_every",
    "wandb",
    "out",
    "resume",
}


# --- the step ------------------------------------------------------------------------------------


def learning_rate(step: int, total: int, base: float) -> float:
    """Linear warm-up, then polynomial decay to 0 at step `total`: a function of the step alone.

    Source: the "poly" policy of Liu et al. 2015 (ParseNet), power 0.9 as in DeepLab.
    """
    warmup = max(1, round(WARMUP * total))
    if step < warmup:
        return base * (step + 1) / warmup
    return base * (1 - (step - warmup) / max(1, total - warmup)) ** POWER


def train_step(run: Run, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """One step on batches of images (N, 3, H, W) uint8 and masks (N, H, W) uint8 on the device.

    Several batches give the gradient of one that holds all their images, since each is divided by
    the pixels of all. Returns the loss, on the device: nothing here waits for the GPU.
    """
    total = run.args.epochs * run.steps
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.progress.step, total, run.args.lr)
    # Dropout too is a function of (seed, step, rank), so that nothing depends on what ran before.
    torch.manual_seed(mixed_seed(run.args.seed, run.progress.step, rank()))
    run.optimizer.zero_grad(set_to_none=True)
    gamma = run.args.gamma if run.args.focal else 0.0
    pixels = sum(pixel_weights(masks, run.weight).sum() for _, masks in batches)
    pixels = mean_over_ranks(pixels)
    loss = torch.zeros((), device=run.device)
    for number, (images, masks) in enumerate(batches, start=1):
        # Gradients are averaged over the ranks once a step, in the last backward.
        wait = number < len(batches) and world() > 1
        with run.forward.no_sync() if wait else nullcontext():
            with torch.autocast(run.device.type, dtype=run.dtype, enabled=run.dtype is not None):
                outputs = run.forward(normalize(images))
            part = total_loss(outputs, masks, run.weight, gamma, pixels)
            run.scaler.scale(part).backward()
        loss += part.detach()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return mean_over_ranks(loss)


def step_batches(run: Run) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The batches of each step that is left in the epoch, on the device."""
    run.batches.set_epoch(run.progress.epoch, start=run.progress.batch)
    step = []
    for images, masks in run.loader:
        images = images.to(run.device, non_blocking=True)
        step.append((images, masks.to(run.device, non_blocking=True)))
        if len(step) == run.args.accumulate:
            yield step
            step = []


def train_epoch(run: Run) -> tuple[float, float]:
    """The rest of the current epoch. Returns its mean loss and images per second.

    Raises DataError where the loss is not finite, SystemExit after a signal, with the run saved.
    """
    progress, first = run.progress, run.progress.batch
    run.model.train()
    started = saved = time.perf_counter()
    title = f"epoch {progress.epoch + 1}/{run.args.epochs}"
    with tqdm(total=run.steps, initial=first, desc=title, leave=False, disable=None) as bar:
        for batches in step_batches(run):
            loss = train_step(run, batches)
            run.recent.append(loss)
            progress.loss_sum += loss
            progress.step += 1
            progress.batch += 1
            bar.update()
            if progress.batch % LOG_EVERY == 0:
                bar.set_postfix(loss=f"{mean_loss(run):.4f}")
            if run.signal is not None:
                stop_here(run)
            if time.perf_counter() - saved >= 60 * run.args.save_every:
                save(run, "last.pt")
                saved = time.perf_counter()
    images = (run.steps - first) * run.batches.images
    return mean_loss(run), images / max(time.perf_counter() - started, 1e-9)


# --- logging -------------------------------------------------------------------------------------


def wandb_config(run: Run) -> dict:
    """The arguments, and what was computed from the training images."""
    rows = np.unique(run.batches.rows)
    rare_images = int(holds_any(run.manifest, rows, run.rare).sum())
    computed = {"rare_classes": run.rare, "rare_images": rare_images}
    return {**vars(run.args), **computed, "class_weights": named_weights(run)}


@torch.inference_mode()
def validation_pictures(run: Run, matrices: np.ndarray) -> list[tuple[str, np.ndarray, dict]]:
    """(caption, image, masks as wandb.Image takes them) of the same few validation images each
    time: those that hold most of each class."""
    rows = []
    for name in run.manifest.classes[1:]:
        rows += pick_rows(name, 1, run.val_rows, matrices, run.manifest.classes)
    rows = np.array(list(dict.fromkeys(rows))[:LOGGED_IMAGES], dtype=np.int64)
    labels = dict(enumerate(run.manifest.classes)) | {255: "ignored"}
    loader = evaluation_loader(run.manifest, rows, run.args.size, 1, workers=0)
    pictures = []
    for row, prediction, mask in predict_batches(run.model, loader, run.device, run.dtype):
        image, _ = read_pair(run.manifest, row)
        masks = {
            name: {"mask_data": data.cpu().numpy(), "class_labels": labels}
            for name, data in (("prediction", prediction), ("ground_truth", mask))
        }
        pictures.append((str(run.manifest.files[row]), image.permute(1, 2, 0).numpy(), masks))
    return pictures


def validate(run: Run, loss: float, images_per_second: float, started: float) -> None:
    """Evaluate, log, and end the epoch: best.pt where it is the best, last.pt in any case."""
    mine = evaluate(run.model, run.val_loader, run.device, run.dtype, "validate")
    matrices = joined(torch.from_numpy(mine).to(run.device), len(run.val_rows)).cpu().numpy()
    entry = report("", run.manifest.classes, matrices, resamples=0)
    total = run.args.epochs * run.steps
    progress = run.progress
    value = entry["foreground_miou"]
    better = (-0.5 if value is None else value) > progress.best
    progress.best = max(progress.best, -0.5 if value is None else value)
    progress.epoch, progress.batch = progress.epoch + 1, 0
    progress.loss_sum = torch.zeros((), device=run.device)
    line = {
        "epoch": progress.epoch,
        "step": progress.step,
        "train_loss": loss,
        "val_iou": entry["iou"],
        "val_miou": entry["miou"],
        "val_foreground_miou": value,
        "lr": learning_rate(progress.step - 1, total, run.args.lr),
        "images_per_second": images_per_second,
        "seconds": time.perf_counter() - started,
    }
    if run.scaler.is_enabled():
        line["skipped_steps"] = skipped_steps(run)
    if rank() == 0:
        append_metrics(run, line)
    print(summary(line, run.args.epochs, better), flush=True)
    if run.wandb:
        confusion = matrices.sum(axis=0) if better else None
        run.wandb.log(line, validation_pictures(run, matrices), confusion)
    if better:
        save(run, "best.pt")
    save(run, "last.pt")


def summary(line: dict, epochs: int, better: bool) -> str:
    """A line of metrics.jsonl for a person; a star marks the best epoch so far."""
    ious = "  ".join(f"{name} {percent(iou)}" for name, iou in line["val_iou"].items())
    skipped = line.get("skipped_steps", 0)
    return (
        f"epoch {line['epoch']}/{epochs}  loss {line['train_loss']:.4f}  "
        f"fg mIoU {percent(line['val_foreground_miou'])}{' *' if better else '  '} {ious}  "
        f"{line['images_per_second']:.1f} images/s  {line['seconds']:.0f} s"
        + f"  {skipped} steps skipped"
        * (skipped > 0)
    )


# --- command line --------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser(
        "Train a segmentation network on the masks of prepare_masks.py.",
        "python train.py --data data --model deeplab --focal --oversample 4",
    )
    add = parser.add_argument_group("data").add_argument
    add("--data", default="data", help="what prepare_masks.py wrote")
    add(
        "--val-split", metavar="NAME", help="split that validates, instead of a fifth of all images"
    )
    add("--size", type=int, default=512, help="side of training crops, short side in evaluation")
    add("--oversample", type=int, default=1, metavar="N", help="rare images N times an epoch")
    add("--rare", nargs="+", metavar="CLASS", help="rare classes, instead of those in under 5%%")
    add("--workers", type=int, default=default_workers(), help="loader processes")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=["unet", "deeplab"], help="network (required)")
    add("--width", type=int, default=64, help="first channels of the U-Net")
    choices = ["coco", "imagenet", "none"]
    add("--weights", choices=choices, help="start (default: coco for deeplab, none for unet)")
    add = parser.add_argument_group("loss").add_argument
    add("--focal", action="store_true", help="focal loss")
    add("--gamma", type=float, default=2.0, help="exponent of the focal loss")
    add("--weighted", action="store_true", help="class weights from pixel counts")
    add = parser.add_argument_group("loop").add_argument
    add("--epochs", type=int, default=20, help="passes over the training images")
    add("--batch-size", type=int, default=8, help="images at once")
    add("--accumulate", type=int, default=1, metavar="N", help="batches a step")
    add("--lr", type=float, help="highest rate (default: 1e-4 from weights, 1e-3 from scratch)")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="autocast")
    add("--compile", action="store_true", help="torch.compile the training forward")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--seed", type=int, default=0, help="of the split, the weights, the order and the crops")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="run directory (default: runs/<model and loss>)")
    resume = "go on from this checkpoint, with its arguments; without PATH from last.pt in --out"
    add("--resume", nargs="?", const="", metavar="PATH", help=resume)
    add("--save-every", type=float, default=30, metavar="MINUTES", help="between two last.pt")
    modes = ["auto", "online", "offline", "disabled"]
    add("--wandb", choices=modes, default="auto", help="auto: online with an API key, else offline")
    return parser


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """Arguments, complete and checked, and the checkpoint to resume from.

    A resumed run takes its arguments from the checkpoint; what decides its results cannot change.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if restarted() and Path(args.out or default_out(args), "last.pt").exists():
        args.resume = ""  # a rank had died, and torchrun repeats the command
    if args.resume is None:
        if args.model is None:
            parser.error("--model: choose unet or deeplab")
        args.weights = args.weights or ("coco" if args.model == "deeplab" else "none")
        if args.lr is None:
            args.lr = 1e-3 if args.weights == "none" else 1e-4
        args.out = args.out or default_out(args)
        check_args(parser, args)
        return args, None
    path = Path(args.resume or Path(args.out or default_out(args), "last.pt"))
    state = load_checkpoint(path, path.with_name(PREVIOUS) if path.name == "last.pt" else None)
    parser.set_defaults(**{**state["args"], "out": str(path.parent)})
    args = parser.parse_args(argv)
    for name, value in state["args"].items():
        if name not in FREE_ARGUMENTS and getattr(args, name) != value:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag}: the run in {path} has {value}; --resume cannot change it")
    check_args(parser, args)
    return args, state


def default_out(args: argparse.Namespace) -> str:
    """runs/<model and loss>."""
    parts = [str(args.model), "weighted" * args.weighted, "focal" * args.focal]
    parts += [f"oversample{args.oversample}" * (args.oversample > 1)]
    return str(Path("runs", "-".join(part for part in parts if part)))


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot work before any data is touched."""
    lowest = {"size": 32, "oversample": 1, "workers": 0, "width": 1, "epochs": 1, "batch_size": 1}
    lowest["accumulate"] = 1
    for name, low in {**lowest, "seed": 0, "gamma": 0, "save_every": 0}.items():
        if not getattr(args, name) >= low:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give {low} or more")
    wrong = {
        f"--lr {args.lr}: give a number above 0": not 0 < args.lr < math.inf,
        "--batch-size 1: DeepLab's batch norm needs 2 or more images": args.model == "deeplab"
        and args.batch_size == 1,
        "--width: only the U-Net has one": args.model == "deeplab" and args.width != 64,
        "--weights: there are none for the U-Net": args.model == "unet" and args.weights != "none",
        "--gamma: only with --focal": args.gamma != 2.0 and not args.focal,
        "--rare: only with --oversample 2 or more": args.rare and args.oversample == 1,
    }
    for message, applies in wrong.items():
        if applies:
            parser.error(message)


def main(argv: list[str] | None = None) -> None:
    """Train, validating after each epoch; under torchrun as one of its processes."""
    args, state = parse_args(argv)
    device = pick_device(own_device(args.device))
    with process_group(device):
        run = build_run(args, state, device)
        if rank() == 0:
            open_directory(run, resumed=state is not None)
        if state is not None:
            restore(run, state)
        if run.progress.epoch >= args.epochs:
            raise DataError(f"{run.out} is done: {args.epochs} epochs; raise --epochs to go on")
        if args.wandb != "disabled" and rank() == 0:
            run.wandb = WandbLog(
                args.wandb, run.out, state["wandb_id"] if state else None, wandb_config(run)
            )
        catch_signals(run)
        try:
            fit(run)
        except RuntimeError as error:
            raise out_of_memory(args, error) or error from None
        leave(run, 0)


def out_of_memory(args: argparse.Namespace, error: RuntimeError) -> ModelError | None:
    """A sentence that says what to lower, if memory is what the error is about."""
    gpu = isinstance(error, torch.cuda.OutOfMemoryError)
    if not gpu and "can't allocate memory" not in str(error):
        return None
    width = f" of width {args.width}" if args.model == "unet" else ""
    return ModelError(
        f"out of memory with {args.model}{width} at --size {args.size} --batch-size "
        f"{args.batch_size}: halve --batch-size and double --accumulate, or lower --size"
    )


def fit(run: Run) -> None:
    """The epochs that are left."""
    while run.progress.epoch < run.args.epochs:
        started = time.perf_counter()
        loss, images_per_second = train_epoch(run)
        validate(run, loss, images_per_second, started)
        if run.signal is not None and run.progress.epoch < run.args.epochs:
            stop_here(run)
    print(f"best foreground mIoU {100 * max(run.progress.best, 0):.1f}: {run.out / 'best.pt'}")


if __name__ == "__main__":
    run_command(main, DataError, ModelError)
