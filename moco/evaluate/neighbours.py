"""Look at an encoder: images and their nearest neighbours, as a contact sheet and an HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from moco.data.images import Images
from moco.data.subsets import image_names
from moco.errors import DataError
from moco.evaluate.extraction import ImageEncoder, Loading, extract
from moco.packages import import_optional
from moco.printable import printable

THUMBNAIL, CAPTION, GAP = 96, 28, 6  # pixels
_INK, _PAPER, _OTHER = "#1b1b1b", "#ffffff", "#D55E00"  # the last: frame of another label


@dataclass(frozen=True)
class Shown:
    """An image on the sheet.

    Attributes:
        distance: of its unit feature from the query's, in [0, 2]; None for the query itself.
        label: name of its class; None where there are no labels.
        same: whether that is the query's.
    """

    index: int
    name: str
    distance: float | None
    label: str | None
    same: bool

    @property
    def captions(self) -> list[str]:
        first = "query" if self.distance is None else f"{self.distance:.3f}"
        return [first] if self.label is None else [first, printable(self.label)]


def nearest(features: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows nearest to some rows, themselves left out.

    Args:
        features: (N, C) unit rows.
        queries: (Q,) positions among them.
        k: at most N - 1.

    Returns:
        (distances, positions), both (Q, k), the nearest first. Of equals the first position.
    """
    similarity = features[queries].double() @ features.double().t()
    similarity[torch.arange(len(queries)), queries] = -torch.inf
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    return (2 - 2 * similarity[:, :k]).clamp(min=0).sqrt(), order[:, :k]


def find_neighbours(
    encoder: ImageEncoder,
    images: Images,
    loading: Loading,
    *,
    layer: str,
    queries: int = 12,
    k: int = 8,
    seed: int = 0,
) -> list[list[Shown]]:
    """For some images, drawn by the seed, the image itself and its k nearest among all others.

    Raises:
        DataError: fewer than two images, one that cannot be read, features that are not finite.
    """
    if len(images) < 2:
        raise DataError(f"neighbours need at least 2 images, got {len(images)}")
    (found,), _ = extract(encoder, images, loading, layer=layer, what="features")
    if not found[layer].isfinite().all():
        raise DataError("the features are not finite: there are no distances between them")
    return neighbour_rows(found[layer], images, queries=queries, k=k, seed=seed)


def neighbour_rows(
    features: Tensor, images: Images, *, queries: int, k: int, seed: int = 0
) -> list[list[Shown]]:
    """The same by features that are there: (N, C) finite unit rows of N images, at least 2."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(images), generator=generator)[:queries].sort().values
    distances, positions = nearest(features, chosen, min(k, len(images) - 1))
    names, targets = image_names(images), images.targets
    rows = []
    for query, near, at in zip(
        chosen.tolist(), distances.tolist(), positions.tolist(), strict=True
    ):
        rows.append(
            [
                Shown(
                    index,
                    names[index],
                    distance,
                    None if targets is None else images.classes[targets[index]],
                    targets is None or targets[index] == targets[query],
                )
                for index, distance in zip([query, *at], [None, *near], strict=True)
            ]
        )
    return rows


def share_of_same_label(rows: Sequence[Sequence[Shown]]) -> float | None:
    """Percent of the neighbours shown; None without labels."""
    near = [shown for row in rows for shown in row[1:]]
    if any(shown.label is None for shown in near):
        return None
    return 100 * sum(shown.same for shown in near) / len(near)


def thumbnail(image: Image.Image) -> Image.Image:
    """A square of `THUMBNAIL` pixels, the whole image in its middle; small ones are enlarged."""
    scale = THUMBNAIL / max(image.size)
    size = [max(1, round(scale * side)) for side in image.size]
    kind = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    square = Image.new("RGB", (THUMBNAIL, THUMBNAIL), _PAPER)
    small = image.resize(size, kind)
    square.paste(small, ((THUMBNAIL - size[0]) // 2, (THUMBNAIL - size[1]) // 2))
    return square


def contact_sheet(rows: Sequence[Sequence[Shown]], images: Images) -> Image.Image:
    """A row for each query: itself, then its neighbours with their distances and labels, those of
    another label in a frame."""
    font = ImageFont.load_default(size=10)
    height, width = THUMBNAIL + CAPTION + GAP, THUMBNAIL + GAP
    size = (GAP + width * max(map(len, rows)) + GAP, GAP + height * len(rows))
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, shown in enumerate(row):
            x, y = GAP + j * width + (GAP if j else 0), GAP + i * height
            sheet.paste(thumbnail(images.load(shown.index)), (x, y))
            if not shown.same:
                box = (x - 2, y - 2, x + THUMBNAIL + 1, y + THUMBNAIL + 1)
                pen.rectangle(box, outline=_OTHER, width=2)
            for line, text in enumerate(shown.captions):
                while len(text) > 1 and pen.textlength(text, font=font) > THUMBNAIL:
                    text = text[:-1]
                pen.text((x, y + THUMBNAIL + 2 + 12 * line), text, fill=_INK, font=font)
    return sheet


def page(rows: Sequence[Sequence[Shown]], images: Images, title: str) -> str:
    """The same as one HTML page that loads nothing from elsewhere; names show under the pointer."""
    jinja2, markupsafe = (import_optional(name, "the page") for name in ("jinja2", "markupsafe"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    shown = {shown.index for row in rows for shown in row}
    pictures = {index: markupsafe.Markup(_data(images.load(index))) for index in shown}
    return environment.get_template("neighbours.html.jinja").render(
        rows=rows, pictures=pictures, title=title, share=share_of_same_label(rows)
    )


def _data(image: Image.Image) -> str:
    buffer = io.BytesIO()
    thumbnail(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
