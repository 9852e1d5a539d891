"""U-Net and DeepLabV3-ResNet50, warm start, devices, optimizer groups, and checkpoints on disk.

    model = build_model("deeplab", classes=["background", "person", "car"], weights="coco")
    logits = model(images)["out"]            # (N, C, H, W), at the size of the images

Every model returns a dict with "out", and in training mode DeepLab adds "aux", its auxiliary head.
To add a model, write a class with the attributes of `UNet` and enter it in `MODELS`.
"""

import math
import os
import platform
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.compiler import is_exporting
from torchvision.models import ResNet50_Weights
from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights, deeplabv3_resnet50
from torchvision.models.segmentation.deeplabv3 import DeepLabV3

from common import LARGEST_SIZE, UserError, atomic_write

CHECKPOINT_VERSION = 1
WEIGHT_DECAY = 0.01
DONOR = DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1
CPU_FLAGS = Path("/proc/cpuinfo")

# The weights' metadata spells these names of COCO as Pascal VOC does.
VOC_NAMES = {
    "background": "__background__",
    "airplane": "aeroplane",
    "couch": "sofa",
    "dining table": "diningtable",
    "motorcycle": "motorbike",
    "potted plant": "pottedplant",
    "tv": "tvmonitor",
}


def double_convolution(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch norm and ReLU, that keep the size."""
    layers = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=1, bias=False),  # batch norm has the bias
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with channels width, 2, 4 and 8 times width, for any size."""

    STRIDE = 8
    HEADS = ("classifier",)  # final convolutions
    STARTS = ("none",)  # what --weights takes; the first is the default
    WIDTHS = range(1, 1025)  # what --width takes
    SMALLEST_BATCH = 1  # per device, in training

    def __init__(self, classes: int, width: int = 64):
        super().__init__()
        channels = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(map(double_convolution, [3, *channels[:-1]], channels))
        up = list(zip(channels[:0:-1], channels[-2::-1]))
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in up)
        self.up = nn.ModuleList(double_convolution(2 * b, b) for _, b in up)
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) float -> {"out": (N, C, H, W)}."""
        height, width = images.shape[-2:]
        # Pad right and below to a multiple of the stride, and crop at the end: any size works.
        padding = (0, -width % self.STRIDE, 0, -height % self.STRIDE)
        # An exported model gets padded images, and could not express this for open sizes.
        x = images if is_exporting() else F.pad(images, padding, mode="replicate")
        skips = []
        for depth, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if depth else x)
            skips.append(x)
        skips.pop()
        for upsample, block in zip(self.upsample, self.up):
            x = block(torch.cat([skips.pop(), upsample(x)], dim=1))
        return {"out": self.classifier(x)[..., :height, :width]}


class ImagePooling(nn.Sequential):
    """torchvision's `ASPPPooling` with the same layers, but its result stays channels last.
    Otherwise its gradients, and those of the 1,280 channels beside it, would change layout."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, 2048, H, W) -> (N, 256, H, W), the same at each pixel."""
        # The backward of avg_pool2d keeps the layout, that of mean does not; only mean can be
        # exported.
        pooled = x.mean((2, 3), keepdim=True) if is_exporting() else F.avg_pool2d(x, x.shape[2:])
        pooled = super().forward(pooled)
        pooled = pooled.expand(-1, -1, *x.shape[2:])
        return pooled.contiguous(memory_format=torch.channels_last)


