"""Weights & Biases, kept from ending or hanging what it watches.

    log = WandbLog("auto", Path("runs/unet"), run_id=None, config={"lr": 1e-3})
    log.log(line, pictures, confusion)
    log.finish()

metrics.jsonl holds the same figures, whatever happens here.
"""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

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
