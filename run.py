"""A training run: what it consists of, built from its arguments; its directory; saved and restored.

run = build_run(args, state=None, device=device)
save(run, "last.pt")
"""

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from dataset import (
    EpochBatches,
    evaluation_loader,
    oversample,
    rare_classes,
    split_rows,
    training_loader,
)
from losses import class_weights
from manifest import DataError, Manifest, load_manifest, write_json, write_text
from models import ModelError, amp_dtype, build_model, save_checkpoint, start_from_prior
from ranks import parallel, rank, synchronized, world
from track import WandbLog

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
