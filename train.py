"""Train U-Net or DeepLabV3 on prepared masks: one hand-written loop, for a GPU or a laptop.

    python train.py --data data --model deeplab --focal --oversample 4
    python train.py --resume runs/deeplab-focal-oversample4/last.pt

A run directory holds args.json, metrics.jsonl (one line per epoch), curves.svg, which a browser can
show during the run, last.pt and best.pt (highest foreground mIoU). Ctrl-C saves and prints the
command that continues the run.
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import common
import dataset
import distributed
import metrics
import models
from common import UserError, say, write_text
from dataset import normalize, to_device
from distributed import gather, mean_over_ranks, rank, world
from evaluate import Predictor, evaluate, predict_examples
from losses import Totals, class_weights, pixel_weights, total_dice_sums, total_loss
from report import curves

WARMUP = 0.03  # share of all steps
TIMED = 3  # steps after which the time per epoch on a CPU is printed
LOG_EVERY = 20  # steps between two readings of the loss
MUCH_WAITING = 0.2  # share of an epoch that a GPU may wait for data before the user is told
LITTLE = 0.01  # foreground mIoU of a network that has learnt only the background
TELL_EVERY = 30  # seconds between two lines on the loss in a log, where there is no bar
LOGGED_IMAGES = 4
# What a resumed run may change. The product of the first two, the images per step, must stay.
FREE_ARGUMENTS = {"batch_size", "accumulate", "data", "epochs", "workers", "device", "compile"}
FREE_ARGUMENTS |= {"amp", "save_every", "wandb", "out", "resume", "coco_root", "lr"}
WANDB_LIMITS = {"init_timeout": 60, "finish_timeout": 180, "finish_timeout_raises": True}
PRECISIONS = {None: "off", torch.bfloat16: "bf16", torch.float16: "fp16"}
PROGRESS = ("epoch", "batch", "step", "best", "history")  # of a Run, in its checkpoints


def learning_rate(step: int, total: int, base: float) -> float:
    """Linear warm-up, then polynomial decay to 0 at step `total`: a function of the step only.

    Source: the "poly" policy of Liu et al. 2015 (ParseNet), power 0.9 as in DeepLab.
    """
    warmup = max(1, round(WARMUP * total))
    if step < warmup:
        return base * (step + 1) / warmup
    return base * max(0, 1 - (step - warmup) / max(1, total - warmup)) ** 0.9


class Run:
    """A training run: data and model, built from the arguments; the loop; the run directory.

    `batch` steps of `epoch` are done, and `step` in all. `history` holds the lines of
    metrics.jsonl.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, weights: str):
        """The initial weights are a function of the seed and the pretrained `weights`."""
        self.args, self.device, self.out = args, device, Path(args.out)
        self.dtype = models.amp_dtype(args.amp, device)
        self.epoch, self.batch, self.step, self.best, self.history = 0, 0, 0, -1.0, []
        self.loss_sum, self.checked_step = torch.zeros((), device=device), 0
        self.signal, self.wandb, self.wandb_id, self.told = None, None, None, time.monotonic()
        self.started = 0.0  # when the epoch began; before `fit`, minus the seconds spent on it
        self.origin, self.told_duration = models.origin(device), False

        self.manifest = manifest = common.load_manifest(args.data, args.coco_root)
        split = dataset.split_indices(manifest, args.seed, args.val_split, args.group)
        train_indices, self.val_indices = split
        self.upright = bool(manifest.upright[train_indices].mean() > 0.5)
        self.scale = args.size / float(np.median(manifest.sizes[train_indices].min(axis=1)))
        self.rare = dataset.rare_classes(manifest, train_indices, args.rare)
        if args.oversample > 1 and not self.rare:
            raise UserError("--oversample: no class is in fewer than 5% of the images: use --rare")
        indices = dataset.oversample(manifest, train_indices, self.rare, args.oversample)
        options = {"accumulate": args.accumulate, "rank": rank(), "world": world()}
        options |= {"balance": args.balance, "holders": dataset.holders(manifest, train_indices)}
        self.batches = dataset.EpochBatches(indices, args.batch_size, args.seed, **options)
        self.loader = dataset.training_loader(manifest, self.batches, args.size, args.workers)
        mine, loading = self.val_indices[rank() :: world()], (args.batch_size, args.workers)
        self.val_loader = dataset.evaluation_loader(manifest, mine, args.size, *loading)
        pixels = dataset.drawn_pixels(manifest, indices, args.balance)
        if not pixels[1:].any():
            raise UserError(f"no training image of {args.data} holds a pixel of any class")
        self.build(pixels, weights)
        self.describe(train_indices, pixels / pixels.sum())

    def build(self, pixels: np.ndarray, weights: str) -> None:
        """Build network, class weights and optimizer. `pixels`: (C,), those of one epoch."""
        args, device, classes = self.args, self.device, self.manifest.classes
        torch.set_float32_matmul_precision("high")  # TF32 where the GPU has it
        weight = class_weights(pixels) if args.weighted else torch.ones(len(pixels))
        self.weight = weight.to(device) if args.weighted else None
        self.named_weights = dict(zip(classes, weight.tolist())) if args.weighted else None
        torch.manual_seed(args.seed)
        self.model = models.build_model(args.model, classes, args.width, weights)
        if args.freeze_backbone:
            self.model.backbone.requires_grad_(False)
        if args.weights in ("none", "imagenet"):
            prior = torch.from_numpy(pixels) * weight
            models.init_class_prior(self.model, prior / prior.sum())
        self.predictor = Predictor(self.model.to(device), args.size, device, self.dtype)
        self.ddp_model = distributed.parallel(self.model, device)
        if args.compile:
            options = {"fallback_random": True}  # dropout as without
            self.ddp_model = torch.compile(self.ddp_model, options=options)
        if args.fresh is None:
            args.fresh = models.fresh_classes(classes, args.weights)
        factor = 10.0 if args.fresh else 1.0
        if args.head_lr:
            factor = args.head_lr / args.lr
        head = models.head_of(args.model, args.weights)
        self.optimizer = models.build_optimizer(self.model, args.lr, head, factor)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def describe(self, train_indices: np.ndarray, shares: np.ndarray) -> None:
        """Print what is about to be trained, on which images, and the shares of the classes."""
        args, classes, batches = self.args, self.manifest.classes, self.batches
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        precision = str(self.dtype or torch.float32).removeprefix("torch.")
        say(f"{args.model}, {millions:.1f} M parameters, {self.device}, {precision} -> {args.out}")
        counts = f"{len(train_indices)} training and {len(self.val_indices)} validation images"
        say(f"{counts}, {batches.images_per_step} images per step")
        if args.fresh:
            say(f"start: {args.weights}, except {', '.join(args.fresh)}, which start fresh")
        say("pixels:", ", ".join(f"{n} {s:.2%}" for n, s in zip(classes, shares)))
        if not self.manifest.pixels[self.val_indices, 1:].any():
            say("warning: no validation image holds a pixel of any class: there is no best.pt")
        if args.oversample > 1:
            repeated = f"{', '.join(self.rare)} {args.oversample} times per epoch"
            say(f"images with {repeated}: {len(batches.indices)} images in all")
        if self.named_weights:
            say("class weights:", {name: round(w, 2) for name, w in self.named_weights.items()})

    def begin(self, new: bool) -> None:
        """Start the log: write args.json into the run directory, if no other run has taken it."""
        args = self.args
        if new:
            refuse_taken(self.out / "last.pt")  # since the arguments were checked
            for leftover in ("metrics.jsonl", "best.pt"):  # of a run whose last.pt was deleted
                (self.out / leftover).unlink(missing_ok=True)
        elif not (self.out / "best.pt").exists():
            best = Path(args.resume).with_name("best.pt")
            if best.exists():
                shutil.copyfile(best, self.out / "best.pt")
        told = json.dumps(vars(args) | {"origin": self.origin}, indent=1)
        write_text(self.out / "args.json", told + "\n")
        mode = (os.environ.get("WANDB_MODE") or "auto") if args.wandb == "auto" else args.wandb
        if mode != "disabled":
            computed = {"rare_classes": self.rare, "class_weights": self.named_weights}
            self.wandb = self.try_wandb(start_wandb, args, mode, self.wandb_id, computed)
            self.wandb_id = self.wandb.id if self.wandb else self.wandb_id

    def fit(self) -> None:
        """Train the epochs that are left. A network that starts from weights is validated first."""
        self.started += time.perf_counter()
        if not self.history and self.args.weights != "none":
            self.validate({})
        while self.epoch < self.args.epochs:
            self.validate(self.train_one_epoch())
            if self.epoch < self.args.epochs:
                self.check_signal()
        best = self.out / "best.pt"
        where = f": {best}" if best.exists() else ""
        say(f"best foreground mIoU {100 * max(self.best, 0):.1f}{where}")
        if 0 <= self.best < LITTLE:
            flags = {"--dice": "dice", "--balance 0.5": "balance", "--weighted": "weighted"}
            unused = [flag for flag, name in flags.items() if not getattr(self.args, name)]
            remedy = " ".join([*unused, "with more --epochs, or another --lr"])
            say(f"that is little more than background: try {remedy} (README: Little data)")

    def train_one_epoch(self) -> dict[str, float]:
        """Train the rest of the current epoch. Returns its entries for metrics.jsonl: mean loss,
        images per second, and the share of the time spent waiting for data."""
        args, batches, first, parts = self.args, self.batches, self.batch, []
        batches.set_epoch(self.epoch, start=first)
        self.model.train()
        if args.freeze_norm:
            models.freeze_norm(self.model, args.weights)
        if args.freeze_backbone:
            self.model.backbone.eval()
        torch.backends.cudnn.benchmark = True  # pays for one shape, not for those of validation
        started = saved = time.perf_counter()
        waits, asked = [], moment(self.device)
        title = f"epoch {self.epoch + 1}/{args.epochs}"
        bar = tqdm(total=batches.steps, initial=first, desc=title, leave=False, disable=None)
        for batch in self.loader:
            waits.append((asked, moment(self.device)))
            parts.append([to_device(tensor, self.device) for tensor in batch])
            if len(parts) == args.accumulate:
                self.loss_sum += self.train_step(parts)
                self.step, self.batch, parts = self.step + 1, self.batch + 1, []
                bar.update()
                if self.batch == first + TIMED and self.device.type == "cpu":
                    self.tell_duration((time.perf_counter() - started) / TIMED)
                silent = bar.disable and time.monotonic() - self.told > TELL_EVERY
                if self.batch % LOG_EVERY == 0 or silent:
                    self.tell_loss(bar, time.perf_counter() - started, self.batch - first)
                self.check_signal()
                if time.perf_counter() - saved >= 60 * args.save_every:
                    self.save("last.pt")
                    saved = time.perf_counter()
            asked = moment(self.device)
        bar.close()
        loss, seconds = self.mean_loss(), time.perf_counter() - started
        images = (batches.steps - first) * batches.images_per_step
        waiting = sum(seconds_between(*moments) for moments in waits) / seconds
        if self.device.type == "cuda" and waiting > MUCH_WAITING:
            say(f"the GPU waited for data {waiting:.0%} of the time: raise --workers")
        return {"train_loss": loss, "images_per_second": images / seconds, "data_wait": waiting}

    def train_step(self, batches: list[list[Tensor]]) -> Tensor:
        """One step on batches of images (N, 3, H, W) and masks (N, H, W), uint8, on the device.

        Several batches give the gradient of one that holds all their images, since each is divided
        by the pixels of all. Returns the loss, on the device: nothing here waits for the GPU.
        """
        args = self.args
        rate = learning_rate(self.step, args.epochs * self.batches.steps, args.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        gamma = args.gamma if args.focal else 0.0
        weights = sum(pixel_weights(masks, self.weight).sum() for _, masks in batches)
        totals = Totals(mean_over_ranks(weights), None, world(), len(batches))
        # Dropout is a function of (seed, step, rank), so that nothing depends on what ran before.
        key = repr((args.seed, self.step, rank())).encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little", signed=True)
        torch.manual_seed(seed)
        if args.dice and len(batches) > 1:
            totals = totals._replace(dice=self.dice_of_parts(batches))
            torch.manual_seed(seed)
        loss = torch.zeros((), device=self.device)
        for number, (images, masks) in enumerate(batches, start=1):
            # Gradients are averaged over the ranks once per step, in the last backward.
            wait = number < len(batches) and world() > 1
            with self.ddp_model.no_sync() if wait else nullcontext():
                with self.autocast():
                    outputs = self.ddp_model(normalize(images))
                if args.dice and len(batches) == 1:
                    totals = totals._replace(dice=mean_over_ranks(total_dice_sums(outputs, masks)))
                part = total_loss(outputs, masks, self.weight, gamma, totals)
                self.scaler.scale(part).backward()
            loss += part.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return mean_over_ranks(loss)

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    @torch.no_grad()
    def dice_of_parts(self, batches: list[list[Tensor]]) -> Tensor:
        """`Totals.dice` of a step in several parts, which the gradient of the first part needs.
        Takes one more forward pass per part, which does not change statistics of batch norm."""
        sums = 0
        for images, masks in batches:
            buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
            with self.autocast():
                outputs = torch.func.functional_call(self.model, buffers, normalize(images))
            sums = sums + total_dice_sums(outputs, masks)
        return mean_over_ranks(sums)

    def mean_loss(self) -> float:
        """Mean loss of the epoch so far; waits for the device. Raises UserError if not finite."""
        loss = self.loss_sum.item() / self.batch
        self.require(math.isfinite(loss), f"the loss became {loss}")
        self.checked_step = self.step
        return loss

    def require(self, finite: bool, what: str) -> None:
        """Raise UserError, naming the last good checkpoint, if training is no longer finite."""
        if not finite:
            first = min(self.checked_step + 1, self.step)
            steps = f"in one of the steps {first} to {self.step}"
            last = self.out / "last.pt"
            kept = f"; {last} is from before" if last.exists() else ""
            raise UserError(f"{what} {steps}: lower --lr or try --amp off{kept}")

    def tell_duration(self, seconds: float) -> None:
        """Say how long a CPU will take, from the seconds per step: once, at the beginning."""
        hours = seconds * self.batches.steps / 3600
        if self.told_duration or hours < 1 / 60:
            return
        self.told_duration = True
        left = hours * (self.args.epochs - self.epoch)
        say(f"about {60 * hours:.0f} minutes per epoch on this CPU, {left:.1f} hours in all")
        if hours > 1:
            say("lower --size and --batch-size (128 and 4), or use --model unet --width 16")

    def tell_loss(self, bar: tqdm, seconds: float, steps: int) -> None:
        """Show the loss and the time left, from the `seconds` of the last `steps`: in the bar, or
        if there is none in a line every half minute; and in W&B."""
        loss, per_epoch = self.mean_loss(), seconds / steps * self.batches.steps
        per_epoch = max(per_epoch, self.history[-1]["seconds"] if self.epoch else 0)
        left = (self.args.epochs - self.epoch - self.batch / self.batches.steps) * per_epoch
        bar.set_postfix(loss=f"{loss:.4f}", run_ends_in=tqdm.format_interval(left))
        if bar.disable and time.monotonic() - self.told > TELL_EVERY:
            step = f"step {self.batch}/{self.batches.steps}"
            say(f"epoch {self.epoch + 1}/{self.args.epochs}: {step}, loss {loss:.4f}")
            self.told = time.monotonic()
        if self.wandb:
            self.try_wandb(self.wandb.log, {"train/epoch_loss": loss}, step=self.step)

    def validate(self, trained: dict[str, float]) -> None:
        """Evaluate, save and log, and end the epoch that was `trained`, if there was one. Writes
        last.pt, and best.pt if this is the best so far."""
        self.save("last.pt")  # if the validation is interrupted, the epoch is not lost
        distributed.share_buffers(self.model)
        torch.backends.cudnn.benchmark = False
        between = self.check_signal
        confusion = evaluate(self.predictor, self.val_loader, "validate", between, loss=True)
        loss, pixels = mean_over_ranks(confusion.loss.clone()).tolist()
        counts = gather(confusion.counts, len(self.val_indices)).cpu().numpy()
        found = metrics.scores(counts.sum(axis=0))
        classes = self.manifest.classes
        if trained:
            self.epoch, self.batch = self.epoch + 1, 0
            self.loss_sum.zero_()
        line = {
            "epoch": self.epoch,
            "step": self.step,
            "train_loss": trained.get("train_loss"),
            "val_loss": loss / pixels if pixels and math.isfinite(loss) else None,
            "val_iou": dict(zip(classes, map(metrics.plain, found["iou"]))),
            "val_miou": metrics.plain(found["miou"]),
            "val_foreground_miou": metrics.plain(found["foreground_miou"]),
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_second": trained.get("images_per_second"),
            "data_wait": trained.get("data_wait"),
            "seconds": time.perf_counter() - self.started,
        }
        if self.scaler.is_enabled() and self.step:
            line["skipped_steps"] = self.skipped_steps()
        better = bool(found["foreground_miou"] > self.best)  # never where there is none, NaN
        self.history.append(line)
        self.started = time.perf_counter()
        if better:
            self.best = line["val_foreground_miou"]
            self.save("best.pt")
        self.save("last.pt")
        self.draw_curves()
        say(summary(line, self.args.epochs, better))
        if self.wandb:
            # The same few images after each epoch: those that hold most of each class.
            picked = [metrics.pick(name, 1, counts, classes) for name in classes[1:]]
            chosen = self.val_indices[np.unique(np.concatenate(picked))[:LOGGED_IMAGES]]
            examples = predict_examples(self.predictor, self.manifest, chosen)
            self.try_wandb(log_wandb, self.wandb, line, better, examples)

    def draw_curves(self) -> None:
        """Write curves.svg, which a browser can show during the run."""
        drawing = curves(self.history, self.manifest.classes, self.manifest.colors)
        self.write_text("curves.svg", drawing)

    def write_text(self, name: str, text: str) -> None:
        """Write a file that people look at. On Windows, one that they have open cannot be replaced,
        which does not end the run."""
        try:
            if rank() == 0:
                write_text(self.out / name, text)
        except UserError as error:
            say(f"warning: {error}")

    def skipped_steps(self) -> int:
        """Steps that the scaler of fp16 skipped, as gradients overflowed; waits for the device."""
        return self.step - int(next(iter(self.optimizer.state.values()))["step"].item())

    def save(self, name: str) -> None:
        """Write a checkpoint of tensors and plain types, and metrics.jsonl. last.pt also has what
        only --resume needs. Nothing is written that is not finite."""
        if self.batch:
            self.mean_loss()  # raises an error if it is not finite
        weights = self.model.state_dict()
        finite = torch.stack([tensor.isfinite().all() for tensor in weights.values()]).all()
        self.require(bool(finite), "the weights became infinite or not a number")
        progress = {key: getattr(self, key) for key in PROGRESS}
        progress["seconds"] = time.perf_counter() - self.started if self.batch else 0.0
        state = {
            "model": weights,
            "progress": progress | {"loss_sum": float(self.loss_sum)},
            "args": vars(self.args),
            "classes": self.manifest.classes,
            "colors": [list(color) for color in self.manifest.colors],
            "val_ids": self.manifest.keys(self.val_indices),
            "upright": self.upright,
            "scale": self.scale,
            "fingerprint": self.manifest.fingerprint,
            "images_per_step": self.batches.images_per_step,
            "class_weights": self.named_weights,
            "wandb_id": self.wandb_id,
            "launch": distributed.launch(),
            "origin": self.origin,
            "precision": PRECISIONS[self.dtype],
        }
        if name == "last.pt":
            state["optimizer"] = self.optimizer.state_dict()
            state["scaler"] = self.scaler.state_dict()
        if rank() == 0:
            models.save_checkpoint(self.out / name, state)
            lines = [json.dumps(line) + "\n" for line in self.history]
            self.write_text("metrics.jsonl", "".join(lines))

    def restore(self, state: dict) -> None:
        """Continue from a checkpoint. Raises UserError if that is not possible."""
        if state["fingerprint"] != self.manifest.fingerprint:
            other = f"{self.args.data} holds other masks than the run began with"
            raise UserError(f"{other}: prepare the same masks again")
        before, now = state["images_per_step"], self.batches.images_per_step
        if before != now:
            product = "--batch-size times --accumulate times processes"
            raise UserError(f"the run took {before} images per step, not {now}: keep {product}")
        epoch, batch, step = (state["progress"][name] for name in ("epoch", "batch", "step"))
        if batch > self.batches.steps or step != epoch * self.batches.steps + batch:
            raise UserError(f"{self.args.resume}: its steps do not add up: start again")
        self.model.load_state_dict(state["model"])
        if state["scaler"]:  # else it began in another precision, on another device
            self.scaler.load_state_dict(state["scaler"])
        old = state["args"]["epochs"] * self.batches.steps, state["args"]["lr"]
        new = self.args.epochs * self.batches.steps, self.args.lr
        rate, last = learning_rate(step, *new), learning_rate(max(step - 1, 0), *old)
        if rate != learning_rate(step, *old):
            say(f"the learning rate continues at {rate:.1e}; it was {last:.1e}: see --lr")
        groups = self.optimizer.state_dict()["param_groups"]  # all else in them is as at the start
        groups = [{**group, "lr": last * group["factor"]} for group in groups]
        moments = state["optimizer"]["state"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        for name in PROGRESS:
            setattr(self, name, state["progress"][name])
        self.loss_sum += state["progress"]["loss_sum"]
        self.started = -state["progress"].get("seconds", 0)
        self.checked_step, self.wandb_id = self.step, state["wandb_id"]
        began, command = state.get("origin", self.origin), self.origin["command"]
        before = began.get("command", "")
        if command not in before:  # as it is where torchrun repeats it
            began = began | {"command": f"{before}; {command}"}
        self.origin = began

    def catch_signals(self) -> None:
        """SIGINT, SIGTERM and a closed terminal stop the run after the current step, and a second
        SIGINT at once. With several ranks the first one saves; the others work on until then."""

        def note(number: int, _) -> None:
            self.signal = number
            signal.signal(signal.SIGINT, signal.default_int_handler)

        for number in dataset.SIGNALS:
            if number.name != "SIGHUP" or signal.getsignal(number) == signal.SIG_DFL:  # nohup
                signal.signal(number, signal.SIG_IGN if rank() else note)

    def check_signal(self) -> None:
        """After a signal: save, print the command that continues, exit as the shell expects."""
        if not self.signal:
            return
        self.save("last.pt")
        dataset.end_workers()
        command = f"python train.py --resume {shlex.quote((self.out / 'last.pt').as_posix())}"
        if world() > 1:
            command = f"the same torchrun options and {command.removeprefix('python ')}"
        say(f"\n{signal.Signals(self.signal).name}: saved. Go on with: {command}")
        if self.wandb:
            self.try_wandb(self.wandb.finish)
        sys.exit(128 + self.signal)

    def try_wandb(self, action: Callable, *arguments: object, **named: object) -> object:
        """Call Weights & Biases. It cannot end a training: a failure is reported once."""
        try:
            return action(*arguments, **named)
        except Exception as error:
            say(f"warning: Weights & Biases is off now ({error!r}); metrics.jsonl continues")
            self.wandb = None


def moment(device: torch.device) -> float | torch.cuda.Event:
    """Now, on the device: a GPU notes it when it gets there, since the host runs ahead."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: float | torch.cuda.Event, second: float | torch.cuda.Event) -> float:
    """The time between two moments, which the device has passed."""
    on_gpu = isinstance(first, torch.cuda.Event)
    return first.elapsed_time(second) / 1000 if on_gpu else second - first


def summary(line: dict, epochs: int, better: bool) -> str:
    """A line of metrics.jsonl for a person; a star marks the best epoch so far."""
    loss, rate, waiting = (line[k] for k in ("train_loss", "images_per_second", "data_wait"))
    ious = "  ".join(f"{name} {metrics.percent(iou)}" for name, iou in line["val_iou"].items())
    skipped = f"  {line['skipped_steps']} steps skipped" if line.get("skipped_steps") else ""
    return (
        f"epoch {line['epoch']}/{epochs}  loss {'-' if loss is None else f'{loss:.4f}'}  "
        f"fg mIoU {metrics.percent(line['val_foreground_miou'])}{' *' if better else '  '} {ious}  "
        f"{rate or 0:.1f} images/s ({waiting or 0:.0%} waiting)  {line['seconds']:.0f} s{skipped}"
    )


def start_wandb(args: argparse.Namespace, mode: str, run_id: str | None, computed: dict) -> object:
    """Start a run of Weights & Biases, with time limits; `run_id` continues an earlier one."""
    import wandb  # here, so that --wandb disabled does not need it

    if mode == "auto":
        mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "coco-segmentation"),
        name=os.environ.get("WANDB_NAME", Path(args.out).name),
        id=run_id,
        resume="allow" if run_id else None,
        dir=args.out,
        mode=mode,
        config=vars(args) | computed,
        settings=wandb.Settings(console="off", silent=True, **WANDB_LIMITS),
    )
    upload = f"{mode}; to upload: wandb sync {Path(run.dir).parent}"
    say(f"Weights & Biases: {run.url if mode == 'online' else upload}")
    return run


def log_wandb(run, line: dict, better: bool, examples: list) -> None:
    """Log a line of metrics.jsonl, and a few validation images with masks that can be shown."""
    import wandb

    names = ("train_loss", "lr", "images_per_second", "data_wait", "skipped_steps")
    values = {f"train/{name.removeprefix('train_')}": line.get(name) for name in names}
    values |= {f"val/{name}": line[f"val_{name}"] for name in ("loss", "miou", "foreground_miou")}
    values |= {f"val_iou/{name}": iou for name, iou in line["val_iou"].items()}
    values = {name: value for name, value in values.items() if value is not None}
    if better:
        run.summary.update({f"best/{k}": v for k, v in values.items() if k.startswith("val")})
    labels = dict(enumerate(line["val_iou"])) | {255: "ignored"}
    for number, example in enumerate(examples):
        layers = {"prediction": example.prediction, "ground_truth": example.mask}
        masks = {k: {"mask_data": mask, "class_labels": labels} for k, mask in layers.items()}
        picture = wandb.Image(example.image, masks=masks, caption=example.caption)
        values[f"examples/{number}"] = picture
    run.log(values | {"epoch": line["epoch"]}, step=line["step"])


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = common.ArgumentParser(description=__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--data", type=os.path.abspath, default="data", help="what prepare_masks.py wrote")
    add("--coco-root", type=os.path.abspath, metavar="ROOT", help="where moved images are now")
    add("--val-split", metavar="NAME", help="split to validate on (default: a fifth of the images)")
    add("--group", metavar="REGEX", help="keep images together whose paths give the same match")
    add("--size", type=int, default=512, help="side of training crops, short side in evaluation")
    add("--oversample", type=int, default=1, metavar="N", help="use rare images N times per epoch")
    balanced = "share of the crops that are drawn by class and centred on one of its pixels"
    add("--balance", type=float, default=0.0, metavar="SHARE", help=balanced)
    rare = "rare classes (default: those in fewer than 5%% of the images)"
    add("--rare", nargs="+", metavar="CLASS", help=rare)
    add("--workers", type=int, default=common.default_workers(), help="loader processes")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=list(models.MODELS), help="network (required)")
    add("--width", type=int, default=64, help="first channels of the U-Net")
    start = "coco, imagenet, none, or a checkpoint's path (default: coco where a network has it)"
    add("--weights", metavar="START", help=start)
    add("--freeze-norm", action="store_true", help="keep the batch norm statistics of the weights")
    add("--freeze-backbone", action="store_true", help="train only the heads, for few images")
    add = parser.add_argument_group("loss").add_argument
    add("--focal", action="store_true", help="focal loss")
    add("--gamma", type=float, default=2.0, help="exponent of the focal loss")
    add("--weighted", action="store_true", help="class weights from pixel counts")
    add("--dice", action="store_true", help="add soft Dice of the foreground")
    add = parser.add_argument_group("loop").add_argument
    add("--epochs", type=int, default=20, help="passes over the training images")
    add("--batch-size", type=int, default=8, help="images at once")
    add("--accumulate", type=int, default=1, metavar="N", help="batches per step")
    add("--lr", type=float, help="peak rate (default: 1e-4 from weights, 1e-3 from scratch)")
    add("--head-lr", type=float, help="rate of the head (default: 10 times --lr if it is fresh)")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="autocast")
    compiled = argparse.BooleanOptionalAction
    add("--compile", action=compiled, default=False, help="torch.compile the training forward")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--seed", type=int, default=0, help="seed of split, weights, order and crops")
    add = parser.add_argument_group("run").add_argument
    add("--out", help="run directory (default: runs/<model and loss>)")
    add("--resume", nargs="?", const="", metavar="PATH", help="continue (default: OUT/last.pt)")
    add("--save-every", type=float, default=30.0, metavar="MINUTES", help="minutes between saves")
    parser.set_defaults(fresh=None)  # classes that the weights do not know: a Run finds out
    modes = ["auto", "online", "offline", "disabled"]
    add("--wandb", choices=modes, default="auto", help="auto: online with an API key, else offline")
    return parser


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """The checked and completed arguments, and the checkpoint to resume from, if there is one."""
    parser, state = build_parser(), None
    args = parser.parse_args(argv)
    if args.resume is None and is_path(args.weights):  # that decides which network it is
        own = models.load_checkpoint(args.weights, mmap=True)["args"]
        parser.set_defaults(model=own["model"], width=own["width"])
        args = parser.parse_args(argv)
        for name in ("model", "width"):
            if getattr(args, name) != own[name]:
                parser.error(f"--{name} {getattr(args, name)}: {args.weights} has {own[name]}")
    last = Path(args.out or default_out(args), "last.pt")
    started = distributed.launch()
    again = started is not None and last.exists()
    if distributed.agreed(again and models.load_checkpoint(last).get("launch") == started):
        args.resume = ""  # a rank died, and torchrun repeats the command
    if args.resume is not None:
        args, state = resumed(parser, args, last, argv)
    elif args.model is None:
        parser.error(f"--model: choose {' or '.join(models.MODELS)}")
    else:
        args.out = str(last.parent)
        args.weights = absolute(args.weights or models.MODELS[args.model].STARTS[0])
        if args.lr is None:
            args.lr = 1e-3 if args.weights == "none" else 1e-4
    check_args(parser, args)
    if not state or Path(args.out).resolve() != Path(args.resume).parent.resolve():
        refuse_taken(Path(args.out, "last.pt"))
    return args, state


def resumed(
    parser: argparse.ArgumentParser, args: argparse.Namespace, last: Path, argv: list[str] | None
) -> tuple[argparse.Namespace, dict]:
    """The arguments, with those of the resumed run as defaults, and its checkpoint: `last`, unless
    --resume names one. Of what decides the results, only --lr and --epochs may change."""
    if not (args.resume or args.out or args.model):
        parser.error("--resume: which run? give its path, or --out, or --model and its flags")
    path = Path(args.resume or last)
    path = path / "last.pt" if path.is_dir() else path
    if not path.exists() and path.with_name("args.json").exists():
        raise UserError(f"{path.parent} ended before its first checkpoint: start without --resume")
    state = models.load_checkpoint(path, check=check_run)
    if "history" not in state["progress"] or "optimizer" not in state:
        raise UserError(f"{path} holds no optimizer: resume from the last.pt of its run")
    parser.set_defaults(**{**state["args"], "out": str(path.parent)})
    args = parser.parse_args(argv)
    args.resume = str(path)
    if args.weights != state["args"]["weights"]:  # else it may be of another system
        args.weights = absolute(args.weights)
    for name, value in state["args"].items():
        if name not in FREE_ARGUMENTS and getattr(args, name) != value:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag}: the run in {path} has {value}; --resume cannot change it")
    return args, state


def is_path(weights: str | None) -> bool:
    """Whether --weights names a checkpoint."""
    return weights not in (None, "coco", "imagenet", "none")


def absolute(weights: str) -> str:
    """The path that is valid in any folder, or the name as it is."""
    return os.path.abspath(weights) if is_path(weights) else weights


def check_run(state: dict) -> None:
    """Raise an error unless arguments and progress have the types that `Run` writes."""
    if "optimizer" not in state:
        return  # `resumed` has a sentence of its own for this
    # That these exist, or a KeyError. The last two lines test in the same way.
    _ = state["scaler"], state["wandb_id"], state["args"]["lr"], state["args"]["epochs"]
    expected = vars(build_parser().parse_args([]))
    for name, value in state["args"].items():
        kind = type(expected[name])
        if expected[name] is None:
            kinds = {"lr": float, "head_lr": float, "rare": list, "fresh": list}
            kind = kinds.get(name, str) | None
        listed = value if isinstance(value, list) else []
        if not isinstance(value, kind) or not all(isinstance(each, str) for each in listed):
            raise TypeError(name)
    progress = state["progress"]
    counts = [progress["epoch"], progress["batch"], progress["step"], state["images_per_step"]]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("progress")
    json.dumps([dict(line) for line in progress.get("history", [])])
    float(progress["best"]), float(progress["loss_sum"]), float(progress.get("seconds", 0))


def refuse_taken(last: Path) -> None:
    """Raise UserError if a run has already written last.pt."""
    if last.exists():
        raise UserError(f"{last.parent} holds a run already: --resume it, or choose another --out")


def default_out(args: argparse.Namespace) -> str:
    """runs/<model, loss, and whatever else differs from the defaults>."""
    values, defaults = vars(args), vars(build_parser().parse_args([]))
    switches = ("weighted", "focal", "dice", "freeze_norm", "freeze_backbone")
    parts = [str(args.model), *(name.replace("_", "-") for name in switches if values[name])]
    if args.weights:
        parts.append(Path(args.weights).parent.name if is_path(args.weights) else args.weights)
    numbers = ("oversample", "balance", "gamma", "size", "width", "batch_size", "lr", "head_lr")
    for name in (*numbers, "seed"):
        if values[name] != defaults[name]:
            parts.append(f"{name.replace('_', '-')}{values[name]}")
    return str(Path("runs", "-".join(parts)))


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot work before any data is touched."""
    model = models.MODELS[args.model]
    for name, value in {"--lr": args.lr, "--head-lr": args.head_lr}.items():
        if value is not None and not 0 < value < math.inf:
            parser.error(f"{name} {value}: give a number above 0")
    for name, value in {"--head-lr": args.head_lr, "--freeze-norm": args.freeze_norm}.items():
        if value and args.weights == "none":
            parser.error(f"{name}: only with --weights other than none")
    if args.freeze_backbone and ("imagenet" not in model.STARTS or args.weights == "none"):
        parser.error("--freeze-backbone: only for --model deeplab, with --weights")
    frozen = args.freeze_norm and args.weights != "imagenet"
    if args.batch_size < model.SMALLEST_BATCH and not frozen:
        parser.error(f"--batch-size: {args.model} needs {model.SMALLEST_BATCH} or more images")
    if args.width not in model.WIDTHS:
        parser.error(f"--width: {args.model} takes {model.WIDTHS[0]} to {model.WIDTHS[-1]}")
    if args.weights not in model.STARTS and not is_path(args.weights):
        starts = f"{', '.join(model.STARTS)} or a checkpoint"
        parser.error(f"--weights {args.weights}: {args.model} takes {starts}")
    if args.gamma != 2.0 and not args.focal:
        parser.error("--gamma: only with --focal")
    if args.rare and args.oversample == 1:
        parser.error("--rare: only with --oversample 2 or more")


def main(argv: list[str] | None = None) -> None:
    """Train and validate after each epoch; under torchrun as one of its processes."""
    with distributed.process_group():
        args, state = parse_args(argv)
        device = models.pick_device(args.device)
        if args.compile and device.type == "cuda" and distributed.world() > 1:
            raise UserError("--compile: not with several GPUs, whose batch norm it cannot compile")
        run = Run(args, device, weights="none" if state else args.weights)
        if state:
            run.restore(state)
        if run.epoch >= args.epochs:
            raise UserError(f"{args.out} is done: {args.epochs} epochs; raise --epochs to go on")
        with common.locked(run.out) if rank() == 0 else nullcontext():
            if rank() == 0:
                run.begin(new=state is None)
            run.catch_signals()
            run.fit()
            if run.wandb:
                run.try_wandb(run.wandb.finish)


if __name__ == "__main__":
    common.run_command(main)
