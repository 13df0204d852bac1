"""Raw text to clean text: what no reader would miss is taken out, paragraphs and indentation stay."""

import html
import re
from dataclasses import dataclass

from stage import check_types


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """What is mended beyond control characters, broken Unicode, line ends and trailing blanks, which always are.

    Raises TypeError or ValueError, naming the field, for what cannot be.
    """

    html: bool = True
    """Takes out tags, comments, scripts and styles, and decodes entities. Not for text that is about HTML."""
    urls: str = "keep"
    """"keep", "drop", or "replace" (by <url>)."""
    repeated_line_chars: int = 40
    """A line of at least this many characters that an earlier line of its document has said is dropped; 0: none is."""

    def __post_init__(self):
        check_types(self)
        if self.urls not in ("keep", "drop", "replace"):
            raise ValueError(f'urls is {self.urls!r}; expected "keep", "drop" or "replace"')
        if self.repeated_line_chars < 0:
            raise ValueError(f"repeated_line_chars is {self.repeated_line_chars}; expected at least 0")


# UTF-8 that was once read as Windows-1252: "Ã©" for "é", "â€™" for "’".
MOJIBAKE = re.compile("(?:Ã|Â|â[€\x80-\x84\u201a\u0192\u201e])[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]")
BREAKS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
BLANKS = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
# Control characters; what has no width or only turns the writing direction; private use; no characters at all. The
# joiners U+200C and U+200D stay: Persian and emoji are spelt with them.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ud800-\udfff\ue000-\uf8ff"
    "\ufdd0-\ufdef\ufeff\ufff9-\uffff\U000f0000-\U0010ffff]"
)
TRAILING = re.compile(r"(?<![ \t])[ \t]+$", re.MULTILINE)  # looks at each run of blanks once
EMPTY_LINES = re.compile(r"\n{4,}")

BLOCK_TAG = re.compile(
    r"</?(?:address|article|aside|blockquote|body|br|center|dd|div|dl|dt|fieldset|figcaption|figure|footer|form|h[1-6]|"
    r"head|header|hr|html|iframe|li|main|nav|ol|option|p|pre|section|select|table|tbody|td|tfoot|th|thead|title|tr|ul)"
    r"(?:\s[^<>]*)?/?>",
    re.IGNORECASE,
)
INLINE_TAG = re.compile(
    r"</?(?:a|abbr|acronym|b|big|button|cite|code|del|em|font|i|img|input|ins|label|link|meta|q|s|small|span|strike|"
    r"strong|sub|sup|tt|u|var)(?:\s[^<>]*)?/?>|<!doctype[^<>]*>",
    re.IGNORECASE,
)
# From the opening on, what lies before the closing is no text.
HIDDEN = (
    (re.compile("<!--"), re.compile("-->")),
    (re.compile(r"<script\b", re.IGNORECASE), re.compile(r"</script\s*>", re.IGNORECASE)),
    (re.compile(r"<style\b", re.IGNORECASE), re.compile(r"</style\s*>", re.IGNORECASE)),
)
AMPERSANDS = re.compile(r"&(?:(?:amp|#0*38|#x0*26);)+", re.IGNORECASE)  # escaped more than once
NO_CHARACTER = re.compile(r"&#\d{9,};?")  # a number that Python may refuse to read
URL = re.compile(r"\b(?:https?://|www\.)[^\s<>\"]*[^\s<>\".,;:!?)\]}'’]", re.IGNORECASE)


def clean(text: str, config: Cleaning = Cleaning()) -> str:
    """The text with \\n line ends, without what `config` and this module's name take out."""
    if not text.isascii():
        text = MOJIBAKE.sub(_reread, text)
    text = BREAKS.sub("\n", text)
    if config.html and "<" in text:
        for opening, closing in HIDDEN:
            text = _without(text, opening, closing)
        text = INLINE_TAG.sub("", BLOCK_TAG.sub("\n", text))
    if config.html and "&" in text:
        text = BREAKS.sub("\n", html.unescape(NO_CHARACTER.sub("", AMPERSANDS.sub("&", text))))
    text = INVISIBLE.sub("", text)
    if not text.isascii():
        text = BLANKS.sub(" ", text)
    if config.urls != "keep":
        text = URL.sub("<url>" if config.urls == "replace" else "", text)
    text = TRAILING.sub("", text)
    if config.repeated_line_chars:
        text = _without_repeated_lines(text, config.repeated_line_chars)
    return EMPTY_LINES.sub("\n\n\n", text).strip("\n")


def _reread(match: re.Match) -> str:
    try:
        # What Windows-1252 leaves undefined was read as the control character of that number.
        return b"".join(c.encode("latin-1" if c < "\xa0" else "cp1252") for c in match[0]).decode()
    except UnicodeDecodeError:
        return match[0]


def _without(text: str, opening: re.Pattern, closing: re.Pattern) -> str:
    """The text without everything from an opening to the next closing; one that is never closed stays."""
    kept, start, looked = [], 0, 0
    for close in closing.finditer(text):
        if found := opening.search(text, looked, close.start()):
            kept.append(text[start : found.start()])
            start = close.end()
        looked = close.end()
    return "".join(kept) + text[start:]


def _without_repeated_lines(text: str, length: int) -> str:
    lines = text.split("\n")
    long = [line for line in lines if len(line) >= length]
    if len(set(long)) == len(long):
        return text
    seen: set[str] = set()
    return "\n".join(line for line in lines if len(line) < length or not (line in seen or seen.add(line)))
