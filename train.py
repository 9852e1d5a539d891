"""Train U-Net or DeepLabV3 on prepared masks: one hand-written loop, for a GPU or a laptop.

    python train.py --data data --model deeplab --focal --oversample 4
    python train.py --resume runs/deeplab-focal-oversample4/last.pt

A run directory holds args.json, metrics.jsonl (a line an epoch), last.pt and best.pt (highest
foreground mIoU). Ctrl-C saves and says how to go on.
"""

import argparse
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
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
from dataset import (
    EpochBatches,
    evaluation_loader,
    holds_any,
    mixed_seed,
    normalize,
    oversample,
    rare_classes,
    read_pair,
    split_rows,
    training_loader,
)
from distributed import (
    joined,
    mean_over_ranks,
    own_device,
    parallel,
    process_group,
    rank,
    restarted,
    synchronized,
    world,
)
from evaluate import evaluate, pick_rows, predict_batches
from losses import class_weights, pixel_weights, total_loss
from metrics import percent, report
from models import (
    ModelError,
    amp_dtype,
    build_model,
    load_checkpoint,
    pick_device,
    save_checkpoint,
    start_from_prior,
)

SECONDS = 180  # that a call of wandb may take
NAMES = {
    "val_miou": "val/miou",
    "val_foreground_miou": "val/foreground_miou",
    "train_loss": "train/loss",
    "lr": "train/lr",
    "images_per_second": "train/images_per_second",
    "skipped_steps": "train/skipped_steps",
    "epoch": "epoch",
}


