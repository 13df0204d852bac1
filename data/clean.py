"""Raw text to clean text: removes invisible characters, markup and repeats; keeps paragraphs and indentation."""

import html
import re
from dataclasses import dataclass
from html.entities import html5

from cli import extra
from stage import check_types


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """Optional cleaning. Control characters, broken Unicode, line ends and trailing blanks are always cleaned."""

    html: bool = True  # removes tags, comments, scripts and styles, and decodes entities. Not for text about HTML
    urls: str = "keep"  # "keep", "drop", or "replace" (by <url>)
    # Drops a line of at least this many characters that repeats an earlier line of its document. 0 drops none.
    repeated_line_chars: int = 40
    # Repairs text that was decoded with the wrong encoding ("Ã©" for "é"). Can damage correct text. Needs ftfy.
    mojibake: bool = False

    def __post_init__(self):
        check_types(self)
        if self.urls not in ("keep", "drop", "replace"):
            raise ValueError(f'urls is {self.urls!r}; expected "keep", "drop" or "replace"')


BREAKS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
BLANKS = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")
# U+0080 to U+009F in UTF-8, decoded as Latin-1
MISREAD = re.compile("Â[\x80-\x84\x86-\x9f]")
# Control characters, characters without width, writing directions, private use, non-characters. The joiners U+200C and
# U+200D stay: Persian and emoji need them.
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ud800-\udfff\ue000-\uf8ff"
    "\ufdd0-\ufdef\ufeff\ufff9-\uffff\U000f0000-\U0010ffff]"
)
TRAILING = re.compile(r"(?<![ \t])[ \t]+$", re.MULTILINE)  # the lookbehind: tries each run of blanks only once
EMPTY_LINES = re.compile(r"\n{4,}")
URL = re.compile(r"\b(?:https?://|www\.)[^\s<>\"]*[^\s<>\".,;:!?)\]}'’]", re.IGNORECASE)

# Tags that stand for a line break, and the other tags of HTML. Any other word in angle brackets is text.
BLOCK = (
    "address|article|aside|blockquote|body|br|center|dd|div|dl|dt|fieldset|figcaption|figure|footer|form|h[1-6]|head|"
    "header|hr|html|iframe|li|main|nav|ol|option|p|pre|section|select|table|tbody|td|tfoot|th|thead|title|tr|ul"
)
INLINE = (
    "a|abbr|acronym|b|big|button|cite|code|del|em|font|i|img|input|ins|label|link|meta|q|s|small|span|strike|strong|"
    "sub|sup|tt|u|var"
)
MAY_STAY_OPEN = {"br", "dd", "dt", "hr", "img", "input", "li", "link", "meta", "option", "p", "td", "th", "tr"}
ATTRIBUTES = r"\s+(?:[\w:-]+\s*=|(?:checked|compact|disabled|hidden|noshade|nowrap|readonly|selected)\b)[^<>]*"
TAG = re.compile(rf"<(/?)(?:({BLOCK})|({INLINE}))({ATTRIBUTES})?\s*/?>|<!doctype[^<>]*>", re.IGNORECASE)
CLOSING = re.compile(r"</(\w+)\s*>")
# The text between these opening and closing marks is not for readers.
HIDDEN = (("<!--", "-->"), (r"<script\b", r"</script\s*>"), (r"<style\b", r"</style\s*>"))
AMPERSANDS = re.compile(r"&(?:(?:amp|#0*38|#x0*26);)+", re.IGNORECASE)  # escaped more than once
ENTITY = re.compile(r"&(#\d{1,7}|#x[0-9a-f]{1,6}|\w{2,31});", re.IGNORECASE)


def clean(text: str, config: Cleaning = Cleaning()) -> tuple[str, str]:
    """The clean text, with \\n line ends, and the repeated lines that were dropped."""
    if config.mojibake:
        ftfy = extra("ftfy", "ftfy", "Cleaning(mojibake=True)")
        text = "\n".join(map(ftfy.fix_encoding, text.split("\n")))
    text = BREAKS.sub("\n", text)
    if config.html:
        text = _without_html(text)
    if not text.isascii():
        text = BLANKS.sub(" ", MISREAD.sub("", text))
    text = INVISIBLE.sub("", text)
    if config.urls != "keep":
        text = URL.sub("<url>" if config.urls == "replace" else "", text)
    kept, seen, repeated = [], set(), []
    for line in TRAILING.sub("", text).split("\n"):
        again = line in seen and len(line) >= config.repeated_line_chars > 0
        (repeated if again else kept).append(line)
        seen.add(line)
    return EMPTY_LINES.sub("\n\n\n", "\n".join(kept)).strip("\n"), "\n".join(repeated)


def _without_html(text: str) -> str:
    for opening, closing in HIDDEN:
        # Search only before the last closing mark: an opening mark without one would cost quadratic time.
        end = max((match.end() for match in re.finditer(closing, text, re.IGNORECASE)), default=0)
        before = re.sub(f"{opening}.*?{closing}", "", text[:end], flags=re.IGNORECASE | re.DOTALL)
        text = before + text[end:]
    closed = set(CLOSING.findall(text))
    text = TAG.sub(lambda match: _tag(match, closed), text)
    return BREAKS.sub("\n", ENTITY.sub(_entity, AMPERSANDS.sub("&", text)))


def _tag(match: re.Match, closed: set[str]) -> str:
    """The text that replaces a tag. Keeps a lone <A>, as in List<A>: HTML would close it, or give it attributes."""
    slash, block, inline, attributes = match.groups()
    name = block or inline
    if name and not slash and not attributes and name not in closed:
        before = match.string[max(0, match.start() - 1) : match.start()]
        if name.lower() not in MAY_STAY_OPEN or (name == "P" and before.isalnum() and not closed):
            return match[0]
    return "\n" if block else ""


def _entity(match: re.Match) -> str:
    known = match[1].startswith("#") or f"{match[1]};" in html5
    return html.unescape(match[0]) if known else match[0]
