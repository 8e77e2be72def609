"""Data: what is read from disk, the published augmentations, and who sees which sample when."""

import hashlib
import os
import pickle
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from helpers import write_images
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import InterpolationMode

from moco import distributed, loader
from moco.loader import (
    AugmentedViews,
    DataError,
    EpochBatches,
    FolderImages,
    GaussianBlur,
    PlainImages,
    RankShare,
    eval_transform,
    lincls_transform,
    normalize,
    open_images,
    pretrain_transform,
    sample_seed,
)


def noise_image(size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    """A smooth random picture: noise of a few pixels, blown up."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


class FakeImages:
    """Images in memory with the interface of the data sets."""

    def __init__(self, count: int = 6, targets: bool = True) -> None:
        self.pictures = [noise_image(seed=i) for i in range(count)]
        self.targets = [i % 3 for i in range(count)] if targets else None
        self.classes = ["a", "b", "c"]

    def __len__(self) -> int:
        return len(self.pictures)

    def load(self, index: int) -> Image.Image:
        return self.pictures[index]


# ------------------------------------------------------------------------------------------------
# Augmentation: published parameters and order
# ------------------------------------------------------------------------------------------------


def describe(step) -> tuple:
    """Type and parameters of a transform, as plain values."""
    match step:
        case T.RandomResizedCrop():
            return "crop", step.size, tuple(step.scale), step.ratio, step.interpolation
        case T.RandomGrayscale():
            return "grey", step.p
        case T.RandomHorizontalFlip():
            return "flip", step.p
        case T.ColorJitter():
            return "jitter", step.brightness, step.contrast, step.saturation, step.hue
        case T.RandomApply():
            return "apply", step.p, [describe(inner) for inner in step.transforms]
        case GaussianBlur():
            return "blur", step.sigma
        case T.PILToTensor():
            return ("uint8",)
    raise AssertionError(f"unexpected transform {step}")


def crop(size: int, least: float = 0.2) -> tuple:
    return "crop", (size, size), (least, 1.0), (3 / 4, 4 / 3), InterpolationMode.BILINEAR


def jitter(hue: float) -> tuple:
    return "jitter", (0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-hue, hue)


BLUR = ("apply", 0.5, [("blur", (0.1, 2.0))])


def test_v1_views_have_the_published_parameters_and_order():
    """MoCo v1: crop of 0.2 to 1 of the area, grey with 0.2, jitter 0.4 of everything, flip."""
    steps = [describe(step) for step in pretrain_transform().transforms]
    assert steps == [crop(224), ("grey", 0.2), jitter(0.4), ("flip", 0.5), ("uint8",)]


def test_v2_views_have_the_published_parameters_and_order():
    """MoCo v2: crop, jitter with hue 0.1 at 0.8, grey at 0.2, blur at 0.5, flip."""
    steps = [describe(step) for step in pretrain_transform(aug_plus=True).transforms]
    colour = ("apply", 0.8, [jitter(0.1)])
    assert steps == [crop(224), colour, ("grey", 0.2), BLUR, ("flip", 0.5), ("uint8",)]


def test_cifar_views_are_v2_without_blur_and_with_another_crop():
    """MoCo's CIFAR-10 recipe: size 32, scale 0.08 to 1, no blur, all else as v2."""
    transform = pretrain_transform(32, aug_plus=True, crop_scale=(0.08, 1.0), blur=False)
    steps = [describe(step) for step in transform.transforms]
    colour = ("apply", 0.8, [jitter(0.1)])
    assert steps == [crop(32, 0.08), colour, ("grey", 0.2), ("flip", 0.5), ("uint8",)]


def test_v1_never_blurs():
    """`blur` is of v2 only."""
    transforms = pretrain_transform(blur=True).transforms
    assert "blur" not in str([describe(step) for step in transforms])


def test_linear_evaluation_trains_on_imagenets_crop_and_flip():
    """Torchvision's default crop, 0.08 to 1 of the area."""
    steps = [describe(step) for step in lincls_transform().transforms]
    assert steps == [crop(224, 0.08), ("flip", 0.5), ("uint8",)]


def test_views_are_uint8_of_the_asked_size():
    for transform in (
        pretrain_transform(32),
        pretrain_transform(32, aug_plus=True),
        lincls_transform(32),
        eval_transform(32),
    ):
        view = transform(noise_image())
        assert view.dtype == torch.uint8 and view.shape == (3, 32, 32)


def test_blur_draws_sigma_uniformly_from_its_range():
    """From torch's generator, which is what makes a view a function of its seed."""
    image, blur = noise_image(), GaussianBlur((0.1, 2.0))
    sigmas = []
    for seed in range(50):
        torch.manual_seed(seed)
        sigma = 0.1 + 1.9 * torch.rand(1).item()
        sigmas.append(sigma)
        wanted = image.filter(ImageFilter.GaussianBlur(radius=sigma))
        torch.manual_seed(seed)
        assert np.array_equal(blur(image), wanted), seed
    assert min(sigmas) < 0.2 and max(sigmas) > 1.9
    fixed = GaussianBlur((1.5, 1.5))(image)
    assert np.array_equal(fixed, image.filter(ImageFilter.GaussianBlur(radius=1.5)))


def test_eval_views_of_224_are_resize_256_and_centre_crop():
    image = noise_image((400, 300))
    wanted = T.PILToTensor()(T.CenterCrop(224)(T.Resize(256)(image)))
    assert torch.equal(eval_transform(224)(image), wanted)
    tall = noise_image((300, 500))
    assert T.Resize(256)(tall).width == 256  # the shorter side
    assert torch.equal(
        eval_transform()(tall), T.PILToTensor()(T.CenterCrop(224)(T.Resize(256)(tall)))
    )


def test_eval_views_of_small_images_are_the_images():
    for size in (32, 64):
        image = noise_image((size, size))
        assert torch.equal(eval_transform(size)(image), T.PILToTensor()(image))


def test_normalize_is_to_tensor_and_normalize():
    """Torchvision's, of every pixel value."""
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = np.stack([pixels, pixels.T, 255 - pixels], axis=2)
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    wanted = T.Normalize(mean, std)(T.ToTensor()(image))
    batch = torch.from_numpy(image).permute(2, 0, 1).unsqueeze(0)
    before = batch.clone()
    got = normalize(batch, mean, std)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[0], wanted)
    assert torch.equal(batch, before)


