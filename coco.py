"""COCO annotation files from any tool, read without trusting them, and their segmentations.

    index = read_index(source)  # what the preparation needs to know about images and annotations
    tasks = split_tasks(index, root, classes, skipped)
    encoded, dropped, nested = encode(segmentation, height, width)

A file is read once, value by value, and never held in memory: only the ids of an annotation and its
place in the file are kept. Everything is checked before pycocotools, which is written in C, gets to
see it. What cannot be used is skipped and counted by reason.
"""

import difflib
import filecmp
import hashlib
import json
import os
import re
import sys
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO, NamedTuple

import numpy as np
from pycocotools import mask as rle

from common import BACKGROUND, IGNORE_INDEX, UserError

# pycocotools walks an outline at five points per pixel, in 32-bit integers: 1e8 crashes it.
MAX_COORDINATE = 1e6
MAX_OUTLINE = 2e6
WINDOW = 2**24  # bytes of an annotation file in memory at once, if no single value is longer
EXAMPLES = 10  # per reason, in the manifest
OUTSIDE = "polygon outside the image: annotated on a picture of another size?"
TOO_SHORT = "polygon has fewer than 6 numbers"
MISSING = "image file is missing"
DOUBTFUL = "two rows lead to the same file, by different paths or sizes"
SPACE = re.compile(r"[ \t\n\r]*")


class Source(NamedTuple):
    """A split: its annotation file, or folder of masks, and where its images may lie."""

    split: str
    path: Path
    folders: list[Path]


class Index(NamedTuple):
    """An annotation file. `images` are (id, file name, height, width), with 0 for an unknown size.
    For each annotation: the ids of its image and category, and in `places` two byte offsets."""

    source: Source
    names: dict[int | str, str]
    images: list[tuple]
    image_ids: list
    category_ids: list
    places: array


class Task(NamedTuple):
    """What a worker needs for one image. `file` is relative to the root; a size of 0 is unknown.
    `annotations` are (label, start, end) of their text in `source`, or None if that is a mask."""

    id: int | str
    split: str
    file: str
    mask: str
    height: int
    width: int
    source: Path
    annotations: list[tuple] | None


class Unusable(ValueError):
    """An annotation or image that cannot be used; the text is the reason."""


class Empty(Unusable):
    """An annotation that can be read, but covers no pixel."""


