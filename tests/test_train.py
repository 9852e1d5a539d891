"""The loop through its command line: every model with every loss, resuming, logging, refusals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from conftest import SCRIPTS, TINY, command
from PIL import Image
from wandb_file import records

import train
from manifest import load_manifest
from models import load_checkpoint

LOSSES = {"ce": [], "weighted": ["--weighted"], "focal": ["--focal"]}
LOSSES["weighted-focal"] = ["--weighted", "--focal", "--gamma", "1.5"]


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_times(out):
    times = ("images_per_second", "seconds")
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
    assert set(line["val_iou"]) == {"background", "person", "car", "bus", "dog"}
    state = load_checkpoint(out / "last.pt")
    assert (state["class_weights"] is not None) == ("weighted" in loss)
    assert len(state["val_ids"]) == 9
    assert sorted(os.listdir(out)) == ["args.json", "best.pt", "last.pt", "metrics.jsonl"]


def test_the_loss_falls_and_the_metric_rises(data, tmp_path):
    """On a colour a class, a U-Net of width 8 gets somewhere in a minute."""
    out = tmp_path / "run"
    flags = "--model unet --epochs 12 --oversample 3 --lr 1e-2".split()
    train.main(["--data", str(data), "--out", str(out), *TINY, "--width", "8", *flags])
    lines = lines_of(out)
    assert lines[-1]["train_loss"] < 0.6 * lines[0]["train_loss"]
    assert max(line["val_foreground_miou"] for line in lines) > 0.3
    best = max(lines, key=lambda line: line["val_foreground_miou"])
    assert load_checkpoint(out / "best.pt")["progress"]["epoch"] == best["epoch"]


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
    decayed, rest = train.build_optimizer(model, 1e-3).param_groups
    assert [p.ndim for p in decayed["params"]] == [4]
    assert len(rest["params"]) == 3
    assert rest["weight_decay"] == 0 < decayed["weight_decay"]


# --- resuming ----------------------------------------------------------------------------------


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
    for key in ("model", "optimizer", "progress", "random"):
        assert equal(a[key], b[key]), key
    assert without_times(first) == without_times(second)


def test_resume_after_an_epoch_or_inside_one_ends_bit_equal(data, tmp_path, monkeypatch):
    flags = ["--data", str(data), *TINY, "--model", "unet", "--epochs", "3"]
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    train.main([*flags, "--out", str(alone)])

    original = train.train_step
    for stop_at in (3, 6, 11):  # inside the first epoch, between two, inside the second

        def step(run, images, masks, stop_at=stop_at):
            loss = original(run, images, masks)
            if run.progress.step + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return loss

        monkeypatch.setattr(train, "train_step", step)
        arguments = (
            [*flags, "--out", str(stopped)]
            if stop_at == 3
            else ["--resume", str(stopped / "last.pt")]
        )
        with pytest.raises(SystemExit) as stop:
            train.main(arguments)
        assert stop.value.code == 128 + signal.SIGTERM
        assert load_checkpoint(stopped / "last.pt")["progress"]["step"] == stop_at
    monkeypatch.setattr(train, "train_step", original)
    train.main(["--out", str(stopped), "--resume"])
    same_run(alone, stopped)


def test_lines_of_unfinished_epochs_are_dropped_on_resume(data, checkpoint, tmp_path):
    out = tmp_path / "run"
    flags = ["--data", str(data), *TINY, "--model", "unet", "--out", str(out)]
    train.main([*flags, "--epochs", "1"])
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"epoch": 2}) + "\n" + '{"epoch": 3, "tr')
    train.main(["--resume", str(out / "last.pt"), "--epochs", "2"])
    assert [line["epoch"] for line in lines_of(out)] == [1, 2]


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


# --- Weights & Biases --------------------------------------------------------------------------


def test_offline_run_is_read_back(data, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    out = tmp_path / "run"
    flags = [*TINY[:-2], "--wandb", "auto", "--model", "unet", "--epochs", "2", "--weighted"]
    train.main(["--data", str(data), "--out", str(out), *flags])
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
    chart = config["_wandb", "visualize", "val/confusion"]["panel_config"]
    assert chart["panelDefId"] == "wandb/confusion_matrix/v1"
    (path, *_) = sorted((out / "wandb").rglob("confusion_table*.json"))
    cells = json.loads(path.read_text())["data"]
    assert len(cells) == 25
    assert sum(share for truth, _, share in cells if truth == "person") == pytest.approx(100, abs=1)


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


HANGING = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {scripts!r})
import track, train, wandb
track.SECONDS = 3
log = wandb.Run.log
def log_and_stop_the_service(*args, **kwargs):
    log(*args, **kwargs)
    for path in Path("/proc").glob("[0-9]*/stat"):
        name, _, rest = path.read_text().rpartition(")")
        if "(wandb-core" in name and int(rest.split()[1]) == os.getpid():
            print("service", path.parent.name, flush=True)
            os.kill(int(path.parent.name), signal.SIGSTOP)
wandb.Run.log = log_and_stop_the_service
train.main(sys.argv[1:])
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the service in /proc")
def test_a_wandb_that_hangs_cannot_hang_a_training(data, tmp_path):
    out = tmp_path / "run"
    flags = [*TINY[:-2], "--wandb", "offline", "--model", "unet", "--epochs", "2"]
    line = [sys.executable, "-c", HANGING.format(scripts=str(SCRIPTS)), *flags, "--data", data]
    alone = {key: value for key, value in os.environ.items() if "WANDB" not in key}  # own service
    line = [*map(str, line), "--out", str(out)]
    with open(tmp_path / "log", "w") as log:  # no pipe: the stopped service would keep it open
        result = subprocess.run(line, stdout=log, stderr=log, timeout=120, env=alone)
    printed = (tmp_path / "log").read_text()
    services = {int(word) for word in re.findall(r"service (\d+)", printed)}
    for service in services:
        os.kill(service, signal.SIGKILL)
    assert services, printed
    assert result.returncode == 0, printed
    assert len(lines_of(out)) == 2
    assert printed.count("no more Weights & Biases") == 1


# --- refusals ----------------------------------------------------------------------------------


def test_bad_combinations_are_refused_before_any_data_is_read(refused):
    def sentence(*flags):
        return refused("train", "--data", "/nowhere", *flags)

    assert "--model" in sentence()
    assert "2 or more" in sentence("--model", "deeplab", "--batch-size", 1)
    assert "--width" in sentence("--model", "deeplab", "--width", 32)
    assert "--gamma" in sentence("--model", "unet", "--gamma", 1)
    assert "--rare" in sentence("--model", "unet", "--rare", "dog")
    assert "--weights" in sentence("--model", "unet", "--weights", "coco")
    assert "--size" in sentence("--model", "unet", "--size", 8)
    assert "--lr" in sentence("--model", "unet", "--lr", 0)
    assert "--lr" in sentence("--model", "unet", "--lr", "nan")
    assert "no manifest at /nowhere" in sentence("--model", "unet")


def test_refusals(data, checkpoint, tmp_path, refused):
    base = ["--data", data, *TINY, "--model", "unet", "--out", tmp_path / "run"]
    assert "--rare cow" in refused("train", *base, "--oversample", 2, "--rare", "cow")
    assert "train2017, val2017" in refused("train", *base, "--val-split", "test2017")
    assert "24 training images" in refused("train", *base, "--batch-size", 100)
    only_people = tmp_path / "people"
    shutil.copytree(data, only_people)
    content = json.loads((only_people / "manifest.json").read_text())
    for image in content["images"]:
        image["pixels"][2:] = [0, 0, 0]
    (only_people / "manifest.json").write_text(json.dumps(content))
    sentence = refused("train", *base, "--data", only_people, "--oversample", 2)
    assert "no class is in fewer than 5%" in sentence
    assert "fp16 needs a GPU" in refused("train", *base, "--amp", "fp16")
    if not torch.cuda.is_available():
        assert "no device 'cuda'" in refused("train", *base, "--device", "cuda")
    assert not (tmp_path / "run").exists()
    assert "holds a run already" in refused("train", *base, "--out", checkpoint.parent)
    assert "no checkpoint at" in refused("train", *base, "--resume")
    assert "cannot change it" in refused("train", "--resume", checkpoint, "--batch-size", 5)
    assert "is done" in refused("train", "--resume", checkpoint)
    (tmp_path / "file").write_text("")
    assert "cannot write" in refused("train", *base, "--out", tmp_path / "file" / "run")


def test_resume_with_other_masks_is_refused(data, tmp_path, refused):
    out = tmp_path / "run"
    train.main(["--data", str(data), *TINY, "--model", "unet", "--epochs", "1", "--out", str(out)])
    content = json.loads((data / "manifest.json").read_text())
    content["images"][0]["pixels"][0] += 1
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    flags = ["--resume", out / "last.pt", "--epochs", 2, "--data", tmp_path]
    assert "not those that the run began with" in refused("train", *flags)
    assert len(load_manifest(tmp_path)) == 33


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, refused):
    out = tmp_path / "run"
    flags = ["--data", data, *TINY, "--model", "unet", "--epochs", 3, "--out", out, "--lr", 1e30]
    assert "the loss became" in refused("train", *flags)
    assert "lower --lr" in refused("train", *flags)
    assert not (out / "best.pt").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_label_out_of_range_is_one_sentence_from_any_process(data, tmp_path, workers):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    manifest = load_manifest(copy)
    path = copy / "masks_raw" / manifest.masks[2]
    Image.fromarray(np.full(manifest.sizes[2], 9, dtype=np.uint8)).save(path)
    flags = [*TINY, "--model", "unet", "--workers", workers, "--out", tmp_path / "run"]
    result = command("train.py", "--data", copy, *flags)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    expected = (
        f"train.py: error: {path} holds the label 9, which is neither a class (0 to 4) nor 255"
    )
    assert result.stderr.strip().startswith(expected)


def test_bf16_on_a_cpu(data, tmp_path):
    flags = [*TINY, "--model", "unet", "--epochs", "1", "--amp", "bf16"]
    train.main(["--data", str(data), *flags, "--out", str(tmp_path / "run")])
    (line,) = lines_of(tmp_path / "run")
    assert 0 < line["train_loss"] < 10
