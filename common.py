"""What all scripts share: the manifest of a data directory, colours, errors, writing, starting.

    manifest = load_manifest("data")
    manifest.classes, manifest.pixels.sum(axis=0)

Imports neither torch nor a sibling, so that prepare_masks.py starts in a tenth of a second.
"""

import argparse
import colorsys
import errno
import glob
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, NoReturn, TextIO

import numpy as np
from PIL import Image

MANIFEST_VERSION = 2
IGNORE_INDEX = 255
BACKGROUND = "background"
IGNORE_COLOR = (255, 255, 255)
# Colour-blind safe (Okabe and Ito); further classes take hues in golden-ratio steps.
COLORS = [(0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167)]
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # by a file system
LARGEST_SIZE = 4096  # pixels: a hostile checkpoint could ask for any memory
# The lowest and the highest number that each flag takes, in all scripts.
LIMITS = {"size": (32, LARGEST_SIZE), "scale": (0.001, 16.0), "balance": (0, 1)}
LIMITS |= {"workers": (0, 256), "seed": (0, 2**63 - 1)}
LIMITS |= dict.fromkeys(("gamma", "save_every", "panels"), (0, math.inf))
LIMITS |= dict.fromkeys(("oversample", "epochs", "batch_size", "accumulate"), (1, math.inf))
COMPILER = r"C(\+\+)? compiler|Compiler: \w+ is not found|working triton"
DEATH = r"DataLoader worker .* (exited unexpectedly|is killed by signal)|DataLoader timed out"


class UserError(ValueError):
    """What the user can fix: one sentence that names the path or the value, and the remedy."""


@dataclass(frozen=True)
class Manifest:
    """What `prepare_masks.py` wrote, one row per image, as arrays (small to send to workers).

    `classes` and `colors` are indexed by label, 0 is the background. `pixels` is (N, C) int32,
    `sizes` (N, 2) int64: height, width. `upright` says where EXIF is to be applied, `checksums` are
    of the masks' labels. `fingerprint` identifies classes, images and masks.
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
    upright: np.ndarray
    checksums: np.ndarray
    pixels: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ids)

    def keys(self, indices: np.ndarray) -> list[list]:
        """[split, id, file name] of each image, in plain types for a checkpoint. Split and id are
        unique within one manifest, but not across manifests."""
        columns = (column[indices].tolist() for column in (self.splits, self.ids, self.files))
        return [[split, id_, file.rpartition("/")[2]] for split, id_, file in zip(*columns)]


def load_manifest(data: str | Path, root: str | None = None) -> Manifest:
    """Read `data`/manifest.json. Raises UserError if missing, damaged or of another version.

    Images are looked up below `root`, by default where they were prepared, or below the environment
    variable COCO_ROOT if that folder is gone.
    """
    path = Path(data) / "manifest.json"
    remedy = f"give its new folder with --data, or run prepare_masks.py --out {data}"
    try:
        content = json.loads(path.read_bytes())
        version, classes, images = (content[key] for key in ("version", "classes", "images"))
        root = root or content["root"]
        if not Path(root).is_dir():
            root = os.environ.get("COCO_ROOT", root)
        if version != MANIFEST_VERSION or not images:
            raise ValueError(f"format version {version}, {len(images)} images")

        def read(key, dtype):
            return np.array([image[key] for image in images], dtype=dtype)

        ids, splits = read("id", np.str_), read("split", np.str_)
        sizes = np.stack([read(side, np.int64) for side in ("height", "width")], axis=1)
        checksums = read("checksum", np.int64)
        pixels = np.zeros((len(images), len(classes)), dtype=np.int32)
        for row, image in zip(pixels, images):
            for label, count in image["pixels"].items():
                row[int(label)] = count
        identity = b"".join(column.tobytes() for column in (splits, ids, sizes, checksums))
        return Manifest(
            data=Path(data),
            root=Path(root),
            classes=classes,
            colors=[tuple(color) for color in content["colors"]],
            ids=ids,
            splits=splits,
            files=read("file", np.str_),
            masks=read("mask", np.str_),
            sizes=sizes,
            upright=np.array([content["exif"][split] == "upright" for split in splits.tolist()]),
            checksums=checksums,
            pixels=pixels,
            fingerprint=hashlib.sha256(json.dumps(classes).encode() + identity).hexdigest(),
        )
    except FileNotFoundError:
        raise UserError(f"no manifest at {path}: {remedy}") from None
    except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        raise UserError(f"cannot read {path} ({error!r}): {remedy}") from None


def class_colors(count: int) -> list[tuple[int, int, int]]:
    """Colours of `count` labels, background first; the same label always gets the same one."""
    colors = list(COLORS[:count])
    for label in range(len(colors), count):
        saturation, value = (0.9, 0.63, 0.43)[label % 3], (1, 0.78)[label % 2]
        color = colorsys.hsv_to_rgb(label * 0.618034 % 1, saturation, value)
        colors.append(tuple(round(255 * channel) for channel in color))
    return colors


def color_mask(mask: np.ndarray, colors: list[tuple[int, int, int]]) -> Image.Image:
    """RGB picture of an (H, W) uint8 index mask; 255 in the ignore colour."""
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[: len(colors)] = colors
    palette[IGNORE_INDEX] = IGNORE_COLOR
    image = Image.fromarray(mask)
    image.putpalette(palette.tobytes())
    return image.convert("RGB")


@contextmanager
def atomic_write(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """A file to write to. It appears at `path` complete, or not at all and with a UserError.

    With `sync` it also survives a power cut, at the price of waiting for the disk.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            if sync:
                file.flush()
                with _tolerated(f"the disk of {file.name} does not support fsync"):
                    os.fsync(file.fileno())
        rename(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError | RuntimeError):  # torch turns a full disk into the latter
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        full = getattr(error, "errno", errno.ENOSPC) in (errno.ENOSPC, errno.EDQUOT)
        remedy = "is its disk full?" if full else "give another path"
        raise UserError(f"cannot write {path} ({reason}): {remedy}") from None


