"""Render Markdown as HTML that is safe for the chat page, and give the colours of highlighted code.

markdown-it-py renders without raw HTML, and an image as a link to it. nh3 then removes every tag and attribute that is
not listed here. TeX formulas are shown as source text.
"""

from __future__ import annotations

import html
import re
from functools import cache

import nh3
from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.styles import get_style_by_name
from pygments.token import STANDARD_TYPES, Whitespace
from pygments.util import ClassNotFound

LONGEST = 200_000  # characters; a longer text is shown without Markdown
_LONGEST_CODE = 20_000  # characters; a longer code block is not highlighted
_PREFIX = "hl-"  # prefix of the CSS classes of highlighted code
_LIGHT, _DARK = "xcode", "github-dark"  # Pygments' styles
_HEADINGS, _TABLE = {f"h{level}" for level in range(1, 7)}, {"table", "thead", "tbody", "tr", "th", "td"}
_TAGS = {*"a blockquote br code em hr li ol p pre s span strong ul".split(), *_HEADINGS, *_TABLE}  # noqa: SIM905
_ATTRIBUTES = {"a": {"href", "title"}, "code": {"class"}, "ol": {"start"}, "span": {"class"}}
_ALIGNMENTS = {"left", "center", "right"}  # CSS classes, because the page forbids style attributes
_CHECKBOXES = {"[ ] ": "☐ ", "[x] ": "☑ ", "[X] ": "☑ "}
# TeX formulas. The length limits bound the search when the end is missing. As in Pandoc, "$5 and $6" is no formula.
_FORMULA = re.compile(
    r"\\\((?:(?!\\[()]).){1,1000}\\\)|\\\[(?:(?!\\[\[\]]).){1,1000}\\\]|\$\$[^$]{1,1000}\$\$|\$(?=\S)[^$\n]{1,200}(?<=\S)\$(?!\d)",
    re.DOTALL,
)


def render(text: str) -> str:
    """Return Markdown as HTML with links to web pages and mail addresses, without images, scripts and styles."""
    if len(text) > LONGEST:
        return f"<pre>{html.escape(text)}</pre>"
    return nh3.clean(
        _renderer().render(text),
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        allowed_classes={"td": _ALIGNMENTS, "th": _ALIGNMENTS},
        url_schemes={"http", "https", "mailto"},
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )


@cache
def code_stylesheet() -> str:
    """Return CSS for highlighted code in the light and the dark theme."""
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
    made = MarkdownIt("commonmark", options).enable(["table", "strikethrough"])
    made.inline.ruler.before("escape", "formula", _formula)
    made.core.ruler.after("inline", "checkboxes", _checkboxes)
    for name, rule in (("image", _image), ("td_open", _cell), ("th_open", _cell)):
        made.add_render_rule(name, rule)
    return made


def _formula(state: StateInline, silent: bool) -> bool:
    """Parse a TeX formula as inline code, so that Markdown does not change its backslashes and underscores."""
    found = _FORMULA.match(state.src, state.pos, state.posMax)
    if found is None:
        return False
    if not silent:
        state.push("code_inline", "code", 0).content = found[0]
    state.pos = found.end()
    return True


def _checkboxes(state: StateCore) -> None:
    """Replace ``[ ]`` at the beginning of a list item by an empty box, and ``[x]`` by a ticked one."""
    for item, token in zip(state.tokens, state.tokens[2:], strict=False):
        box = _CHECKBOXES.get(token.content[:4]) if token.type == "inline" and item.type == "list_item_open" else None
        if box and token.children[0].type == "text":
            token.children[0].content = box + token.children[0].content[4:]


def _image(renderer, tokens, index, options, env) -> str:
    """Render an image as a link, because the page loads nothing from other servers."""
    address, text = tokens[index].attrGet("src"), renderer.renderInlineAsText(tokens[index].children, options, env)
    if sum(token.nesting for token in tokens[:index] if token.type in ("link_open", "link_close")):
        return html.escape(text or address)
    return f'<a href="{html.escape(address)}">Image: {html.escape(text or address)}</a>'


def _cell(renderer, tokens, index, options, env) -> str:
    if style := tokens[index].attrs.pop("style", None):
        tokens[index].attrSet("class", style.removeprefix("text-align:"))
    return renderer.renderToken(tokens, index, options, env)


def _highlighted(code: str, language: str, _: str) -> str:
    """Return the code in spans with classes, or "" for an unknown language; the renderer then escapes the code."""
    if len(code) > _LONGEST_CODE:
        return ""
    try:
        lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return ""
    return highlight(code, lexer, HtmlFormatter(nowrap=True, classprefix=_PREFIX))
