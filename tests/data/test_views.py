"""Views: what is drawn is distributed as torchvision draws it, and what is made of it is what
torchvision makes of a Pillow image, by Pillow or on the device."""

import dataclasses
import math
import sys
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from harness import Processes
from helpers import noise_image
from PIL import Image, ImageFilter
from scipy import stats

from moco.data import views
from moco.data.device_views import augment_on_device, crop, crop_on_device
from moco.data.views import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    ORDERS,
    SATURATION,
    Recipe,
    ViewParams,
    draw,
    eval_transform,
    lincls_recipe,
    normalize,
    pil_view,
    pretrain_recipe,
    uniforms,
)

V1, V2 = pretrain_recipe(), pretrain_recipe(aug_plus=True)

# ---- Recipes: published parameters ---------------------------------------------------------------


MOCO_CIFAR10 = pretrain_recipe(32, aug_plus=True, crop_scale=[0.08, 1.0], blur=False)
RATIO, STRONG, WEAK_HUE = (3 / 4, 4 / 3), (0.4, 0.4, 0.4, 0.4), (0.4, 0.4, 0.4, 0.1)


@pytest.mark.parametrize(
    ("recipe", "published"),
    [
        (V1, Recipe(224, (0.2, 1), RATIO, True, 1.0, STRONG, 0.2, 0.0, flip_p=0.5)),
        (V2, Recipe(224, (0.2, 1), RATIO, False, 0.8, WEAK_HUE, 0.2, 0.5, (0.1, 2.0), 0.5)),
        (MOCO_CIFAR10, dataclasses.replace(V2, image_size=32, crop_scale=(0.08, 1), blur_p=0)),
        (lincls_recipe(), Recipe(224, (0.08, 1), RATIO, False, 0, grey_p=0, blur_p=0, flip_p=0.5)),
    ],
    ids=["MoCo v1", "MoCo v2", "MoCo's CIFAR-10", "torchvision's default crop"],
)
def test_recipes_have_the_published_parameters(recipe, published):
    assert recipe == published


def resized_then_cropped(image: Image.Image, size: int) -> torch.Tensor:
    resize = size if size <= 64 else round(size * 256 / 224)
    return T.PILToTensor()(T.CenterCrop(size)(T.Resize(resize)(image)))


@pytest.mark.parametrize("size", [224, 160, 96, 64, 32, 17])
def test_eval_views_are_resized_and_centre_cropped(size, monkeypatch):
    """The shorter side of 224 to 256; images of any ordinary shape. Thin ones are cropped first,
    pixel for pixel: with the limit at nothing, so that the whole can be compared."""
    for width, height in ((400, 300), (300, 500), (301, 97), (20, 31), (224, 224), (5, 90)):
        image = noise_image((width, height))
        assert torch.equal(eval_transform(size)(image), resized_then_cropped(image, size))
    assert torch.equal(eval_transform()(image), eval_transform(224)(image))
    monkeypatch.setattr(views, "MOST_RESIZED_PIXELS", 0)
    for thin in ((900, 1), (700, 3), (1000, 60), (901, 97)):
        for shape in (thin, thin[::-1]):
            pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            assert torch.equal(eval_transform(size)(image), resized_then_cropped(image, size))


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, limits memory")
def test_thin_images_take_little_memory(tmp_path):
    """200 MB beside what the image itself has, and the audit has nothing to refuse."""
    for size in ((20_000, 1), (1, 60_000), (3_000_000, 2), (120_000, 300)):
        Image.new("RGB", size, (10, 20, 30)).save(tmp_path / f"{size[0]}.png")
    code = """
import resource, sys
from pathlib import Path
from PIL import Image
from moco.data import audit, images, views
views.eval_transform(224)(Image.new("RGB", (300, 300)))
free = resource.getrlimit(resource.RLIMIT_AS)
for path in Path(sys.argv[1]).glob("*.png"):
    resource.setrlimit(resource.RLIMIT_AS, free)
    assert audit.check_file(str(path)) == []
    image = images.load_rgb(path)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20, free[1]))
    view = views.eval_transform(224)(image)
    assert view.shape == (3, 224, 224) and view[:, 100, 100].tolist() == [10, 20, 30]
"""
    process = Processes(tmp_path / "out", tmp_path, code=code)
    assert process.wait() == [0] and not process.output(), process.output()


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
    for memory_format in (torch.channels_last, torch.contiguous_format):
        other = normalize(batch, mean, std, memory_format)
        assert torch.equal(other, got) and other.is_contiguous(memory_format=memory_format)