def whole(value: object) -> int | None:
    """The whole number that a value stands for (640, 640.0 or "640"), or None."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = int(value) if value.lstrip("-").isdecimal() else float(value)
    return int(value) if isinstance(value, int | float) and value % 1 == 0 else None


def identifier(value: object) -> int | str | None:
    """An id, however it is written: 7, 7.0 and "7" are the same. None if it is not one."""
    number = whole(value)
    if number is None and isinstance(value, str):
        return value[:99] or None
    return number


# --- segmentations -------------------------------------------------------------------------------


def encode(segmentation: object, height: int, width: int) -> tuple[dict, list[str], bool]:
    """A segmentation as compressed RLE of pycocotools; the reasons why rings were dropped; and
    whether a ring lies within another one. That could be meant as a hole, but it is filled.

    Takes polygons or RLE as COCO writes them, a single polygon, pairs, numbers as text, and several
    RLEs. Raises Unusable for anything that would make pycocotools crash, guess, or read memory that
    is not its own.
    """
    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    if segmentation is None or not parts:
        raise Unusable("annotation has no segmentation")
    pairs = len(parts) > 2 and all(isinstance(part, list) and len(part) == 2 for part in parts)
    if pairs or not any(isinstance(part, list | dict) for part in parts):
        parts = [parts]
    encoded, dropped, outside = [], [], False
    for part in parts:
        try:
            if isinstance(part, dict):
                encoded.append(_checked_rle(part, height, width))
                continue
            points = _checked_polygon(part)
            encoded += rle.frPyObjects([points.ravel()], height, width)
            apart = (points.max(axis=0) <= 0) | (points.min(axis=0) >= (width, height))
            outside |= apart.any()
        except Unusable as reason:
            dropped.append(str(reason))
    if not encoded:
        raise Unusable(dropped[0])
    merged, areas = rle.merge(encoded), rle.area(encoded)
    if not rle.area(merged):
        raise Empty(OUTSIDE if outside else "segmentation covers no pixel")
    nested = areas.sum() - rle.area(merged) >= max(1, areas.min())  # perhaps; more is slow
    if nested:  # the share of each ring that lies within each other one
        shares = rle.iou(encoded, encoded, [1] * len(encoded)) - np.eye(len(encoded))
        nested = shares.max() >= 1
    return merged, dropped, bool(nested)


def encode_bbox(bbox: object, height: int, width: int) -> dict | None:
    """RLE of a bbox [x, y, width, height]; None if it is not one or covers no pixel."""
    try:
        x, y, w, h = map(float, bbox)
        return encode([[x, y, x + w, y, x + w, y + h, x, y + h]], height, width)[0]
    except (TypeError, ValueError, OverflowError):
        return None


def states_nothing(annotation: dict) -> bool:
    """Whether an annotation itself says that it covers nothing: a point or a placeholder."""
    box, area = annotation.get("bbox"), annotation.get("area")
    empty_box = box == [] or (isinstance(box, list) and 0 in box[2:])
    empty = annotation.get("segmentation") in (None, [], [[]], {}, "")
    return empty and (empty_box or area is not None) and whole(area or 0) == 0


def _checked_polygon(polygon: object) -> np.ndarray:
    try:
        points = np.array(polygon, dtype=np.float64).ravel()
    except (TypeError, ValueError, OverflowError):
        raise Unusable("polygon holds something other than numbers") from None
    if len(points) < 6:
        raise Unusable(TOO_SHORT)
    if len(points) % 2:
        raise Unusable("polygon has an odd count of numbers")
    points = points.reshape(-1, 2)
    if not (np.abs(points) <= MAX_COORDINATE).all():  # which is false for NaN too
        raise Unusable("polygon coordinate is not finite or out of bounds")
    edges = np.abs(points - np.concatenate([points[-1:], points[:-1]]))
    if edges.max(axis=1).sum() > MAX_OUTLINE:
        raise Unusable("polygon outline is out of bounds")
    if points.min() >= 0 and points.max() <= 1:
        raise Unusable("polygon between 0 and 1: normalised coordinates? Pixels are expected")
    return points


def _checked_rle(segmentation: dict, height: int, width: int) -> dict:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or [whole(side) for side in size] != [height, width]:
        raise Unusable("RLE size is not the image's")
    if isinstance(counts, str):
        counts = _decompressed(counts)
    elif not isinstance(counts, list):
        raise Unusable("RLE counts are neither a list nor a string")
    else:
        counts = [whole(count) for count in counts]
    if not all(count is not None and count >= 0 for count in counts):
        raise Unusable("RLE counts are not whole numbers from 0 up")
    if sum(counts) != height * width:
        raise Unusable("RLE counts do not sum to the image's pixels")
    return rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)


def _decompressed(text: str) -> list[int]:
    """Run lengths of a compressed RLE string: 5 bits per character, low bits first. Bit 5 says that
    more follow, and bit 4 of the last character is the sign. From the fourth on, numbers are stored
    as differences to the last but one."""
    if not re.fullmatch("(?:[P-o]{0,6}[0-O])*", text):
        raise Unusable("RLE string is damaged")
    counts, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    return counts


# --- annotation files ----------------------------------------------------------------------------


class Skipped:
    """What could not be used, `images` and `annotations`: a count and a few examples per reason.
    `seen` holds the images of all splits: an image in two of them stays in the first."""

    def __init__(self, strict: bool = False):
        self.strict, self.images, self.annotations, self.seen = strict, {}, {}, {}

    def add(self, kind: str, reason: str, split: str, image: object, annotation=None) -> None:
        """Count an image or annotation, known by names or ids. Raises UserError if strict."""
        names = [name if isinstance(name, int) else str(name)[:99] for name in (image, annotation)]
        example = {"split": split, "image": names[0]}
        if kind == "annotations":
            example["annotation"] = names[1]
        entry = getattr(self, kind).setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(example)
        if self.strict:
            what = ", ".join(f"{name} {value}" for name, value in example.items())
            raise UserError(f"{what}: {reason} (--strict)")

    def earlier(self, path: Path, task: Task) -> Task | None:
        """The task of an earlier split that has the same image; if none has, this one is noted.
        Raises Unusable if there is no such file."""
        try:
            stat = path.stat()
        except FileNotFoundError:  # a link that leads nowhere
            raise Unusable(MISSING) from None
        for key in ((stat.st_dev, stat.st_ino), (task.id, task.mask, stat.st_size)):
            other, known = self.seen.setdefault(key, (path, task))
            if known.split == task.split:
                continue
            # Compared, since on some network drives all inode numbers are equal.
            if other == path or filecmp.cmp(path, other, shallow=False):
                return known
        return None

    def lines(self) -> list[str]:
        """A line for each reason."""
        reasons = [*self.images.items(), *self.annotations.items()]
        return [f"{e['count']} x {r} (first: {e['examples'][0]['image']})" for r, e in reasons]


class JsonText:
    """JSON in a file, read value by value from a window of its text, in which `at` is the place.

    It is read as Latin-1, in which a character is a byte; values with other characters are decoded
    again.
    """

    def __init__(self, file: BinaryIO):
        self.file, self.start, self.text, self.at = file, 0, "", 0
        # Fractions stay text: parsing them would double the time, and only workers need them.
        self.decode = json.JSONDecoder(parse_float=str).raw_decode
        self._move()
        if self.text.startswith("\xef\xbb\xbf"):  # a byte order mark
            self.at = 3

    def _move(self) -> bool:
        """Move the window to the current place. Returns whether it holds more than before."""
        left = len(self.text) - self.at
        self.start, self.at = self.start + self.at, 0
        self.file.seek(self.start)
        self.text = str(self.file.read(max(WINDOW, 2 * left)), "latin-1")
        return len(self.text) > left

    def peek(self) -> str:
        """Move to the next character that is not a space, and return it."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._move():
                raise ValueError("it ends too early")

    def value(self) -> tuple[object, int, int]:
        """The next value, and where in the file it begins and ends."""
        self.peek()
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except ValueError:  # it may be cut off at the end of the window
                if not self._move():
                    raise
                continue
            # So may a number, which without its last digits is still a number.
            if (end < len(self.text) and self.text[end] in ",:]} \t\n\r") or not self._move():
                break
        text, place = self.text[self.at : end], (self.start + self.at, self.start + end)
        self.at = end
        return value if text.isascii() else json.loads(text.encode("latin-1")), *place

    def items(self, closing: str) -> Iterator[None]:
        """Step through the items of the list or object whose bracket comes next."""
        self.at += 1
        while self.peek() != closing:
            yield
            if self.peek() == ",":
                self.at += 1
            elif self.text[self.at] != closing:
                raise ValueError(f"no comma at byte {self.start + self.at}")
        self.at += 1