def test_imagenets_mean_and_deviation():
    assert loader.IMAGENET_MEAN == (0.485, 0.456, 0.406)
    assert loader.IMAGENET_STD == (0.229, 0.224, 0.225)


# ------------------------------------------------------------------------------------------------
# A view is a function of (seed, epoch, index, view)
# ------------------------------------------------------------------------------------------------

V2 = pretrain_transform(16, aug_plus=True)


def views_of(key=(0, 0), *, seed: int = 0, views: int = 2, images=None) -> tuple[torch.Tensor, ...]:
    return AugmentedViews(images or FakeImages(), V2, seed=seed, views=views)[key][:-2]


@pytest.mark.parametrize("aug_plus", [False, True], ids=["v1", "v2"])
def test_the_two_views_of_an_image_differ(aug_plus):
    data = AugmentedViews(FakeImages(), pretrain_transform(16, aug_plus=aug_plus), seed=0, views=2)
    for index in range(6):
        one, other, _, _ = data[0, index]
        assert not torch.equal(one, other)


def test_views_are_independent_of_how_many_there_are():
    """View 1 is the same with one, two or three views, so no view shifts another's numbers."""
    one, two, three = (views_of(views=count) for count in (1, 2, 3))
    assert [len(views) for views in (one, two, three)] == [1, 2, 3]
    assert torch.equal(one[0], two[0]) and torch.equal(two[0], three[0])
    assert torch.equal(two[1], three[1])


def test_view_2_does_not_depend_on_what_view_1_drew():
    """Not even when its transform takes fewer random numbers."""
    images = FakeImages()

    class FirstIsPlain:
        calls = 0

        def __call__(self, image):
            self.calls += 1
            return torch.zeros(1) if self.calls == 1 else V2(image)

    got = AugmentedViews(images, FirstIsPlain(), seed=0, views=2)[0, 0][1]
    assert torch.equal(got, views_of(images=images)[1])


