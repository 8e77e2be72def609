"""Images in Parquet files as Hugging Face writes them: a column {bytes, path}, and a column label.

pyarrow (optional) reads the small columns and the files' ends. The column of bytes is read here,
one image at a time: pyarrow itself would read a row group, a hundred images, for one of them. A row
group's values lie in pages; the index says where the pages are. Of an uncompressed page only the
image is read, of a compressed one (about 1 MB) all. Format: github.com/apache/parquet-format.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from moco.data.file_list import Names
from moco.data.shards import PackedImages, number_classes
from moco.errors import DataError
from moco.packages import import_optional
from moco.progress import progress

_DATA, _DICTIONARY, _DATA_2 = 0, 2, 3  # kinds of pages
_PLAIN, _BY_DICTIONARY = 0, (2, 8)  # encodings
# Columns of the index, one row for a page: first row, file, place of its bytes, their number packed
# and unpacked, number of rows, whether by a dictionary, bytes of levels (of version 2; else -1),
# codec (-1: none), definition level of what is no null, and the page of its dictionary.
_FIRST, _FILE, _OFFSET, _SIZE, _UNPACKED, _COUNT, _KIND, _LEVELS, _CODEC, _MOST, _BOOK = range(11)
REMEDY = "write it anew by pyarrow.parquet.write_table"

Take = Callable[[int, int], bytes]  # (offset, size) -> bytes of a page


class ParquetImages(PackedImages):
    """Images in the Parquet files of one split, in the order of files and rows.

    Raises:
        DataError: pyarrow is missing; a file cannot be read, has no column of images or one that is
            packed in another way; a class that `classes` lacks.
    """

    def __init__(
        self, root: str | Path, paths: Sequence[str], classes: Sequence[str] | None = None
    ) -> None:
        super().__init__(root, paths)
        self.codecs: list[str] = []
        names, labels, pages, own = [], [], [], None
        for number, path in enumerate(progress(paths, "index of Parquet files")):
            try:
                about = self._read_file(number, path, sum(map(len, names)), pages)
            except DataError:
                raise
            except Exception as error:  # a damaged file can make the readers fail in any way
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise DataError(f"cannot read {path} as a Parquet file: {reason}") from error
            names.append(about[0])
            labels.append(about[1])
            own = own or about[2]
            if about[2] not in (None, own):
                raise DataError(
                    f"{path} has other names of classes, or in another order, than the files before"
                )
        self.names = Names(names)
        if not self.names:
            raise DataError(f"no images in {paths[0]} and {len(paths) - 1} more Parquet files")
        self._pages = torch.tensor(pages, dtype=torch.int64)
        self._firsts = self._pages[:, _FIRST].contiguous()
        if None not in labels and (found := torch.cat(labels)).min() >= 0:
            own = own or [str(i) for i in range(int(found.max()) + 1)]
            if found.max() >= len(own):
                raise DataError(f"{root} has the label {int(found.max())} of {len(own)} classes")
            self.classes, self.targets = number_classes(found, own, classes, root)

    def title(self, index: int) -> str:
        page = self._page_of(index)
        first = self._firsts[self._pages[:, _FILE] == page[_FILE]][0].item()
        return f"{self.names[index]} (row {index - first} of {self.files.paths[page[_FILE]]})"

    def _read_file(
        self, number: int, path: str, first: int, pages: list[list[int]]
    ) -> tuple[list[str], torch.Tensor | None, list[str] | None]:
        """Names, labels and class names of a file; adds its pages."""
        pq = import_optional("pyarrow.parquet", "--dataset parquet", "pyarrow")
        with pq.ParquetFile(path) as file:
            meta, schema = file.metadata, file.schema
            columns = {schema.column(i).path: i for i in range(len(schema))}
            images = sorted(name for name in columns if name.endswith(".bytes"))
            image = "image.bytes" if "image.bytes" in images else next(iter(images), None)
            if image is None:
                raise DataError(
                    f"{path} has no column of images (columns {', '.join(columns)}): expected "
                    "image.bytes, as Hugging Face's datasets have it"
                )
            column = schema.column(columns[image])
            if column.max_repetition_level:
                raise DataError(f"{path}: a row of its column {image} is a list, expected an image")
            row = first
            for group in map(meta.row_group, range(meta.num_row_groups)):
                chunk, last = group.column(columns[image]), row + group.num_rows
                self._add_pages(number, chunk, row, last, column.max_definition_level, pages)
                row = last
            about = image.removesuffix("bytes") + "path"
            paths = [None] * meta.num_rows
            if about in columns:
                table = file.read(columns=[about]).column(0).combine_chunks()
                paths = table.field("path").to_pylist()
            labels, names = None, None
            if "label" in columns:
                values = file.read(columns=["label"]).column(0)
                if not values.null_count and str(values.type).startswith(("int", "uint", "bool")):
                    labels = torch.tensor(values.to_pylist(), dtype=torch.int64)
                said = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
                feature = json.loads(said).get("info", {}).get("features", {}).get("label", {})
                names = feature.get("names")
        named = [path or f"{first + row}" for row, path in enumerate(paths)]
        return named, labels, names

    def _add_pages(
        self, number: int, chunk: Any, row: int, last: int, most: int, pages: list[list[int]]
    ) -> None:
        """The pages of a row group's column, of rows up to `last`; `most` is the definition level
        of a value."""
        codec = {"LZ4": "lz4_raw"}.get(chunk.compression, chunk.compression.lower())
        if codec not in self.codecs:
            self.codecs.append(codec)
        book = -1
        offset = min(o for o in (chunk.dictionary_page_offset, chunk.data_page_offset) if o)
        end = offset + chunk.total_compressed_size
        while row < last and offset < end:
            header, length = self._header(number, offset, end)
            kind, size = header[1], header[3]
            about = header[{_DATA: 5, _DICTIONARY: 7, _DATA_2: 8}[kind]]
            encoding = about[2] if kind != _DATA_2 else about[4]
            if encoding not in (_PLAIN, *_BY_DICTIONARY):
                raise DataError(
                    f"{self.files.paths[number]}: its images are in encoding {encoding} of "
                    f"Parquet, which is not read here; {REMEDY}"
                )
            levels = about[5] + about.get(6, 0) if kind == _DATA_2 else -1
            packed = codec != "uncompressed" and about.get(7, True)
            entry = [row, number, offset + length, size, header[2], about[1]]
            entry += [int(encoding in _BY_DICTIONARY), levels]
            entry += [self.codecs.index(codec) if packed else -1, most, -1]
            offset += length + size
            if kind == _DICTIONARY:
                book = len(pages)
                # Its first row is that of the page after it, which is the one that is found.
                entry[_COUNT] = 0
            else:
                row += about[1]
                entry[_BOOK] = book
            pages.append(entry)
        if row != last:
            raise DataError(f"{self.files.paths[number]} has fewer images than rows: it is damaged")

    def _header(self, number: int, offset: int, end: int) -> tuple[dict, int]:
        """Fields of a page's header by their numbers, and its length."""
        for most in (2**10, 2**14, 2**20):  # statistics may make it long
            data = self.files.read(number, offset, min(most, end - offset))
            try:
                return thrift_struct(data, 0)
            except IndexError:
                continue
        raise DataError(f"{self.files.paths[number]} is damaged at byte {offset}")

    def _page_of(self, index: int) -> list[int]:
        # The last page with this first row: a dictionary has that of the page after it.
        place = torch.searchsorted(self._firsts, index, right=True).item() - 1
        return self._pages[place].tolist()

    def read(self, index: int) -> bytes:
        page = self._page_of(index)
        try:
            return self._value(page, index - page[_FIRST])
        except DataError as error:
            raise DataError(f"cannot read image {self.title(index)}: {error}") from error
        except Exception as error:  # damaged bytes can make a reader fail in any way
            reason = str(error) or type(error).__name__
            raise DataError(
                f"cannot read image {self.title(index)}: its page is damaged ({reason})"
            ) from error

    def _value(self, page: list[int], row: int) -> bytes:
        """Value of a row of a page."""
        take, values = self._opened(page), 0
        if most := page[_MOST]:
            if page[_LEVELS] < 0:
                length = int.from_bytes(take(0, 4), "little")
                levels, values = take(4, length), 4 + length
            else:
                levels, values = take(0, page[_LEVELS]), page[_LEVELS]
            defined = itertools.islice(hybrid(levels, most.bit_length()), row + 1)
            present = [level == most for level in defined]
            if not present[row]:
                raise DataError("there is none in this row")
            row = sum(present[:row])
        if page[_KIND]:
            data = take(values, page[_UNPACKED] - values)
            row = next(hybrid(data[1:], data[0], row)) if data[0] else 0
            take, values = self._opened(self._pages[page[_BOOK]].tolist()), 0
        for _ in range(row):
            values += 4 + int.from_bytes(take(values, 4), "little")
        return take(values + 4, int.from_bytes(take(values, 4), "little"))

    def _opened(self, page: list[int]) -> Take:
        """Access to a page: to its place in the file, or, of a compressed one, unpacked."""
        number, offset, size = page[_FILE], page[_OFFSET], page[_SIZE]
        whole = None
        if page[_CODEC] >= 0:
            pyarrow = import_optional("pyarrow", "--dataset parquet")
            levels = max(0, page[_LEVELS])  # are never compressed
            data = self.files.read(number, offset, size)
            unpacked = pyarrow.decompress(
                data[levels:], page[_UNPACKED] - levels, self.codecs[page[_CODEC]], asbytes=True
            )
            whole = data[:levels] + unpacked
            size = len(whole)

        def take(start: int, length: int) -> bytes:
            if start + length > size:
                raise DataError("its page is damaged")
            if whole is None:
                return self.files.read(number, offset + start, length)
            return whole[start : start + length]

        return take


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def thrift_struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """The fields of a struct in Thrift's compact protocol by their numbers, and where it ends.

    Raises:
        IndexError: it goes on behind the data.
        ValueError: it is none that a page's header has.
    """
    fields: dict[int, Any] = {}
    number = 0
    while data[at]:
        kind, delta = data[at] & 15, data[at] >> 4
        at += 1
        if delta:
            number += delta
        else:
            value, at = varint(data, at)
            number = (value >> 1) ^ -(value & 1)
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind in (3, 7):  # a byte, a double: neither is used
            at += 1 if kind == 3 else 8
        elif kind in (4, 5, 6):
            value, at = varint(data, at)
            fields[number] = (value >> 1) ^ -(value & 1)
        elif kind == 8:
            length, at = varint(data, at)
            at += length
        elif kind == 12:
            fields[number], at = thrift_struct(data, at)
        else:
            raise ValueError(f"a field of kind {kind} in a page's header")
    return fields, at + 1


def hybrid(data: bytes, width: int, start: int = 0) -> Iterator[int]:
    """Numbers of so many bits each, in runs of one value and packed ones, from number `start` on;
    IndexError behind the data."""
    at, whole = 0, (width + 7) // 8
    while True:
        header, at = varint(data, at)
        count, size = header >> 1, whole
        if header & 1:
            count, size = 8 * count, count * width
        bits = int.from_bytes(data[at : at + size], "little")
        at += size
        for i in range(start, count):
            yield (bits >> (i * width)) & ((1 << width) - 1) if header & 1 else bits
        start = max(0, start - count)
