"""From a prepared data directory to batches: manifest, split, oversampling, transforms, loaders.

    manifest = load_manifest("data")  # of manifest.py
    train_rows, val_rows = split_rows(manifest, seed=0)
    batches = EpochBatches(train_rows, batch_size=8, seed=0)
    loader = training_loader(manifest, batches, size=512, seed=0, workers=4)
    for images, masks in loader: ...

Nothing here depends on global random state: the order of an epoch is a function of (seed, epoch),
the augmentation of an image a function of (seed, epoch, position in the epoch).
"""

import hashlib
import signal
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from common import IGNORE_INDEX, DataError, Manifest
from images import read_image, read_mask

# ImageNet statistics of RGB in [0, 1]: what every pretrained backbone of torchvision expects.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Evaluation pads to this multiple, so that batches of few different shapes hold all images.
PAD_MULTIPLE = 32
# Native pixels of a batch, unless it is one image: 200 MB as RGB, whatever the size of the images.
BATCH_PIXELS = 2**26


# --- split and oversampling ----------------------------------------------------------------------


def split_rows(
    manifest: Manifest, seed: int, val_split: str | None = None, fraction: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the manifest that train and rows that validate: disjoint, together all of them.

    With `val_split` that split validates and the others train. Without, `fraction` of the images,
    stratified: images are grouped by the rarest class they hold, each group is put in the order of
    a hash of (seed, split, id), and its first part validates. So the outcome depends on the seed
    and the images alone, not on their order. Raises DataError if either side would be empty.
    """
    if val_split is not None:
        validates = manifest.splits == val_split
        if not validates.any() or validates.all():
            known = ", ".join(sorted(set(manifest.splits.tolist())))
            raise DataError(
                f"--val-split {val_split} leaves no image to "
                f"{'train' if validates.any() else 'validate'} on; {manifest.data} holds the "
                f"splits: {known}"
            )
        return np.flatnonzero(~validates), np.flatnonzero(validates)

    def rank(row: int) -> bytes:
        text = f"{seed}/{manifest.splits[row]}/{manifest.ids[row]}"
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    strata = _rarest_class(manifest.pixels)
    val_rows = []
    for stratum in np.unique(strata):
        group = sorted(np.flatnonzero(strata == stratum).tolist(), key=rank)
        count = round(fraction * len(group))
        val_rows += group[: max(count, 1) if len(group) > 1 else count]
    val_rows = np.sort(np.array(val_rows, dtype=np.int64))
    train_rows = np.setdiff1d(np.arange(len(manifest)), val_rows)
    if not len(val_rows) or not len(train_rows):
        raise DataError(f"{manifest.data} holds {len(manifest)} image(s): too few to split")
    return train_rows, val_rows


def _rarest_class(pixels: np.ndarray) -> np.ndarray:
    """(N,) label of the class, among those an image holds, that the fewest images hold; else 0."""
    holds = pixels[:, 1:] > 0
    rarity = np.where(holds, holds.sum(axis=0), len(pixels) + 1)
    if not rarity.shape[1]:
        return np.zeros(len(pixels), dtype=np.int64)
    return np.where(holds.any(axis=1), rarity.argmin(axis=1) + 1, 0)


def rare_classes(manifest: Manifest, rows: np.ndarray, threshold: float = 0.05) -> list[str]:
    """Names of the classes that some, but fewer than `threshold` of the images in `rows` hold."""
    share = (manifest.pixels[rows] > 0).mean(axis=0)
    return [name for name, s in zip(manifest.classes[1:], share[1:]) if 0 < s < threshold]


def oversample(manifest: Manifest, rows: np.ndarray, rare: list[str], factor: int) -> np.ndarray:
    """`rows` with those whose image holds a class of `rare` repeated `factor` times."""
    return np.repeat(rows, np.where(holds_any(manifest, rows, rare), factor, 1))


def holds_any(manifest: Manifest, rows: np.ndarray, names: list[str]) -> np.ndarray:
    """(N,) bool: whether each image of `rows` has a pixel of any of the named classes."""
    labels = [manifest.classes.index(name) for name in names]
    return (manifest.pixels[rows][:, labels] > 0).any(axis=1)


# --- transforms ----------------------------------------------------------------------------------


class RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's, but masks are sampled at pixel centres (nearest-exact).

    The stock transform takes a mask's top-left neighbour ("nearest"), which shifts it against the
    image by up to half a pixel.
    """

    def transform(self, inpt, params):
        """Crop and resize an image with antialiasing, a mask by nearest pixel centre."""
        if not isinstance(inpt, tv_tensors.Mask):
            return super().transform(inpt, params)
        nearest = v2.InterpolationMode.NEAREST_EXACT
        plain = inpt.as_subclass(torch.Tensor)[None]
        plain = F.resized_crop(plain, **params, size=self.size, interpolation=nearest)
        return tv_tensors.wrap(plain[0], like=inpt)


def training_transform(size: int) -> v2.Transform:
    """Joint transform of an image and its mask: crop of bounded aspect, flip, colour jitter."""
    return v2.Compose(
        [
            RandomResizedCrop((size, size), scale=(0.25, 1.0), ratio=(3 / 4, 4 / 3)),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.03),
        ]
    )