def test_another_seed_epoch_index_or_view_gives_other_pixels():
    """The same picture stands at every index, so that only the random numbers can differ."""
    images = FakeImages()
    images.pictures = [images.pictures[0]] * 6
    seen = [
        views_of((epoch, index), seed=seed, images=images)[view]
        for seed in (0, 1)
        for epoch in (0, 1)
        for index in (0, 1)
        for view in (0, 1)
    ]
    assert len({tensor.numpy().tobytes() for tensor in seen}) == len(seen)


def test_sample_seeds_are_64_bit_and_do_not_collide():
    """Also where the four numbers have the same sum or are swapped."""
    keys = [(a, b, c, d) for a in range(4) for b in range(4) for c in range(20) for d in range(2)]
    seeds = {sample_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**64 for seed in seeds) and max(seeds) > 2**63


def test_sample_seeds_stay_what_they_are():
    """A run that is resumed with another version of this code goes on with the same pictures."""
    assert sample_seed(5, 6, 7, 1) == 6377907974124195358


def test_global_random_state_neither_matters_nor_changes():
    """Of torch, numpy and Python."""
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
        seen.append(views_of((3, 4)))
        after = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_global_random_state_is_given_back_after_an_error():
    def failing(image):
        torch.rand(1)
        raise OSError("in the transform")

    before = torch.get_rng_state()
    with pytest.raises(OSError, match="in the transform"):
        AugmentedViews(FakeImages(), failing, seed=0, views=2)[0, 0]
    assert torch.equal(torch.get_rng_state(), before)


def epochs_of(workers: int, epochs=(0, 1)) -> list[list[list[torch.Tensor]]]:
    """All batches of some epochs from one loader, as the main makes it."""
    batches = EpochBatches(6, 2, seed=3)
    data = AugmentedViews(FakeImages(), V2, seed=9, views=2)
    pairs = loader.train_loader(data, batches, workers=workers, pin_memory=False)
    assert pairs.persistent_workers == (workers > 0)
    seen = []
    for epoch in epochs:
        batches.set_epoch(epoch)
        seen.append(list(pairs))
    return seen


def assert_same_epochs(got, wanted) -> None:
    for epoch, other in zip(got, wanted, strict=True):
        for batch, expected in zip(epoch, other, strict=True):
            assert len(batch) == 4  # two views, the targets, what was replaced
            assert batch[3] == expected[3] == ("", "")
            assert all(torch.equal(a, b) for a, b in zip(batch[:3], expected[:3], strict=True))


def test_pixels_are_the_same_with_any_number_of_workers():
    """Over two epochs of persistent workers, which never see set_epoch; and epochs differ."""
    torch.manual_seed(0)
    none = epochs_of(0)
    torch.manual_seed(1)
    two = epochs_of(2)
    assert_same_epochs(two, none)
    first, second = ({tuple(view.flatten().tolist()) for b in e for view in b[0]} for e in none)
    assert len(first) == 6 and not first & second


def test_an_epoch_can_be_entered_without_those_before_it():
    """After a resume the pictures are those of the run that was not stopped."""
    assert_same_epochs(epochs_of(0, epochs=(1,)), epochs_of(0)[1:])


def test_targets_are_those_of_the_images_or_minus_1():
    assert AugmentedViews(FakeImages(), V2, seed=0, views=1)[0, 4][-2] == 1
    assert AugmentedViews(FakeImages(targets=False), V2, seed=0, views=1)[0, 4][-2] == -1
    assert PlainImages(FakeImages(), T.PILToTensor())[5][1] == 2
    assert PlainImages(FakeImages(targets=False), T.PILToTensor())[5][1] == -1


# ------------------------------------------------------------------------------------------------
# Who sees which sample when
# ------------------------------------------------------------------------------------------------


def indices(batches: EpochBatches) -> list[list[int]]:
    seen = list(batches)
    assert {epoch for batch in seen for epoch, _ in batch} <= {batches.epoch}
    return [[index for _, index in batch] for batch in seen]