# ---- Random numbers ------------------------------------------------------------------------------


def splitmix64(state: int) -> tuple[int, int]:
    """The next state and its output, as published (Steele, Lea and Flood, 2014)."""
    everything = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & everything
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & everything
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & everything
    return state, z ^ (z >> 31)


def test_random_numbers_are_splitmix64s():
    """Against the published algorithm in Python's integers, which has a known first output; the
    start is the output after adding each number's multiple of its increment."""
    assert splitmix64(0)[1] == 0xE220A8397B1DCDAF
    for numbers in ((0, 0, 0, 0), (5, 6, 7, 1), (2**63 - 1, 1000, 1_281_166, 1)):
        start = 0
        for number in numbers:
            start = splitmix64(start + 0x9E3779B97F4A7C15 * number)[1]
        wanted = []
        for _ in range(5):
            start, output = splitmix64(start)
            wanted.append((output >> 11) / 2**53)
        seed, epoch, index, view = numbers
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # numpy's, of overflows
            assert uniforms(seed, epoch, [3, index], view, 5)[1].tolist() == wanted


def test_random_numbers_stay_what_they_are():
    """A run that is resumed with another version of this code goes on with the same pictures."""
    params = draw(V2, 5, 6, [7, 8], 1, [375, 400], [500, 300])
    assert params.box.tolist() == [[57, 109, 283, 363], [74, 24, 247, 216]]
    assert params.order.tolist() == [[0, 1, 3, 2], [2, 0, 3, 1]]
    factors = [0.7120864, 1.1411611, 0.7398707, -0.00758836]
    np.testing.assert_allclose(params.factors[0], factors, rtol=1e-6)


# ---- Parameters are distributed as torchvision draws them ----------------------------------------

DRAWS = 4000


def drawn(recipe: Recipe, height: int = 375, width: int = 500, count: int = DRAWS) -> ViewParams:
    return draw(recipe, 1, 2, range(count), 0, [height] * count, [width] * count)


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [(375, 500, (0.2, 1.0)), (500, 375, (0.08, 1.0)), (32, 32, (0.2, 1.0)), (100, 240, (0.2, 1.0)),
     (240, 100, (0.5, 1.0))],
)  # fmt: skip
def test_crops_are_distributed_as_torchvisions(height, width, scale):
    """Height, width, place and share of the area; the last two fall back to the centre at times."""
    torch.manual_seed(0)
    crop, image = T.RandomResizedCrop(224, scale=scale), torch.empty(3, height, width)
    theirs = np.array([crop.get_params(image, crop.scale, crop.ratio) for _ in range(DRAWS)])
    ours = drawn(Recipe(224, scale), height, width).box
    top, left, h, w = ours.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (h > 0).all() and (top + h <= height).all() and (w > 0).all()
    assert (left + w <= width).all()
    quantities = {
        "top": lambda b: b[:, 0], "left": lambda b: b[:, 1], "height": lambda b: b[:, 2],
        "width": lambda b: b[:, 3], "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 3] / b[:, 2], "space above": lambda b: b[:, 0] / height,
        "right edge": lambda b: b[:, 1] + b[:, 3],
    }  # fmt: skip
    for name, of in quantities.items():
        assert stats.ks_2samp(of(ours), of(theirs)).pvalue > 1e-3, name


@pytest.mark.parametrize("size", [(1, 1), (10, 1000), (1000, 10), (1, 7), (333, 2), (3, 100)])
def test_where_no_crop_fits_it_is_torchvisions_centre_crop(size):
    recipe = Recipe(224, (0.9, 1.0))
    image = torch.empty(3, *size)
    theirs = {tuple(T.RandomResizedCrop.get_params(image, [0.9, 1.0], [3 / 4, 4 / 3]))
              for _ in range(50)}  # fmt: skip
    assert len(theirs) == 1
    assert {tuple(box) for box in drawn(recipe, *size, count=50).box.tolist()} == theirs


