"""An HTML report as one file that needs nothing else: the page, its look, and figures in its ink."""

from __future__ import annotations

import io
from html import escape
from typing import Any

INK = "#1d2733"
"""Text and axes of figures; it turns into the colour of the surrounding page."""

_LOOK = """
:root { color-scheme: light dark; --ink: #1d2733; --paper: #ffffff; --soft: #f2f4f7; --line: #d5dae1; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ee; --paper: #14181d; --soft: #1e242c; --line: #38414c; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 24px 20px 60px; }
h1 { font-size: 26px; margin: 8px 0 0; }
h2 { font-size: 19px; margin: 40px 0 6px; border-top: 1px solid var(--line); padding-top: 18px; }
h3 { font-size: 15px; margin: 24px 0 6px; }
.lead { opacity: .75; }
p { max-width: 80ch; margin: 4px 0 12px; }
.warning { border-left: 4px solid #d55e00; background: var(--soft); padding: 8px 12px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 4px 8px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
thead th { font-weight: 600; background: var(--soft); }
tbody th, thead th:first-child { text-align: left; }
.conditions td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.plot svg { max-width: 100%; height: auto; }
"""


def html_page(title: str, body: str, look: str = "") -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML.
        look: CSS of its own, after what all pages share.
    """
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_LOOK}{look}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def section(title: str, about: str, content: str) -> str:
    """A heading, what the reader should know, and the content; all HTML."""
    return f"<h2>{title}</h2><p>{about}</p>{content}"


def svg(figure: Any) -> str:
    """A matplotlib figure as an <svg> element that takes its ink from the page around it, light or dark."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    element = buffer.getvalue()
    return element[element.index("<svg") :].replace(INK, "currentColor")