@pytest.mark.parametrize(("length", "batch"), [(20, 4), (23, 4), (4, 4), (7, 4)])
def test_an_epoch_has_every_sample_at_most_once_and_no_ragged_batch(length, batch):
    batches = EpochBatches(length, batch, seed=0)
    seen = indices(batches)
    assert len(seen) == len(batches) == batches.batches_per_epoch() == length // batch
    assert all(len(one) == batch for one in seen)
    flat = sum(seen, [])
    assert len(set(flat)) == len(flat) and set(flat) <= set(range(length))


def test_every_epoch_and_seed_has_its_own_order():
    """And its own ragged rest, so that all samples are seen in the long run."""
    orders, rests = set(), set()
    for seed in (0, 1):
        batches = EpochBatches(23, 4, seed=seed)
        for epoch in range(4):
            batches.set_epoch(epoch)
            flat = sum(indices(batches), [])
            orders.add(tuple(flat))
            rests |= set(range(23)) - set(flat)
            assert sum(indices(batches), []) == flat  # the same once more
    assert len(orders) == 8 and len(rests) > 10


def test_a_start_within_the_epoch_continues_exactly():
    whole, rest = EpochBatches(23, 4, seed=0), EpochBatches(23, 4, seed=0)
    whole.set_epoch(2)
    for start in range(6):
        rest.set_epoch(2, start)
        assert list(rest) == list(whole)[start:]
        assert len(rest) == 5 - start
    rest.set_epoch(3)
    assert len(rest) == 5


def pretend(monkeypatch, rank: int, world: int) -> None:
    """Be one of several ranks; test_distributed.py has real ones."""
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world)


