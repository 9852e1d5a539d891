"""Split, oversampling, transforms, loaders: what must always hold."""

import io
import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import given, settings, st
from PIL import Image
from torchvision.transforms.v2 import functional as F

import dataset
from common import IGNORE_COLOR, UserError, class_colors, color_mask, load_manifest
from dataset import (
    EpochBatches,
    TrainingSet,
    augment,
    crop_box,
    decoder_scale,
    drawn_pixels,
    evaluation_input,
    evaluation_loader,
    holders,
    jitter,
    load_mask,
    normalize,
    oversample,
    padded_size,
    rare_classes,
    resized_size,
    split_indices,
    training_loader,
)
from images import read_image


class Fake(SimpleNamespace):
    def __len__(self):
        return len(self.pixels)


def fake_manifest(pixels):
    pixels = np.array(pixels)
    splits, ids = np.full(len(pixels), "a"), np.arange(len(pixels))
    classes = ["background", "person", "car", "bus"]
    files = np.array([f"{id_}.jpg" for id_ in ids])
    fake = Fake(data="data", classes=classes, pixels=pixels, ids=ids, splits=splits, files=files)
    fake.keys = lambda rows: [[str(fake.splits[r]), str(fake.ids[r]), fake.files[r]] for r in rows]
    return fake


def skewed(count=400, seed=0):
    rng = np.random.default_rng(seed)
    present = rng.random((count, 4)) < [1, 0.5, 0.1, 0.03]
    return fake_manifest(present * rng.integers(1, 99, (count, 4)))


# --- split and oversampling ----------------------------------------------------------------------


def test_split_is_disjoint_complete_stable_and_stratified():
    manifest = skewed()
    train, val = split_indices(manifest, 3, None)
    assert len(np.intersect1d(train, val)) == 0
    np.testing.assert_array_equal(np.union1d(train, val), np.arange(400))
    again = split_indices(manifest, 3, None)
    np.testing.assert_array_equal(val, again[1])
    assert not np.array_equal(val, split_indices(manifest, 4, None)[1])
    holds = manifest.pixels > 0
    for label in range(1, 4):
        share = holds[val, label].sum() / holds[:, label].sum()
        assert share == pytest.approx(0.2, abs=0.06), manifest.classes[label]
    rarest = holds[:, 3].sum()
    assert holds[val, 3].sum() == round(0.2 * rarest)


def test_split_depends_on_the_images_not_on_their_order():
    manifest = skewed()
    _, val = split_indices(manifest, 0, None)
    order = np.random.default_rng(1).permutation(400)
    shuffled = fake_manifest(manifest.pixels[order])
    shuffled.ids[:] = manifest.ids[order]
    _, other = split_indices(shuffled, 0, None)
    assert set(manifest.ids[val]) == set(shuffled.ids[other])


@pytest.mark.parametrize(("count", "validating"), [(1, 0), (2, 1), (3, 1), (8, 2)])
def test_a_class_of_two_images_has_one_to_validate_on(count, validating):
    pixels = np.tile([9, 1, 0, 0], (50, 1))
    pixels[:count, 3] = 1
    for seed in range(9):
        _, val = split_indices(fake_manifest(pixels), seed, None)
        assert (val < count).sum() == validating


def test_named_split_validates(data):
    manifest = load_manifest(data)
    train, val = split_indices(manifest, 0, "val2017")
    assert set(manifest.splits[val]) == {"val2017"}
    assert set(manifest.splits[train]) == {"train2017"}
    with pytest.raises(UserError, match="train2017, val2017"):
        split_indices(manifest, 0, "test2017")