class WandbLog:
    """Weights & Biases, which can neither end nor hang a training: when a call fails, or takes
    longer than SECONDS, this says so once and goes quiet."""

    def __init__(self, mode: str, out: Path, run_id: str | None, config: dict):
        self.run, self.id, self.hung = None, run_id, False
        self._attempt(lambda: self._start(mode, out, config))

    def _attempt(self, action: Callable[[], None]) -> None:
        failures = []

        def guarded() -> None:
            try:
                action()
            except Exception as error:  # whatever it is, the training goes on
                failures.append(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        thread.join(SECONDS)
        self.hung = thread.is_alive()
        if self.hung or failures:
            self.run = None
            why = f"no answer for {SECONDS} s" if self.hung else repr(failures[0])
            print(f"warning: no more Weights & Biases ({why}); metrics.jsonl goes on")

    def _start(self, mode: str, out: Path, config: dict) -> None:
        import wandb  # here, so that --wandb disabled does not need it

        if mode == "auto":
            mode = os.environ.get("WANDB_MODE")
            if mode is None:
                logged_in = wandb.login(prompt=False, verify=False)
                mode = "online" if logged_in else "offline"
        self.run = wandb.init(
            project="coco-segmentation",
            name=out.name,
            id=self.id,
            resume="allow" if self.id else None,
            dir=out,
            mode=mode,
            config=config,
            settings=wandb.Settings(init_timeout=60, console="off", silent=True),
        )
        self.id = self.run.id
        upload = f"{mode}; to upload: wandb sync {Path(self.run.dir).parent}"
        print(f"Weights & Biases: {self.run.url if mode == 'online' else upload}")

    def log(self, line: dict, pictures: list, confusion: np.ndarray | None) -> None:
        """Log a line of metrics.jsonl, (caption, image, masks) of a few validation images, and the
        (C, C) confusion matrix where it is the best one so far."""
        if self.run is not None and not self.hung:
            self._attempt(lambda: self._log(line, pictures, confusion))

    def _log(self, line: dict, pictures: list, confusion: np.ndarray | None) -> None:
        import wandb

        values = {f"val_iou/{name}": iou for name, iou in line["val_iou"].items()}
        values |= {name: line.get(key) for key, name in NAMES.items()}
        values = {name: value for name, value in values.items() if value is not None}
        for number, (caption, image, masks) in enumerate(pictures):
            values[f"examples/{number}"] = wandb.Image(image, masks=masks, caption=caption)
        if confusion is not None:
            kept = {k: v for k, v in values.items() if k.startswith(("val", "epoch"))}
            self.run.summary.update({f"best/{key}": value for key, value in kept.items()})
            values["val/confusion"] = _confusion_chart(list(line["val_iou"]), confusion)
        self.run.log(values, step=line["step"])

    def finish(self) -> None:
        """Close the run; an online one is uploaded first."""
        if self.run is not None and not self.hung:
            self._attempt(self.run.finish)


def _confusion_chart(classes: list[str], confusion: np.ndarray):
    import wandb

    share = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    cells = [
        [truth, label, round(float(share[i, j]), 2)]
        for i, truth in enumerate(classes)
        for j, label in enumerate(classes)
    ]
    columns = ["Actual", "Predicted", "nPredictions"]  # as W&B's own confusion chart names them
    return wandb.plot_table(
        "wandb/confusion_matrix/v1",
        wandb.Table(columns=columns, data=cells),
        {name: name for name in columns},
        {"title": "what the pixels of a class are taken for, in %"},
    )


WEIGHT_DECAY = 0.01
PREVIOUS = "previous.pt"  # the last.pt before, should that be damaged


@dataclass
class Progress:
    """Where a run is. `batch` steps of `epoch` are done; `loss_sum` is theirs, on the device."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float = -1.0
    loss_sum: torch.Tensor = field(default_factory=lambda: torch.zeros(()))


@dataclass
class Run:
    """All that the loop works with. `recent`: the losses since they were last read."""

    args: argparse.Namespace
    manifest: Manifest
    val_rows: np.ndarray
    device: torch.device
    dtype: torch.dtype | None
    model: torch.nn.Module
    forward: Callable
    weight: torch.Tensor | None
    rare: list[str]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: DataLoader
    val_loader: DataLoader
    progress: Progress
    wandb: WandbLog | None = None
    signal: int | None = None
    recent: list[torch.Tensor] = field(default_factory=list)

    @property
    def batches(self) -> EpochBatches:
        """What the training images of an epoch are, and their order."""
        return self.loader.batch_sampler

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.batches.steps

    @property
    def out(self) -> Path:
        """The run directory."""
        return Path(self.args.out)


# --- building ------------------------------------------------------------------------------------


def build_optimizer(model: torch.nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW, fused; biases and batch norm (the one-dimensional parameters) are not decayed."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def build_run(args: argparse.Namespace, state: dict | None, device: torch.device) -> Run:
    """Data, model and optimizer of a run; the initial weights are a function of the seed.

    With the `state` of a checkpoint, which is restored later, no pretrained weights are loaded.
    """
    dtype = amp_dtype(args.amp, device)
    if dtype == torch.float16 and device.type != "cuda":
        raise ModelError("--amp fp16 needs a GPU: use --amp bf16 or off")
    torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
    torch.backends.cudnn.benchmark = True
    manifest = load_manifest(args.data)
    train_rows, val_rows = split_rows(manifest, args.seed, args.val_split)
    rare = checked_rare(args, manifest, train_rows)
    batches = epoch_batches(args, oversample(manifest, train_rows, rare, args.oversample))
    pixels = manifest.pixels[train_rows].sum(axis=0)
    weight = class_weights(pixels) if args.weighted else None
    torch.manual_seed(args.seed)
    model = build_model(args.model, manifest.classes, args.width, "none" if state else args.weights)
    if args.weights != "coco":
        prior = torch.tensor(pixels) * (1 if weight is None else weight)
        start_from_prior(model, prior / prior.sum())
    model = synchronized(model.to(device), device)
    forward = parallel(model, device)
    run = Run(
        args=args,
        manifest=manifest,
        val_rows=val_rows,
        device=device,
        dtype=dtype,
        model=model,
        forward=torch.compile(forward) if args.compile else forward,
        weight=None if weight is None else weight.to(device),
        rare=rare,
        optimizer=build_optimizer(model, args.lr),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        loader=training_loader(manifest, batches, args.size, args.seed, args.workers),
        val_loader=evaluation_loader(
            manifest, val_rows[rank() :: world()], args.size, args.batch_size, args.workers
        ),
        progress=Progress(loss_sum=torch.zeros((), device=device)),
    )
    describe(run, train_rows)
    return run


def checked_rare(args: argparse.Namespace, manifest: Manifest, rows: np.ndarray) -> list[str]:
    """The rare classes: those of --rare, else computed. Raises DataError for an unknown name, and
    where --oversample would have nothing to repeat."""
    for name in args.rare or []:
        if name not in manifest.classes[1:]:
            raise DataError(f"--rare {name}: choose from {', '.join(manifest.classes[1:])}")
    rare = args.rare or rare_classes(manifest, rows)
    if args.oversample > 1 and not rare:
        raise DataError(
            f"--oversample {args.oversample}: no class is in fewer than 5% of the training images; "
            "name those to repeat with --rare"
        )
    return rare


def epoch_batches(args: argparse.Namespace, rows: np.ndarray) -> EpochBatches:
    """The batches of this process. Raises DataError if `rows` do not fill a single step."""
    batches = EpochBatches(rows, args.batch_size, args.seed, args.accumulate, rank(), world())
    if not batches.steps:
        raise DataError(
            f"a step takes {batches.images} images, but there are only {len(rows)} training "
            "images: lower --batch-size"
        )
    return batches


def describe(run: Run, train_rows: np.ndarray) -> None:
    """Print what is about to be trained, on what, and how the pixels are shared."""
    args, manifest = run.args, run.manifest
    pixels = manifest.pixels[train_rows].sum(axis=0)
    shares = ", ".join(f"{n} {s:.2%}" for n, s in zip(manifest.classes, pixels / pixels.sum()))
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    precision = "float32" if run.dtype is None else str(run.dtype).removeprefix("torch.")
    print(
        f"{args.model}, {millions:.1f} M parameters, on {run.device} in {precision}, "
        f"{run.batches.images} images a step -> {args.out}"
    )
    print(f"{len(train_rows)} training and {len(run.val_rows)} validation images; pixels: {shares}")
    if args.oversample > 1:
        epoch = len(run.batches.rows)
        print(f"images with {', '.join(run.rare)} {args.oversample} times: {epoch} images an epoch")
    if run.weight is not None:
        weights = ", ".join(f"{name} {value:.2f}" for name, value in named_weights(run).items())
        print(f"class weights: {weights}")


def named_weights(run: Run) -> dict[str, float] | None:
    """{class name: weight}, None without class weights."""
    if run.weight is None:
        return None
    return dict(zip(run.manifest.classes, run.weight.tolist()))


# --- the loss, read ------------------------------------------------------------------------------


def mean_loss(run: Run) -> float:
    """Mean loss of the epoch so far, read from the device. Raises DataError if not finite, with
    the step and the images of the first loss that was not."""
    progress = run.progress
    loss = progress.loss_sum.item() / progress.batch
    for ago, value in [] if math.isfinite(loss) else enumerate(run.recent, -len(run.recent)):
        if not math.isfinite(value.item()):
            files = ", ".join(run.manifest.files[run.batches.step_rows(progress.batch + ago)])
            raise DataError(
                f"the loss became {value.item()} in step {progress.step + ago + 1}, on {files}: "
                f"lower --lr or try --amp off; {run.out} keeps the last good checkpoint"
            )
    run.recent.clear()
    return loss


def skipped_steps(run: Run) -> int:
    """Steps that the fp16 scaler has left out since a gradient overflowed: the optimizer counts,
    on the device, those that it made."""
    made = next(iter(run.optimizer.state.values()))["step"].item()
    return run.progress.step - int(made)


# --- the directory, saving and resuming ----------------------------------------------------------


def save(run: Run, name: str) -> None:
    """Write a checkpoint of the run: tensors and plain types, all that --resume needs."""
    if run.progress.batch:
        mean_loss(run)  # never overwrite a good checkpoint with one whose loss is not finite
    if rank() > 0:
        return
    progress = vars(run.progress) | {"loss_sum": float(run.progress.loss_sum)}
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "progress": progress,
        "args": vars(run.args),
        "classes": run.manifest.classes,
        "colors": [list(color) for color in run.manifest.colors],
        "val_ids": run.manifest.keys(run.val_rows),
        "fingerprint": run.manifest.fingerprint,
        "images_a_step": run.batches.images,
        "class_weights": None if run.weight is None else run.weight.tolist(),
        "rare": run.rare,
        "wandb_id": run.wandb.id if run.wandb else None,
    }
    previous = run.out / PREVIOUS if name == "last.pt" else None
    save_checkpoint(run.out / name, state, previous)


def restore(run: Run, state: dict) -> None:
    """Put a run where the checkpoint left it; later lines of metrics.jsonl are dropped."""
    if state["fingerprint"] != run.manifest.fingerprint:
        raise DataError(
            f"the masks in {run.args.data} are not those that the run began with: "
            "prepare them as they were, or start a new run"
        )
    if state["images_a_step"] != run.batches.images:
        raise DataError(
            f"the run took {state['images_a_step']} images a step, not {run.batches.images}: keep "
            "the product of --batch-size, --accumulate and the number of processes"
        )
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    progress = state["progress"]
    loss_sum = torch.tensor(progress["loss_sum"], device=run.device)
    run.progress = Progress(**{**progress, "loss_sum": loss_sum})
    path = run.out / "metrics.jsonl"
    if path.exists() and rank() == 0:
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _epoch_of(line) <= run.progress.epoch]
        write_text(path, "".join(line + "\n" for line in kept))


def _epoch_of(line: str) -> float:
    with suppress(ValueError):  # a line cut off by a crash belongs to no finished epoch
        return json.loads(line)["epoch"]
    return math.inf


def append_metrics(run: Run, line: dict) -> None:
    """Add a line to metrics.jsonl. Raises DataError if the disk does not take it."""
    path = run.out / "metrics.jsonl"
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror}): is its disk full?") from None


def stop_here(run: Run) -> None:
    """Save after a signal and exit as the shell expects, naming the command that goes on."""
    save(run, "last.pt")
    name = signal.Signals(run.signal).name
    print(
        f"\n{name}: saved. Go on with: python train.py --resume {run.out / 'last.pt'}", flush=True
    )
    leave(run, 128 + run.signal)


def leave(run: Run, code: int) -> None:
    """Close Weights & Biases and exit with `code`, or return where that is 0."""
    if run.wandb:
        run.wandb.finish()
        if run.wandb.hung:  # then its exit hook would wait for ever
            sys.stdout.flush()
            os._exit(code)
    if code:
        sys.exit(code)


def catch_signals(run: Run) -> None:
    """SIGINT and SIGTERM ask for a stop after the current step; a second SIGINT stops at once.

    Of several ranks the first saves and ends; the others work on with it until it has.
    """
    if rank() > 0:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return

    def note(number: int, _) -> None:
        run.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)


def open_directory(run: Run, resumed: bool) -> None:
    """Make the run directory and write args.json. Raises DataError if another run lies there."""
    if not resumed and any((run.out / name).exists() for name in ("last.pt", PREVIOUS)):
        raise DataError(
            f"{run.out} holds a run already: continue it with --resume {run.out / 'last.pt'}, "
            "or choose another --out"
        )
    try:
        run.out.mkdir(parents=True, exist_ok=True)
        if not resumed:
            (run.out / "metrics.jsonl").unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write to {run.out} ({error.strerror}): choose another --out"
        ) from None
    write_json(run.out / "args.json", vars(run.args))


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
