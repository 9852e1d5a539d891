"""From a prepared data directory to batches: split, oversampling, augmentation, loaders.

    manifest = load_manifest("data")
    train_indices, val_indices = split_indices(manifest, seed=0, val_split=None)
    batches = EpochBatches(train_indices, batch_size=8, seed=0)
    loader = training_loader(manifest, batches, size=512, workers=4)
    for images, masks in loader: ...

An index is a row of the manifest. Nothing depends on global random state: the order of an epoch is
a function of (seed, epoch), the augmentation of an image of (seed, epoch, position in the epoch).
"""

import atexit
import hashlib
import math
import multiprocessing
import re
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.transforms.v2 import functional as F

from common import IGNORE_INDEX, Manifest, UserError
from images import read_image, read_mask

# ImageNet statistics of RGB in [0, 1]: what every pretrained backbone of torchvision expects.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
FILL = [round(255 * channel) for channel in MEAN]  # colour of padding
CHUNK = 2**16  # pixels that fit into a core's cache as float32
# Luma and two axes of colour, of RGB: the NTSC standard.
YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
VAL_FRACTION = 0.2
RARE = 0.05  # share of the training images under which a class counts as rare
# Evaluation pads to this multiple, so that batches of few different shapes hold all images.
PAD_MULTIPLE = 32
# Native pixels of a batch, unless it is one image: 200 MB as RGB, whatever the size of the images.
BATCH_PIXELS = 2**26
TIMEOUT = 600  # seconds to wait for a batch
SIGNALS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]


def split_indices(
    manifest: Manifest, seed: int, val_split: str | None, group: str | None = None
) -> tuple[np.ndarray, ...]:
    """Indices that train and indices that validate: disjoint, together all of them.

    With `val_split`, that split validates and the others train. Otherwise a fifth of the groups of
    `image_groups` validates, stratified: groups are sorted by the rarest class they hold, each such
    stratum is ordered by a hash of seed and group, and its first part validates. So the outcome
    depends only on the seed and the images. Raises UserError if either side would be empty.
    """
    names, groups = np.unique(image_groups(manifest, group), return_inverse=True)
    if val_split:
        validates = manifest.splits == val_split
        both = len(np.intersect1d(groups[validates], groups[~validates]))
        if both:
            print(f"warning: {both} groups of images are on both sides of --val-split")
    else:
        validates = _stratified(manifest, seed, names.tolist(), groups)[groups]
        if len(names) < len(groups):
            print(f"{len(groups)} images in {len(names)} groups, each on one side of the split")
    if not validates.any() or validates.all():
        source = f"--val-split {val_split}" if val_split else manifest.data
        empty, known = "train" if validates.any() else "validate", sorted(set(manifest.splits))
        remedy = f"add images, or choose another split of {', '.join(known)}"
        raise UserError(f"{source} leaves no image to {empty} on: {remedy}")
    return np.flatnonzero(~validates), np.flatnonzero(validates)


def image_groups(manifest: Manifest, pattern: str | None) -> list[str]:
    """The group of each image: what the `pattern` matches in its file name, or else in its path. If
    nothing matches, the image is alone, but Roboflow's augmented copies, as a_jpg.rf.4f2e.jpg, are
    grouped by what precedes the hash."""
    groups, missed, keys = [], 0, manifest.keys(np.arange(len(manifest)))
    try:
        for (split, id_, name), path in zip(keys, manifest.files.tolist()):
            match = (re.search(pattern, name) or re.search(pattern, path)) if pattern else None
            missed += match is None
            match = match or re.search(r".+(?=\.rf\.)", name)
            groups.append(match.group() if match and match.group() else f"{split}/{id_}")
    except re.error as error:
        raise UserError(f"--group {pattern}: {error}; give a regular expression") from None
    if pattern and missed:
        print(f"warning: --group {pattern} matches nothing in the paths of {missed} images")
    return groups