class DeepLab(DeepLabV3):
    """torchvision's DeepLabV3-ResNet50 (Chen et al. 2017), output stride 8, with auxiliary head.

    The parameters have torchvision's names. But the auxiliary head runs only in training, and the
    logits are converted to float32 and then upsampled by exactly the stride: stretched to a size
    that is not a multiple of the stride, they would be shifted by up to 7 pixels.
    """

    STRIDE = 8
    HEADS = ("classifier.4", "aux_classifier.4")
    STARTS = ("coco", "imagenet", "none")
    WIDTHS = (64,)  # of ResNet-50
    SMALLEST_BATCH = 2  # batch norm after the global pooling has one value per channel and image

    def __init__(self, classes: int, width: int = 64):
        network = deeplabv3_resnet50(num_classes=classes, aux_loss=True, weights_backbone=None)
        super().__init__(network.backbone, network.classifier, network.aux_classifier)
        branches = self.classifier[0].convs
        branches[-1] = ImagePooling(*branches[-1])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(N, 3, H, W) float -> {"out": (N, C, H, W)}; in training mode "out" and "aux", smaller by
        the stride: `losses.total_loss` upsamples them, a part at a time."""
        features = self.backbone(images)
        logits = self.classifier(features["out"])
        if self.training:
            return {"out": logits, "aux": self.aux_classifier(features["aux"])}
        height, width = images.shape[2:]
        # Contiguous, because channels-last logits take longer to upsample.
        logits = logits.float().contiguous()
        logits = F.interpolate(logits, scale_factor=self.STRIDE, mode="bilinear")
        return {"out": logits[..., :height, :width]}


MODELS = {"unet": UNet, "deeplab": DeepLab}


def donor_rows(classes: list[str], weights: str) -> dict[int, int]:
    """{our label: donor's label} for each class that "coco" or a checkpoint knows."""
    if weights == "coco":
        known, classes = DONOR.meta["categories"], [VOC_NAMES.get(name, name) for name in classes]
    else:
        known = load_checkpoint(weights, mmap=True)["classes"]
    return {label: known.index(name) for label, name in enumerate(classes) if name in known}


def fresh_classes(classes: list[str], weights: str) -> list[str]:
    """The classes that the weights do not know; none if there are no weights."""
    if weights == "none":
        return []
    rows = {} if weights == "imagenet" else donor_rows(classes, weights)
    return [name for label, name in enumerate(classes) if label not in rows]


def head_of(name: str, weights: str) -> tuple[str, ...]:
    """The modules that --head-lr applies to: none after "none", both heads after
    "imagenet", else the final convolutions, where classes unknown to the weights start fresh."""
    if weights == "imagenet":
        return ("classifier.", "aux_classifier.")
    return () if weights == "none" else MODELS[name].HEADS


def pretrained_state(weights) -> dict[str, Tensor]:
    """State dict of torchvision weights, from the cache of torch.hub or downloaded into it."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        return weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except Exception as error:  # no network, no space, or a damaged pickle: that raises anything
        reason = f"cannot load {weights.url} ({error or type(error).__name__})"
        remedy = f"put the file at {path} (delete a damaged one), or use --weights none"
        raise UserError(f"{reason}: {remedy}") from None


def build_model(name: str, classes: list[str], width: int = 64, weights: str = "none") -> nn.Module:
    """The network of that name in `MODELS`. classes: names, the background first. weights: one of
    its `STARTS`, or the path of a checkpoint of such a network.

    "imagenet" is only for the backbone. "coco" and checkpoints also fill the rows of the final
    convolutions for classes of the same name, so the network segments these before its first step;
    other classes keep a fresh row. Raises UserError if the weights cannot be loaded.
    """
    model = MODELS[name](len(classes), width)
    if weights == "imagenet":
        state = pretrained_state(ResNet50_Weights.IMAGENET1K_V2)
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
        model.backbone.load_state_dict(state)
    elif weights != "none":
        state = pretrained_state(DONOR) if weights == "coco" else load_checkpoint(weights)["model"]
        rows = donor_rows(classes, weights)
        for head in model.HEADS:
            for key in (f"{head}.weight", f"{head}.bias"):
                values = model.get_parameter(key).detach().clone()
                values[list(rows)] = state[key][list(rows.values())]
                state[key] = values
        model.load_state_dict(state)
    return model.to(memory_format=torch.channels_last)


@torch.no_grad()
def init_class_prior(model: nn.Module, prior: Tensor) -> None:
    """Set the final biases so that an untrained network predicts `prior`, (C,) probabilities.

    Otherwise a network takes hundreds of steps to learn that most pixels are background (Lin et al.
    2017, section 4.1).
    """
    for head in model.HEADS:
        model.get_submodule(head).bias.copy_(prior.clamp_min(1e-4).log())


def build_optimizer(
    model: nn.Module, lr: float, head: tuple[str, ...] = (), factor: float = 1.0
) -> torch.optim.AdamW:
    """Fused AdamW, without weight decay for biases and batch norm (one-dimensional parameters). The
    rate of parameters whose names begin with one of `head` is `factor` times as high."""
    groups = [{**g, "lr": lr * g["factor"]} for g in _parameter_groups(model, head, factor)]
    return torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)


def _parameter_groups(model: nn.Module, head: tuple[str, ...], factor: float = 1.0) -> list[dict]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for in_head in (False, True):
        part = [parameter for name, parameter in named if name.startswith(head) == in_head]
        scale = factor if in_head else 1.0
        others = [p for p in part if p.ndim <= 1]
        groups.append({"params": [p for p in part if p.ndim > 1], "factor": scale})
        groups.append({"params": others, "factor": scale, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def freeze_norm(model: nn.Module, weights: str) -> None:
    """Let batch norm use the statistics of the weights in training too: in the backbone after
    "imagenet", else in the whole network."""
    for module in (model.backbone if weights == "imagenet" else model).modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def pick_device(name: str) -> torch.device:
    """The named device; "auto" is CUDA where there is one, else the CPU. Under torchrun each
    process gets its own GPU. Raises UserError."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(1, device="cpu" if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"no device {name!r} here ({reason}): try --device cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def command_line() -> str:
    """The command that is running, so that it can be typed again."""
    here, total = (int(os.environ.get(k, 1)) for k in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    nodes = total // here
    launcher = f"torchrun --nnodes {nodes} --nproc-per-node {here}" if total > 1 else "python"
    return f"{launcher} {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"


def origin(device: torch.device) -> dict[str, str]:
    """What a run was made with: command, commit of these scripts, versions and device."""
    version = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(version, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        found = ""
    name, cores = platform.processor() or platform.machine(), os.cpu_count()
    if CPU_FLAGS.exists():
        name = dict(re.findall(r"(.+?)\s*: (.+)", CPU_FLAGS.read_text())).get("model name", name)
    on_gpu = device.type == "cuda"
    return {
        "command": command_line(),
        "scripts": found or "of no known commit",
        "versions": f"torch {torch.__version__}, torchvision {torchvision.__version__}",
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{name}, {cores} cores",
    }


def supports(amp: str, device: torch.device) -> bool:
    """Whether a device computes in that precision. torch would emulate bf16 on an older GPU, slowly
    and not in each operation."""
    on_gpu = device.type == "cuda"
    newer = on_gpu and torch.cuda.get_device_capability(device)[0] >= 8
    return {"fp16": on_gpu, "bf16": newer or not on_gpu}.get(amp, True)


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Autocast dtype, None for float32. "auto" is bf16 on a device that supports it (of CPUs only
    Linux knows), else fp16 on a GPU and off on a CPU."""
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if supports("bf16", device) else "fp16"
    if amp == "auto" and device.type == "cpu" and CPU_FLAGS.exists():
        amp = "bf16" if {"avx512_bf16", "amx_bf16"} & set(CPU_FLAGS.read_text().split()) else "off"
    if not supports(amp, device):
        raise UserError(f"--amp {amp} does not work on {device}: use auto or off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)


def save_checkpoint(path: Path, state: dict) -> None:
    """Write tensors and plain types to `path`, whole or not at all. Raises UserError."""
    with atomic_write(path) as file:
        torch.save({"version": CHECKPOINT_VERSION, **state}, file)


def load_checkpoint(path: str | Path, mmap: bool = False, check: Callable | None = None) -> dict:
    """Read what `save_checkpoint` wrote, to the CPU. Nothing in the file can run code
    (weights_only). With `mmap`, tensors are read only when they are used. `check` is called after
    `check_state`, and raises errors of the same kinds.

    Raises UserError if it is missing, damaged (even by one bit), or of another version or kind.
    """
    remedy = "give best.pt or last.pt of a run of train.py"
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch.load looks at no checksum
                raise ValueError(damaged)
        mmap = mmap and os.name != "nt"  # Windows could not replace the file meanwhile
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}: {remedy}") from None
    except PermissionError:
        raise
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: {remedy}") from None
    except Exception as error:  # a damaged file can make zipfile and the unpickler raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        damaged = f"cannot read the checkpoint {path} (damaged: {reason})"
        raise UserError(f"{damaged}: {remedy}") from None
    if not isinstance(state, dict) or "version" not in state or "model" not in state:
        raise UserError(f"{path} is not a checkpoint: {remedy}")
    if not isinstance(state["version"], int) or state["version"] != CHECKPOINT_VERSION:
        version = f"format version {state['version']}, not {CHECKPOINT_VERSION}"
        raise UserError(f"{path} has {version}: {remedy}")
    try:
        check_state(state)
        if check:
            check(state)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is not a valid checkpoint ({error!r}): {remedy}") from None
    return state


def check_state(state: dict) -> None:
    """Raise an error unless a checkpoint holds what `train.py` writes: before a network of any size
    is built, and before a tensor of any kind is used."""
    arguments, classes, _ = state["args"], state["classes"], state["fingerprint"]
    kind, size = MODELS[arguments["model"]], arguments["size"]
    _require("size", type(size) is int and 32 <= size <= LARGEST_SIZE)
    _require("width", arguments["width"] in kind.WIDTHS)
    _require("classes", 2 <= len(classes) <= 255 and all(isinstance(c, str) for c in classes))
    _require("colors", [len(color) for color in state["colors"]] == [3] * len(classes))
    _require("colors", {value for color in state["colors"] for value in color} <= {*range(256)})
    parts = [part for key in state["val_ids"] for part in key]
    _require("val_ids", {*map(len, state["val_ids"])} <= {2, 3})
    _require("val_ids", all(isinstance(part, str | int) for part in parts))
    plain = str | int | float | list | None
    for name, value in arguments.items():
        _require("args", isinstance(name, str) and isinstance(value, plain))
    for name, type_ in {"data": str, "amp": str, "coco_root": str | None}.items():
        _require(name, isinstance(arguments.get(name), type_))
    _require("scale", 0 < state.get("scale", 1) <= LARGEST_SIZE)
    for line in state.get("progress", {}).get("history", []):
        numbers = [*map(line["val_iou"].get, classes), line["val_foreground_miou"]]
        numbers += [line["train_loss"], line.get("val_loss"), line["lr"] + 0, line["epoch"] + 0]
        numbers += [line.get("seconds", 0)]
        _require("history", all(0 <= (number or 0) < math.inf for number in numbers))
    words = [word for item in state.get("origin", {}).items() for word in item]
    _require("origin", all(isinstance(word, str) for word in words))
    _require("precision", state.get("precision", "off") in ("off", "bf16", "fp16"))
    with torch.device("meta"):
        network = kind(len(classes), arguments["width"])
    expected = network.state_dict()
    _require("names of weights", expected.keys() == state["model"].keys())
    for name, like in expected.items():
        _require_alike(name, state["model"][name], like)
    if "optimizer" in state:  # AdamW's fused step would write beyond tensors that are too small
        if arguments.get("freeze_backbone"):
            network.backbone.requires_grad_(False)
        groups = _parameter_groups(network, head_of(arguments["model"], arguments["weights"]))
        parameters = [parameter for group in groups for parameter in group["params"]]
        for number, moments in state["optimizer"]["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                _require_alike(name, moments[name], parameters[number])
            _require_alike("step", moments["step"], torch.zeros(()))


def _require(name: str, sound: bool) -> None:
    if not sound:
        raise ValueError(name)


def _require_alike(name: str, tensor: Tensor, like: Tensor) -> None:
    _require(name, (tensor.shape, tensor.dtype) == (like.shape, like.dtype))
    _require(name, tensor.layout == torch.strided and not tensor.is_quantized)
    # An expanded tensor would be of any size in a small file.
    _require(name, tensor.untyped_storage().nbytes() >= tensor.nbytes)


def model_from_checkpoint(state: dict, device: torch.device) -> nn.Module:
    """The network of a loaded checkpoint, in evaluation mode, on `device`."""
    with torch.device("meta"):  # the tensors of the checkpoint take the place of these
        model = MODELS[state["args"]["model"]](len(state["classes"]), state["args"]["width"])
    model.load_state_dict(state["model"], assign=True)
    return model.to(device, memory_format=torch.channels_last).eval()