def resized_size(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width with the shorter side at `size`, aspect kept, the longer at most doubled.

    Training crops show a 4:3 image between 0.87 and 1.73 times this scale, so objects are evaluated
    at sizes that were trained; with the longer side at `size` they would be smaller than in any.
    """
    scale = min(size / min(height, width), 2 * size / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def padded_size(height: int, width: int, size: int) -> tuple[int, int]:
    """`resized_size` rounded up to multiples of `PAD_MULTIPLE`: the shape that the model sees."""
    h, w = resized_size(height, width, size)
    return -(-h // PAD_MULTIPLE) * PAD_MULTIPLE, -(-w // PAD_MULTIPLE) * PAD_MULTIPLE


def evaluation_input(image: torch.Tensor, size: int) -> torch.Tensor:
    """(3, H, W) uint8 -> (3, h, w) uint8 of `padded_size`, padded with the mean colour.

    The padding is right and below, and its logits are cut off before they are compared.
    """
    height, width = image.shape[-2:]
    h, w = resized_size(height, width, size)
    padded_h, padded_w = padded_size(height, width, size)
    image = F.resize(image, [h, w], antialias=True)
    return F.pad(image, [0, 0, padded_w - w, padded_h - h], fill=[round(255 * m) for m in MEAN])


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8 of an RGB picture."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) uint8 -> float32 with ImageNet mean 0 and deviation 1, channels last.

    Called on the device: a byte a channel crosses the bus, and the arithmetic is the GPU's.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    # A full() a channel, not torch.tensor(...): that would copy from the host at each call.
    mean = torch.stack([torch.full((1, 1), 255 * m, device=images.device) for m in MEAN])
    std = torch.stack([torch.full((1, 1), 255 * s, device=images.device) for s in STD])
    return (images - mean) / std


# --- datasets and loaders ------------------------------------------------------------------------


class TrainingSet(Dataset):
    """Augmented crops. Keys are (epoch, position, row): everything that the result depends on.

    Item: image (3, size, size) uint8, mask (size, size) uint8.
    """

    def __init__(self, manifest: Manifest, size: int, seed: int):
        self.manifest, self.seed = manifest, seed
        self.transform = training_transform(size)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, position, row = key
        image, mask = read_pair(self.manifest, row)
        # transforms.v2 draws from torch's global generator: lend it a state of this image's own.
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(mixed_seed(self.seed, epoch, position))
        try:
            image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        finally:
            torch.set_rng_state(state)
        return image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)


class EvaluationSet(Dataset):
    """Whole images at evaluation size, masks at native size. Keys are rows of the manifest.

    Item: image (3, h, w) uint8, mask (H, W) uint8, row.
    """

    def __init__(self, manifest: Manifest, size: int):
        self.manifest, self.size = manifest, size

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        image, mask = read_pair(self.manifest, row)
        return evaluation_input(image, self.size), mask, row


def read_pair(manifest: Manifest, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (3, H, W) uint8 and mask (H, W) uint8 of a row, at native size."""
    height, width = (int(n) for n in manifest.sizes[row])
    image = read_image(manifest.root / manifest.files[row], (height, width))
    path = manifest.data / "masks_raw" / manifest.masks[row]
    mask = read_mask(path, len(manifest.classes))
    if mask.shape != (height, width):
        raise DataError(
            f"{path} is {mask.shape[0]}x{mask.shape[1]}, the manifest says {height}x{width}: "
            "run prepare_masks.py again"
        )
    return to_tensor(image), torch.from_numpy(mask)


def mixed_seed(*numbers: int) -> int:
    """One 64-bit seed out of several numbers, without the correlations of adding them up."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


class EpochBatches(Sampler):
    """Batches of keys for `TrainingSet`: each epoch its own permutation of `rows`.

    A step takes `accumulate` batches of each of `world` processes; this one is `rank`. Which images
    a step holds depends on their product alone. Images that do not fill the last step are left out,
    since batch norm cannot use a single image. `set_epoch` chooses the epoch, and the step to start
    from when a run is resumed inside one.
    """

    def __init__(
        self,
        rows: np.ndarray,
        batch_size: int,
        seed: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.images = batch_size * accumulate * world  # of a step
        self.steps = len(rows) // self.images
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Next iteration is of `epoch`, without its first `start` steps."""
        self.epoch, self.start = epoch, start

    def order(self) -> np.ndarray:
        """The epoch's rows in its order."""
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.rows)

    def step_rows(self, step: int) -> np.ndarray:
        """The rows of a step of the epoch, of all processes."""
        return self.order()[step * self.images : (step + 1) * self.images]

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        order = self.order().tolist()
        for batch in range(self.start * self.accumulate, len(self)):
            first = (batch * self.world + self.rank) * self.batch_size
            chosen = order[first : first + self.batch_size]
            yield [(self.epoch, first + i, row) for i, row in enumerate(chosen)]

    def __len__(self) -> int:
        return self.steps * self.accumulate


