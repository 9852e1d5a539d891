"""The loop through its command line: every model with every loss, resuming, logging, refusals."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import wandb
from conftest import SCRIPTS, TINY, command
from PIL import Image
from wandb_file import records

import common
import dataset
import train
from common import load_manifest
from losses import class_weights, segmentation_loss
from models import build_model, build_optimizer, load_checkpoint, save_checkpoint
from train import Run

LOSSES = {"ce": [], "weighted": ["--weighted"], "focal": ["--focal"]}
LOSSES["weighted-focal"] = ["--weighted", "--focal", "--gamma", "1.5"]
LOSSES["dice"] = ["--dice", "--balance", "0.5"]


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_times(out):
    times = ("images_per_second", "data_wait", "seconds")
    return [{k: v for k, v in line.items() if k not in times} for line in lines_of(out)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", ["unet", "deeplab"])
def test_every_model_with_every_loss(data, tmp_path, model, loss):
    flags = ["--model", model, *LOSSES[loss], "--epochs", 1, "--oversample", 2, "--rare", "dog"]
    flags += ["--batch-size", 12, "--size", 32, "--val-split", "val2017", "--wandb", "disabled"]
    flags += ["--width", 4] if model == "unet" else ["--weights", "none"]
    out = tmp_path / "run"
    result = command("train.py", "--data", data, "--out", out, "--workers", 1, *flags)
    assert result.returncode == 0, result.stderr
    (line,) = lines_of(out)
    assert line["step"] == 25 // 12
    assert 0 < line["train_loss"] < 10
    assert 0 < line["val_loss"] < 10
    assert "minutes per epoch" not in result.stdout  # two steps tell little
    assert set(line["val_iou"]) == {"background", "person", "car", "bus", "dog"}
    state = load_checkpoint(out / "last.pt")
    assert (state["class_weights"] is not None) == ("weighted" in loss)
    assert len(state["val_ids"]) == 9
    names = [".lock", "args.json", "best.pt", "curves.svg", "last.pt", "metrics.jsonl"]
    assert sorted(os.listdir(out)) == names


def test_the_loss_falls_and_the_metric_rises(data, tmp_path):
    """On a colour per class, a U-Net of width 8 gets somewhere in a minute."""
    out = tmp_path / "run"
    flags = "--model unet --epochs 12 --oversample 3 --lr 1e-2".split()
    train.main(["--data", str(data), "--out", str(out), *TINY, "--width", "8", *flags])
    lines = lines_of(out)
    assert lines[-1]["train_loss"] < 0.6 * lines[0]["train_loss"]
    assert max(line["val_foreground_miou"] for line in lines) > 0.3
    best = max(lines, key=lambda line: line["val_foreground_miou"])
    assert load_checkpoint(out / "best.pt")["progress"]["epoch"] == best["epoch"]


def test_the_loss_of_an_epoch_is_the_mean_over_its_own_steps(data, tmp_path, monkeypatch):
    """Of which there are six: 0 to 5, then 6 to 11."""
    monkeypatch.setattr(Run, "train_step", lambda run, _: torch.tensor(float(run.step)))
    flags = ["--model", "unet", "--epochs", "2", "--out", str(tmp_path / "run")]
    train.main(["--data", str(data), *TINY, *flags])
    assert [line["train_loss"] for line in lines_of(tmp_path / "run")] == [2.5, 8.5]


def test_learning_rate():
    rates = np.array([train.learning_rate(step, 1000, 0.1) for step in range(1001)])
    assert rates[0] == pytest.approx(0.1 / 30)
    assert rates[29] == pytest.approx(0.1)
    assert (np.diff(rates[:30]) > 0).all()
    assert (np.diff(rates[30:]) < 0).all()
    assert rates[515] == pytest.approx(0.1 * 0.5**0.9)
    assert rates[1000] == 0
    assert train.learning_rate(0, 1, 0.1) == 0.1


def test_biases_and_norms_are_not_decayed():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    decayed, rest = build_optimizer(model, 1e-3).param_groups
    assert [p.ndim for p in decayed["params"]] == [4]
    assert len(rest["params"]) == 3
    assert rest["weight_decay"] == 0 < decayed["weight_decay"]


# --- resuming ------------------------------------------------------------------------------------


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same_run(first, second):
    a, b = load_checkpoint(first / "last.pt"), load_checkpoint(second / "last.pt")
    for state in (a, b):
        for line in state["progress"]["history"]:
            del line["images_per_second"], line["data_wait"], line["seconds"]
    for key in ("model", "optimizer", "progress", "wandb_id"):
        assert equal(a[key], b[key]), key
    assert without_times(first) == without_times(second)


DEEPLAB = ["--weights", "none", "--width", "64", "--batch-size", "8"]  # it has dropout


@pytest.mark.parametrize(
    ("flags", "epochs", "stops"),
    # Inside the first epoch, between two, inside the second.
    [(["--model", "unet"], 3, (3, 6, 11)), (["--model", "deeplab", *DEEPLAB], 1, (1,))],
)
def test_resume_after_an_epoch_or_inside_one_ends_bit_equal(
    data, tmp_path, monkeypatch, flags, epochs, stops
):
    flags = ["--data", str(data), *TINY, *flags, "--epochs", str(epochs)]
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    train.main([*flags, "--out", str(alone)])

    original = Run.train_step
    for stop_at in stops:

        def step(run, batches, stop_at=stop_at):
            loss = original(run, batches)
            if run.step + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return loss

        monkeypatch.setattr(Run, "train_step", step)
        resume = ["--resume", str(stopped / "last.pt")]
        with pytest.raises(SystemExit) as stop:
            train.main([*flags, "--out", str(stopped)] if stop_at == stops[0] else resume)
        assert stop.value.code == 128 + signal.SIGTERM
        assert load_checkpoint(stopped / "last.pt")["progress"]["step"] == stop_at
    monkeypatch.setattr(Run, "train_step", original)
    train.main(["--out", str(stopped), "--resume"])
    same_run(alone, stopped)


def test_the_seconds_of_an_epoch_are_those_before_an_interruption_too(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    flags = ["--data", str(data), *TINY, "--model", "unet", "--epochs", "3", "--out", str(out)]
    original = Run.train_step

    def step(run, batches):
        if run.step + 1 == 8:  # the second of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, batches)

    monkeypatch.setattr(Run, "train_step", step)
    with pytest.raises(SystemExit):
        train.main(flags)
    monkeypatch.undo()
    state = load_checkpoint(out / "last.pt")
    assert state["progress"]["batch"] == 2
    assert 0 < state["progress"]["seconds"] < 100
    state["progress"]["seconds"] = 1000.0
    save_checkpoint(out / "last.pt", state)
    train.main(["--out", str(out), "--resume"])
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert [line["seconds"] > 1000 for line in lines] == [False, True, False]
    assert load_checkpoint(out / "last.pt")["progress"]["seconds"] == 0


def test_the_number_of_workers_changes_no_bit(data, tmp_path):
    flags = ["--data", str(data), *TINY, "--model", "deeplab", "--weights", "none", "--epochs", "1"]
    flags = [*flags, "--batch-size", "12", "--width", "64"]
    for workers in ("0", "1", "4"):
        torch.rand(int(workers))  # whatever the global random state is
        train.main([*flags, "--out", str(tmp_path / workers), "--workers", workers])
    same_run(tmp_path / "0", tmp_path / "1")
    same_run(tmp_path / "0", tmp_path / "4")


KILLED = """
import os, random, signal, sys
sys.path.insert(0, {scripts!r})
import common, train
out, kills, flags = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
rng = random.Random(0)
left = -1