@pytest.mark.parametrize("strengths", [V1.jitter, V2.jitter, (1.5, 1.5, 1.5, 0.5)], ids=str)
def test_colour_jitter_is_distributed_as_torchvisions(strengths):
    """Factors, which end at 0, and the 24 orders, each as likely as the other."""
    torch.manual_seed(0)
    jitter = T.ColorJitter(*strengths)
    limits = jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue
    theirs = [jitter.get_params(*limits) for _ in range(DRAWS)]
    ours = drawn(dataclasses.replace(V2, jitter=strengths))
    for kind in (BRIGHTNESS, CONTRAST, SATURATION, HUE):
        factors = np.array([params[1 + kind] for params in theirs])
        assert stats.ks_2samp(ours.factors[:, kind], factors).pvalue > 1e-3
        low, high = limits[kind]
        assert np.abs(ours.factors[:, kind]).max() <= high + 1e-6
        assert ours.factors[:, kind].min() >= low - 1e-6
    orders, counts = np.unique(ours.order, axis=0, return_counts=True)
    assert len(orders) == 24 and {tuple(sorted(order)) for order in orders} == {(0, 1, 2, 3)}
    assert stats.chisquare(counts).pvalue > 1e-3
    names, their_counts = np.unique([p[0].tolist() for p in theirs], axis=0, return_counts=True)
    assert np.array_equal(names, orders)
    assert stats.chi2_contingency([counts, their_counts]).pvalue > 1e-3


def test_operations_have_the_recipes_probabilities_independently():
    for recipe in (V1, V2, lincls_recipe(), pretrain_recipe(aug_plus=True, blur=False)):
        params = drawn(recipe)
        happened = {
            "jitter": (params.jitter, recipe.jitter_p), "grey": (params.grey, recipe.grey_p),
            "blur": (params.sigma > 0, recipe.blur_p), "flip": (params.flip, recipe.flip_p),
        }  # fmt: skip
        for name, (seen, p) in happened.items():
            assert abs(seen.mean() - p) <= 4 * math.sqrt(p * (1 - p) / DRAWS), name
        columns = [seen for seen, p in happened.values() if 0 < p < 1]
        columns += [*params.factors.T, params.box[:, 0], params.order[:, 0]]
        off_diagonal = np.corrcoef(np.array(columns, dtype=float)) - np.eye(len(columns))
        assert np.abs(off_diagonal).max() < 4.5 / math.sqrt(DRAWS)


# ---- Views by Pillow: torchvision's pixels -------------------------------------------------------


def torchvision_view(image: Image.Image, recipe: Recipe, params: ViewParams, i: int) -> Image.Image:
    """The same by torchvision's functions for Pillow images, one after the other."""
    top, left, height, width = params.box[i].tolist()
    size = [recipe.image_size] * 2
    image = TF.resized_crop(image, top, left, height, width, size)

    def grey(image):
        return TF.rgb_to_grayscale(image, 3) if params.grey[i] else image

    def jitter(image):
        adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
        for kind in params.order[i].astype(int) if params.jitter[i] else ():
            image = adjust[kind](image, params.factors[i, kind].item())
        return image

    image = jitter(grey(image)) if recipe.grey_before_jitter else grey(jitter(image))
    if params.sigma[i] > 0:
        image = image.filter(ImageFilter.GaussianBlur(radius=params.sigma[i].item()))
    return TF.hflip(image) if params.flip[i] else image


@pytest.mark.parametrize(
    "recipe",
    [pretrain_recipe(48), pretrain_recipe(48, aug_plus=True), lincls_recipe(48)],
    ids=["v1", "v2", "lincls"],
)
def test_views_by_pillow_are_torchvisions(recipe):
    """Of images larger and smaller than the view, colour and grey."""
    for size in ((100, 80), (20, 31), (48, 48)):
        for image in (noise_image(size), noise_image(size).convert("L").convert("RGB")):
            params = drawn(recipe, size[1], size[0], count=25)
            for i in range(25):
                wanted = torchvision_view(image, recipe, params, i)
                assert np.array_equal(pil_view(image, recipe, params, i), wanted)


# ---- Views on the device -------------------------------------------------------------------------

SIZE = 80  # large enough for a CPU to augment them one by one


