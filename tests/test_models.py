"""Shapes, the warm start, and checkpoints that cannot be half-written or run code."""

import argparse
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models import ResNet50_Weights
from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights, deeplabv3_resnet50

import models
from common import UserError
from evaluate import load_predictor
from models import (
    DeepLab,
    UNet,
    amp_dtype,
    build_model,
    build_optimizer,
    init_class_prior,
    load_checkpoint,
    model_from_checkpoint,
    pick_device,
    save_checkpoint,
)

CLASSES = ["background", "person", "car", "bus", "dog"]


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (8, 100), (1, 1), (7, 9)])
def test_unet_takes_any_size(size):
    model = UNet(3, width=4).eval()
    outputs = model(torch.randn(2, 3, *size))
    assert list(outputs) == ["out"]
    assert outputs["out"].shape == (2, 3, *size)


def test_unet_pads_with_the_pixels_of_the_edge():
    """So a picture of one colour gives the logits of a larger one."""
    model, images = UNet(3, 4).eval(), torch.ones(1, 3, 40, 48)
    with torch.no_grad():
        whole, part = (model(x)["out"] for x in (images, images[..., :33, :41]))
    torch.testing.assert_close(part, whole[..., :33, :41])


def test_unet_is_the_one_of_the_paper():
    """64-128-256-512: parameters counted by hand, convolutions without bias under batch norm."""

    def double(inputs, outputs):
        return 9 * inputs * outputs + 9 * outputs * outputs + 4 * outputs

    down = double(3, 64) + double(64, 128) + double(128, 256) + double(256, 512)
    up = sum(4 * 2 * c * c + c + double(2 * c, c) for c in (256, 128, 64))
    expected = down + up + 64 * 5 + 5
    assert sum(p.numel() for p in UNet(5).parameters()) == expected


def test_deeplab_is_torchvisions():
    torch.manual_seed(0)
    model = DeepLab(21).eval()
    assert sum(p.numel() for p in model.parameters()) == 42_004_074
    referee = deeplabv3_resnet50(weights=None, weights_backbone=None, aux_loss=True).eval()
    referee.load_state_dict(model.state_dict())
    images = torch.randn(1, 3, 72, 48)
    with torch.inference_mode():
        expected = referee(images)["out"]
        torch.testing.assert_close(model(images)["out"], expected, rtol=1e-3, atol=1e-4)
        assert list(model(images)) == ["out"]
        images = images[..., :65, :47]  # the same network at any size; see below for the upsampling
        grid = referee.classifier(referee.backbone(images)["out"])
        expected = torch.nn.functional.interpolate(grid, size=(72, 48), mode="bilinear")
        found = model(images)["out"]
        torch.testing.assert_close(found, expected[..., :65, :47], rtol=1e-3, atol=1e-4)
    outputs = model.train()(torch.randn(2, 3, 65, 50))
    assert {name: tuple(logits.shape) for name, logits in outputs.items()} == dict.fromkeys(
        ["out", "aux"], (2, 21, 9, 7)
    )