def _stratified(manifest: Manifest, seed: int, names: list[str], groups: np.ndarray) -> np.ndarray:
    keys = [f"{seed}/{name}".encode(errors="surrogateescape") for name in names]
    hashes = [hashlib.blake2b(key, digest_size=8).digest() for key in keys]
    holds = np.zeros((len(names), manifest.pixels.shape[1] - 1), dtype=bool)
    np.logical_or.at(holds, groups, manifest.pixels[:, 1:] > 0)
    groups_with_class = np.where(holds, holds.sum(axis=0), len(names) + 1)
    rarest = np.where(holds.any(axis=1), groups_with_class.argmin(axis=1) + 1, 0)
    validates = np.zeros(len(names), dtype=bool)
    for label in np.unique(rarest):
        stratum = sorted(np.flatnonzero(rarest == label).tolist(), key=hashes.__getitem__)
        if len(stratum) > 1:  # a group alone in its stratum trains
            validates[stratum[: max(1, round(VAL_FRACTION * len(stratum)))]] = True
    return validates


def rare_classes(manifest: Manifest, indices: np.ndarray, chosen: list[str] | None) -> list[str]:
    """The `chosen` classes (or UserError), by default those in fewer than 5% of the images."""
    for name in chosen or []:
        if name not in manifest.classes[1:]:
            raise UserError(f"--rare {name}: choose from {', '.join(manifest.classes[1:])}")
    if chosen:
        return chosen
    share = (manifest.pixels[indices] > 0).mean(axis=0)
    return [name for name, s in zip(manifest.classes[1:], share[1:]) if 0 < s < RARE]


def oversample(manifest: Manifest, indices: np.ndarray, rare: list[str], factor: int) -> np.ndarray:
    """`indices`, where those of images that hold a class of `rare` are repeated `factor` times."""
    labels = [manifest.classes.index(name) for name in rare]
    holds_any = (manifest.pixels[indices][:, labels] > 0).any(axis=1)
    return np.repeat(indices, np.where(holds_any, factor, 1))


def holders(manifest: Manifest, indices: np.ndarray) -> dict[int, np.ndarray]:
    """{label: those of the `indices` that hold it, each once} for each class that occurs."""
    indices = np.unique(indices)
    found = {c: indices[manifest.pixels[indices, c] > 0] for c in range(1, len(manifest.classes))}
    return {label: images for label, images in found.items() if len(images)}


def drawn_pixels(manifest: Manifest, indices: np.ndarray, share: float) -> np.ndarray:
    """(C,) expected pixels of each class in one epoch, if a `share` of its images is drawn by
    class, as `EpochBatches` does."""
    pixels, groups = manifest.pixels[indices].sum(axis=0), holders(manifest, indices).values()
    if not share or not groups:
        return pixels
    by_class = np.mean([manifest.pixels[group].mean(axis=0) for group in groups], axis=0)
    return (1 - share) * pixels + share * len(indices) * by_class


