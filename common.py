"""The data directory that all scripts work on, and what their command lines share.

    manifest = load_manifest("data")
    manifest.classes, manifest.pixels.sum(axis=0)

Imports neither torch nor a sibling, so that prepare_masks.py starts in a tenth of a second.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

MANIFEST_VERSION = 1
IGNORE_INDEX = 255
BACKGROUND = "background"
IGNORE_COLOR = (255, 255, 255)
DEAD_LOADER = "error: a loader process died, killed or out of memory: try fewer --workers"
# Colour-blind safe (Okabe and Ito); further classes take hues in golden-ratio steps.
COLORS = [(0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167)]


class DataError(ValueError):
    """The user's data or a path is wrong: one sentence that names it and the remedy."""


# --- manifest ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """What `prepare_masks.py` wrote, a row an image, as arrays (small to send to workers).

    `classes` and `colors` are indexed by label, so index 0 is the background. `pixels` is
    (N, classes) int64, `sizes` (N, 2) int64 as height, width. `fingerprint` identifies the masks:
    the same images, classes and pixel counts give the same one, wherever the files lie.
    """

    data: Path
    root: Path
    classes: list[str]
    colors: list[tuple[int, int, int]]
    ids: np.ndarray
    splits: np.ndarray
    files: np.ndarray
    masks: np.ndarray
    sizes: np.ndarray
    pixels: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ids)

    def keys(self, rows: np.ndarray) -> list[list]:
        """[split, id] of each row: unique in a manifest, plain types for a checkpoint."""
        return [[str(self.splits[row]), int(self.ids[row])] for row in rows]

    def rows(self, keys: list[list]) -> np.ndarray:
        """Rows of `keys`, in their order. Raises DataError for an image the manifest lacks."""
        row_of = {key: row for row, key in enumerate(zip(self.splits.tolist(), self.ids.tolist()))}
        missing = [key for key in keys if tuple(key) not in row_of]
        if missing:
            raise DataError(
                f"{self.data / 'manifest.json'} lacks {len(missing)} of the checkpoint's "
                f"{len(keys)} validation images (first: {missing[0][0]} {missing[0][1]}); give "
                "the data directory it was trained on with --data"
            )
        return np.array([row_of[tuple(key)] for key in keys], dtype=np.int64)


def load_manifest(data: str | Path) -> Manifest:
    """Read `data`/manifest.json. Raises DataError if missing, damaged or of another version."""
    path = Path(data) / "manifest.json"
    remedy = "run prepare_masks.py --coco-root ROOT --out " + str(data)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"]
    except FileNotFoundError:
        raise DataError(f"no manifest at {path}: {remedy}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read {path} ({error!r}): {remedy}") from None
    if version != MANIFEST_VERSION:
        raise DataError(
            f"{path} has format version {version}, these scripts read {MANIFEST_VERSION}: {remedy}"
        )
    try:
        return _manifest_from_json(Path(data), content)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error!r}): {remedy}") from None


def _manifest_from_json(data: Path, content: dict) -> Manifest:
    images = content["images"]
    if not images:
        raise ValueError("it lists no images")

    def column(key, dtype):
        return np.array([image[key] for image in images], dtype=dtype)

    identity = [content["classes"]]
    identity += [[image[key] for key in ("split", "id", "mask", "pixels")] for image in images]
    return Manifest(
        data=data,
        root=Path(content["root"]),
        classes=list(content["classes"]),
        colors=[tuple(color) for color in content["colors"]],
        ids=column("id", np.int64),
        splits=column("split", np.str_),
        files=column("file", np.str_),
        masks=column("mask", np.str_),
        sizes=np.stack([column("height", np.int64), column("width", np.int64)], axis=1),
        pixels=column("pixels", np.int64).reshape(len(images), len(content["classes"])),
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
    )


def class_colors(count: int) -> list[tuple[int, int, int]]:
    """Colours of `count` labels, background first; the same label always gets the same one."""
    colors = list(COLORS[:count])
    for label in range(len(colors), count):
        hue = round(255 * (label * 0.618034 % 1))
        saturation, value = (230, 160, 110)[label % 3], (255, 200)[label % 2]
        colors.append(
            Image.new("HSV", (1, 1), (hue, saturation, value)).convert("RGB").getpixel((0, 0))
        )
    return colors


def color_mask(mask: np.ndarray, colors: list[tuple[int, int, int]]) -> Image.Image:
    """RGB picture of an (H, W) uint8 index mask; 255 in the ignore colour."""
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[: len(colors)] = colors
    palette[IGNORE_INDEX] = IGNORE_COLOR
    image = Image.fromarray(mask)
    image.putpalette(palette.tobytes())
    return image.convert("RGB")


# --- command lines -------------------------------------------------------------------------------


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


def command_parser(description: str, example: str) -> argparse.ArgumentParser:
    """The parser of a script: its help shows the defaults and an example."""
    return argparse.ArgumentParser(
        description=description, epilog=f"example: {example}", formatter_class=_HelpFormatter
    )


def run_command(main: Callable[[], int | None], *errors: type[Exception]) -> None:
    """Run a script's `main` and exit: 2 and one sentence for `errors`, 130 for Ctrl-C."""
    try:
        try:
            code, sentence = _outcome(main, errors)
        finally:
            if hasattr(signal, "SIGCHLD"):
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except RuntimeError as error:
        # torch tells of a dead loader process by an error in its handler of SIGCHLD, wherever the
        # program is: perhaps while `_outcome` deals with the connection that broke with it.
        if "DataLoader worker" not in str(error):
            raise
        code, sentence = 2, DEAD_LOADER
    if sentence:
        print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    sys.exit(code)


def _outcome(main: Callable[[], int | None], errors: tuple) -> tuple[int | None, str | None]:
    """Exit code and sentence.

    An error raised in a loader worker arrives with the worker's traceback in its text; the sentence
    is the last line of it.
    """
    try:
        return main(), None
    except errors as error:
        text = str(error).strip().splitlines()[-1].split(f"{type(error).__name__}: ")[-1]
        return 2, f"error: {text}"
    except (ConnectionError, EOFError):
        return 2, DEAD_LOADER
    except KeyboardInterrupt:
        return 130, "interrupted"


def write_whole(path: Path, content: bytes | memoryview, sync: bool = True) -> None:
    """Write a file whole or not at all: temporary file, rename. Raises DataError.

    With `sync` it outlasts a power cut too, at the price of waiting for the disk.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise DataError(f"cannot write {path}: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    """`write_whole` of text."""
    write_whole(path, text.encode())


def write_json(path: Path, content: object, indent: int | None = 1) -> None:
    """`write_text` of JSON."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def default_workers() -> int:
    """Loader processes when the user names none: a core each, at most eight."""
    return min(8, os.cpu_count() or 1)