def walk(file: BinaryIO) -> Iterator[tuple[str, object, int, int]]:
    """(key, element, start, end) for each element of each list in a JSON object; before them, for
    the list itself, (key, None, 0, 0). Raises ValueError if the file is not a JSON object."""
    text = JsonText(file)
    if text.peek() != "{":
        raise ValueError("no JSON object")
    for _ in text.items("}"):
        key = text.value()[0]
        if text.peek() != ":":
            raise ValueError(f"no colon at byte {text.start + text.at}")
        text.at += 1
        if text.peek() != "[":
            text.value()
            continue
        yield key, None, 0, 0
        for _ in text.items("]"):
            yield key, *text.value()


def read_index(source: Source) -> Index:
    """Read what the preparation needs from an annotation file. Raises UserError if it is missing or
    damaged, or if two categories share an id."""
    names, images, image_ids, category_ids, places = {}, [], [], [], array("q")
    lists = set()
    try:
        with open(source.path, "rb") as file:
            for key, element, start, end in walk(file):
                lists.add(key)
                if not end:  # the list itself, as yet without an element
                    continue
                fields = element if isinstance(element, dict) else {}
                if key == "annotations":
                    image_ids.append(identifier(fields.get("image_id")))
                    category_ids.append(identifier(fields.get("category_id")))
                    places.extend((start, end))
                elif key == "images":
                    images.append(_image_row(fields))
                elif key == "categories" and isinstance(fields.get("name"), str | int | float):
                    id_, name = identifier(fields.get("id")), str(fields["name"]).strip()
                    name = name or f"category {id_}"
                    if names.setdefault(id_, name) != name:
                        raise ValueError(f"category {id_} is both {names[id_]!r} and {name!r}")
    except (ValueError, RecursionError) as error:
        what = f"cannot read {source.path} ({error})"
        raise UserError(f"{what}: repair it, or export it again") from None
    for key in ("images", "annotations", "categories"):
        if key not in lists:
            raise UserError(f"{source.path} has no list {key!r}: it is not a COCO instances file")
    names.pop(None, None)  # of a category without an id
    return Index(source, names, images, image_ids, category_ids, places)