def pictures() -> list[Image.Image]:
    """SIZE x SIZE: smooth, noise, grey, black, white, one colour, all hues, text-like edges."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
    ramp = np.linspace(0, 255, SIZE).astype(np.uint8)
    hues = np.stack([np.broadcast_to(ramp, (SIZE, SIZE)), np.full((SIZE, SIZE), 255),
                     np.broadcast_to(ramp[:, None], (SIZE, SIZE))], axis=2)  # fmt: skip
    edges = np.kron(rng.integers(0, 2, (SIZE // 4, SIZE // 4, 3)), np.ones((4, 4, 1))) * 255
    plain = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 0, 255), (1, 2, 3), (128, 128, 127)]
    return [
        noise_image((SIZE, SIZE)), noise_image((SIZE, SIZE), seed=1), noise,
        noise_image((SIZE, SIZE)).convert("L").convert("RGB"),
        Image.fromarray(hues.astype(np.uint8), "HSV").convert("RGB"),
        Image.fromarray(edges.astype(np.uint8)),
        *(Image.new("RGB", (SIZE, SIZE), colour) for colour in plain),
    ]  # fmt: skip


def params_of(count: int, **changes) -> ViewParams:
    """The whole image as it is, but for `changes`, each for all rows or one per row."""
    plain = {
        "box": [0, 0, SIZE, SIZE], "jitter": False, "grey": False, "flip": False,
        "sigma": np.float32(0), "factors": np.float32([1, 1, 1, 0]),
        "order": np.float32([0, 1, 2, 3]),
    }  # fmt: skip
    made = {}
    for name, value in (plain | changes).items():
        value = np.asarray(value, dtype=np.asarray(plain[name]).dtype)
        made[name] = np.broadcast_to(value, (count, *np.shape(plain[name]))).copy()
    return ViewParams(**made)


def as_tensor(images) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def differences(recipe: Recipe, params: ViewParams, images: list[Image.Image]) -> torch.Tensor:
    """Ours minus Pillow's, (N, 3, H, W) int32."""
    crops = as_tensor(images)
    before = crops.clone()
    ours = augment_on_device(crops, params.as_tensor(), recipe)
    with mock.patch("torch.compiler.is_compiling", return_value=True):
        at_once = augment_on_device(crops, params.as_tensor(), recipe)
    assert torch.equal(ours, at_once), "all images at once, as on a GPU"
    assert ours.dtype == torch.uint8 and torch.equal(crops, before)
    wanted = as_tensor([pil_view(image, recipe, params, i) for i, image in enumerate(images)])
    return ours.int() - wanted.int()


V2_SMALL, V1_SMALL = pretrain_recipe(SIZE, aug_plus=True), pretrain_recipe(SIZE)


@pytest.mark.parametrize("kind", [BRIGHTNESS, CONTRAST, SATURATION])
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4, 3.0])
def test_a_blend_on_the_device_is_pillows_pixel_for_pixel(kind, factor):
    """A shift of the hue by 0 follows, which is not without loss: so the device shifts Pillow's
    blend as well."""
    images = pictures()
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)[kind]
    blended = as_tensor([adjust(image, factor) for image in images])
    rest = params_of(len(images), jitter=True)
    params = params_of(len(images), jitter=True)
    params.factors[:, kind] = factor
    wanted = augment_on_device(blended, rest.as_tensor(), V2_SMALL)
    assert torch.equal(augment_on_device(as_tensor(images), params.as_tensor(), V2_SMALL), wanted)


def test_grey_and_flip_on_the_device_are_pillows_pixel_for_pixel():
    images = pictures()
    for recipe in (V1_SMALL, V2_SMALL, lincls_recipe(SIZE)):
        assert not differences(recipe, params_of(len(images), flip=True), images).any()
        if recipe.grey_p:
            both = params_of(len(images), flip=[i % 2 for i in range(len(images))], grey=True)
            assert not differences(recipe, both, images).any()


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.05, 0.4])
def test_hue_on_the_device_is_pillows(shift):
    """Of all 8-bit colours on a grid: equal but for the rounding of a quotient now and then."""
    levels = torch.arange(0, 256, 5, dtype=torch.uint8)
    colours = torch.cartesian_prod(levels, levels, levels).view(-1, 52, 3).numpy()
    image = Image.fromarray(colours)
    wanted = as_tensor([TF.adjust_hue(image, shift)])
    params = params_of(1, jitter=True, factors=[1, 1, 1, shift])
    ours = augment_on_device(as_tensor([image]), params.as_tensor(), V2_SMALL)
    difference = (ours.int() - wanted.int()).abs().float()
    assert difference.mean() < 0.02 and (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.3, 2.0])