@pytest.mark.parametrize("world", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_ranks(monkeypatch, world):
    single = indices(EpochBatches(23, 4, seed=0))
    shares = []
    for rank in range(world):
        pretend(monkeypatch, rank, world)
        shares.append(indices(EpochBatches(23, 4, seed=0)))
    assert [sum(parts, []) for parts in zip(*shares, strict=True)] == single


def test_fewer_images_than_a_batch_are_refused():
    message = "7 images are fewer than one batch of 8; lower --batch-size"
    with pytest.raises(DataError, match=message):
        EpochBatches(7, 8, seed=0)
    EpochBatches(8, 8, seed=0)


@pytest.mark.parametrize("length", [0, 1, 5, 6, 7])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_rank_shares_cover_every_index_exactly_once(monkeypatch, length, world):
    seen = []
    for rank in range(world):
        pretend(monkeypatch, rank, world)
        share = RankShare(length)
        assert len(share) == len(list(share))
        assert list(share) == sorted(share)
        seen += share
    assert sorted(seen) == list(range(length))


def test_eval_loader_gives_images_in_order():
    data = PlainImages(FakeImages(5), eval_transform(32))
    for workers in (0, 1):
        made = loader.eval_loader(data, batch_size=2, workers=workers, pin_memory=False)
        images, targets = zip(*made, strict=True)
        assert torch.equal(torch.cat(images), torch.stack([image for image, _ in data_of(data)]))
        assert torch.cat(targets).tolist() == [0, 1, 2, 0, 1]


def data_of(data: PlainImages) -> list[tuple[torch.Tensor, int]]:
    return [data[i] for i in range(len(data))]


# ------------------------------------------------------------------------------------------------
# Folders of images
# ------------------------------------------------------------------------------------------------


def relative(images: FolderImages) -> list[str]:
    return [os.path.relpath(path, images.root) for path in images.paths]


def test_class_folders_are_as_image_folder_has_them(tmp_path):
    """Paths, labels and classes equal torchvision.datasets.ImageFolder's."""
    write_images(tmp_path, {"dog": 3, "Cat": 2, "ant/small": 2, "ant/big": 1, "ant": 1, "a-x": 1})
    write_images(tmp_path, {"dog/more": 1}, suffix=".JPEG")
    wanted = datasets.ImageFolder(tmp_path)
    images = FolderImages(tmp_path)
    assert images.paths == [path for path, _ in wanted.samples]
    assert images.targets == wanted.targets
    assert images.classes == wanted.classes == ["Cat", "a-x", "ant", "dog"]
    for index in range(len(images)):
        assert np.array_equal(images.load(index), wanted[index][0])


def test_folders_within_a_class_are_in_image_folders_order_too(tmp_path):
    """It sorts whole paths: "b-x" lies before what is in "b/c"."""
    write_images(tmp_path, {"a/b": 1, "a/b-x": 1, "a/b/c": 1, "a/10": 1, "a/9": 1})
    wanted = [path for path, _ in datasets.ImageFolder(tmp_path).samples]
    assert FolderImages(tmp_path).paths == wanted


def test_images_directly_in_the_folder_have_no_labels(tmp_path):
    write_images(tmp_path, {".": 3})
    images = open_images("folder", tmp_path, "pretrain")
    assert relative(images) == ["000.png", "001.png", "002.png"]
    assert images.targets is None and images.classes == []
    with pytest.raises(DataError, match="because of .*000.png: pretrain images must lie"):
        open_images("folder", tmp_path, "pretrain", per_class=2)


def test_a_mix_of_images_and_folders_has_no_labels(tmp_path):
    write_images(tmp_path, {".": 1, "deep/down": 2})
    images = FolderImages(tmp_path)
    assert relative(images) == ["000.png", "deep/down/000.png", "deep/down/001.png"]
    assert images.targets is None


def test_nested_folders_without_train_are_taken_whole(tmp_path):
    write_images(tmp_path, {"2019/may": 2, "2020": 1})
    assert len(open_images("folder", tmp_path, "pretrain")) == 3


def test_train_and_val_are_found_in_the_folder(tmp_path):
    write_images(tmp_path, {"train/a": 2, "train/b": 1, "val/a": 1, "val/b": 1})
    pretrain, train, val = (
        open_images("folder", tmp_path, s) for s in ("pretrain", "train", "val")
    )
    assert pretrain.paths == train.paths and len(train) == 3 and len(val) == 2
    assert all(str(tmp_path / "train") in path for path in train.paths)
    assert all(str(tmp_path / "val") in path for path in val.paths)
    assert train.targets == [0, 0, 1]


def test_hidden_and_other_files_are_skipped(tmp_path):
    """macOS leaves ._000.png beside images, which are none."""
    write_images(tmp_path, {"a": 1})
    for name in ("._000.png", ".hidden.jpg", "notes.txt", "000.png.part", "Thumbs.db"):
        (tmp_path / "a" / name).write_bytes(b"no image")
    assert relative(FolderImages(tmp_path)) == ["a/000.png"]


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".PNG", ".webp", ".bmp", ".tif", ".ppm"])
def test_image_formats_are_known_by_suffix_whatever_its_case(tmp_path, suffix):
    write_images(tmp_path, {"a": 1}, suffix=suffix)
    assert FolderImages(tmp_path).load(0).mode == "RGB"


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match=f"no such data folder: {tmp_path}/nowhere"):
        open_images("folder", tmp_path / "nowhere", "pretrain")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="no such data folder"):
        open_images("folder", tmp_path / "file", "pretrain")


def test_a_folder_without_images_is_an_error(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=f"no images in {tmp_path} .*looked for .jpg"):
        open_images("folder", tmp_path, "pretrain")
    (tmp_path / "train" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match=f"no images in {tmp_path}/train"):
        open_images("folder", tmp_path, "pretrain")


@pytest.mark.parametrize("split", ["train", "val"])
def test_evaluation_needs_its_split_as_a_folder(tmp_path, split):
    write_images(tmp_path, {"a": 1})
    with pytest.raises(DataError, match=f"no folder {tmp_path}/{split}: expected"):
        open_images("folder", tmp_path, split)


@pytest.mark.parametrize("split", ["train", "val"])
def test_evaluation_needs_labels(tmp_path, split):
    write_images(tmp_path, {"train": 2, "val": 2})
    with pytest.raises(
        DataError, match=f"no labels because of .*{split} images must lie .*{split}/CLASS/IMAGE"
    ):
        open_images("folder", tmp_path, split)