def mortal(module, name):
    # Before and after each call the process may die.
    function = getattr(module, name)
    def call(*arguments, **named):
        live()
        result = function(*arguments, **named)
        live()
        return result
    setattr(module, name, call)

def live():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

for name in ("train_step", "save"):
    mortal(train.Run, name)
mortal(train, "evaluate")
for name in ("fsync", "replace"):
    mortal(common.os, name)

killed = 0
while True:
    saved = os.path.exists(out + "/last.pt")
    left = rng.randint(1, 30) if killed < kills else -1
    child = os.fork()
    if not child:
        train.main(["--out", out, "--resume"] if saved else ["--out", out, *flags])
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert status == signal.SIGKILL, status
    killed += 1
print("killed", killed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_run_killed_ten_times_ends_bit_equal_to_one_left_alone(data, tmp_path):
    flags = ["--data", data, *TINY, "--model", "unet", "--epochs", "5", "--save-every", "0"]
    line = [sys.executable, "-c", KILLED.format(scripts=str(SCRIPTS)), tmp_path / "killed", 10]
    result = subprocess.run([*map(str, [*line, *flags])], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "killed 10" in result.stdout
    train.main([*map(str, flags), "--out", str(tmp_path / "alone")])
    same_run(tmp_path / "alone", tmp_path / "killed")
    best = [load_checkpoint(tmp_path / name / "best.pt") for name in ("alone", "killed")]
    assert equal(best[0]["model"], best[1]["model"])


def test_a_full_disk_leaves_the_last_checkpoint_whole(data, tmp_path):
    import resource

    out = tmp_path / "run"
    train.main(["--data", str(data), *TINY, "--model", "unet", "--epochs", "1", "--out", str(out)])
    before = (out / "last.pt").read_bytes()
    limit = len(before) // 2
    result = command(
        "train.py", "--resume", out / "last.pt", "--epochs", 2,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert result.returncode == 2
    assert f"cannot write {out}" in result.stderr
    assert "Traceback" not in result.stderr
    assert (out / "last.pt").read_bytes() == before
    assert not list(out.glob("*.tmp"))


def test_a_resumed_run_keeps_its_wandb_id(data, tmp_path):
    out = tmp_path / "run"
    flags = ["--data", str(data), *TINY[:-2], "--wandb", "offline", "--model", "unet"]
    train.main([*flags, "--epochs", "1", "--out", str(out)])
    first = load_checkpoint(out / "last.pt")["wandb_id"]
    time.sleep(1)  # W&B names a run's folder after the second in which it starts
    train.main(["--resume", str(out / "last.pt"), "--epochs", "2"])
    assert load_checkpoint(out / "last.pt")["wandb_id"] == first is not None
    assert len(list((out / "wandb").glob(f"offline-run-*-{first}"))) == 2


def test_metrics_are_those_of_the_checkpoint_after_a_resume(data, tmp_path):
    """Lines that a crash cut off or that belong to no saved epoch are gone, lost ones come back."""
    out = tmp_path / "run"
    flags = ["--data", str(data), *TINY, "--model", "unet", "--out", str(out)]
    train.main([*flags, "--epochs", "1"])
    (first,) = lines_of(out)
    (out / "metrics.jsonl").write_text(json.dumps({"epoch": 2}) + "\n" + '{"epoch": 3, "tr')
    train.main(["--resume", str(out / "last.pt"), "--epochs", "2"])
    assert [line["epoch"] for line in lines_of(out)] == [1, 2]
    assert lines_of(out)[0] == first


def test_a_fresh_run_keeps_no_metrics_of_an_older_one(data, tmp_path, refused):
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"epoch": 1}\n')
    flags = ["--data", data, *TINY, "--model", "unet", "--lr", 1e30, "--epochs", 1, "--out", out]
    assert "the loss became" in refused("train", *flags)
    assert not (out / "metrics.jsonl").exists()


def test_a_resumed_run_keeps_its_best_epoch(data, tmp_path):
    out = tmp_path / "run"
    flags = ["--data", str(data), *TINY, "--model", "unet", "--out", str(out)]
    train.main([*flags, "--epochs", "1"])
    state = load_checkpoint(out / "last.pt")
    state["progress"]["best"] = 0.99  # no epoch of these will reach that
    save_checkpoint(out / "last.pt", state)
    best = (out / "best.pt").read_bytes()
    train.main(["--resume", str(out / "last.pt"), "--epochs", "2"])
    assert (out / "best.pt").read_bytes() == best
    assert load_checkpoint(out / "last.pt")["progress"]["best"] == 0.99


def test_ctrl_c_saves_and_names_the_command(data, tmp_path):
    out = tmp_path / "run"
    flags = [
        "--data",
        data,
        *TINY,
        "--workers",
        2,
        "--model",
        "unet",
        "--epochs",
        500,
        "--out",
        out,
    ]
    line = [sys.executable, str(SCRIPTS / "train.py"), *map(str, flags)]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (out / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert f"python train.py --resume {out / 'last.pt'}" in stdout
    assert "Traceback" not in stdout + stderr
    epoch = load_checkpoint(out / "last.pt")["progress"]["epoch"]
    assert [entry["epoch"] for entry in lines_of(out)] == list(range(1, epoch + 1))


# --- Weights & Biases ----------------------------------------------------------------------------


def test_offline_run_is_read_back(data, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    out = tmp_path / "run"
    flags = [*TINY[:-2], "--wandb", "auto", "--model", "unet", "--epochs", "2", "--weighted"]
    train.main(["--data", str(data), "--out", str(out), *flags])
    found, deadline = [], time.monotonic() + 30
    while not any(record.WhichOneof("record_type") == "exit" for record in found):
        assert time.monotonic() < deadline  # wandb's service writes on after finish() has returned
        time.sleep(0.2)
        found = records(out / "wandb")
    config, history, summary = {}, [], {}
    for record in found:
        for item in [*record.run.config.update, *record.config.update]:
            config[item.key or tuple(item.nested_key)] = json.loads(item.value_json)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append(
                {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            )
        for item in record.summary.update:
            summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    assert config["model"] == "unet"
    assert config["class_weights"].keys() == {"background", "person", "car", "bus", "dog"}
    for line, logged in zip(lines_of(out), history, strict=True):
        assert logged["train/loss"] == pytest.approx(line["train_loss"])
        assert logged["train/lr"] == pytest.approx(line["lr"])
        assert logged["val/miou"] == pytest.approx(line["val_miou"])
        for name, iou in line["val_iou"].items():
            assert iou is None or logged[f"val_iou/{name}"] == pytest.approx(iou)
        assert logged["examples/0/_type"] == "image-file"
        for name in ("prediction", "ground_truth"):
            path = logged[f"examples/0/masks/{name}/path"]
            (picture,) = (out / "wandb").rglob(Path(path).name)
            assert Image.open(picture).size == (
                logged["examples/0/width"],
                logged["examples/0/height"],
            )
    assert config["rare_classes"] == ["dog"]
    best = max(lines_of(out), key=lambda line: line["val_foreground_miou"])
    assert summary["best/val/foreground_miou"] == pytest.approx(best["val_foreground_miou"])
    assert summary["best/val_iou/person"] == pytest.approx(best["val_iou"]["person"])


@pytest.mark.parametrize("broken", ["init", "log"])
def test_a_failing_wandb_ends_nothing_and_says_so_once(data, tmp_path, monkeypatch, capsys, broken):
    def fail(*_, **__):
        raise BrokenPipeError("the service is gone")

    if broken == "init":
        monkeypatch.setattr(wandb, "init", fail)
    else:
        monkeypatch.setattr(wandb.Run, "log", fail)
    out = tmp_path / "run"
    flags = [*TINY[:-2], "--wandb", "offline", "--model", "unet", "--epochs", "2"]
    train.main(["--data", str(data), "--out", str(out), *flags])
    assert len(lines_of(out)) == 2
    assert capsys.readouterr().out.count("the service is gone") == 1


SILENT = """
import sys
sys.path.insert(0, {scripts!r})
import train
train.WANDB_LIMITS |= dict(init_timeout=3, finish_timeout=3)
train.main(sys.argv[1:])
"""


def test_a_wandb_server_that_never_answers_cannot_hang_a_training(data, tmp_path):
    out = tmp_path / "run"
    flags = [*TINY[:-2], "--wandb", "online", "--model", "unet", "--epochs", "2"]
    line = [sys.executable, "-c", SILENT.format(scripts=str(SCRIPTS)), *flags, "--data", data]
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, and is silent
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        env = {key: value for key, value in os.environ.items() if "WANDB" not in key}
        env |= {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}
        result = subprocess.run(
            [*map(str, line), "--out", str(out)], env=env, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert len(lines_of(out)) == 2
    assert result.stdout.count("Weights & Biases is off now") == 1, result.stdout


# --- what goes wrong on the way ------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_its_steps(data, tmp_path, monkeypatch, refused):
    out = tmp_path / "run"
    flags = ["--data", data, *TINY, "--model", "unet", "--out", out]
    train.main([*map(str, flags), "--epochs", "1"])
    before = (out / "last.pt").read_bytes()
    original = train.total_loss
    spoilt = []

    def loss(outputs, masks, *rest):
        spoilt.append(masks)
        return original(outputs, masks, *rest) * (float("nan") if len(spoilt) == 3 else 1)

    monkeypatch.setattr(train, "total_loss", loss)
    sentence = refused("train", "--resume", out / "last.pt", "--epochs", 2)
    assert "the loss became nan in one of the steps 7 to 12: lower --lr" in sentence
    assert (out / "last.pt").read_bytes() == before


def test_steps_that_the_scaler_skips_are_counted(monkeypatch):
    """As fp16 does on a GPU: gradients that overflow change no weight, and the run goes on."""
    torch.manual_seed(0)
    model = build_model("unet", ["background", "person", "car"], width=4)
    args = SimpleNamespace(epochs=2, lr=1e-2, seed=0, gamma=2.0, focal=False, dice=False)
    run = SimpleNamespace(
        args=args, batches=SimpleNamespace(steps=5), device=torch.device("cpu"), dtype=None, step=0,
        ddp_model=model, weight=None, optimizer=build_optimizer(model, 1e-2),
        scaler=torch.amp.GradScaler("cpu"), autocast=nullcontext,
    )  # fmt: skip
    batch = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.ones(2, 32, 32, dtype=torch.uint8)
    original, skipped = train.total_loss, []
    for factor in (float("inf"), 1.0, 1.0, float("inf"), 1.0):
        monkeypatch.setattr(train, "total_loss", lambda *a, f=factor: original(*a) * f)
        before = [p.detach().clone() for p in model.parameters()]
        Run.train_step(run, [batch])
        run.step += 1
        skipped.append(Run.skipped_steps(run))
        changed = not all(map(torch.equal, before, model.parameters()))
        assert changed == (factor == 1)
    assert skipped == [1, 1, 1, 2, 2]


def bare_run(model, **changed):
    """What `train_step` needs of a Run."""
    args = {"epochs": 2, "lr": 1e-2, "seed": 0, "gamma": 2.0, "focal": False, "dice": False}
    return SimpleNamespace(
        args=SimpleNamespace(**args | changed), batches=SimpleNamespace(steps=5), step=0,
        device=torch.device("cpu"), dtype=None, autocast=nullcontext, weight=None, ddp_model=model,
        optimizer=build_optimizer(model, 1e-2), scaler=torch.amp.GradScaler("cpu", enabled=False),
    )  # fmt: skip


@pytest.mark.parametrize(("focal", "gamma"), [(False, 0.0), (True, 2.0)])
def test_gamma_is_of_the_focal_loss_alone(focal, gamma):
    torch.manual_seed(0)
    model = build_model("unet", ["background", "person", "car"], width=4).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    masks = torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        logits = model(dataset.normalize(images))["out"]
    loss = Run.train_step(bare_run(model, focal=focal), [(images, masks)])
    torch.testing.assert_close(loss, segmentation_loss(logits, masks, gamma=gamma))


def test_dropout_is_a_function_of_seed_step_and_rank(monkeypatch):
    model = build_model("unet", ["background", "person", "car"], width=4)
    batch = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.ones(2, 32, 32, dtype=torch.uint8)
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for seed, step, rank in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        monkeypatch.setattr(train, "rank", lambda rank=rank: rank)
        run = bare_run(model, seed=seed)
        run.step = step
        Run.train_step(run, [batch])
    assert len(set(seeds)) == 4
    assert seeds[0] == seeds[-1]


@pytest.mark.parametrize("dice", [False, True])
def test_accumulated_batches_give_the_step_of_the_whole(dice):
    """With batch norm frozen; more pixels are ignored in one part than in the other."""
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    masks = torch.randint(0, 3, (8, 32, 32), dtype=torch.uint8)
    masks[:3, 4:] = 255
    after = []
    for parts in ([slice(0, 8)], [slice(0, 4), slice(4, 8)], [slice(0, 1), slice(1, 8)]):
        torch.manual_seed(0)
        model = build_model("unet", ["background", "person", "car"], width=4).eval()
        args = SimpleNamespace(epochs=2, lr=1e-2, seed=0, gamma=2.0, focal=True, dice=dice)
        run = SimpleNamespace(
            args=args, batches=SimpleNamespace(steps=5), device=torch.device("cpu"), dtype=None,
            model=model, ddp_model=model, weight=torch.tensor([0.5, 1.0, 3.0]), step=3,
            autocast=nullcontext,
            scaler=torch.amp.GradScaler("cpu", enabled=False),
        )  # fmt: skip
        run.optimizer = torch.optim.SGD([{"params": model.parameters(), "factor": 1.0}], lr=1e-2)
        run.dice_of_parts = partial(Run.dice_of_parts, run)
        loss = Run.train_step(run, [(images[part], masks[part]) for part in parts])
        after.append([loss, *(p.detach() for p in model.parameters())])
    for other in after[1:]:
        for one, value in zip(after[0], other):
            torch.testing.assert_close(value, one, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("parts", [1, 2])
def test_dice_of_a_step_in_parts_is_that_of_its_forwards(data, tmp_path, monkeypatch, parts):
    """With dropout, which must fall alike in both forwards, and batch norm, which counts one."""
    flags = ["--model", "deeplab", "--weights", "none", "--size", "32", "--batch-size", "2"]
    flags += ["--dice", "--accumulate", str(parts), "--amp", "off", "--wandb", "disabled"]
    line = ["--data", str(data), *flags, "--workers", "0", "--out", str(tmp_path / "run")]
    run = Run(train.parse_args(line)[0], torch.device("cpu"), "none")
    run.model.train()
    seen, averaged, original = [], [], train.total_loss

    def recorded(outputs, masks, weight, gamma, totals):
        seen.append((train.total_dice_sums(outputs, masks), totals.dice))
        return original(outputs, masks, weight, gamma, totals)

    monkeypatch.setattr(train, "total_loss", recorded)
    monkeypatch.setattr(train, "mean_over_ranks", lambda x: averaged.append(x.shape) or x)
    run.train_step(list(run.loader)[:parts])
    for _, totals in seen:
        torch.testing.assert_close(totals, sum(sums for sums, _ in seen))
    assert run.model.backbone.bn1.num_batches_tracked == parts
    assert averaged.count((2, 3, 5)) == 1


def test_class_weights_are_of_the_pixels_that_are_drawn(data, tmp_path):
    line = ["--data", data, *TINY, "--model", "unet", "--weighted", "--balance", 0.5]
    line += ["--oversample", 9, "--rare", "bus"]
    args, _ = train.parse_args([*map(str, line), "--out", str(tmp_path / "run")])
    run = Run(args, torch.device("cpu"), "none")
    rows, _ = dataset.split_indices(run.manifest, args.seed, args.val_split)
    rows = dataset.oversample(run.manifest, rows, ["bus"], 9)
    expected = class_weights(dataset.drawn_pixels(run.manifest, rows, 0.5))
    assert list(run.named_weights.values()) == pytest.approx(expected.tolist())
    assert expected[4] < 0.9 * class_weights(run.manifest.pixels[rows].sum(axis=0))[4]


def test_scale_and_exif_are_those_of_most_training_images(data, tmp_path, monkeypatch):
    """One of which is upright, and all validation images, which are small besides."""
    manifest = load_manifest(data)
    other = (manifest.splits == "val2017")[:, None]
    sizes, upright = np.where(other, 8, manifest.sizes), other[:, 0].copy()
    upright[np.flatnonzero(~upright)[0]] = True
    changed = replace(manifest, sizes=sizes, upright=upright)
    monkeypatch.setattr(common, "load_manifest", lambda *_: changed)
    line = ["--data", data, *TINY, "--model", "unet", "--out", tmp_path / "run"]
    run = Run(train.parse_args([*map(str, line)])[0], torch.device("cpu"), "none")
    assert (run.upright, run.scale) == (False, 32 / 48)


def test_no_validation_image_is_drawn(data, tmp_path):
    """Neither for its class nor as a rare one: the dog, in one of 24 training images, is rare, but
    would not be among all 33."""
    line = ["--data", data, *TINY, "--model", "unet", "--oversample", 3, "--balance", 0.5]
    args, _ = train.parse_args([*map(str, line), "--out", str(tmp_path / "run")])
    run = Run(args, torch.device("cpu"), "none")
    assert run.rare == ["dog"]
    rows, _ = dataset.split_indices(run.manifest, args.seed, args.val_split)
    for epoch in range(9):
        run.batches.set_epoch(epoch)
        assert {row for batch in run.batches for _, _, row, _ in batch} <= set(rows.tolist())


def test_a_run_from_weights_freezes_its_norm_and_has_two_rates(data, tmp_path):
    """With a fresh network in the place of COCO's weights."""
    flags = ["--model", "deeplab", "--weights", "coco", "--size", "32", "--batch-size", "1"]
    flags += ["--freeze-norm", "--head-lr", "5e-4", "--amp", "off", "--wandb", "disabled"]
    line = ["--data", str(data), *flags, "--workers", "0", "--out", str(tmp_path / "run")]
    run = Run(train.parse_args(line)[0], torch.device("cpu"), "none")
    run.batches.steps = 2
    run.loader = list(run.loader)[:2]
    run.train_one_epoch()
    assert not any(b.any() for n, b in run.model.named_buffers() if n.endswith("running_mean"))
    rates = sorted({round(group["lr"], 9) for group in run.optimizer.param_groups})
    assert rates[1] == pytest.approx(5 * rates[0])
    run.out.mkdir()
    run.epoch, run.batch = 1, 0
    run.save("last.pt")
    again, state = train.parse_args(["--resume", str(tmp_path / "run" / "last.pt")])
    other = Run(again, torch.device("cpu"), "none")
    other.batches.steps = 2
    other.restore(state)
    for mine, theirs in zip(run.optimizer.param_groups, other.optimizer.param_groups):
        assert theirs["lr"] == mine["lr"]
        for one, two in zip(mine["params"], theirs["params"]):
            moments = [
                o.state[p]["exp_avg"] for o, p in ((run.optimizer, one), (other.optimizer, two))
            ]
            assert torch.equal(*moments)


def test_accumulate_through_the_command_line(data, tmp_path):
    out = tmp_path / "run"
    flags = ["--model", "unet", "--epochs", "1", "--accumulate", "2", "--out", str(out)]
    train.main(["--data", str(data), *TINY, *flags])
    assert lines_of(out)[0]["step"] == 24 // (4 * 2)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_a_loader_process_that_dies_is_a_sentence(data, tmp_path, monkeypatch, refused):
    read = dataset.load_image

    def deadly(manifest, row, scale=1):
        if torch.utils.data.get_worker_info() is not None and row == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(manifest, row, scale)

    monkeypatch.setattr(dataset, "load_image", deadly)
    flags = ["--data", data, *TINY, "--model", "unet", "--out", tmp_path / "run", "--workers", 2]
    assert "a loader process died" in refused("train", *flags)


def test_a_notebook_whose_output_is_no_file(monkeypatch):
    shown = []
    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=shown.append, flush=lambda: None))
    with pytest.raises(SystemExit) as stop:
        common.run_command(lambda: print("done"))
    assert (stop.value.code, shown) == (None, ["done", "\n"])


def test_a_missing_compiler_is_one_sentence(refused, monkeypatch):
    """On Linux, on Windows, and of a GPU, in the words of torch and its parts."""
    for error in (
        "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx",
        "Compiler: cl is not found.",
        "Cannot find a working triton installation.",
    ):
        monkeypatch.setattr(train, "main", Mock(side_effect=RuntimeError(error)))
        assert "use --no-compile" in refused("train")


def test_a_dead_loader_process_shows_in_two_ways(capsys):
    """As a lost connection, or as an error that torch raises in a signal handler."""

    def ended(error):
        def main():
            raise error

        with pytest.raises(SystemExit) as stop:
            common.run_command(main)
        return stop.value.code

    assert ended(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")) == 2
    assert ended(ConnectionResetError()) == 2
    assert capsys.readouterr().err.count("a loader process died") == 2
    with pytest.raises(RuntimeError, match="a bug"):
        ended(RuntimeError("a bug"))


def test_out_of_memory_says_what_to_lower(data, tmp_path, monkeypatch, refused):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(train, "total_loss", full)
    sentence = refused("train", "--data", data, *TINY, "--model", "unet", "--out", tmp_path / "run")
    assert "out of memory: lower --size" in sentence
    assert "--accumulate" in sentence


# --- refusals ------------------------------------------------------------------------------------


def test_bad_combinations_are_refused_before_any_data_is_read(refused):
    def sentence(*flags):
        return refused("train", "--data", "/nowhere", *flags)

    assert "--model" in sentence()
    assert "which run?" in sentence("--resume")
    assert "2 or more" in sentence("--model", "deeplab", "--batch-size", 1)
    assert "--width" in sentence("--model", "deeplab", "--width", 32)
    assert "--gamma" in sentence("--model", "unet", "--gamma", 1)
    assert "--rare" in sentence("--model", "unet", "--rare", "dog")
    assert "--weights" in sentence("--model", "unet", "--weights", "coco")
    assert "--size" in sentence("--model", "unet", "--size", 8)
    assert "--lr" in sentence("--model", "unet", "--lr", 0)
    assert "--lr" in sentence("--model", "unet", "--lr", "nan")
    assert "--balance 1.5: give 0 to 1" in sentence("--model", "unet", "--balance", 1.5)
    assert "--head-lr 0.0" in sentence("--model", "deeplab", "--head-lr", 0)
    assert "--head-lr: only with" in sentence("--model", "unet", "--head-lr", 1e-3)
    scratch = ["--model", "deeplab", "--weights", "none"]
    assert "--freeze-norm: only with" in sentence(*scratch, "--freeze-norm")
    one = ["--model", "deeplab", "--batch-size", 1, "--freeze-norm"]
    assert "2 or more" in sentence(*one, "--weights", "imagenet")
    assert "no manifest" in sentence(*one)
    assert "no manifest at /nowhere" in sentence("--model", "unet")


def test_a_cpu_is_told_once_how_long_it_takes(capsys):
    """100 steps of 60 s are 100 minutes; 18 epochs are left."""
    parts = {"batches": SimpleNamespace(steps=100), "args": SimpleNamespace(epochs=20)}
    run = SimpleNamespace(told_duration=False, epoch=2, **parts)
    train.Run.tell_duration(run, 60.0)
    said = capsys.readouterr().out
    assert "about 100 minutes per epoch on this CPU, 30.0 hours in all" in said
    assert "--model unet --width 16" in said
    train.Run.tell_duration(run, 60.0)
    assert capsys.readouterr().out == ""
    run.told_duration = False
    train.Run.tell_duration(run, 1.0)
    assert "lower" not in (said := capsys.readouterr().out)
    assert "about 2 minutes per epoch" in said
    run.told_duration = False
    train.Run.tell_duration(run, 0.5)  # under a minute: nobody needs to know
    assert capsys.readouterr().out == ""


def test_a_run_that_learns_only_the_background_says_what_to_try(data, tmp_path, capsys):
    sentence = "little more than background: try --dice --balance 0.5"
    flags = ["--data", str(data), *TINY, "--model", "unet", "--epochs", "1"]
    train.main([*flags, "--lr", "1e-9", "--out", str(tmp_path / "a")])
    assert sentence in capsys.readouterr().out
    train.main([*flags, "--epochs", "8", "--dice", "--lr", "1e-2", "--out", str(tmp_path / "b")])
    said = capsys.readouterr().out
    assert load_checkpoint(tmp_path / "b" / "best.pt")["progress"]["best"] > 0.01, said
    assert sentence not in said


def test_refusals(data, checkpoint, tmp_path, refused):
    base = ["--data", data, *TINY, "--model", "unet", "--out", tmp_path / "run"]
    assert "--rare cow" in refused("train", *base, "--oversample", 2, "--rare", "cow")
    assert "train2017, val2017" in refused("train", *base, "--val-split", "test2017")
    assert "24 training images" in refused("train", *base, "--batch-size", 100)
    only_people = tmp_path / "people"
    shutil.copytree(data, only_people)
    content = json.loads((only_people / "manifest.json").read_text())
    for image in content["images"]:
        image["pixels"] = {label: n for label, n in image["pixels"].items() if label in "01"}
    (only_people / "manifest.json").write_text(json.dumps(content))
    sentence = refused("train", *base, "--data", only_people, "--oversample", 2)
    assert "no class is in fewer than 5%" in sentence
    assert "fp16 does not work on cpu" in refused("train", *base, "--amp", "fp16")
    if not torch.cuda.is_available():
        assert "no device 'cuda'" in refused("train", *base, "--device", "cuda")
    assert not (tmp_path / "run").exists()
    assert "holds a run already" in refused("train", *base, "--out", checkpoint.parent)
    assert "no checkpoint at" in refused("train", *base, "--resume")
    assert "cannot change it" in refused("train", "--resume", checkpoint, "--size", 64)
    assert "cannot change it" in refused("train", "--resume", checkpoint, "--weights", "a.pt")
    assert "is done" in refused("train", "--resume", checkpoint)
    (tmp_path / "file").write_text("")
    assert "cannot use" in refused("train", *base, "--out", tmp_path / "file" / "run")


def test_a_run_from_a_checkpoint_resumes_on_another_system(data, checkpoint, tmp_path):
    flags = ["--data", str(data), *TINY, "--weights", str(checkpoint), "--epochs", "1"]
    train.main([*flags, "--out", str(tmp_path)])
    state = load_checkpoint(tmp_path / "last.pt")
    state["args"]["weights"] = path = r"C:\runs\a\best.pt"
    save_checkpoint(tmp_path / "last.pt", state)
    args, _ = train.parse_args(["--resume", str(tmp_path), "--epochs", "2"])
    assert args.weights == path


def test_resume_with_other_masks_is_refused(data, tmp_path, refused):
    out = tmp_path / "run"
    train.main(["--data", str(data), *TINY, "--model", "unet", "--epochs", "1", "--out", str(out)])
    content = json.loads((data / "manifest.json").read_text())
    content["images"][0]["checksum"] += 1
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    flags = ["--resume", out / "last.pt", "--epochs", 2, "--data", tmp_path]
    assert "other masks than the run began with" in refused("train", *flags)
    assert len(load_manifest(tmp_path)) == 33


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, refused):
    out = tmp_path / "run"
    flags = ["--data", data, *TINY, "--model", "unet", "--epochs", 3, "--out", out, "--lr", 1e30]
    assert "the loss became" in refused("train", *flags)
    assert "lower --lr" in refused("train", *flags)
    assert not (out / "best.pt").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_changed_mask_is_one_sentence_from_any_process(data, tmp_path, workers):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    manifest = load_manifest(copy)
    path = copy / "masks_raw" / manifest.masks[2]
    Image.fromarray(np.full(manifest.sizes[2], 9, dtype=np.uint8)).save(path)
    flags = [*TINY, "--model", "unet", "--workers", workers, "--out", tmp_path / "run"]
    result = command("train.py", "--data", copy, *flags)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.strip().startswith(f"train.py: error: {path} is not the mask that")


def test_compile_changes_nothing_but_the_speed(data, tmp_path, monkeypatch):
    """The forward is captured as for a GPU, but run by torch's own operators, to save a minute."""
    compiled, original = [], torch.compile

    def compile_(function, **_):
        compiled.append(function)
        return original(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)  # nor after a validation
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        line = ["--data", data, *TINY, "--model", "unet", "--epochs", 2, *flags]
        train.main([*map(str, line), "--out", str(tmp_path / name)])
    assert len(compiled) == 1
    for line, other in zip(*(lines_of(tmp_path / name) for name in ("plain", "compiled"))):
        assert other["train_loss"] == pytest.approx(line["train_loss"], rel=1e-3)
    names = [
        load_checkpoint(tmp_path / n / "last.pt")["model"].keys() for n in ("plain", "compiled")
    ]
    assert names[0] == names[1]


def test_bf16_on_a_cpu(data, tmp_path):
    flags = [*TINY, "--model", "unet", "--epochs", "1", "--amp", "bf16"]
    train.main(["--data", str(data), *flags, "--out", str(tmp_path / "run")])
    (line,) = lines_of(tmp_path / "run")
    assert 0 < line["train_loss"] < 10
