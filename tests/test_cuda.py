"""What only a GPU can show; skipped where there is none. `make test` runs it where there is one."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, TINY, command
from test_no_sync import CLASSES, a_batch, evaluation_step

import train
from common import load_manifest
from dataset import evaluation_loader
from evaluate import Predictor, evaluate
from losses import Totals, pixel_weights, total_dice_sums, total_loss
from metrics import ConfusionMatrix
from models import build_model, load_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

# As the other tests have it, but for the device and the precision.
GPU = TINY[: TINY.index("--device")] + ["--device", "cuda", "--wandb", "disabled"]


@pytest.fixture
def exact():
    """Float32 as it is on a CPU: TF32 keeps ten bits of what it multiplies."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture
def no_sync():
    """Within it an operation that makes the host wait for the GPU raises an error."""

    class Mode:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    return Mode()


def a_run(data, out, *flags):
    """A run on the GPU, and its first batches."""
    line = ["--data", data, *GPU, "--epochs", 1, "--out", out, *flags]
    args, _ = train.parse_args([str(word) for word in line])
    run = train.Run(args, torch.device("cuda"), weights="none")
    run.model.train()
    batches = list(run.loader)[: args.accumulate]
    assert all(tensor.is_pinned() for batch in batches for tensor in batch)  # else copies wait
    return run, [[tensor.cuda() for tensor in batch] for batch in batches]


@pytest.mark.parametrize("flags", [
    ["--model", "unet", "--amp", "auto", "--dice"],
    ["--model", "unet", "--amp", "fp16", "--weighted", "--focal"],
    ["--model", "deeplab", "--width", 64, "--weights", "none", "--amp", "auto"],
    ["--model", "deeplab", "--width", 64, "--weights", "none", "--accumulate", 2, "--amp", "off",
     "--dice"],
], ids=lambda flags: "-".join(map(str, flags[1:])))  # fmt: skip
def test_a_training_step_does_not_wait_for_the_gpu(data, tmp_path, no_sync, flags):
    run, batches = a_run(data, tmp_path / "run", *flags)
    run.train_step(batches)  # what is done once may wait: cudnn's choice, the optimizer's state
    with no_sync:
        loss = run.train_step(batches)
    assert torch.isfinite(loss)


def test_an_evaluation_step_does_not_wait_for_the_gpu(no_sync):
    model = build_model("unet", CLASSES, 4).cuda().eval()
    images, masks = a_batch("cuda")
    with torch.inference_mode():
        evaluation_step(model, "cuda", images, masks)
        with no_sync:
            confusion = evaluation_step(model, "cuda", images, masks)
    assert confusion.total.sum() == 2 * 32 * 32


def test_the_mode_sees_a_wait(no_sync):
    with pytest.raises(RuntimeError), no_sync:
        torch.ones(1, device="cuda").item()