def test_a_class_that_the_training_set_lacks_is_an_error(tmp_path):
    write_images(tmp_path, {"train/a": 1, "train/b": 1, "val/b": 1, "val/zebra": 1})
    train = open_images("folder", tmp_path, "train")
    with pytest.raises(DataError, match="val has classes that the training set lacks: zebra"):
        open_images("folder", tmp_path, "val", classes=train.classes)


def test_validation_labels_are_the_training_sets_even_if_a_class_is_missing(tmp_path):
    write_images(tmp_path, {"train/a": 1, "train/b": 1, "val/b": 2})
    train = open_images("folder", tmp_path, "train")
    assert open_images("folder", tmp_path, "val", classes=train.classes).targets == [1, 1]


def test_per_class_keeps_the_first_images_of_each_class(tmp_path):
    write_images(tmp_path, {"train/a": 3, "train/b": 1, "train/c": 4})
    whole = open_images("folder", tmp_path, "train")
    images = open_images("folder", tmp_path, "train", per_class=2)
    assert images.targets == [0, 0, 1, 2, 2] and images.classes == ["a", "b", "c"]
    assert len(images) == 5
    for i, j in enumerate([0, 1, 3, 4, 5]):
        assert np.array_equal(images.load(i), whole.load(j))


# ------------------------------------------------------------------------------------------------
# Images that are broken or not RGB
# ------------------------------------------------------------------------------------------------