@given(st.integers(1, 6), st.integers(0, 5))
@settings(deadline=None, max_examples=30)
def test_oversampling_repeats_exactly_the_rare_training_images(factor, seed):
    manifest = skewed(seed=seed)
    train, val = split_indices(manifest, 0, None)
    rare = rare_classes(manifest, train, None)
    assert rare == ["bus"]
    rows, counts = np.unique(oversample(manifest, train, rare, factor), return_counts=True)
    np.testing.assert_array_equal(rows, train)
    np.testing.assert_array_equal(counts, np.where(manifest.pixels[train, 3] > 0, factor, 1))
    assert not np.isin(rows, val).any()


def test_a_class_in_no_image_is_not_rare_but_absent():
    manifest = fake_manifest([[9, 1, 0, 0]] * 99 + [[9, 0, 0, 1]])
    assert rare_classes(manifest, np.arange(100), None) == ["bus"]


# --- transforms ----------------------------------------------------------------------------------

BLOCKS = np.kron(np.arange(48).reshape(6, 8), np.ones((20, 20))).astype(np.uint8)


def test_crops_lie_in_the_image_and_keep_their_shape():
    rng, shares = np.random.default_rng(0), []
    for height, width in [(480, 640), (641, 427), (33, 4000), (1, 1), (7, 500)] * 200:
        top, left, h, w = crop_box(height, width, rng)
        assert 0 <= top <= height - h < height
        assert 0 <= left <= width - w < width
        if min(h, w) > 30:
            assert 0.7 < w / h < 1.4
        shares.append(h * w / (height * width) if (height, width) == (480, 640) else 1)
    assert 0.24 < min(shares) < 0.3
    tops = {crop_box(100, 100, rng)[0] for _ in range(500)}
    assert 0 in tops
    assert max(tops) > 40


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("scale", [1, 2, 4])
def test_image_and_mask_move_together(seed, scale, monkeypatch):
    """The red channel encodes the label; colour jitter is left out, it may change colours. A JPEG's
    decoder has made the image smaller, whose sides `scale` need not divide."""
    monkeypatch.setattr(dataset, "jitter", lambda image, *_: image)
    rng = np.random.default_rng(seed)
    blocks = np.kron(BLOCKS, np.ones((scale, scale), dtype=np.uint8))
    blocks = blocks[seed % 7 :, seed % 5 :]
    box = crop_box(*blocks.shape, rng)
    size = 96 if scale == 1 else 60
    picture = Image.fromarray(blocks * 5)
    if scale > 1:
        encoded = io.BytesIO()
        picture.save(encoded, "JPEG", quality=100)
        picture = Image.open(encoded)
        assert decoder_scale((0, 0, scale * size, scale * size), size) == scale
        assert decoder_scale((0, 0, scale * size, scale * size - 1), size) == scale // 2
        picture.draft(None, (picture.width // scale, picture.height // scale))
        assert picture.height == -(-len(blocks) // scale)
    picture = torch.from_numpy(np.array(picture)).expand(3, -1, -1)
    image, mask = augment(picture, torch.from_numpy(blocks), box, size, rng)
    assert mask.shape == (size, size)
    # Of each label the middle, not the edges, where the image is interpolated.
    off = (image[0].int() - 5 * mask.int()).abs()
    middle = torch.ones_like(mask, dtype=torch.bool)
    for shift in [(dy, dx) for dy in (-3, 0, 3) for dx in (-3, 0, 3)]:
        middle &= mask.roll(shift, (0, 1)) == mask
    assert off[middle].float().mean() < 2


def test_the_crop_of_a_smaller_image_begins_where_the_masks_does(monkeypatch):
    """The image is half as large as its mask, so a box of odd numbers begins between its pixels."""
    monkeypatch.setattr(dataset, "jitter", lambda image, *_: image)
    half = torch.arange(36, dtype=torch.uint8).reshape(6, 6)
    mask = half.repeat_interleave(2, 0).repeat_interleave(2, 1)
    for box, size in (((1, 1, 5, 5), 2), ((3, 5, 4, 5), 2), ((2, 3, 7, 6), 3)):
        rng = np.random.default_rng(0)
        image, crop = augment(half.expand(3, -1, -1), mask, box, size, rng)
        assert torch.equal(image[0], crop)


@pytest.mark.parametrize(("scale", "size"), [(1, (101, 67)), (2, (51, 34)), (4, (26, 17))])
def test_a_jpeg_is_decoded_smaller(tmp_path, scale, size):
    Image.new("RGB", (101, 67)).save(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg", (67, 101), True, scale).size == size


@pytest.mark.parametrize("seed", range(20))
def test_image_and_mask_agree_exactly(seed, monkeypatch):
    """The red channel encodes the label; colour jitter is left out, it may change colours."""
    monkeypatch.setattr(dataset, "jitter", lambda image, *_: image)
    rng = np.random.default_rng(seed)
    picture = torch.from_numpy(BLOCKS * 5).expand(3, -1, -1)
    image, mask = augment(picture, torch.from_numpy(BLOCKS), crop_box(120, 160, rng), 96, rng)
    assert image.shape == (3, 96, 96)
    assert mask.shape == (96, 96)
    assert set(mask.unique().tolist()) <= set(range(48))
    off = (image[0].int() - 5 * mask.int()).abs()
    # Pixels away from the edges of the blocks, where the image is interpolated, agree exactly.
    inner = torch.ones_like(mask, dtype=torch.bool)
    for shift in [(dy, dx) for dy in (-2, 0, 2) for dx in (-2, 0, 2)]:
        inner &= mask.roll(shift, (0, 1)) == mask
    inner[:3], inner[-3:], inner[:, :3], inner[:, -3:] = False, False, False, False
    assert inner.float().mean() > 0.2
    assert off[inner].max() <= 1


def pictures():
    """Noise, in which neighbours differ by all, and smooth colours as of a photograph."""
    rng = np.random.default_rng(0)
    yield torch.from_numpy(rng.integers(0, 256, (3, 64, 96), dtype=np.uint8))
    smooth = torch.from_numpy(rng.uniform(80, 175, (1, 3, 5, 7)))
    yield torch.nn.functional.interpolate(smooth, (64, 96), mode="bicubic")[0].clamp(0, 255).byte()


def test_jitter_is_torchvisions_but_for_the_hue():
    for image in pictures():
        assert torch.equal(jitter(image, 1, 1, 1, 0), image)
        for factor in (0.7, 0.9, 1.2, 1.3):
            for place, adjust in enumerate(
                (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
            ):
                factors = [1, 1, 1]
                factors[place] = factor
                off = jitter(image, *factors, 0).int() - adjust(image, factor).int()
                assert off.abs().max() <= 1, (adjust, factor)
                assert off.float().mean() > 0.1  # torchvision cuts off what is rounded here


@pytest.mark.parametrize("turns", [-0.03, 0.03])
def test_hue_keeps_the_luma_and_turns_as_torchvisions(turns):
    _, image = pictures()
    found = jitter(image, 1, 1, 1, turns)
    luma = torch.tensor([0.299, 0.587, 0.114])
    inside = ((found > 0) & (found < 255)).all(dim=0)
    off = torch.einsum("c,chw->hw", luma, found.float() - image.float())
    assert off[inside].abs().max() <= 1
    # HSV's hue is no linear map: near, and in the same direction.
    image, found = image.float(), found.float()
    expected = F.adjust_hue(image / 255, turns) * 255
    assert (found - expected).abs().mean() < 3
    assert ((found - image) * (expected - image)).mean() > 0.5 * (expected - image).square().mean()


@pytest.mark.parametrize("source", [16, 48, 64, 96, 128])
def test_masks_are_sampled_at_pixel_centres(source):
    """A half-and-half mask resized to 32 keeps its edge; "nearest" would move it at some sizes."""
    whole = (0, 0, source, source)
    rng = np.random.default_rng(1)
    assert rng.random() > 0.5  # no flip
    image = torch.zeros(3, source, source, dtype=torch.uint8)
    mask = torch.zeros(source, source, dtype=torch.uint8)
    mask[:, source // 2 :] = 1
    mask[source // 2 :] += 2
    expected = torch.zeros(32, 32, dtype=torch.uint8)
    expected[:, 16:] = 1
    expected[16:] += 2
    assert torch.equal(augment(image, mask, whole, 32, np.random.default_rng(1))[1], expected)
    gradient = torch.arange(source, dtype=torch.uint8).expand(source, source)
    columns = augment(image, gradient, whole, 32, np.random.default_rng(1))[1][0].double()
    centre = (columns - torch.arange(source).double().mean()).mean().item()
    assert abs(centre) <= 0.5


@pytest.mark.parametrize(
    ("height", "width"), [(480, 640), (640, 427), (100, 33), (32, 32), (7, 500)]
)
def test_evaluation_keeps_the_aspect_and_pads(height, width):
    image = torch.full((3, height, width), 200, dtype=torch.uint8)
    result = evaluation_input(image, 128)
    h, w = resized_size(height, width, 128)
    assert min(h, w) == 128 or max(h, w) == 256
    assert max(h, w) <= 256
    assert abs(h / w - height / width) <= 0.5 * max(h / w, 1) / min(h, w) + 1e-9
    assert result.shape == (3, *padded_size(height, width, 128))
    assert result.shape[1] % 32 == result.shape[2] % 32 == 0
    assert (result[:, :h, :w] == 200).all()
    assert (result[0, h:] == 124).all()
    assert (result[0, :, w:] == 124).all()


def test_shrunk_pictures_hold_all_their_pixels(monkeypatch):
    """Each fourth column is white. Interpolated between two pixels each, all would be black."""
    monkeypatch.setattr(dataset, "jitter", lambda image, *_: image)
    image = torch.zeros(3, 256, 256, dtype=torch.uint8)
    image[..., ::4] = 255
    crop, _ = augment(image, image[0], (0, 0, 256, 256), 64, np.random.default_rng(0))
    for small in (crop, evaluation_input(image, 64)):
        assert small.shape == (3, 64, 64)
        assert ((small[..., 1:-1] >= 63) & (small[..., 1:-1] <= 65)).all()


def test_normalize():
    images = torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
    images[1] = 255
    result = normalize(images)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(
        result[0, :, 0, 0], [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], rtol=1e-6
    )
    np.testing.assert_allclose(
        result[1, :, 3, 4], [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225], rtol=1e-6
    )


# --- loaders -------------------------------------------------------------------------------------


def epoch_of(manifest, rows, workers, epoch=0, start=0, seed=0):
    loader = training_loader(manifest, EpochBatches(rows, 4, seed), 32, workers)
    loader.batch_sampler.set_epoch(epoch, start)
    return [(images.clone(), masks.clone()) for images, masks in loader]


def test_batches_are_a_function_of_seed_and_epoch(data):
    manifest = load_manifest(data)
    rows = np.arange(18)
    state = torch.get_rng_state()
    first = epoch_of(manifest, rows, workers=0)
    assert torch.equal(state, torch.get_rng_state())
    assert len(first) == 4  # the incomplete batch is left out
    torch.manual_seed(99)
    for workers in (0, 1, 3):
        for a, b in zip(first, epoch_of(manifest, rows, workers), strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])
    rest = epoch_of(manifest, rows, workers=1, start=2)
    assert torch.equal(rest[0][0], first[2][0])
    assert len(rest) == 2
    for changed in ({"epoch": 1}, {"seed": 1}):
        assert not torch.equal(epoch_of(manifest, rows, 0, **changed)[0][0], first[0][0])


def test_an_epoch_holds_every_row_as_often_as_it_is_listed():
    rows = np.array([5, 6, 7, 7, 7, 8, 9, 10])
    batches = EpochBatches(rows, 4, seed=0)
    orders = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        keys = [key for batch in batches for key in batch]
        assert sorted(row for _, _, row, _ in keys) == rows.tolist()
        assert [position for _, position, _, _ in keys] == list(range(8))
        orders.append([row for _, _, row, _ in keys])
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_share_of_the_crops_is_drawn_by_class(data, share):
    manifest = load_manifest(data)
    rows = np.arange(len(manifest))
    groups = holders(manifest, np.repeat(rows, 2))
    assert all(np.array_equal(group, np.unique(group)) for group in groups.values())
    assert set(groups) == set(np.flatnonzero(manifest.pixels[:, 1:].any(axis=0)) + 1)
    options = {"balance": share, "holders": groups}
    drawn, batches = [], EpochBatches(np.tile(rows, 50), 4, 0, **options)
    for epoch in range(4):
        batches.set_epoch(epoch)
        whole = [key for batch in batches for key in batch]
        by_class = [(row, label) for _, _, row, label in whole if label]
        assert len(by_class) == int(share * len(whole))
        assert all(manifest.pixels[row, label] for row, label in by_class)
        drawn += by_class
        ranks = [EpochBatches(np.tile(rows, 50), 1, 0, 2, r, 2, **options) for r in range(2)]
        for other in ranks:
            other.set_epoch(epoch, start=1)
        assert sorted(k for other in ranks for b in other for k in b) == sorted(whole[4:])
    count = len(drawn) // 4  # of an epoch
    assert drawn[:count] != drawn[count : 2 * count]
    labels, images = np.array(drawn).T[::-1]
    counts = np.array([(labels == label).sum() for label in groups])
    assert np.abs(counts / len(labels) - 1 / len(groups)).max() < 0.05
    rarest = min(groups, key=lambda label: len(groups[label]))
    found = np.bincount(images[labels == rarest], minlength=len(rows))[groups[rarest]]
    assert found.min() > 0.5 * found.mean()


def test_crops_drawn_by_class_show_it(data):
    manifest = load_manifest(data)
    training = TrainingSet(manifest, 32, seed=0)
    for label, group in holders(manifest, np.arange(len(manifest))).items():
        masks = [training[0, n, int(n), label][1] for n in group for _ in range(3)]
        assert all((mask == label).any() for mask in masks)


def test_a_crop_is_centred_as_far_as_the_image_allows():
    rng = np.random.default_rng(0)
    for _ in range(300):
        center = tuple(rng.integers((90, 130)).tolist())
        top, left, h, w = crop_box(90, 130, rng, center)
        for start, side, whole, pixel in ((top, h, 90, center[0]), (left, w, 130, center[1])):
            assert 0 <= start <= pixel < start + side <= whole
            middle = start + side // 2 == pixel
            assert middle or start == 0 or start + side == whole


def test_pixels_as_often_as_they_are_drawn():
    pixels = np.array([[80, 20, 0], [100, 0, 0], [60, 30, 10]])
    manifest = SimpleNamespace(pixels=pixels, classes=["background", "a", "b"])
    rows = np.array([0, 1, 2, 2])
    assert drawn_pixels(manifest, rows, 0.0).tolist() == [300, 80, 20]
    # By class: "a" in images 0 and 2 (70, 25, 5), "b" in image 2 (60, 30, 10).
    expected = 0.5 * np.array([300, 80, 20]) + 0.5 * 4 * np.array([65, 27.5, 7.5])
    np.testing.assert_allclose(drawn_pixels(manifest, rows, 0.5), expected)


def test_a_repeated_image_is_augmented_anew(data):
    training = TrainingSet(load_manifest(data), 32, seed=0)
    assert torch.equal(training[0, 1, 5, 0][0], training[0, 1, 5, 0][0])
    for other in ((0, 2, 5, 0), (1, 1, 5, 0)):  # position, epoch
        assert not torch.equal(training[0, 1, 5, 0][0], training[other][0])


def test_evaluation_loader_gives_every_image_once_with_255_around_its_mask(data):
    manifest = load_manifest(data)
    rows = np.arange(24)
    for batch_size in (1, 5):
        seen = []
        for images, masks, batch in evaluation_loader(manifest, rows, 64, batch_size, workers=0):
            assert len(images) == len(masks) == len(batch) <= batch_size
            for image, mask, row in zip(images, masks, batch):
                height, width = manifest.sizes[row]
                native = load_mask(manifest, row)
                assert (mask[:height, :width].numpy() == native).all()
                assert (mask[height:] == 255).all()
                assert (mask[:, width:] == 255).all()
                assert image.shape[1:] == padded_size(height, width, 64)
            seen += batch
        assert sorted(seen) == rows.tolist()


def test_batches_are_of_like_images_and_few_pixels():
    def batches(sizes, size, batch_size):
        manifest = SimpleNamespace(sizes=np.array(sizes).reshape(-1, 2))
        loader = evaluation_loader(manifest, np.arange(len(sizes)), size, batch_size, workers=0)
        return list(loader.batch_sampler)

    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9000, (300, 2)).tolist()
    found = batches(sizes, 64, 4)
    assert sorted(index for batch in found for index in batch) == [*range(300)]
    for batch in found:
        assert len({padded_size(*sizes[index], 64) for index in batch}) == 1
        pixels = sum(sizes[index][0] * sizes[index][1] for index in batch)
        assert len(batch) == 1 or (len(batch) <= 4 and pixels <= dataset.BATCH_PIXELS)
    assert batches([(480, 640)] * 9, 64, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert batches([(4000, 6000)] * 5, 64, 4) == [[0, 1], [2, 3], [4]]  # 24 megapixels each
    assert batches([(12_000, 9000)] * 2, 64, 4) == [[0], [1]]
    assert batches([], 64, 4) == []


# --- reading -------------------------------------------------------------------------------------


def test_exif_turns_only_what_was_annotated_turned(tmp_path):
    path = tmp_path / "image.jpg"
    pixels = np.zeros((6, 8, 3), dtype=np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    assert np.array(read_image(path, (6, 8)))[3, 1, 0] > 200
    turned = np.array(read_image(path, (8, 6)))
    assert turned.shape == (8, 6, 3)
    assert turned[1, 3, 0] > 200
    assert turned[6, 3, 0] < 50
    assert read_image(path).size == (6, 8)
    with pytest.raises(UserError, match="6x8.*say 5x8"):
        read_image(path, (5, 8))


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no image at .*gone.jpg"):
        read_image(tmp_path / "gone.jpg")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(UserError, match="cannot read the image .*text.jpg"):
        read_image(tmp_path / "text.jpg")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), dtype=np.uint8)).save(
        tmp_path / "cut.jpg"
    )
    whole = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut.jpg"):
        read_image(tmp_path / "cut.jpg")


def test_a_changed_mask_is_named_with_the_file(data, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    manifest = load_manifest(copy)
    path = copy / "masks_raw" / manifest.masks[3]
    before = np.array(Image.open(path))
    mask = before.copy()
    mask[2, 2] = 77
    Image.fromarray(mask).save(path)
    for workers in (0, 1):
        with pytest.raises(UserError, match=rf"{path.name} is not the mask"):
            epoch_of(manifest, np.arange(8), workers=workers)
    Image.fromarray(before.reshape(1, -1)).save(path)
    with pytest.raises(UserError, match="is not of the manifest's size"):  # of the same checksum
        load_mask(manifest, 3)
    Image.fromarray(mask).convert("RGB").save(path)
    with pytest.raises(UserError, match="is not the mask"):
        load_mask(manifest, 3)
    path.unlink()
    with pytest.raises(UserError, match="no mask at"):
        load_mask(manifest, 3)


def test_damaged_manifests_are_refused(data, tmp_path):
    path = tmp_path / "manifest.json"
    with pytest.raises(UserError, match=f"no manifest at {path}.*prepare_masks"):
        load_manifest(tmp_path)
    content = json.loads((data / "manifest.json").read_text())
    for broken in ("", "[]", "{}", json.dumps({**content, "images": []})):
        path.write_text(broken)
        with pytest.raises(UserError, match=str(path)):
            load_manifest(tmp_path)
    path.write_text(json.dumps({**content, "version": 99}))
    with pytest.raises(UserError, match="version 99"):
        load_manifest(tmp_path)
    del content["images"][3]["pixels"]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="pixels"):
        load_manifest(tmp_path)


def test_fingerprint_names_the_masks_not_the_place(data, tmp_path):
    content = json.loads((data / "manifest.json").read_text())
    original = load_manifest(data).fingerprint
    (tmp_path / "manifest.json").write_text(json.dumps({**content, "root": "/elsewhere"}))
    assert load_manifest(tmp_path).fingerprint == original
    content["images"][0]["checksum"] += 1
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert load_manifest(tmp_path).fingerprint != original


@pytest.mark.parametrize("name", ["classes", "id", "split", "height"])
def test_fingerprint_names_classes_and_images(data, tmp_path, name):
    content = json.loads((data / "manifest.json").read_text())
    if name == "classes":
        content["classes"] = [*content["classes"][:1], *content["classes"][:0:-1]]
    else:
        content["images"][0][name] = {"id": 999, "split": "val2017", "height": 7}[name]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert load_manifest(tmp_path).fingerprint != load_manifest(data).fingerprint


def test_colors_are_distinct_and_stable():
    colors = class_colors(255)
    assert len(set(colors)) == 255
    assert IGNORE_COLOR not in colors
    assert colors[:5] == class_colors(5)
    mask = np.array([[0, 1], [4, 255]], dtype=np.uint8)
    image = np.array(color_mask(mask, colors[:5]))
    assert image[0, 1].tolist() == list(colors[1])
    assert image[1, 1].tolist() == list(IGNORE_COLOR)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_no_unicode_can_be_split(data):
    """Of a ZIP archive of an old Windows; no other image changes sides for it."""
    manifest = load_manifest(data)
    before = split_indices(manifest, 0, None)
    ids = manifest.ids.astype(object)
    ids[0] = "caf\udce9"
    after = split_indices(replace(manifest, ids=ids.astype(np.str_)), 0, None)
    moved = set(before[1]) ^ set(after[1])
    assert moved <= {0} or len(moved) == 2  # it, and at most the one that makes room for it


def test_groups_are_matched_in_names_then_paths_and_what_is_missed_is_said(data, capsys):
    manifest = load_manifest(data)
    files = ["train/07_1.jpg", "val/07_2.jpg", "v8/1.jpg", "x/a_jpg.rf.1f.jpg", "y/a_jpg.rf.2e.jpg"]
    manifest = replace(manifest, **{
        name: getattr(manifest, name)[: len(files)] for name in ("ids", "splits", "sizes", "pixels")
    }, files=np.array(files))  # fmt: skip
    groups = dataset.image_groups(manifest, r"^\d+(?=_)|^v\d")
    assert groups == ["07", "07", "v8", "a_jpg", "a_jpg"]
    assert "matches nothing in the paths of 2 images" in capsys.readouterr().out
    alone = dataset.image_groups(manifest, None)
    assert (len(set(alone)), alone[3:]) == (4, ["a_jpg", "a_jpg"])
    assert dataset.image_groups(manifest, "^q*")[:3] == alone[:3]  # no empty match for all


def test_equal_ids_in_two_splits_are_no_group(data):
    manifest = fake_manifest(np.ones((6, 4), dtype=int))
    manifest.ids[3:], manifest.splits[3:] = manifest.ids[:3], "b"
    assert len(set(dataset.image_groups(manifest, None))) == 6
