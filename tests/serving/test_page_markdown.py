"""Markdown in answers, the colours of code, and the difference between two answers."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("markdown_it")
pytest.importorskip("nh3")

from page_helpers import HOSTILE  # noqa: E402

from mlx_lora.errors import ConfigError  # noqa: E402
from mlx_lora.serving.server.difference import difference  # noqa: E402
from mlx_lora.serving.server.markdown import LONGEST, code_stylesheet, render  # noqa: E402
from mlx_lora.serving.server.page import FILES  # noqa: E402

pytest_plugins = ("page_fixtures",)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_markdown_becomes_harmless(text):
    class Checked(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag in {"p", "pre", "code", "span", "a", "br", "em", "strong"}, tag
            for name, value in attributes:
                assert name in {"class", "href", "title", "rel", "target"}, name
                assert name != "href" or urlsplit(value).scheme in {"http", "https", "mailto"}, value

    Checked().feed(render(text))


def test_markdown_is_rendered(server):
    html = render("# H\n\n- *a*\n\n```python\nprint(1)\n```\n\n|a|b|\n|-|-|\n|1|2|\n\n~~c~~ [d](https://e.org)")
    for part in ("<h1>H</h1>", "<em>a</em>", 'class="hl-nb"', "<td>1</td>", "<s>c</s>", "noopener"):
        assert part in html
    assert render("|a|b|\n|-:|:-:|\n|1|2|").count('class="right"') == 2
    assert "<li>☐ a</li>\n<li>☑ b</li>" in render("- [ ] a\n- [x] b")
    image = render("![a *b*](https://e.org/x.png)")
    assert '<a href="https://e.org/x.png"' in image and "Image: a b</a>" in image
    linked = render("[![a](https://e.org/x.png)](https://e.org)")
    assert '<a href="https://e.org"' in linked and linked.count("<a ") == 1
    assert render("<b>" * LONGEST) == f"<pre>{'&lt;b&gt;' * LONGEST}</pre>"
    got = httpx.post(f"{server[0]}/page/markdown", json={"texts": ["*a*", "b"]}).json()
    assert got == {"html": ["<p><em>a</em></p>\n", "<p>b</p>\n"]}


@pytest.mark.parametrize("formula", ["$a_1*b*c$", r"\(x^2\)", "\\[a\n= b_1 b_2\\]", "$$\n\\frac{a}{b}\n$$"])
def test_formulas_stay_as_they_are_written(formula):
    assert render(f"So {formula}.") == f"<p>So <code>{formula}</code>.</p>\n"


@pytest.mark.parametrize("text", ["It costs $5 or $6.", "$5-$6", "US$ and C$", "$x", "$$", r"\(x"])
def test_sums_of_money_are_no_formulas(text):
    assert "<code>" not in render(text)


def test_highlighted_code_can_be_read_in_both_themes():
    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    def contrast(a: str, b: str) -> float:
        dark, light = sorted((luminance(a), luminance(b)))
        return (light + 0.05) / (dark + 0.05)

    style = (FILES / "style.css").read_text()
    panels = re.search(r"--panel: light-dark\((#\w+), (#\w+)\)", style).groups()
    for colors in re.findall(r"light-dark\((.*), (.*)\)", code_stylesheet()):
        for color, panel in zip(colors, panels, strict=True):
            assert color == "var(--text)" or contrast(color, panel) >= 4.5, (color, panel)


def test_a_difference_has_both_texts():
    for old, new in (("a b c", "a x c"), ("", "a\n\nb"), ("  a", "a  "), ("same", "same"), ("ä 🙂 b", "ä b 🙂\n")):
        parts = difference(old, new)
        assert "".join(part["text"] for part in parts if part["kind"] != "added") == old
        assert "".join(part["text"] for part in parts if part["kind"] != "removed") == new
    assert [part["kind"] for part in difference("a b c", "a x c")] == ["same", "removed", "added", "same"]
    with pytest.raises(ConfigError, match="words"):
        difference("a " * 5000, "b")