def test_the_matrix_is_the_cpus(data, exact):
    """Of the same labels to the pixel. The logits, whose deviation is 77, differ by rounding, about
    1e-4: of these 85,184 pixels a few have two classes that close. TF32 would change hundreds."""
    torch.manual_seed(0)
    manifest = load_manifest(data)
    model = build_model("unet", manifest.classes, 4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 4:  # labels that change from place to place
                torch.nn.init.normal_(parameter, std=2 / parameter[0].numel() ** 0.5)
    loader = evaluation_loader(manifest, np.arange(len(manifest)), 32, 4, workers=0)
    cpu = evaluate(Predictor(model, 32, torch.device("cpu")), loader, "cpu")
    gpu = evaluate(Predictor(model.cuda(), 32, torch.device("cuda")), loader, "gpu")
    assert (cpu.total > 0).sum() > 5
    assert (cpu.total - gpu.total.cpu()).abs().sum() <= 40  # of 20 pixels, each in two cells
    labels = torch.randint(0, 5, (2, 50, 60), dtype=torch.uint8)
    labels[1, :5] = 255
    matrices = [ConfusionMatrix(1, 5, torch.device(name)) for name in ("cpu", "cuda")]
    for matrix, device in zip(matrices, ("cpu", "cuda")):
        matrix.update(0, labels[0].to(device), labels[1].to(device))
    assert torch.equal(matrices[0].total, matrices[1].total.cpu())
    assert torch.equal(matrices[0].counts, matrices[1].counts.cpu())


@pytest.mark.parametrize("side", [5, 40])  # of logits that are upsampled by 8, or not at all
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_loss_and_gradient_are_the_cpus(gamma, side, exact):
    torch.manual_seed(0)
    logits, masks = torch.randn(2, 5, side, side), torch.randint(0, 5, (2, 40, 40)).byte()
    masks[0, :9] = 255
    results = []
    for device in ("cpu", "cuda"):
        x = logits.to(device).detach().requires_grad_()
        weight = torch.linspace(0.5, 3, 5, device=device)
        outputs, labels = {"out": x, "aux": -x}, masks.to(device)
        weights = pixel_weights(labels, weight).sum()
        totals = Totals(weights, total_dice_sums(outputs, labels))
        loss = total_loss(outputs, labels, weight, gamma, totals)
        results.append([loss.cpu(), torch.autograd.grad(loss, x)[0].cpu()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-8)


def test_only_a_gpu_with_nothing_to_do_waits_for_data(data, tmp_path, monkeypatch):
    """A step of 1e9 cycles takes over 0.4 s on any GPU, in which the host waits for the next batch
    at no cost: of 6 batches only the first one's 0.4 s count. With empty steps, all of them do."""
    run, _ = a_run(data, tmp_path / "run", "--model", "unet")
    batches = list(run.loader)

    def slow_batches():
        for batch in batches:
            time.sleep(0.4)
            yield batch

    waits = []
    for cycles in (10**9, 1):
        run.loader, run.batch = slow_batches(), 0

        def step(_, cycles=cycles):
            torch.cuda._sleep(cycles)
            return torch.zeros((), device="cuda")

        monkeypatch.setattr(run, "train_step", step)
        waits.append(run.train_one_epoch()["data_wait"])
    assert waits[0] < 0.3
    assert waits[1] > 0.8


@pytest.mark.parametrize("flags", [[], ["--compile"]], ids=["eager", "compiled"])
def test_the_commands(data, coco, tmp_path, flags):
    out = tmp_path / "run"
    line = ["--data", data, *GPU, "--model", "unet", "--epochs", 6, "--out", out, *flags]
    line += ["--lr", 1e-2, "--dice", "--balance", 0.5, "--weighted"]  # else it learns background
    for script, *words in (
        ["train.py", *line],
        ["train.py", "--resume", out / "last.pt", "--epochs", 8],
        ["evaluate.py", "--ckpt", out / "best.pt", "--json", tmp_path / "a.json"],
        ["predict.py", "--ckpt", out / "best.pt", "--images", coco / "val2017", "--out", out / "p"],
    ):
        result = command(script, *words)
        assert result.returncode == 0, result.stderr
    best = load_checkpoint(out / "best.pt")["progress"]["best"]
    (entry,) = json.loads((tmp_path / "a.json").read_text())
    assert best > 0.05  # 0.33 on a CPU
    assert entry["foreground_miou"] == pytest.approx(best, abs=1e-2)
    assert len(list((out / "p" / "masks_raw").iterdir())) == 9


def test_a_gradient_that_overflows_skips_its_step_and_is_counted(data, tmp_path, monkeypatch):
    run, batches = a_run(data, tmp_path / "run", "--model", "unet", "--amp", "fp16")
    run.train_step(batches)
    run.step += 1
    skipped = run.skipped_steps()  # none, or that one, as the first scale is a guess
    before = [parameter.clone() for parameter in run.model.parameters()]
    original = train.total_loss
    monkeypatch.setattr(train, "total_loss", lambda *a: original(*a) * float("inf"))
    run.train_step(batches)
    run.step += 1
    assert all(map(torch.equal, before, run.model.parameters()))
    assert run.skipped_steps() == skipped + 1


def test_a_full_gpu_is_a_sentence(data, tmp_path, refused):
    flags = ["--data", str(data), *GPU, "--model", "unet", "--out", str(tmp_path / "run")]
    flags += ["--width", "64", "--size", "512", "--batch-size", "8"]
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.5e9 / total)  # of 5 GB that it needs
    try:
        assert "out of memory: lower" in refused("train", *flags)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
def test_two_gpus_train_as_one(data, tmp_path):
    """Synchronized batch norm sees the images of both, so that only the order of sums differs.
    Weights that hardly move, and no TF32, leave nothing else: without synchronization the losses
    differ by 0.6% and the running means by up to 6%. tests/test_ranks.py has the gradients."""
    lines, models = {}, {}
    for ranks, batch_size in ((1, 8), (2, 4)):
        out = tmp_path / str(ranks)
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        line += [ranks, SCRIPTS / "train.py", "--data", data, *GPU, "--batch-size", batch_size]
        line += ["--model", "unet", "--epochs", 2, "--lr", 1e-30, "--amp", "off", "--out", out]
        options = {"env": {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}, "timeout": 300}
        result = subprocess.run([*map(str, line)], capture_output=True, text=True, **options)
        assert result.returncode == 0, result.stderr
        models[ranks] = load_checkpoint(out / "last.pt")["model"]
        lines[ranks] = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    for one, two in zip(lines[1], lines[2], strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    for name in (name for name in models[1] if "running" in name):
        torch.testing.assert_close(models[2][name], models[1][name], rtol=1e-3, atol=1e-4)
