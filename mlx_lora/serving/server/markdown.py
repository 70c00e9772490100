"""Markdown as HTML that is safe to show in the chat page, and the colours of highlighted code.

markdown-it-py renders without raw HTML and without images; nh3 then removes every tag and attribute that is not listed
here, whatever the renderer made.
"""

from __future__ import annotations

import html
from functools import cache

import nh3
from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.styles import get_style_by_name
from pygments.token import STANDARD_TYPES, Whitespace
from pygments.util import ClassNotFound

LONGEST = 200_000  # characters; a longer text is shown without Markdown
_LONGEST_CODE = 20_000  # characters of a block that is highlighted
_PREFIX = "hl-"  # of the classes of highlighted code
_LIGHT, _DARK = "xcode", "github-dark"  # Pygments' styles
_HEADINGS, _TABLE = {f"h{level}" for level in range(1, 7)}, {"table", "thead", "tbody", "tr", "th", "td"}
_TAGS = {*"a blockquote br code em hr li ol p pre s span strong ul".split(), *_HEADINGS, *_TABLE}  # noqa: SIM905
_ATTRIBUTES = {"a": {"href", "title"}, "code": {"class"}, "ol": {"start"}, "span": {"class"}}


def render(text: str) -> str:
    """The HTML of a Markdown text: links to web pages and mail addresses only, no images, no scripts, no styles."""
    if len(text) > LONGEST:
        return f"<pre>{html.escape(text)}</pre>"
    return nh3.clean(
        _renderer().render(text),
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )


@cache
def code_stylesheet() -> str:
    """CSS for highlighted code in light and dark."""
    light, dark = get_style_by_name(_LIGHT), get_style_by_name(_DARK)
    rules = []
    for token, name in STANDARD_TYPES.items():
        if not name or token is Whitespace:
            continue
        styles = [style.style_for_token(token) for style in (light, dark)]
        colors = [f"#{style['color']}" if style["color"] else "inherit" for style in styles]
        if colors != ["inherit", "inherit"]:
            both = ", ".join("var(--text)" if color == "inherit" else color for color in colors)
            rules.append(f".{_PREFIX}{name} {{ color: light-dark({both}); }}")
    return "\n".join(rules) + "\n"


@cache
def _renderer() -> MarkdownIt:
    options = {"html": False, "breaks": True, "highlight": _highlighted}
    return MarkdownIt("commonmark", options).enable(["table", "strikethrough"]).disable("image")


def _highlighted(code: str, language: str, _: str) -> str:
    """The code in spans with classes; empty where the language is unknown, so that the renderer escapes the code."""
    if len(code) > _LONGEST_CODE:
        return ""
    try:
        lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return ""
    return highlight(code, lexer, HtmlFormatter(nowrap=True, classprefix=_PREFIX))