def crop_box(
    height: int, width: int, rng: np.random.Generator, center: tuple[int, int] | None = None
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop: a quarter to all of the area, sides 3:4 to 4:3,
    centred on the pixel at `center` as far as the image allows.

    Source: Szegedy et al. 2015, section 6; here a crop that is too tall or too wide is shrunk until
    it fits.
    """
    area = height * width * rng.uniform(0.25, 1)
    ratio = math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
    h, w = math.sqrt(area / ratio), math.sqrt(area * ratio)
    shrink = min(1, height / h, width / w)
    h, w = max(1, round(h * shrink)), max(1, round(w * shrink))
    if center is None:
        return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    top, left = center[0] - h // 2, center[1] - w // 2
    return min(max(top, 0), height - h), min(max(left, 0), width - w), h, w


def decoder_scale(box: tuple[int, int, int, int], size: int) -> int:
    """The factor by which a JPEG may be shrunk while it is decoded: 1, 2, 4 or 8, so that the crop
    still has at least `size` pixels per side."""
    return max(scale for scale in (1, 2, 4, 8) if scale == 1 or min(box[2:]) >= scale * size)


def augment(
    image: Tensor, mask: Tensor, box: tuple[int, int, int, int], size: int, rng
) -> tuple[Tensor, Tensor]:
    """(3, h, w) and (H, W) uint8 -> (3, size, size) and (size, size): crop, flip, colour jitter.

    The box is in pixels of the mask; the image may be smaller by a `decoder_scale`. The mask is
    sampled at pixel centres. torchvision's own transform takes the top-left neighbour, which shifts
    the mask against the image by up to half a pixel.
    """
    scale = round(mask.shape[1] / image.shape[2])
    top, left, height, width = (side - side % scale for side in box)
    box = [side // scale for side in (top, left, height, width)]
    image = F.resized_crop(image, *box, [size, size], antialias=True)
    centers = 2 * np.arange(size) + 1  # in halves of a pixel
    rows, columns = (centers * n // (2 * size) + a for a, n in ((top, height), (left, width)))
    mask = torch.from_numpy(mask.numpy()[rows].take(columns, axis=1))
    if rng.random() < 0.5:
        image, mask = image.flip(-1), mask.flip(-1)
    brightness, contrast, saturation = rng.uniform(0.7, 1.3, 3)
    return jitter(image, brightness, contrast, saturation, rng.uniform(-0.03, 0.03)), mask


def jitter(
    image: Tensor, brightness: float, contrast: float, saturation: float, hue: float
) -> Tensor:
    """(3, H, W) uint8 with other colours: three factors, where 1 changes nothing, and a shift of
    the hue in turns, where 0 changes nothing.

    All four are one affine map of RGB, in one pass over the pixels. Contrast is relative to the
    mean luma. In YIQ, saturation scales the plane of I and Q, and hue rotates it: unlike the hue of
    HSV, which torchvision uses, it keeps the luma.
    """
    cosine, sine = (saturation * f(2 * math.pi * hue) for f in (math.cos, math.sin))
    plane = np.array([[1, 0, 0], [0, cosine, sine], [0, -sine, cosine]])
    matrix = brightness * contrast * np.linalg.inv(YIQ) @ plane @ YIQ
    matrix, pixels = torch.from_numpy(matrix).float(), image.reshape(3, -1)
    luma = float(YIQ[0] @ pixels.mean(dim=1, dtype=torch.float32).numpy())
    offset = torch.full((3, 1), brightness * (1 - contrast) * luma + 0.5)  # to round by cutting
    result = torch.empty_like(pixels)
    for part, target in zip(pixels.split(CHUNK, dim=1), result.split(CHUNK, dim=1)):
        target.copy_(torch.addmm(offset, matrix, part.float()).clamp_(0, 255))
    return result.view_as(image)


def resized_size(
    height: int, width: int, size: int, lower: Callable = min, higher: Callable = max
) -> tuple[int, int]:
    """Height and width with the shorter side at `size`, the same aspect, and the longer side at
    most twice `size`.

    Training crops show a 4:3 image at 0.87 to 1.73 times this scale, so objects are evaluated at
    sizes that were trained. With the longer side at `size` they would be smaller than any of these.
    """
    short, long = lower(height, width), higher(height, width)

    def scaled(side: int) -> int:  # rounded, in integers, which export.py has symbols for
        by_short, by_long = (2 * side * size + short) // (2 * short), (4 * side * size + long)
        return higher(1, lower(by_short, by_long // (2 * long)))

    return scaled(height), scaled(width)


def padded_size(height: int, width: int, size: int) -> tuple[int, int]:
    """`resized_size` rounded up to multiples of `PAD_MULTIPLE`: the shape that the network gets."""
    h, w = resized_size(height, width, size)
    return -(-h // PAD_MULTIPLE) * PAD_MULTIPLE, -(-w // PAD_MULTIPLE) * PAD_MULTIPLE


def evaluation_input(image: Tensor, size: int) -> Tensor:
    """(3, H, W) uint8 -> (3, h, w) uint8 of `padded_size`, padded on the right and below with the
    mean colour. The logits of the padding are cut off before the evaluation."""
    h, w = resized_size(*image.shape[-2:], size)
    padded_h, padded_w = padded_size(*image.shape[-2:], size)
    image = F.resize(image, [h, w], antialias=True)
    return F.pad(image, [0, 0, padded_w - w, padded_h - h], fill=FILL)


def normalize(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 -> float32, normalised with ImageNet's mean and deviation, channels last.

    Called on the device: one byte per channel crosses the bus, and the GPU does the arithmetic.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    # full() per channel, not torch.tensor(...), which would copy from the host at each call.
    mean = torch.stack([torch.full((1, 1), 255 * m, device=images.device) for m in MEAN])
    std = torch.stack([torch.full((1, 1), 255 * s, device=images.device) for s in STD])
    return (images - mean) / std


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device. The host waits for it, except on CUDA: on Apple's MPS, the copy might
    read what the host has freed since."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def load_image(manifest: Manifest, index: int, scale: int = 1) -> Tensor:
    """Image (3, H, W) uint8, shrunk by `scale` if its decoder can do that. Raises UserError."""
    path, upright = manifest.root / manifest.files[index], bool(manifest.upright[index])
    image = read_image(path, tuple(manifest.sizes[index].tolist()), upright, scale)
    return F.pil_to_tensor(image)


def load_mask(manifest: Manifest, index: int) -> np.ndarray:
    """Mask (H, W) uint8. Raises UserError."""
    path = manifest.data / "masks_raw" / manifest.masks[index]
    mask = read_mask(path, int(manifest.checksums[index]))
    if mask.shape != tuple(manifest.sizes[index].tolist()):  # a checksum knows no shape
        raise UserError(f"{path} is not of the manifest's size: run prepare_masks.py again")
    return mask


class EpochBatches(Sampler):
    """Batches of keys for `TrainingSet`: each epoch its own permutation of `indices`.

    A step takes `accumulate` batches from each of `world` processes; this one is `rank`. Which
    images a step holds depends on their product alone. Images that do not fill an epoch's last step
    come first in the next, since batch norm cannot use a single image. `set_epoch` chooses the
    epoch, and the step to start from when a run is resumed inside one.

    At a share `balance` of the positions, the image is replaced: a label is drawn uniformly from
    `holders`, then an image uniformly from those that hold it. (nnU-Net, Isensee et al. 2021,
    forces a third of its patches onto the foreground.)
    """

    def __init__(
        self, indices, batch_size, seed, accumulate=1, rank=0, world=1, balance=0.0, holders=None
    ):
        self.indices, self.batch_size, self.seed = indices, batch_size, seed
        self.balance, self.holders = balance if holders else 0.0, holders
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.images_per_step = batch_size * accumulate * world
        self.steps = len(indices) // self.images_per_step
        if not self.steps:
            few = f"{len(indices)} training images are too few"
            raise UserError(f"{few} for {self.images_per_step} per step: lower --batch-size")
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next iteration is of `epoch`, without its first `start` steps."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[list[tuple[int, int, int, int]]]:
        # Epochs are pieces of one sequence, in which a permutation of all images follows another.
        count = self.steps * self.images_per_step
        number, skipped = divmod(self.epoch * count, len(self.indices))
        rngs = [np.random.default_rng([self.seed, number + i]) for i in range(2)]
        order = np.concatenate([rng.permutation(self.indices) for rng in rngs]).tolist()
        order = self.balanced(order[skipped : skipped + count])
        for batch in range(self.start * self.accumulate, len(self)):
            first = (batch * self.world + self.rank) * self.batch_size
            chosen = order[first : first + self.batch_size]
            yield [(self.epoch, first + i, *image) for i, image in enumerate(chosen)]

    def balanced(self, order: list[int]) -> list[tuple[int, int]]:
        """Index and label of each position of the epoch; label 0 where it is not drawn by class."""
        rng = np.random.default_rng([self.seed, self.epoch, 0, 1])  # no crop has this seed
        groups, images = list((self.holders or {}).items()), [(index, 0) for index in order]
        for position, (a, b) in enumerate(rng.random((len(order), 2)).tolist()):
            # Evenly spaced: where the sum of the shares so far reaches the next whole number.
            if math.floor((position + 1) * self.balance) > math.floor(position * self.balance):
                label, group = groups[int(a * len(groups))]
                images[position] = (int(group[int(b * len(group))]), label)
        return images

    def __len__(self) -> int:
        return self.steps * self.accumulate


class TrainingSet(Dataset):
    """Augmented crops: image (3, size, size), mask (size, size), uint8. A key is (epoch, position,
    index, label), all that a crop depends on: it is centred on a pixel of the label, unless 0."""

    def __init__(self, manifest: Manifest, size: int, seed: int):
        self.manifest, self.size, self.seed = manifest, size, seed

    def __getitem__(self, key: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
        epoch, position, index, label = key
        rng = np.random.default_rng([self.seed, epoch, position])
        mask, center = load_mask(self.manifest, index), None
        if label:
            center = divmod(int(rng.choice(np.flatnonzero(mask == label))), mask.shape[1])
        box = crop_box(*mask.shape, rng, center)
        image = load_image(self.manifest, index, decoder_scale(box, self.size))
        return augment(image, torch.from_numpy(mask), box, self.size, rng)


class EvaluationSet(Dataset):
    """Whole images. An item is the image (3, h, w) at evaluation size, its mask (H, W) at native
    size and its index. Without a size, the image too is at native size."""

    def __init__(self, manifest: Manifest, size: int | None):
        self.manifest, self.size = manifest, size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        image, mask = load_image(self.manifest, index), load_mask(self.manifest, index)
        image = evaluation_input(image, self.size) if self.size else image
        return image, torch.from_numpy(mask), index


def training_loader(manifest, batches: EpochBatches, size: int, workers: int) -> DataLoader:
    """Batches of images (N, 3, size, size) uint8 and masks (N, size, size) uint8."""
    return _loader(TrainingSet(manifest, size, batches.seed), batches, workers)


def evaluation_loader(
    manifest: Manifest, indices: np.ndarray, size: int | None, batch_size: int, workers: int
) -> DataLoader:
    """Batches of images (N, 3, h, w), masks (N, H, W) padded with 255, and indices (a list).

    All images of a batch have the same padded shape, so the padding of an image, and with it its
    logits, does not depend on the other images. Every image comes exactly once. Without a size,
    each image is a batch of its own, at its native size.
    """
    groups, batches = defaultdict(list), []
    for index in indices.tolist():
        shape = padded_size(*manifest.sizes[index].tolist(), size) if size else index
        groups[shape].append(index)
    for group in groups.values():
        largest = int(manifest.sizes[group].prod(axis=1).max())
        count = max(1, min(batch_size, BATCH_PIXELS // largest))
        batches += [group[start : start + count] for start in range(0, len(group), count)]
    return _loader(EvaluationSet(manifest, size), batches, workers, _pad_masks)


def _pad_masks(items: list) -> tuple[Tensor, Tensor, list[int]]:
    images, masks, indices = zip(*items)
    shape = [len(masks), max(m.shape[0] for m in masks), max(m.shape[1] for m in masks)]
    padded = torch.full(shape, IGNORE_INDEX, dtype=torch.uint8)
    for target, mask in zip(padded, masks):
        target[: mask.shape[0], : mask.shape[1]] = mask
    batch = torch.stack(images), padded
    if get_worker_info():  # here, where a full /dev/shm is an error, and not in the queue's thread
        batch = tuple(tensor.share_memory_() for tensor in batch)
    return *batch, list(indices)


class Loader(DataLoader):
    """A loader whose processes ignore signals: only the parent decides what to do about them."""

    def __iter__(self) -> Iterator:
        masks = hasattr(signal, "pthread_sigmask")  # not on Windows
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if masks else None
        try:
            return super().__iter__()  # its processes inherit what is blocked
        except OSError as error:
            raise UserError(f"cannot start loader processes ({error}): try --workers 0") from None
        finally:
            if masks:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _loader(dataset: Dataset, batches, workers: int, collate=None) -> DataLoader:
    return Loader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_initialized(),  # not if the CPU is chosen beside a GPU
        persistent_workers=workers > 0 and collate is None,  # else two sets of them live on
        timeout=TIMEOUT if workers else 0,
        worker_init_fn=_start_worker,
        # The default from Python 3.14 on would import torch in each of them: 0.4 GB.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        # Else every new iterator draws from the global generator, which dropout uses.
        generator=torch.Generator(),
    )


def _start_worker(_: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Kill all loader processes. They ignore polite requests, and torch would wait for them."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it an error
    for process in multiprocessing.active_children():
        process.kill()


atexit.register(end_workers)  # before multiprocessing's own, which would ask them and wait
