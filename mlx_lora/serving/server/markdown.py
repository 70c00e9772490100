"""Markdown as HTML that is safe to show in the chat page, and the colours of highlighted code.

markdown-it-py renders without raw HTML, and an image as a link to it; nh3 then removes every tag and attribute that is
not listed here, whatever the renderer made. TeX formulas are shown as they were written.
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
_LONGEST_CODE = 20_000  # characters of a block that is highlighted
_PREFIX = "hl-"  # of the classes of highlighted code
_LIGHT, _DARK = "xcode", "github-dark"  # Pygments' styles
_HEADINGS, _TABLE = {f"h{level}" for level in range(1, 7)}, {"table", "thead", "tbody", "tr", "th", "td"}
_TAGS = {*"a blockquote br code em hr li ol p pre s span strong ul".split(), *_HEADINGS, *_TABLE}  # noqa: SIM905
_ATTRIBUTES = {"a": {"href", "title"}, "code": {"class"}, "ol": {"start"}, "span": {"class"}}
_ALIGNMENTS = {"left", "center", "right"}  # of the cells of a table, as classes: the page allows no style attributes
_CHECKBOXES = {"[ ] ": "☐ ", "[x] ": "☑ ", "[X] ": "☑ "}
# Formulas in TeX, each too short to take long where its end is missing. As in Pandoc, $5 and $6 are no formula.
_FORMULA = re.compile(
    r"\\\((?:(?!\\[()]).){1,1000}\\\)|\\\[(?:(?!\\[\[\]]).){1,1000}\\\]|\$\$[^$]{1,1000}\$\$|\$(?=\S)[^$\n]{1,200}(?<=\S)\$(?!\d)",
    re.DOTALL,
)


def render(text: str) -> str:
    """The HTML of a Markdown text: links to web pages and mail addresses only, no images, no scripts, no styles."""
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
    made = MarkdownIt("commonmark", options).enable(["table", "strikethrough"])
    made.inline.ruler.before("escape", "formula", _formula)
    made.core.ruler.after("inline", "checkboxes", _checkboxes)
    for name, rule in (("image", _image), ("td_open", _cell), ("th_open", _cell)):
        made.add_render_rule(name, rule)
    return made


def _formula(state: StateInline, silent: bool) -> bool:
    """A formula is code: what Markdown would take from it, such as backslashes, stays."""
    found = _FORMULA.match(state.src, state.pos, state.posMax)
    if found is None:
        return False
    if not silent:
        state.push("code_inline", "code", 0).content = found[0]
    state.pos = found.end()
    return True


def _checkboxes(state: StateCore) -> None:
    """``[ ]`` at the beginning of a list's item is an empty box, ``[x]`` a ticked one."""
    for item, token in zip(state.tokens, state.tokens[2:], strict=False):
        box = _CHECKBOXES.get(token.content[:4]) if token.type == "inline" and item.type == "list_item_open" else None
        if box and token.children[0].type == "text":
            token.children[0].content = box + token.children[0].content[4:]


def _image(renderer, tokens, index, options, env) -> str:
    """A link in place of the image: the page loads nothing from elsewhere."""
    address, text = tokens[index].attrGet("src"), renderer.renderInlineAsText(tokens[index].children, options, env)
    if sum(token.nesting for token in tokens[:index] if token.type in ("link_open", "link_close")):
        return html.escape(text or address)
    return f'<a href="{html.escape(address)}">Image: {html.escape(text or address)}</a>'


def _cell(renderer, tokens, index, options, env) -> str:
    if style := tokens[index].attrs.pop("style", None):
        tokens[index].attrSet("class", style.removeprefix("text-align:"))
    return renderer.renderToken(tokens, index, options, env)


def _highlighted(code: str, language: str, _: str) -> str:
    """The code in spans with classes; empty where the language is unknown, so that the renderer escapes the code."""
    if len(code) > _LONGEST_CODE:
        return ""
    try:
        lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return ""
    return highlight(code, lexer, HtmlFormatter(nowrap=True, classprefix=_PREFIX))