def broken_files(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    noise_image((200, 200)).save(folder / "good.jpg")
    noise_image((200, 200)).save(folder / "good.png")
    jpeg, png = ((folder / f"good.{s}").read_bytes() for s in ("jpg", "png"))
    contents = {
        "empty.jpg": b"",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "header_only.jpg": jpeg[:20],
        "text.jpg": b"<html>404 Not Found</html>",
        "truncated.png": png[: len(png) // 2],
        "corrupt.png": png[:60] + bytes(40) + png[100:],
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents}


BROKEN = ["empty.jpg", "truncated.jpg", "header_only.jpg", "text.jpg", "truncated.png",
          "corrupt.png"]  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_an_error_that_names_the_file(tmp_path, name):
    path = broken_files(tmp_path / "images")[name]
    images = FolderImages(path.parent)
    with pytest.raises(DataError, match=f"cannot read image {path}: .*; replace or remove it"):
        images.load(images.paths.index(str(path)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_through_a_loader_process_too(tmp_path, workers):
    path = broken_files(tmp_path / "images")["truncated.jpg"]
    images = FolderImages(path.parent)
    data = AugmentedViews(images, V2, seed=0, views=2)
    key = [(0, images.paths.index(str(path)))]
    pairs = DataLoader(data, batch_sampler=[key], num_workers=workers)
    with pytest.raises(DataError, match=f"cannot read image {path}"):
        list(pairs)


def gradient(mode: str) -> Image.Image:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colours = np.stack([ramp, ramp.T, 255 - ramp], axis=2)
    match mode:
        case "I;16":
            return Image.fromarray(ramp.astype(np.uint16) * 257)
        case "L":
            return Image.fromarray(ramp)
        case _:
            return Image.fromarray(colours).convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix", "levels"),
    [
        ("L", ".png", 256),
        ("L", ".jpg", 200),
        ("LA", ".png", 100),
        ("P", ".png", 4),
        ("1", ".png", 2),
        ("RGBA", ".png", 256),
        ("CMYK", ".jpg", 200),
        ("I;16", ".png", 200),
    ],
)
def test_images_of_any_kind_come_out_as_rgb(tmp_path, mode, suffix, levels):
    """With their content: as many different values as the kind of file can hold."""
    path = tmp_path / f"image{suffix}"
    gradient(mode).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = FolderImages(tmp_path).load(0)
    assert image.mode == "RGB" and image.size == (16, 16)
    assert len(np.unique(image)) >= levels
    assert pretrain_transform(8, aug_plus=True)(image).shape == (3, 8, 8)


# ------------------------------------------------------------------------------------------------
# CIFAR and STL-10 through torchvision
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "stl10"])
@pytest.mark.parametrize("split", ["pretrain", "train", "val"])
def test_torchvisions_data_that_are_not_there_are_not_downloaded(tmp_path, dataset, split):
    with pytest.raises(DataError, match=f"no complete {dataset} in {tmp_path} .*downloaded here"):
        open_images(dataset, tmp_path, split)
    assert list(tmp_path.iterdir()) == []


def sums(folder: Path, names: list[str]) -> list[list[str]]:
    return [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name in names]


def write_cifar(root: Path, monkeypatch, kind, train: list[str], test: list[str], key: str) -> None:
    """A few images in the real files' layout, with their checksums where torchvision has them."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, name in enumerate([*train, *test]):
        data = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        labels = [(i + j) % 10 for j in range(4)]
        (folder / name).write_bytes(pickle.dumps({"data": data, key: labels}))
    meta = {kind.meta["key"]: [f"class {i}" for i in range(10)]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(meta))
    monkeypatch.setattr(kind, "train_list", sums(folder, train))
    monkeypatch.setattr(kind, "test_list", sums(folder, test))
    [[_, md5]] = sums(folder, [kind.meta["filename"]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5})


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_is_read_through_torchvision(tmp_path, monkeypatch, dataset):
    if dataset == "cifar10":
        kind, train, test = datasets.CIFAR10, ["data_batch_1", "data_batch_2"], ["test_batch"]
        write_cifar(tmp_path, monkeypatch, kind, train, test, "labels")
    else:
        kind, train, test = datasets.CIFAR100, ["train"], ["test"]
        write_cifar(tmp_path, monkeypatch, kind, train, test, "fine_labels")
    for split, is_train in (("pretrain", True), ("train", True), ("val", False)):
        images = open_images(dataset, tmp_path, split)
        wanted = kind(str(tmp_path), train=is_train)
        assert len(images) == len(wanted) == 4 * len(train if is_train else test)
        assert images.targets == wanted.targets
        assert images.classes == [f"class {i}" for i in range(10)]
        for i in range(len(images)):
            assert np.array_equal(images.load(i), wanted.data[i])
            assert images.load(i).mode == "RGB" and images.load(i).size == (32, 32)
    assert len(open_images(dataset, tmp_path, "train", per_class=1)) == len(set(
        open_images(dataset, tmp_path, "train").targets))  # fmt: skip


def write_stl10(root: Path, monkeypatch) -> Path:
    folder = root / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("train", 4), ("test", 3), ("unlabeled", 5)):
        rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{name}_X.bin")
        if name != "unlabeled":
            (np.arange(count, dtype=np.uint8) % 3 + 1).tofile(folder / f"{name}_y.bin")
    names = [f"class {i}" for i in range(10)]
    (folder / "class_names.txt").write_text("\n".join(names) + "\n")
    train = ["train_X.bin", "train_y.bin", "unlabeled_X.bin"]
    monkeypatch.setattr(datasets.STL10, "train_list", sums(folder, train))
    monkeypatch.setattr(datasets.STL10, "test_list", sums(folder, ["test_X.bin", "test_y.bin"]))
    return folder


def test_stl10_is_pretrained_on_with_its_unlabelled_images(tmp_path, monkeypatch):
    """Which have no labels; training and validation images have (0-based)."""
    write_stl10(tmp_path, monkeypatch)
    pretrain, train, val = (open_images("stl10", tmp_path, s) for s in ("pretrain", "train", "val"))
    assert (len(pretrain), len(train), len(val)) == (9, 4, 3)
    assert pretrain.targets is None
    assert train.targets == [0, 1, 2, 0] and val.targets == [0, 1, 2]
    assert train.classes == [f"class {i}" for i in range(10)]
    assert np.array_equal(pretrain.load(1), train.load(1))
    assert train.load(0).size == (96, 96)


def test_stl10_without_its_class_names_is_an_error_that_says_so(tmp_path, monkeypatch):
    """Torchvision has no checksum for that file and goes on without it."""
    (write_stl10(tmp_path, monkeypatch) / "class_names.txt").unlink()
    with pytest.raises(DataError, match="stl10"):
        open_images("stl10", tmp_path, "train")