def _image_row(image: dict) -> tuple:
    """Id, file name, height, width. LVIS has no file name, but a URL that ends with it. COCO
    Annotator may use the same file name in two folders, but also writes a path."""
    name, path = image.get("file_name"), image.get("path")
    if isinstance(path, str) and path.endswith(f"/{name}"):
        name = path
    if not name and isinstance(image.get("coco_url"), str):
        name = "/".join(image["coco_url"].split("/")[-2:])
    height, width = (max(0, whole(image.get(side)) or 0) for side in ("height", "width"))
    return identifier(image.get("id")), name, height, width


def choose_classes(wanted: list[str], indexes: list[Index]) -> list[str]:
    """Class names by label, the background first; ["all"] stands for all categories.

    Prints which split lacks a class, and which categories count as one because only the case
    differs. Raises UserError for a class that no split has."""
    known = dict.fromkeys(name for index in indexes for name in index.names.values())
    if wanted == ["all"]:
        return [BACKGROUND, *(name for name in known if name != BACKGROUND)]
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"it knows {', '.join(known) or 'none at all'}"
            hint = f"did you mean {close[0]!r}?" if close else hint
            raise UserError(f"{indexes[0].source.path} has no category {name!r}; {hint}")
        for other in known:
            if fold(other) == fold(name) and other not in wanted:
                print(f"note: category {other!r} counts as {name!r}", file=sys.stderr)
        for index in indexes:
            if fold(name) not in map(fold, index.names.values()):
                print(f"note: {index.source.split} has no category {name!r}", file=sys.stderr)
    return [BACKGROUND, *wanted]


# --- images --------------------------------------------------------------------------------------


def split_name(path: Path) -> str:
    """The split's name, from its annotation file or folder of masks; for Roboflow, the folder."""
    path = Path(os.path.abspath(path))
    return path.parent.name if path.name.startswith("_") else path.stem.removeprefix("instances_")


def find_sources(root: Path, splits: list[str] | None) -> list[Source]:
    """The splits below a root with the layout of COCO, CVAT, Label Studio or Roboflow: those named,
    by default val2017, or else all. Raises UserError if there are none."""
    if not root.is_dir():
        raise UserError(f"no folder {root}: give the COCO root with --coco-root")
    patterns = ("annotations/instances_*.json", "*/_annotations.coco.json")
    for pattern in (*patterns, "_annotations.coco.json", "result.json", "instances_*.json"):
        if paths := {split_name(path): path for path in sorted(root.glob(pattern))}:
            break
    splits, images = splits or (["val2017"] if "val2017" in paths else paths), root / "images"
    sources = []
    for split in dict.fromkeys(splits or ["<split>"]):
        if split not in paths:
            missing = f"no annotation file {root / 'annotations' / f'instances_{split}.json'}"
            found = f"found: {', '.join(paths) or 'none'}"
            own = "any other layout: --annotations FILE --images-dir DIR"
            raise UserError(f"{missing}; splits {found}; {own}")
        folders = [root / split, images / split, images, paths[split].parent, root]
        sources.append(Source(split, paths[split], folders))
    return sources