def test_blur_on_the_device_is_pillows(sigma):
    """Which rounds six times to 8 bits, the device twice."""
    difference = differences(V2_SMALL, params_of(12, sigma=sigma), pictures()).abs().float()
    assert difference.mean((1, 2, 3)).max() < 1.0
    inside = difference[:, :, 6:-6, 6:-6]  # repeating the edge per pass is not repeating it once
    assert inside.max() <= 4


@pytest.mark.parametrize("recipe", [V1_SMALL, V2_SMALL], ids=["v1", "v2"])
def test_all_operations_together_are_pillows(recipe):
    """All 24 orders, with factors at the ends of their ranges, and as they are drawn."""
    images = [picture for picture in pictures() for _ in range(24)]
    factors = np.random.default_rng(0).choice([0.6, 1.4], (len(images), 4))
    factors[:, HUE] = np.where(factors[:, HUE] > 1, *recipe.jitter[[HUE][0] :] * 2)
    factors[1::2, HUE] *= -1
    extreme = params_of(len(images), jitter=True, factors=factors, order=list(ORDERS) * 12)
    as_drawn = dataclasses.replace(drawn(recipe, SIZE, SIZE, len(images)), box=extreme.box)
    for params in (extreme, as_drawn):
        difference = differences(recipe, params, images).abs().float()
        assert difference.mean() < 0.5 and difference.mean((1, 2, 3)).max() < 1.5


def test_finishing_is_one_graph_without_a_wait_for_the_device():
    """Dynamo follows it to the end: it reads no value on the way, nor loops over samples."""
    graphs, recipe = [], V2_SMALL

    def backend(graph, inputs):
        graphs.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(augment_on_device, backend=backend, fullgraph=True, dynamic=False)
    for count in (2, 12):
        images = pictures()[:count]
        table = drawn(recipe, SIZE, SIZE, count).as_tensor()
        made = compiled(as_tensor(images), table, recipe)
        assert torch.equal(made, augment_on_device(as_tensor(images), table, recipe))
    assert graphs[0] == graphs[1] < 400
    torch.compiler.reset()


# ---- Crops ---------------------------------------------------------------------------------------


def boxes(height: int, width: int) -> np.ndarray:
    """As drawn, and the smallest, thinnest and largest there are."""
    odd = [[0, 0, 1, 1], [height - 1, width - 1, 1, 1], [0, 0, height, width], [0, 2, height, 1],
           [3, 0, 1, width], [1, 1, height - 1, width - 1], [2, 3, 5, 4]]  # fmt: skip
    return np.array(odd + drawn(Recipe(32, (0.08, 1.0)), height, width, 40).box.tolist())


@pytest.mark.parametrize("size", [(32, 32), (96, 96), (61, 47), (250, 190)])
@pytest.mark.parametrize("out", [32, 17])
def test_crops_are_within_a_level_of_pillows(size, out):
    """From a decoded image in a loader process, and of a batch on the device."""
    height, width = size
    recipe = Recipe(out, (0.08, 1.0))
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    for image in (noise_image((width, height)), noise):
        box = boxes(height, width)
        params = params_of(len(box), box=box)
        pixels = as_tensor([image])
        wanted = as_tensor([pil_view(image, recipe, params, i) for i in range(len(box))])
        single = torch.stack([crop(pixels[0], recipe, params, i) for i in range(len(box))])
        batch = crop_on_device(pixels.expand(len(box), -1, -1, -1), params.as_tensor(), out)
        for made in (single, batch):
            assert made.dtype == torch.uint8
            assert (made.int() - wanted.int()).abs().max() <= 1
        some = crop_on_device(pixels.expand(3, -1, -1, -1), params.as_tensor()[4:7], out)
        assert torch.equal(some, batch[4:7]), "whatever else is in the batch"