def training_loader(
    manifest: Manifest, batches: EpochBatches, size: int, seed: int, workers: int
) -> DataLoader:
    """Batches of images (N, 3, size, size) uint8 and masks (N, size, size) uint8."""
    return _loader(TrainingSet(manifest, size, seed), batches, workers)


def evaluation_loader(
    manifest: Manifest, rows: np.ndarray, size: int, batch_size: int, workers: int
) -> DataLoader:
    """Batches of images (N, 3, h, w), masks (N, H, W) padded with 255, and rows (a list).

    A batch holds images of one padded shape, so what surrounds an image, and with it its logits,
    does not depend on the images beside it. Every row comes exactly once.
    """
    batches = like_batches(manifest.sizes[rows].tolist(), size, batch_size)
    batches = [rows[batch].tolist() for batch in batches]
    return _loader(EvaluationSet(manifest, size), batches, workers, _pad_masks)


def like_batches(sizes: list[tuple[int, int]], size: int, batch_size: int) -> list[list[int]]:
    """Indices of images with these native `sizes`, in batches of one padded shape; each once.

    A batch has at most `batch_size` images and, if more than one, `BATCH_PIXELS` native pixels.
    """
    shapes, pixels = {}, {}
    for index, (height, width) in enumerate(sizes):
        shape = padded_size(height, width, size)
        batches = shapes.setdefault(shape, [[]])
        pixels[shape] = pixels.get(shape, 0) + height * width
        if batches[-1] and (len(batches[-1]) == batch_size or pixels[shape] > BATCH_PIXELS):
            batches.append([])
            pixels[shape] = height * width
        batches[-1].append(index)
    return [batch for _, batches in sorted(shapes.items()) for batch in batches]


def _pad_masks(items: list) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    images, masks, rows = zip(*items)
    shape = [len(masks), max(m.shape[0] for m in masks), max(m.shape[1] for m in masks)]
    padded = torch.full(shape, IGNORE_INDEX, dtype=torch.uint8)
    for target, mask in zip(padded, masks):
        target[: mask.shape[0], : mask.shape[1]] = mask
    return torch.stack(images), padded, list(rows)


def _loader(dataset: Dataset, batches, workers: int, collate=None) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        # Else every new iterator draws from the global generator, which dropout uses.
        generator=torch.Generator(),
    )


def _start_worker(_: int) -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