class Tree:
    """Finds files below a folder, by listing each folder once."""

    def __init__(self, folder: Path):
        self.folder, self.listed = folder, {}

    def find(self, name: str) -> str | None:
        """The path below the folder, as on disk, or None. A name may begin with the last parts of
        the folder's own path. If it begins with a slash, the longest end of it that exists is
        taken. Case and Unicode form may differ if only one file fits."""
        parts, own = name.lstrip("/").split("/"), self.folder.parts
        for first in range(len(parts)):
            left_out = not first or name[0] == "/" or parts[:first] == list(own[-first:])
            if left_out and (found := self._below("", parts[first:])):
                return found
        return None

    def _below(self, found: str, parts: list[str]) -> str:
        for part in parts:
            alike = self._list(found).get(fold(part), [])
            if part not in alike and len(alike) != 1:
                return ""
            found = f"{found}/{part if part in alike else alike[0]}".lstrip("/")
        return found

    def _list(self, below: str) -> dict[str, list[str]]:
        if below not in self.listed:
            path, names = self.folder / below, defaultdict(list)
            for name in os.listdir(path) if path.is_dir() else []:
                names[fold(name)].append(name)
            self.listed[below] = names
        return self.listed[below]


def fold(name: str) -> str:
    """A form that is equal for names that some file system takes to be the same."""
    return unicodedata.normalize("NFC", name.casefold())


def locate(names: list[str], folders: Iterable[Path]) -> tuple[Path, list[str | None]]:
    """The folder with the most of these files (of several, the first), and their paths below it."""
    candidates = []
    for folder in folders:
        tree = Tree(folder)
        found = [tree.find(name) for name in names]
        candidates.append((folder, found))
        if all(found):
            break
    return max(candidates, key=lambda candidate: sum(map(bool, candidate[1])))


def safe_name(name: object) -> str:
    """A file name with forward slashes. It begins with one if it comes from elsewhere: an absolute
    path, a URL, or a path with "..". Raises Unusable if it is not a name."""
    if not isinstance(name, str) or not name.strip():
        raise Unusable("image without a file name")
    drive = PureWindowsPath(name).drive
    path = re.sub(r"^\w+://([^?#]*).*", r"/\1", name.removeprefix(drive))
    path = PurePosixPath(path.replace("\\", "/"))
    parts = [*takewhile(lambda part: part not in ("/", "//", ".."), reversed(path.parts))][::-1]
    if not parts:
        raise Unusable("image without a file name")
    elsewhere = drive or len(parts) < len(path.parts)
    return ("/" if elsewhere else "") + "/".join(parts)


def mask_names(paths: list[str]) -> list[str]:
    """The path of each image's mask: `cam0/a.jpg` gives `cam0/a.png`. If that is taken, also for
    file systems that ignore case, the mask keeps the image's suffix; if too long, it is a hash."""
    names, taken = [], set()
    for path in paths:  # a folder may be called a.png
        parts = fold(path).split("/")
        taken.update("/".join(parts[:count]) for count in range(1, len(parts)))
    for path in paths:
        folder, _, name = path.rpartition("/")
        stem, digest = os.path.splitext(name)[0], hashlib.blake2b(os.fsencode(path), digest_size=16)
        for base in (stem, name, digest.hexdigest()):
            mask = f"{folder}/{base}.png".lstrip("/")
            if fold(mask) not in taken and len(os.fsencode(base)) < 246:
                break
        taken.add(fold(mask))
        names.append(mask)
    return names


