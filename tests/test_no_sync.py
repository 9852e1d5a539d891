"""Nothing in a step of training or evaluation waits for the GPU, and nothing lands on the wrong
device: read off the operations themselves, which needs no GPU."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dataset import normalize
from evaluate import Predictor
from losses import total_loss
from metrics import ConfusionMatrix
from models import build_model, build_optimizer
from train import Run

CLASSES = ["background", "person", "car"]
READS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal", "item"}


class NoSync(TorchDispatchMode):
    """Fails on an operation that makes the host wait for a value of the device."""

    def __init__(self):
        super().__init__()
        self.operations = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        self.operations.add(name)
        assert name.rstrip("_") not in {read.rstrip("_") for read in READS}, name
        if name in ("index", "index_put", "index_put_"):
            for index in args[1]:
                assert index is None or index.dtype not in (torch.bool, torch.uint8), name
        result = function(*args, **(kwargs or {}))
        for source in args:
            if isinstance(source, torch.Tensor) and isinstance(result, torch.Tensor):
                assert (source.device.type, result.device.type) != ("cuda", "cpu"), name
        return result


def a_run(model, device, gamma=2.0, dice=True):
    run = SimpleNamespace(
        args=SimpleNamespace(epochs=2, lr=1e-3, seed=0, gamma=gamma, focal=gamma > 0, dice=dice),
        batches=SimpleNamespace(steps=5),
        device=torch.device(device),
        dtype=None,
        step=0,
        model=model,
        ddp_model=model,
        weight=torch.ones(len(CLASSES), device=device),
        optimizer=build_optimizer(model, 1e-3),
        scaler=torch.amp.GradScaler(device, enabled=False),
    )
    run.autocast = partial(Run.autocast, run)
    run.dice_of_parts = partial(Run.dice_of_parts, run)
    return run


def a_batch(device):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, device=device)
    masks = torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8, device=device)
    return images, masks


def a_loader(images, masks):
    """What `Predictor.predict` needs of a loader: one batch of two images of 32 x 32."""

    class Loader:
        dataset = SimpleNamespace(manifest=SimpleNamespace(sizes=np.full((2, 2), 32)))

        def __iter__(self):
            yield images, masks, [0, 1]

    return Loader()


def on_fake_cuda(model):
    """The model with fake CUDA parameters; Module.to() cannot swap those."""
    for module in model.modules():
        for tensors, wrap in (
            (module._parameters, torch.nn.Parameter),
            (module._buffers, lambda x: x),
        ):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                layout = {"size": tensor.size(), "stride": tensor.stride(), "dtype": tensor.dtype}
                tensors[name] = wrap(torch.empty_strided(**layout, device="cuda"))
    return model


def evaluation_step(model, device, images, masks):
    confusion = ConfusionMatrix(2, len(CLASSES), torch.device(device))
    predictor = Predictor(model, 32, images.device)
    for row, labels, mask, logits in predictor.predict(a_loader(images, masks)):
        confusion.update(row, labels, mask)
        confusion.loss += predictor.loss(logits, mask)
    return confusion


@pytest.mark.parametrize("name", ["unet", "deeplab"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_training_step_reads_nothing_back(name, parts):
    run = a_run(build_model(name, CLASSES, width=4), "cpu")
    run.model.train()
    images, masks = a_batch("cpu")
    with NoSync() as mode:
        loss = Run.train_step(run, [(images, masks)] * parts)
    assert {"convolution_backward", "_fused_adamw_"} <= mode.operations
    assert torch.isfinite(loss)


class ChannelsLast(TorchDispatchMode):
    """Notes operations with a result of many channels that is not channels last."""

    def __init__(self):
        super().__init__()
        self.seen, self.others = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            many = isinstance(tensor, torch.Tensor) and tensor.ndim == 4 and tensor.shape[1] >= 8
            if many and min(tensor.shape[2:]) > 1 and 0 not in tensor.stride():
                self.seen += 1
                if tensor.stride(1) != 1:
                    self.others.add(function.__name__)
        return result


@pytest.mark.parametrize("name", ["unet", "deeplab"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_training_step_is_channels_last_to_the_end(name, dtype):
    run = a_run(build_model(name, CLASSES, width=8), "cpu")
    run.dtype = dtype
    run.model.train()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with ChannelsLast() as mode:
        Run.train_step(run, [(images, torch.zeros(2, 64, 64, dtype=torch.uint8))])
    assert mode.seen > 100
    assert mode.others == set()


@pytest.mark.parametrize("name", ["unet", "deeplab"])
@torch.no_grad()
def test_an_evaluation_step_reads_nothing_back(name):
    model = build_model(name, CLASSES, width=4).eval()
    images, masks = a_batch("cpu")
    masks[:, :4] = 255
    with NoSync() as mode:
        confusion = evaluation_step(model, "cpu", images, masks)
    assert "scatter_add_" in mode.operations
    assert confusion.total.sum() == 2 * 28 * 32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_labels_read_nothing_back(device):
    with FakeTensorMode() if device == "cuda" else nullcontext(), NoSync() as mode:
        labels = Predictor(None, 32, None).labels(torch.zeros(3, 32, 32, device=device), 64, 64)
        assert labels.device.type == device
    assert "maximum" in mode.operations


@pytest.mark.parametrize("action", [
    lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: torch.bincount(x.flatten()),
    lambda x: bool((x > 0).any()), lambda x: x.nonzero(),
])  # fmt: skip
def test_the_mode_sees_a_sync(action):
    with pytest.raises(AssertionError), NoSync():
        action(torch.ones(3, 3, dtype=torch.int64))


@pytest.mark.parametrize("name", ["unet", "deeplab"])
def test_everything_is_made_on_the_device_of_the_images(name):
    """Fake CUDA tensors have a device and a shape but no memory; mixing devices raises. Without a
    GPU autograd has no backward for them."""
    model = build_model(name, CLASSES, width=4)
    with FakeTensorMode(), NoSync(), torch.no_grad():
        model = on_fake_cuda(model).train()
        images, masks = a_batch("cuda")
        for weight in (None, torch.ones(len(CLASSES), device="cuda")):
            loss = total_loss(model(normalize(images)), masks, weight, 2.0)
            assert loss.device.type == "cuda"
        confusion = evaluation_step(model.eval(), "cuda", images, masks)
        assert confusion.total.device.type == "cuda"
        assert confusion.counts.shape == (2, 3, 3)


def test_the_fake_mode_sees_a_tensor_on_the_wrong_device():
    with FakeTensorMode():
        logits = torch.zeros(2, 4, 4, device="cuda")
        assert Predictor(None, 4, None).labels(logits, 8, 8).device.type == "cuda"
        with pytest.raises(RuntimeError, match="device"):
            logits + torch.zeros(2, 4, 4)