def test_image_pooling_is_torchvisions():
    torch.manual_seed(0)
    mine = DeepLab(2).classifier[0].convs[-1]
    referee = deeplabv3_resnet50(weights=None, weights_backbone=None).classifier[0].convs[-1]
    referee.load_state_dict(mine.state_dict())
    features = torch.rand(2, 2048, 5, 7)
    features = [features.clone().requires_grad_() for _ in range(2)]
    results = [pool.eval()(x) for pool, x in zip((mine, referee), features)]
    weights = torch.rand(results[0].shape)
    for result in results:
        (result * weights).sum().backward()
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(features[0].grad, features[1].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 48), (65, 50), (57, 40)])
def test_deeplab_upsamples_by_its_stride_at_any_size(size):
    """Cells that hold the coordinates of their centres give each pixel its own coordinates."""

    class Centres(torch.nn.Module):
        def forward(self, features):
            y, x = (8 * torch.arange(n) + 3.5 for n in features.shape[-2:])
            return torch.stack(torch.meshgrid(y, x, indexing="ij"))[None]

    model = DeepLab(2).eval()
    model.classifier = Centres()
    with torch.inference_mode():
        found = model(torch.zeros(1, 3, *size))["out"][0, :, 4:, 4:]
    height, width = size
    y, x = torch.arange(4.0, height), torch.arange(4.0, width)
    expected = torch.stack(torch.meshgrid(y, x, indexing="ij"))
    last = [8 * -(-n // 8) - 4.5 for n in size]  # beyond the centre of the last cell it is constant
    expected = torch.minimum(expected, torch.tensor(last)[:, None, None])
    torch.testing.assert_close(found, expected)


def test_logits_of_half_precision_are_upsampled_as_float32():
    model = DeepLab(3).eval().bfloat16()
    with torch.no_grad():
        logits = model(torch.ones(1, 3, 32, 32, dtype=torch.bfloat16))["out"]
    assert logits.dtype == torch.float32


# --- warm start ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A hub cache with stand-ins where torchvision looks for its weights; random, but plausible."""
    folder = tmp_path_factory.mktemp("torch")
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(1)
    donor = deeplabv3_resnet50(weights=None, weights_backbone=None, aux_loss=True).eval()
    weights = DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1
    torch.save(donor.state_dict(), folder / "hub" / "checkpoints" / Path(weights.url).name)
    backbone = dict(donor.backbone.state_dict())
    backbone |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    name = Path(ResNet50_Weights.IMAGENET1K_V2.url).name
    torch.save(backbone, folder / "hub" / "checkpoints" / name)
    return folder, donor


@pytest.fixture
def torch_home(hub, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(hub[0]))
    return hub[1]


@pytest.mark.parametrize(("classes", "theirs"), [
    ([*CLASSES, "airplane", "tv", "potted plant", "giraffe"], [0, 15, 7, 6, 12, 1, 20, 16]),
    (["background", "dog", "cat", "zebra"], [0, 12, 8]),
])  # fmt: skip
@torch.inference_mode()
def test_warm_start_is_the_donor_on_the_classes_of_both(torch_home, classes, theirs):
    model = build_model("deeplab", classes, weights="coco").eval()
    images = torch.randn(2, 3, 64, 80)
    expected, count = torch_home(images), len(theirs)
    found = {"out": model(images)["out"]}
    auxiliary = model.aux_classifier(model.backbone(images)["aux"])
    found["aux"] = torch.nn.functional.interpolate(auxiliary, size=(64, 80), mode="bilinear")
    for name, logits in found.items():
        mine, donor = logits[:, :count], expected[name][:, theirs]
        torch.testing.assert_close(mine, donor, rtol=1e-3, atol=1e-4)
        assert torch.equal(mine.argmax(dim=1), donor.argmax(dim=1)), name
        assert logits[:, count:].abs().amax() > 0  # the last class is fresh, not zero


def test_imagenet_fills_the_backbone_only(torch_home):
    model = build_model("deeplab", CLASSES, weights="imagenet")
    for name, value in torch_home.backbone.state_dict().items():
        if name in model.backbone.state_dict():
            assert torch.equal(model.backbone.state_dict()[name], value)
    assert not torch.equal(model.classifier[1].weight, torch_home.classifier[1].weight)


def test_what_starts_fresh_learns_faster():
    known, others = ["background", "person", "tv"], ["background", "giraffe"]
    for classes, weights, names in (
        (known, "coco", ["classifier.4", "aux_classifier.4"]),
        (others, "imagenet", ["classifier", "aux_classifier"]),
        (others, "none", []),
    ):
        model = DeepLab(len(classes))
        head = models.head_of("deeplab", weights)
        assert models.fresh_classes(classes, weights) == (classes if weights == "imagenet" else [])
        groups = build_optimizer(model, 1e-3, head, 10.0).param_groups
        factors = {id(p): group["factor"] for group in groups for p in group["params"]}
        assert len(factors) == len(list(model.parameters()))
        for name, parameter in model.named_parameters():
            fast = any(name.startswith(f"{module}.") for module in names)
            assert factors[id(parameter)] == (10 if fast else 1), name
        assert all(group["lr"] == 1e-3 * group["factor"] for group in groups)
    assert models.fresh_classes(others, "coco") == ["giraffe"]


@pytest.mark.parametrize(("weights", "frozen"), [("coco", True), ("imagenet", False)])
def test_frozen_batch_norm_keeps_the_statistics_of_the_weights(weights, frozen):
    model = DeepLab(3).train()
    models.freeze_norm(model, weights)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(1 if frozen else 2, 3, 32, 32))["out"].sum().backward()
    changed = {n for n, buffer in model.named_buffers() if not torch.equal(buffer, before[n])}
    assert not any(name.startswith("backbone") for name in changed)
    assert (len(changed) == 0) == frozen
    assert model.backbone.bn1.weight.grad is not None


def test_weights_that_cannot_be_had_are_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match="network is unreachable.*--weights none"):
        build_model("deeplab", CLASSES, weights="coco")
    name = Path(DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.url).name
    path = tmp_path / "hub" / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half a download")
    with pytest.raises(UserError, match=str(path)):
        build_model("deeplab", CLASSES, weights="coco")


