"""Text from files on its way to terminals and Markdown."""

from __future__ import annotations

import pytest

from moco.errors import CheckpointError
from moco.printable import markdown, markdown_code, printable

# What a file may hold, and what is shown of it: terminal sequences, line breaks, reading direction,
# bytes of a name that is no UTF-8, zero width, code points that mean nothing.
FOREIGN = [
    ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
    ("\x1b]0;title\x07\x9b2J\x08\x7f", r"\x1b]0;title\x07\x9b2J\x08\x7f"),
    ("one\ntwo\r\n\tthree\x0b\x85\u2028\u2029", r"one\ntwo\r\n\tthree\x0b\x85\u2028\u2029"),
    ("a\xa0b\u3000c", "a b c"),
    ("\u202egnp.exe\u2066\u200f", r"\u202egnp.exe\u2066\u200f"),
    ("caf\udce9\ud800", r"caf\xe9\ud800"),
    ("a\u200bb\ufeffc\u00ad", r"a\u200bb\ufeffc\xad"),
    ("\U0010ffff\ue000\U000e0041", r"\U0010ffff\ue000\U000e0041"),
]
KEPT = ["3 * align(alpha=2) + 1 * uniform(t=3, with intra-batch pairs)", "日本語 データ", "zażółć",
        r"C:\images", "{'a': [1, 2]}", "it's", "🙂", "a  b", ""]  # fmt: skip


@pytest.mark.parametrize(("text", "shown"), FOREIGN)
def test_what_cannot_be_seen_is_shown_as_its_escape(text, shown):
    assert printable(text) == shown
    assert shown.isprintable() and shown.encode() and printable(shown) == shown


@pytest.mark.parametrize("text", KEPT)
def test_letters_of_every_language_stay(text):
    assert printable(text) == text


def test_any_value_and_no_more_than_the_limit():
    assert printable(None) == "None" and printable({"a": "\n"}) == r"{'a': '\n'}"
    assert printable(CheckpointError("\x00")) == r"\x00"
    for text in ("x" * 11, "\x1b" * 10, "\x1b" * 10**6, "ab" * 10**6):
        shown = printable(text, limit=10)
        assert len(shown) == 10 and " ... " in shown
    assert printable("0123456789", limit=10) == "0123456789"
    assert printable("start" + "x" * 5000 + "end").startswith("startx")
    assert printable("start" + "x" * 5000 + "end").endswith("xend")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n# Title", r"a\\n# Title"),
        ("<script>x</script>", "&lt;script&gt;x&lt;/script&gt;"),
        ("<!-- hidden", "&lt;!-- hidden"),
        ("[a](http://x) ![b](y)", r"\[a\](http://x) !\[b\](y)"),
        ("*a* __b__ `c` ~~d~~ $e$", r"\*a\* \_\_b\_\_ \`c\` \~\~d\~\~ \$e\$"),
        ("&lt; &#60; a & b", "&amp;lt; &amp;#60; a & b"),
        ("one | two", "one / two"),
        ("\\[a]", r"\\\[a\]"),
        ("\x1b", r"\\x1b"),
        ("class_0 of 3 * align(alpha=2), 80.5 % (a-b)",) * 2,
    ],
)
def test_markdown_shows_the_text_itself(text, shown):
    assert markdown(text) == shown


def test_a_code_span_cannot_be_left():
    assert markdown_code("a` <b> | `c*_\n") == r"a' \x3cb> / 'c*_\n"
