"""Text that comes from files, made safe to print. Needs no torch."""


def printable(text: str) -> str:
    """The text in one line that any terminal and UTF-8 file can hold: control characters, line
    breaks and bytes that are not UTF-8 (in file names, by surrogateescape) become escapes."""
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