@contextmanager
def _tolerated(warning: str) -> Iterator[None]:
    """Turns the error of a file system that lacks a feature into a warning."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        print(f"warning: {warning} ({error})", file=sys.stderr)


def rename(temporary: Path, path: Path) -> None:
    """Rename; retry for a few seconds while a virus scanner or a network drive holds the file."""
    for pause in (0.1, 0.3, 1, 3):
        with suppress(PermissionError):
            os.replace(temporary, path)
            return
        time.sleep(pause)
    os.replace(temporary, path)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder. The lock dies with the process, whatever kills it.
    Raises UserError if another one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "ab") as file:
        try:
            with _tolerated(f"the disk of {folder} does not support locks"):
                if sys.platform == "win32":
                    import msvcrt

                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    import fcntl  # lockf: children inherit a lock of flock

                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            remedy = "wait until it has ended, or choose another --out"
            raise UserError(f"{folder} is in use by another run: {remedy}") from None
        yield


def write_text(path: Path, text: str) -> None:
    """`atomic_write` of text."""
    with atomic_write(path) as file:
        file.write(text.encode())


def write_image(path: Path, image: Image.Image) -> None:
    """`atomic_write` of a PNG or JPEG."""
    # PNG ignores quality, JPEG compress_level; subsampled colours would blur the outlines.
    kind = "PNG" if path.suffix == ".png" else "JPEG"
    with atomic_write(path, sync=False) as file:
        plain = SimpleNamespace(write=file.write)  # writing to its fileno, Pillow overlooks errors
        image.save(plain, kind, compress_level=1, quality=90, subsampling=0)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the script's docstring as written, and defaults for arguments that have one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


class ArgumentParser(argparse.ArgumentParser):
    """Expands ~ and globs, since not every shell does, and none does inside quotes; but not in the
    values of flags that take no path."""

    LITERAL = ("--group", "--classes", "--priority", "--rare", "--pick")

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def parse_args(self, argv: list[str] | None = None) -> argparse.Namespace:
        """As in argparse, after expansion. Numbers must be within their `LIMITS`."""
        words, flags = [], [""]
        for given in sys.argv[1:] if argv is None else argv:
            if given.startswith("--"):
                flags.append(given.partition("=")[0])
            words += [given] if flags[-1] in self.LITERAL else self.expanded(given)
        for action in self._actions:  # a second list would take the place of the first
            if action.nargs == "+" and sum(map(flags.count, action.option_strings)) > 1:
                self.error(f"{action.option_strings[0]} is given twice: name all after one")
        args = super().parse_args(words)
        for name, (low, high) in LIMITS.items():
            given = getattr(args, name, None)
            for value in given if isinstance(given, list) else [given]:
                if value is not None and not low <= value <= high:
                    to = f"{low} or more" if high == math.inf else f"{low} to {high}"
                    self.error(f"--{name.replace('_', '-')} {value}: give {to}")
        return args

    def error(self, message: str) -> NoReturn:
        """Raise a UserError: one sentence, without the usage, which fills a screen."""
        raise UserError(f"{message}; see --help")

    @staticmethod
    def expanded(word: str) -> list[str]:
        """The files that a glob matches, else the word itself, with ~ replaced."""
        flag, equals, path = word.partition("=") if word.startswith("--") else ("", "", word)
        path = os.path.expanduser(path)
        # A file may be called "a[1].jpg": a name is a pattern only where nothing has it.
        found = [] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))
        return [part for part in (flag, *found) if part] if found else [flag + equals + path]


def default_workers() -> int:
    """Loader processes when the user names none: one per core, at most eight."""
    allowed = getattr(os, "sched_getaffinity", None)  # fewer than there are, as under Slurm
    return min(8, len(allowed(0)) if allowed else os.cpu_count() or 1)


def say(*words: object) -> None:
    """Print a line immediately. A closed output must not end a training run."""
    try:
        print(*words, flush=True)
    except OSError:  # the reader or the terminal is gone, or the disk is full
        _silence_if_closed(sys.stdout)


def _silence_if_closed(stream: TextIO) -> bool:
    """Whether nobody reads the stream. If so, redirect it to nothing: Python will flush it."""
    try:
        stream.write("\n")
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False


def run_command(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit: with 2 and one sentence after a user's error, with 130 after
    Ctrl-C, and silently with 141 if the output was closed, as by `| head`."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        with suppress(AttributeError):  # of a notebook
            getattr(sys, name).reconfigure(errors="backslashreplace")  # for names of any alphabet
    try:
        code = main()
        sys.stdout.flush()
        sys.exit(code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        # From a loader process it comes with that process's traceback before it.
        sentence = " ".join(str(error).split("UserError: ")[-1].split())
    except (OSError, EOFError, RuntimeError, MemoryError) as error:
        piped = isinstance(error, BrokenPipeError) and not error.filename
        if piped and _silence_if_closed(sys.stdout):
            sys.exit(141)
        # torch reports a dead loader process as a lost connection, as an error from its handler of
        # SIGCHLD, or as both.
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if getattr(error, "errno", None) == errno.ENOSPC and not error.filename:
            sentence = "cannot write the output: is its disk full?"
        elif getattr(error, "filename", None):
            sentence = f"cannot use {error.filename} ({error.strerror}): give another path"
        elif "shared memory" in str(error) or "bus error" in str(error).lower():
            remedy = "in Docker use --shm-size 8g or --ipc=host; else try fewer --workers"
            sentence = f"no shared memory is left for loader processes: {remedy}"
        elif re.search(r"MemoryError|can't allocate|out of memory|ALLOC_FAILED", repr(error)):
            remedy = "lower --size, --workers, or --batch-size and raise --accumulate as much"
            sentence = f"out of memory: {remedy}"
        elif re.search(COMPILER, str(error)):
            remedy = "install one (gcc and g++; on a GPU also Triton), or use --no-compile"
            sentence = f"--compile finds no working C++ compiler: {remedy}"
        elif isinstance(error, ConnectionError | EOFError) or re.search(DEATH, str(error)):
            sentence = "a loader process died or hangs, perhaps out of memory: try fewer --workers"
        else:
            raise
    print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr)
    sys.exit(2)