@pytest.mark.parametrize("name", ["unet", "deeplab"])
def test_prior_is_what_an_untrained_network_predicts(name):
    prior = torch.tensor([0.9, 0.07, 0.03])
    model = build_model(name, CLASSES[:3], width=4)
    heads = (
        [model.classifier] if name == "unet" else [model.classifier[-1], model.aux_classifier[-1]]
    )
    for head in heads:
        torch.nn.init.zeros_(head.weight)
    init_class_prior(model, prior)
    for logits in model.train()(torch.randn(2, 3, 32, 32)).values():
        torch.testing.assert_close(logits.softmax(1)[1, :, 3, 3], prior)


def test_the_prior_of_a_class_without_pixels_is_finite():
    model = build_model("unet", ["background", "a", "b"], width=4)
    init_class_prior(model, torch.tensor([0.9, 0.1, 0.0]))
    expected = torch.tensor([0.9, 0.1, 1e-4]).log()
    torch.testing.assert_close(model.classifier.bias.detach(), expected)


# --- devices -------------------------------------------------------------------------------------


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    assert amp_dtype("bf16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(UserError, match="no device 'tpu'"):
        pick_device("tpu")


def test_a_gpu_has_a_number_and_is_the_current_one(monkeypatch):
    """torch.cuda.set_device refuses a device without a number."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with FakeTensorMode():
        assert chosen == [pick_device("cuda")]
    assert torch.cuda._utils._get_device_index(chosen[0]) == 0


@pytest.mark.parametrize(("capability", "auto"), [(7, torch.float16), (8, torch.bfloat16)])
def test_an_older_gpu_does_not_emulate_bf16(capability, auto, monkeypatch, checkpoint):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (capability, 5))
    monkeypatch.setattr("evaluate.model_from_checkpoint", lambda *_: None)
    gpu = torch.device("cuda:0")
    assert models.amp_dtype("auto", gpu) == auto
    args = argparse.Namespace(tile=False, scale=None, amp=None, flip=False)
    state = load_checkpoint(checkpoint) | {"precision": "bf16"}
    assert load_predictor(state, gpu, args).dtype == (torch.bfloat16 if capability > 7 else None)
    if capability == 7:
        with pytest.raises(UserError, match="--amp bf16 does not work on cuda:0"):
            models.amp_dtype("bf16", gpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(("flags", "dtype"), [("sse avx512_bf16", torch.bfloat16), ("avx2", None)])
def test_a_cpu_computes_in_bf16_where_it_can(flags, dtype, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"processor: 0\nflags\t: fpu {flags} x\n")
    monkeypatch.setattr(models, "CPU_FLAGS", tmp_path / "cpuinfo")
    cpu = torch.device("cpu")
    assert models.amp_dtype("auto", cpu) == dtype
    assert models.amp_dtype("off", cpu) is None
    monkeypatch.setattr(models, "CPU_FLAGS", tmp_path / "none")
    assert models.amp_dtype("auto", cpu) is None


def test_no_such_gpu_is_one_sentence():
    with pytest.raises(UserError, match="no device 'cuda:99' here.*--device cpu"):
        pick_device("cuda:99")


# --- checkpoints ---------------------------------------------------------------------------------


CLASSES_OF_STATE = ["background", "person"]


def a_state():
    """What a checkpoint must hold to be one, of the smallest network."""
    torch.manual_seed(0)
    model = build_model("unet", CLASSES_OF_STATE, width=1)
    return {
        "model": model.state_dict(),
        "args": {"model": "unet", "width": 1, "size": 32, "data": "d", "amp": "off"},
        "classes": CLASSES_OF_STATE,
        "colors": [[0, 0, 0], [255, 0, 0]],
        "val_ids": [["val", "1"]],
        "fingerprint": "",
    }


def same(one, other):
    return one["args"] == other["args"] and all(
        torch.equal(value, other["model"][name]) for name, value in one["model"].items()
    )


@pytest.mark.parametrize("mmap", [False, True])
def test_round_trip(tmp_path, mmap):
    save_checkpoint(tmp_path / "a.pt", a_state())
    loaded = load_checkpoint(tmp_path / "a.pt", mmap)
    assert same(loaded, a_state())
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_checkpoint(path, a_state())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left.*is its disk full"):
        save_checkpoint(path, {**a_state(), "args": None})
    assert same(load_checkpoint(path), a_state())
    assert os.listdir(tmp_path) == ["a.pt"]


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, a_state())
    whole, refused = path.read_bytes(), 0
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)  # the bit was in the padding
        except UserError:
            refused += 1
        else:
            assert same(loaded, a_state())
    assert refused > 100


EVIL = [
    None, True, -1, 0, 3.5, 10**9, 10**30, float("nan"), "", "x", "unet", [], {}, [[]], {"a": 1},
    torch.zeros(3), torch.zeros(1).expand(10**12), torch.zeros(2, 2).to_sparse(),
    torch.quantize_per_tensor(torch.zeros(4), 1.0, 0, torch.qint8),
    torch.zeros(4, dtype=torch.int8),
]  # fmt: skip


def test_no_mutated_checkpoint_breaks_it(tmp_path):
    """Each loads as what it was, or is refused, within seconds and megabytes."""
    path, refused = tmp_path / "a.pt", 0
    rng = random.Random(0)
    for _ in range(200):
        state = a_state()
        for _ in range(rng.randint(1, 2)):
            where = rng.choice([state, state, state["args"], state["model"]])
            key = rng.choice(list(where))
            if rng.random() < 0.2:
                del where[key]
            elif where is state["model"] and rng.random() < 0.3:
                where[key] = where[key].double()
            else:
                where[key] = rng.choice(EVIL)
            if not (isinstance(state.get("args"), dict) and isinstance(state.get("model"), dict)):
                break
        save_checkpoint(path, state)
        try:
            loaded = load_checkpoint(path)
        except UserError:
            refused += 1
        else:
            model_from_checkpoint(loaded, torch.device("cpu"))
    assert refused > 150


class Malice:
    def __reduce__(self):
        return os.system, ("touch /tmp/this_must_not_exist",)


def test_refused_checkpoints(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(UserError, match=f"no checkpoint at {path}"):
        load_checkpoint(path)
    save_checkpoint(path, a_state())
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=str(path)):
            load_checkpoint(path)
    torch.save({"version": 1, "model": Malice()}, path)
    with pytest.raises(UserError, match=str(path)):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Malice()))
    with pytest.raises(UserError, match=str(path)):
        load_checkpoint(path)
    assert not Path("/tmp/this_must_not_exist").exists()
    torch.save({"version": 99, "model": {}}, path)
    with pytest.raises(UserError, match="version 99"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(path)


def test_a_tensor_larger_than_its_file_is_refused(tmp_path):
    state = a_state()
    name, tensor = next(iter(state["model"].items()))
    state["model"][name] = torch.zeros(1).expand_as(tensor)
    save_checkpoint(tmp_path / "a.pt", state)
    with pytest.raises(UserError, match=f"a.pt is not a valid checkpoint.*{name}"):
        load_checkpoint(tmp_path / "a.pt")
