"""Texts from files of others, made safe for a terminal, a page or a spreadsheet."""

import re
import sys

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""Control characters but tab and new line, and characters that change the direction of writing."""
_LOGIN = re.compile(r"(?<=//)[^/\s]*@")
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def printable(text: str) -> str:
    r"""A text with its control characters escaped, as \u001b, so that they have no effect.

    >>> printable("\x1b]0;owned\x07 and\n\ta line")
    '\\u001b]0;owned\\u0007 and\n\ta line'
    """
    return _UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def one_line(text: str) -> str:
    r"""The same with its line breaks escaped, too, so that it can't pass for two lines.

    >>> one_line("a note\nerror: none")
    'a note\\u000aerror: none'
    """
    return printable(text).replace("\n", "\\u000a")


def beyond_locale() -> str:
    """What to do where names of files are no UTF-8 text because of the locale; "" where they may be any text."""
    encoding = sys.getfilesystemencoding()
    if encoding.lower().replace("-", "") == "utf8":
        return ""
    return f"\nThe locale allows {encoding} alone in names of files. Set one of UTF-8, or:  export PYTHONUTF8=1"


WHOLE_TEXT = "text without half characters"


def are_whole(*texts: str) -> bool:
    """Whether UTF-8 can hold some texts: JSON can also name half a character."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def without_login(text: str) -> str:
    """A text whose web addresses have no user and no password.

    >>> without_login("from https://jane:word@hub.example/x")
    'from https://hub.example/x'
    """
    return _LOGIN.sub("", text)


def cell(value: object) -> object:
    """A value as a cell of a CSV file. A text that a spreadsheet would compute gets a ' before it; see `uncell`.

    >>> cell("=1+1"), cell("-0.5"), cell(-0.5), cell("a=b"), cell("'=1+1")
    ("'=1+1", '-0.5', -0.5, 'a=b', "''=1+1")
    """
    if not isinstance(value, str) or not _FORMULA.match(value) or _NUMBER.fullmatch(value):
        return value
    return f"'{value}"


def uncell(text: str) -> str:
    """The text from which `cell` made a cell.

    >>> uncell("'=1+1"), uncell("'tis"), uncell("-0.5")
    ('=1+1', "'tis", '-0.5')
    """
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text
