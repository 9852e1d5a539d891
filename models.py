"""U-Net and DeepLabV3-ResNet50, warm start, devices, and checkpoints on disk.

    model = build_model("deeplab", classes=["background", "person", "car"], weights="coco")
    logits = model(images)["out"]            # (N, C, H, W), at the size of the images

Every model returns a dict: "out" always, "aux" (DeepLab's auxiliary head) in training mode.
"""

import os
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import ResNet50_Weights
from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights, deeplabv3_resnet50

CHECKPOINT_VERSION = 1

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


class ModelError(ValueError):
    """A checkpoint, pretrained weights or a device cannot be used: one sentence that says why."""


# --- U-Net ---------------------------------------------------------------------------------------


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

    def __init__(self, classes: int, width: int = 64):
        super().__init__()
        channels = [width, 2 * width, 4 * width, 8 * width]
        self.down = nn.ModuleList(map(double_convolution, [3, *channels[:-1]], channels))
        up = list(zip(channels[:0:-1], channels[-2::-1]))
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in up)
        self.up = nn.ModuleList(double_convolution(2 * b, b) for _, b in up)
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, 3, H, W) float -> {"out": (N, C, H, W)}."""
        height, width = images.shape[-2:]
        # Right and below up to the stride, cut off again at the end: any size works.
        padding = (0, -width % self.STRIDE, 0, -height % self.STRIDE)
        x = F.pad(images, padding, mode="replicate")
        skips = []
        for depth, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if depth else x)
            skips.append(x)
        skips.pop()
        for upsample, block in zip(self.upsample, self.up):
            x = block(torch.cat([skips.pop(), upsample(x)], dim=1))
        return {"out": self.classifier(x)[..., :height, :width]}


# --- DeepLabV3 -----------------------------------------------------------------------------------


class DeepLab(nn.Module):
    """torchvision's DeepLabV3-ResNet50 (Chen et al. 2017), output stride 8, with auxiliary head.

    The parameters have torchvision's names. Unlike there, the auxiliary head runs in training only,
    and the logits are made float32 before they are upsampled, by exactly the stride: stretched to a
    size that is no multiple of it, they would lie up to 7 pixels beside where they belong.
    """

    STRIDE = 8

    def __init__(self, classes: int):
        super().__init__()
        network = deeplabv3_resnet50(
            weights=None, weights_backbone=None, num_classes=classes, aux_loss=True
        )
        self.backbone = network.backbone
        self.classifier = network.classifier
        self.aux_classifier = network.aux_classifier

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(N, 3, H, W) float -> {"out": (N, C, H, W)}, in training mode "aux" too."""
        features = self.backbone(images)
        logits = {"out": self.classifier(features["out"])}
        if self.training:
            logits["aux"] = self.aux_classifier(features["aux"])
        return {name: self._upsampled(x, *images.shape[-2:]) for name, x in logits.items()}

    def _upsampled(self, logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
        logits = F.interpolate(logits.float(), scale_factor=self.STRIDE, mode="bilinear")
        return logits[..., :height, :width]


def warm_start(model: DeepLab, classes: list[str], weights: str) -> None:
    """Start from torchvision's weights: "coco" for the whole network, "imagenet" for the backbone.

    With "coco" the rows of the final convolutions are those of the donor's classes of the same
    name, so the network segments them before its first step; a class that the donor doesn't know
    keeps its fresh row. Raises ModelError if the weights cannot be loaded or downloaded.
    """
    if weights == "imagenet":
        state = pretrained_state(ResNet50_Weights.IMAGENET1K_V1)
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
        model.backbone.load_state_dict(state)
        return
    donor = DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1
    state = pretrained_state(donor)
    known = donor.meta["categories"]
    names = [VOC_NAMES.get(name, name) for name in classes]
    ours = [label for label, name in enumerate(names) if name in known]
    theirs = [known.index(names[label]) for label in ours]
    for head in ("classifier.4", "aux_classifier.4"):
        for name in (f"{head}.weight", f"{head}.bias"):
            rows = model.get_parameter(name).detach().clone()
            rows[ours] = state[name][theirs]
            state[name] = rows
    model.load_state_dict(state)


@torch.no_grad()
def start_from_prior(model: UNet | DeepLab, prior: torch.Tensor) -> None:
    """Set the final biases so that an untrained network predicts `prior`, (C,) probabilities.

    Saves the hundreds of steps that a network otherwise takes to learn that most pixels are
    background (Lin et al. 2017, section 4.1).
    """
    heads = [model.classifier, getattr(model, "aux_classifier", None)]
    for head in filter(None, heads):
        final = head[-1] if isinstance(head, nn.Sequential) else head
        final.bias.copy_(prior.clamp_min(1e-4).log())


def pretrained_state(weights) -> dict[str, torch.Tensor]:
    """State dict of torchvision weights, from the hub's cache or downloaded into it."""
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        return weights.get_state_dict(
            progress=True, check_hash=True, map_location="cpu", weights_only=True
        )
    except Exception as error:  # no network, no space, or a damaged pickle: that raises anything
        raise ModelError(
            f"cannot load {weights.url} ({error or type(error).__name__}): put the file at {path} "
            "(delete a damaged one), or train from scratch with --weights none"
        ) from None


def build_model(
    name: str, classes: list[str], width: int = 64, weights: str = "none"
) -> UNet | DeepLab:
    """A network for `classes` (names, the background first).

    name: "unet" (with `width` first channels) or "deeplab". weights: "none", or for DeepLab "coco"
    or "imagenet" (see `warm_start`).
    """
    if name == "unet":
        model = UNet(len(classes), width)
    elif name == "deeplab":
        model = DeepLab(len(classes))
    else:
        raise ModelError(f"no model {name!r}: there are unet and deeplab")
    if weights != "none":
        warm_start(model, classes, weights)
    return model.to(memory_format=torch.channels_last)


# --- devices -------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """The named device; "auto" is CUDA where there is one, else the CPU. Raises ModelError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"no device {name!r} here ({reason}): try --device cpu") from None
    return device


def amp_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """Autocast dtype, None for float32. "auto" is bf16 or else fp16 on a GPU, off on a CPU."""
    if amp == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


# --- checkpoints ---------------------------------------------------------------------------------


def save_checkpoint(path: Path, state: dict, previous: Path | None = None) -> None:
    """Write tensors and plain types to `path`, whole or not at all: temporary file, sync, rename.

    With `previous`, what lay at `path` is kept there. Raises ModelError if the disk does not take
    it; an earlier file at `path` is then untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"version": CHECKPOINT_VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a full disk into the latter
        with suppress(OSError):
            temporary.unlink()
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ModelError(f"cannot write {path} ({reason}): is its disk full?") from None


def _keep(path: Path, previous: Path) -> None:
    spare = previous.with_name(previous.name + ".tmp")
    try:
        spare.unlink(missing_ok=True)
        os.link(path, spare)  # so that at no moment there is no file at `path`
        os.replace(spare, previous)
    except OSError:
        os.replace(path, previous)  # a file system without links


def load_checkpoint(path: str | Path, previous: Path | None = None) -> dict:
    """What `save_checkpoint` wrote, on the CPU. Nothing in the file can run code (weights_only).

    Raises ModelError if the file is missing, damaged (a single bit suffices), of another version or
    no checkpoint of these scripts; with `previous`, falls back to that file with a warning.
    """
    try:
        return _load_checkpoint(path)
    except ModelError as error:
        if previous is None or not previous.exists():
            raise ModelError(f"{error}: give best.pt or last.pt of a run of train.py") from None
        print(f"warning: {error}; going on from {previous}")
        return _load_checkpoint(previous)


def _load_checkpoint(path: str | Path) -> dict:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load looks at no checksum
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"no checkpoint at {path}") from None
    except Exception as error:  # a damaged file can make zipfile and the unpickler raise anything
        damaged = str(error).splitlines()[0] if str(error) else type(error).__name__
    if damaged:
        raise ModelError(f"cannot read the checkpoint {path} (damaged: {damaged})")
    if not isinstance(state, dict) or "version" not in state or "model" not in state:
        raise ModelError(f"{path} is not a checkpoint")
    if state["version"] != CHECKPOINT_VERSION:
        raise ModelError(
            f"{path} has format version {state['version']}, these scripts read {CHECKPOINT_VERSION}"
        )
    return state


def model_from_checkpoint(state: dict, device: torch.device) -> UNet | DeepLab:
    """The network of a loaded checkpoint, in evaluation mode, on `device`."""
    arguments = state["args"]
    model = build_model(arguments["model"], state["classes"], arguments["width"])
    model.load_state_dict(state["model"])
    return model.to(device).eval()
