"""Text from files and other machines made safe to print: terminals, logs, Markdown. Needs no torch.

A checkpoint, a folder's name or a log can hold anything: escape sequences that repaint a terminal,
line breaks that fake a second message, marks that turn the reading direction around.
"""

from __future__ import annotations

import re
import unicodedata


def printable(text: object, limit: int = 4000) -> str:
    """One line of text for people to read.

    What cannot be seen becomes its escape, as `\\n`, `\\x1b` or `\\u202e`: line breaks, control
    characters, bidirectional and zero-width marks, unassigned code points; of a name that is not
    UTF-8 the bytes. Spaces of other widths become plain ones. Letters of every language stay.

    Args:
        text: any value; `str` of it is used.
        limit: characters of the result at most, above 5; " ... " stands for a middle left out.
    """
    shown = "".join(_visible(character) for character in _shortened(str(text), limit))
    return _shortened(shown, limit)


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    if "\udc80" <= character <= "\udcff":  # a byte that was no UTF-8, by surrogateescape
        return f"\\x{ord(character) - 0xDC00:02x}"
    if unicodedata.category(character) == "Zs":
        return " "
    return character.encode("unicode_escape").decode("ascii")


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    kept = limit - 5
    return f"{text[: kept - kept // 2]} ... {text[len(text) - kept // 2 :]}"


# What opens or closes markup inside a line of CommonMark or GitHub's dialect: links, images, code,
# formulas, strike-through. Emphasis: a * between spaces and a _ inside a word do not count there.
_MARKUP = re.compile(r"[\\`\[\]$~]|(?<! )\*|\*(?! )|(?<![^\W_])_|_(?![^\W_])")


def markdown(text: object, limit: int = 4000) -> str:
    """`printable` text that Markdown shows as it is, within a paragraph, a heading or a table.

    Runs of spaces become one, as Markdown shows them, and | becomes /, which ends no cell.
    """
    text = _MARKUP.sub(r"\\\g<0>", _in_cell(text, limit))
    text = re.sub(r"&(?=[#\w])", "&amp;", text)  # an entity
    return text.replace("<", "&lt;").replace(">", "&gt;")


def markdown_code(text: object, limit: int = 4000) -> str:
    """`printable` text for a code block or a code span between two backticks.

    Nothing can be escaped in there, so ` becomes ', | becomes / and < becomes `\\x3c`: not even a
    reader that does not know Markdown finds a tag.
    """
    return _in_cell(text, limit).replace("`", "'").replace("<", r"\x3c")


def _in_cell(text: object, limit: int) -> str:
    return " ".join(printable(text, limit).split()).replace("|", "/")