def split_tasks(index: Index, root: Path, classes: list[str], skipped: Skipped) -> list[Task]:
    """The tasks of a split, in which `mask` is still the image's own path. Raises UserError if two
    files share an id, if most images are missing, or if an earlier split has the same image without
    a class that this split labels."""
    (split, annotation_file, folders), owners, tasks, shared = index.source, {}, {}, {}
    rows = _named_rows(index, owners, skipped)
    folder, found = locate([row[1] for row in rows], folders)
    files, doubtful, missing = {}, set(), []
    prefix = Path(os.path.relpath(folder, root)).as_posix()
    for (id_, name, height, width), below in zip(rows, found):
        path = below or name
        if owners.setdefault(id_, path) != path:
            two = f"{owners[id_]} and {path} share the id {id_}"
            raise UserError(f"{annotation_file}: {two}: give each image an id of its own")
        size, file = (height, width), f"{prefix}/{below}".removeprefix("./")
        task = Task(id_, split, file, below, *size, annotation_file, [])
        try:
            if not below:
                raise Unusable(MISSING)
            if below in files:
                tasks[id_], its_name = files[below]
                if _same_image(task, name, *files[below]):
                    raise Unusable("another row holds the image: merged")
                if below not in doubtful:
                    skipped.add("images", DOUBTFUL, split, its_name)
                doubtful.add(below)
                raise Unusable(DOUBTFUL)
            if earlier := skipped.earlier(folder / below, task):
                shared[id_] = earlier
                raise Unusable(f"image is in {earlier.split} too, and kept there")
            tasks[id_], files[below] = task, (task, name)
        except Unusable as reason:
            if str(reason) == MISSING:
                missing.append(folder / name)
            skipped.add("images", str(reason), split, name)
    if len(missing) * 2 > len(rows):
        count = f"{len(missing):,} of the {len(rows):,} images of {split} are missing"
        raise UserError(f"{count} (first: {missing[0]}): is it the right folder?")
    for image_id, label in _add_annotations(index, classes, owners, tasks, skipped):
        earlier = shared.get(image_id)
        if earlier and label not in (own for own, *_ in earlier.annotations):
            both = f"{earlier.source} and {annotation_file} label the same images"
            remedy = "merge the files, or prepare them separately"
            raise UserError(f"{both}, and only the second has {classes[label]}: {remedy}")
    return [task for below, (task, _) in files.items() if below not in doubtful]


def _named_rows(index: Index, owners: dict, skipped: Skipped) -> list[tuple]:
    """The images that have an id and a name, which is made safe. `owners` gets the others' ids."""
    rows = []
    for id_, name, height, width in index.images:
        try:
            if id_ is None:
                raise Unusable("image without an id")
            rows.append((id_, safe_name(name), height, width))
        except Unusable as reason:
            if id_ is not None:
                owners[id_] = str(name)
            skipped.add("images", str(reason), index.source.split, name)
    return rows


def _same_image(task: Task, name: str, other: Task, its_name: str) -> bool:
    """Whether two rows that lead to the same file are the same image: their sizes do not differ,
    and their names are equal, or both were found whole and not only by their ends."""
    sizes = {(task.height, task.width), (other.height, other.width)} - {(0, 0)}
    return len(sizes) < 2 and (name == its_name or "/" not in (name[0], its_name[0]))


def _add_annotations(
    index: Index, classes: list, owners: dict, tasks: dict, skipped: Skipped
) -> Iterator[tuple]:
    """Give the tasks the annotations of the chosen classes, and those without a known category,
    whose pixels are ignored. Yields image id and label of annotations whose image is left out."""
    wanted = {fold(name): label for label, name in enumerate(classes)}
    wanted |= {name: label for label, name in enumerate(classes)}
    labels = {id_: wanted.get(n, wanted.get(fold(n), 0)) for id_, n in index.names.items()}
    rows = zip(index.image_ids, index.category_ids, index.places[::2], index.places[1::2])
    for number, (image_id, category_id, start, end) in enumerate(rows):
        known = image_id in owners
        if not known or category_id not in labels:
            reason = "category is not in categories" if known else "annotation of an unknown image"
            skipped.add("annotations", reason, index.source.split, image_id, f"#{number}")
        label = labels.get(category_id, IGNORE_INDEX)
        if label and image_id in tasks:
            tasks[image_id].annotations.append((label, start, end))
        elif label not in (0, IGNORE_INDEX):
            yield image_id, label
