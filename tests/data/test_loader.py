"""Who sees which sample when, and that a view is a function of (seed, epoch, index, view)."""

import random

import numpy as np
import pytest
import torch
from data_helpers import train, write_cifar
from helpers import differences, noise_image, write_images
from torchvision import datasets

from moco import distributed
from moco.data import loader
from moco.data.images import ArrayImages, FolderImages, Subset
from moco.data.loader import EpochBatches, TrainLoader, rank_share
from moco.data.samples import AugmentedViews, PlainImages
from moco.data.views import eval_transform, pretrain_recipe
from moco.errors import DataError

CPU = torch.device("cpu")
V1, V2 = pretrain_recipe(16), pretrain_recipe(16, aug_plus=True)


def small_images(count: int = 6, targets: bool = True) -> ArrayImages:
    array = np.stack([np.asarray(noise_image(seed=i)) for i in range(count)])
    return ArrayImages(array, [i % 3 if targets else -1 for i in range(count)], ["a", "b", "c"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> FolderImages:
    """Six JPEGs of different sizes in two classes."""
    root = tmp_path_factory.mktemp("images")
    for i in range(6):
        (root / f"class{i % 2}").mkdir(exist_ok=True)
        noise_image((30 + 7 * i, 50 - 4 * i), seed=i).save(root / f"class{i % 2}" / f"{i}.jpg")
    return FolderImages(root)


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_a_request_to_stop_does_not_reach_a_process_that_has_just_started(kind, monkeypatch):
    """Where torch calls this, its own handler, which ends the process, is there already, and
    nothing of the loader has been called yet."""
    stopped = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    monkeypatch.setattr(torch, "set_num_threads", lambda _: exec(stopped))
    images, one = small_images(), {"batch_size": 6, "workers": 1}
    if kind == "train":
        batches = EpochBatches(6, 6, seed=0)
        loading = TrainLoader(
            AugmentedViews(images, V1, seed=0, num_views=1), batches, workers=1, device=CPU
        )
        assert len(next(iter(loading))[0]) == 6
        loading.end()
        return
    plain = PlainImages(images, eval_transform(16))
    loading = loader.eval_loader(plain, **one, pin_memory=False, persistent=True, outlive_stop=True)
    assert len(next(iter(loading))[0]) == 6
    loading._iterator._shutdown_workers()


# ---- A view is a function of (seed, epoch, index, view) ------------------------------------------

ON_DEVICE = pytest.mark.parametrize("on_device", [False, True], ids=["cpu", "device"])


def test_views_are_independent_of_how_many_there_are():
    """View 1 is the same with one, two or three views, so no view shifts another's numbers."""
    one, two, three = (
        AugmentedViews(small_images(), V2, seed=0, num_views=count)[0, 0][:-2]
        for count in (1, 2, 3)
    )
    assert [len(views) for views in (one, two, three)] == [1, 2, 3]
    assert torch.equal(one[0], two[0]) and torch.equal(two[0], three[0])
    assert torch.equal(two[1], three[1])


def test_another_seed_epoch_index_or_view_gives_other_pixels():
    """The same picture stands at every index, so that only the random numbers can differ."""
    images = small_images()
    images.array[:] = images.array[0]
    seen = set()
    for seed in (0, 1):
        data = AugmentedViews(images, V2, seed=seed, num_views=2)
        for key in ((0, 0), (0, 1), (1, 0), (1, 1)):
            seen |= {view.numpy().tobytes() for view in data[key][:2]}
    assert len(seen) == 16


@ON_DEVICE
def test_global_random_state_neither_matters_nor_changes(on_device):
    """Of torch, numpy and Python."""
    seen = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
        data = AugmentedViews(small_images(), V2, seed=0, num_views=2, augment_on_device=on_device)
        seen.append(data[3, 4][:2])
        after = torch.get_rng_state(), np.random.get_state()[1].tobytes(), random.getstate()
        assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@ON_DEVICE
def test_a_sample_is_the_same_alone_and_in_any_batch(folder, on_device, monkeypatch):
    """However many are drawn together, and whatever their sizes."""
    data = AugmentedViews(folder, V2, seed=3, num_views=2, augment_on_device=on_device)
    keys = [(2, index) for index in (4, 0, 5, 1, 3, 2)]
    alone = [data[key] for key in keys]
    for together, held in ((16, 2**24), (4, 2**24), (16, 3000), (1, 2**24)):
        monkeypatch.setattr(data, "DRAWN_TOGETHER", together, raising=False)
        monkeypatch.setattr(data, "PIXELS_HELD", held, raising=False)
        got = data.__getitems__(keys)
        assert len(got) == 6
        for sample, other in zip(got, alone, strict=True):
            assert sample[2:4] == other[2:4]
            assert all(torch.equal(a, b) for a, b in zip(sample[:2], other[:2], strict=True))
            assert len(sample) == 4 + on_device
            if on_device:
                assert torch.equal(sample[4], other[4]) and sample[4].shape == (2, 16)


def test_targets_are_those_of_the_images_or_minus_1():
    assert AugmentedViews(small_images(), V2, seed=0, num_views=1)[0, 4][1] == 1
    assert AugmentedViews(small_images(targets=False), V2, seed=0, num_views=1)[0, 4][1] == -1
    plain = eval_transform(32)
    assert PlainImages(small_images(), plain)[5][1] == 2
    assert PlainImages(small_images(targets=False), plain)[5][1] == -1


# ---- TrainLoader: views from processes, finished on the device, or made there --------------------


def epochs_of(images, *, on_device: bool, workers: int = 0, epochs=(0, 1), start: int = 0, batch=2):
    """All batches of some epochs from one loader, as the mains make it."""
    batches = EpochBatches(len(images), batch, seed=3)
    data = AugmentedViews(images, V2, seed=9, num_views=2, augment_on_device=on_device)
    pairs = TrainLoader(data, batches, workers=workers, device=CPU)
    try:
        seen = []
        for epoch in epochs:
            batches.set_epoch(epoch, start)
            seen.append(list(pairs))
            assert len(pairs) == len(seen[-1])
        return seen
    finally:
        pairs.end()


def assert_same_epochs(got, wanted) -> None:
    for epoch, other in zip(got, wanted, strict=True):
        for batch, expected in zip(epoch, other, strict=True):
            assert len(batch) == 4  # two views, the targets, what was replaced
            assert tuple(batch[3]) == tuple(expected[3]) == ("", "")
            assert all(torch.equal(a, b) for a, b in zip(batch[:3], expected[:3], strict=True))
            assert batch[0].dtype == torch.uint8 and batch[0].shape == (2, 3, 16, 16)


@ON_DEVICE
def test_pixels_are_the_same_with_any_number_of_workers(folder, on_device):
    """Over two epochs of persistent workers, which never see set_epoch; and epochs differ."""
    torch.manual_seed(0)
    none = epochs_of(folder, on_device=on_device)
    torch.manual_seed(1)
    two = epochs_of(folder, on_device=on_device, workers=2)
    assert_same_epochs(two, none)
    first, second = ({tuple(view.flatten().tolist()) for b in e for view in b[0]} for e in none)
    assert len(first) == 6 and not first & second


@ON_DEVICE
@pytest.mark.parametrize("kind", ["folder", "array"])
def test_an_epoch_can_be_entered_anywhere(kind, folder, on_device):
    """After a resume the pictures are those of the run that was not stopped."""
    images = folder if kind == "folder" else small_images()
    whole = epochs_of(images, on_device=on_device)
    assert_same_epochs(epochs_of(images, on_device=on_device, epochs=(1,)), whole[1:])
    rest = epochs_of(images, on_device=on_device, epochs=(1,), start=2)
    assert_same_epochs(rest, [whole[1][2:]])


@ON_DEVICE
@pytest.mark.parametrize("kind", ["folder", "array"])
def test_ranks_share_the_pictures_of_one_process(kind, folder, on_device, monkeypatch):
    """So pixels do not depend on what else is in the batch of a device either."""
    images = folder if kind == "folder" else small_images()
    [single] = epochs_of(images, on_device=on_device, epochs=(1,), batch=6)
    shares = []
    for rank in range(3):
        pretend(monkeypatch, rank, 3)
        [share] = epochs_of(images, on_device=on_device, epochs=(1,), batch=6)
        shares.append(share)
    for i, batch in enumerate(single):
        for part in range(3):
            assert torch.equal(torch.cat([share[i][part] for share in shares]), batch[part])


def test_images_in_memory_need_no_processes_when_the_device_makes_views():
    batches = EpochBatches(6, 2, seed=3)
    for images in (small_images(), Subset(small_images(8), [1, 2, 3, 5, 6, 7])):
        data = AugmentedViews(images, V2, seed=9, num_views=2, augment_on_device=True)
        pairs = TrainLoader(data, batches, workers=2, device=CPU)
        assert pairs.pixels.shape == (6, 3, 30, 40)
        list(pairs)
        pairs.end()
    data = AugmentedViews(small_images(), V2, seed=9, num_views=2)
    assert TrainLoader(data, batches, workers=0, device=CPU).pixels is None


def test_the_device_makes_the_views_that_processes_make(monkeypatch):
    """Of images in memory, in all three ways, with their labels."""
    images = small_images(24)
    resident = sum(epochs_of(images, on_device=True, batch=4), [])
    by_pillow = sum(epochs_of(images, on_device=False, batch=4), [])
    monkeypatch.setattr(loader, "in_memory", lambda images: None)
    worked = sum(epochs_of(images, on_device=True, batch=4), [])
    for other in (by_pillow, worked):
        for got, wanted in zip(resident, other, strict=True):
            assert torch.equal(got[2], wanted[2]) and tuple(got[3]) == tuple(wanted[3])
        made, expected = (
            torch.stack([torch.stack(batch[:2]) for batch in way]) for way in (resident, other)
        )
        difference = (made.int() - expected.int()).abs().float()
        assert difference.mean() < 0.75 and difference.mean((3, 4, 5)).max() < 3  # 16 px: edges


@pytest.mark.long
def test_compiled_finishing_gives_the_same_views():
    images = small_images(8)
    data = AugmentedViews(images, V2, seed=9, num_views=2, augment_on_device=True)
    batches = EpochBatches(8, 4, seed=3)
    plain, compiled = (
        TrainLoader(data, batches, workers=0, device=CPU, compile=compile)
        for compile in (False, True)
    )
    from torch._inductor import config

    # Trying what instructions the processor has would take g++ as long as the views do.
    with config.patch({"cpp.vec_isa_ok": True, "compile_threads": 1}):
        for batch, expected in zip(compiled, plain, strict=True):
            for view, wanted in zip(batch[:2], expected[:2], strict=True):
                difference = (view.int() - wanted.int()).abs().float()
                assert difference.mean() < 0.05  # a fused multiply and add rounds once, not twice
    torch.compiler.reset()


@pytest.mark.long
@pytest.mark.parametrize("kind", ["folder", "cifar10"])
def test_a_run_on_the_devices_views_is_resumed_bit_for_bit(kind, tmp_path, monkeypatch):
    """In the middle of an epoch, with another number of workers."""
    if kind == "cifar10":
        train_files = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4"]
        write_cifar(tmp_path, monkeypatch, datasets.CIFAR10, train_files, ["test_batch"], "labels")
        flags, data = ["--dataset", "cifar10", "-b", "4"], tmp_path
    else:
        write_images(tmp_path / "data", {"train/a": 12, "train/b": 12}, suffix=".jpg")
        flags, data = [], tmp_path / "data"
    flags += ["--aug-plus", "--views", "device"]
    whole = train(data, tmp_path / "whole", "-j", 0, *flags)
    train(data, tmp_path / "cut", "-j", 2, "--max-steps", 4, *flags)
    resumed = train(data, tmp_path / "cut", "-j", 1, "--resume", "auto", *flags)
    assert differences(resumed, whole) == []


# ---- Who sees which sample when ------------------------------------------------------------------


@pytest.mark.parametrize(("length", "batch"), [(20, 4), (23, 4), (4, 4), (7, 4)])
def test_an_epoch_has_every_sample_at_most_once_and_no_ragged_batch(length, batch):
    """And can be entered at any batch."""
    batches = EpochBatches(length, batch, seed=0)
    whole = list(batches)
    assert len(whole) == len(batches) == batches.batches_per_epoch() == length // batch
    assert all(len(one) == batch for one in whole)
    flat = [index for one in whole for epoch, index in one if epoch == 0]
    assert len(set(flat)) == len(flat) == length // batch * batch
    assert set(flat) <= set(range(length))
    for start in range(len(whole) + 1):
        batches.set_epoch(0, start)
        assert list(batches) == whole[start:] and len(batches) == len(whole) - start
    batches.set_epoch(1)
    assert len(list(batches)) == len(whole)
    with pytest.raises(
        DataError, match=f"{length} images are fewer than one batch of {length + 1}"
    ):
        EpochBatches(length, length + 1, seed=0)


def pretend(monkeypatch, rank: int, world: int) -> None:
    """Be one of several ranks; test_distributed.py has real ones."""
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: world)


@pytest.mark.parametrize("length", [0, 1, 5, 6, 7])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_rank_shares_cover_every_index_exactly_once(monkeypatch, length, world):
    seen = []
    for rank in range(world):
        pretend(monkeypatch, rank, world)
        share = rank_share(length)
        assert len(share) == len(list(share))
        assert list(share) == sorted(share)
        seen += share
    assert sorted(seen) == list(range(length))


def test_eval_loader_gives_images_in_order():
    data = PlainImages(small_images(5), eval_transform(32))
    for workers in (0, 1):
        made = loader.eval_loader(data, batch_size=2, workers=workers, pin_memory=False)
        images, targets = zip(*made, strict=True)
        assert torch.equal(torch.cat(images), torch.stack([data[i][0] for i in range(5)]))
        assert torch.cat(targets).tolist() == [0, 1, 2, 0, 1]


# ---- Batches on their way to a GPU --------------------------------------------------------------


@pytest.mark.parametrize("ahead", [0, 2, 9])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_batches_are_started_ahead_in_order(ahead, count):
    """Never more than asked for, and none beyond those that there are."""
    started, seen = [], []
    for batch in loader.started_ahead(range(count), lambda b: started.append(b) or b, ahead):
        seen.append(batch)
        assert started == list(range(min(count, batch + 1 + ahead)))
    assert seen == started == list(range(count))


@pytest.mark.parametrize("of_the_copy", [False, True])
def test_an_error_comes_where_its_batch_would_have(of_the_copy):
    """Of a loader process, or of the copy: the steps before it are done."""
    seen = []

    def batches():
        for batch in range(5):
            if batch == 3 and not of_the_copy:
                raise DataError("no batch 3")
            yield batch

    def start(batch):
        if batch == 3:
            raise DataError("no batch 3")
        return batch

    with pytest.raises(DataError, match="no batch 3"):
        for batch in loader.started_ahead(batches(), start, 2):
            seen.append(batch)
    assert seen == [0, 1, 2]
