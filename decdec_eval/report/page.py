"""All tables and figures as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from decdec_eval.report.figures import Picture
from decdec_eval.report.tables import COMMAND, Cell, Table, slug

_NUMBERS = (int, float)
# the page itself promises that it fetches nothing
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --text: #1a1a1a; --dim: #5c5c5c; --back: #ffffff; --line: #d0d0d0;
  --head: #f2f2f2; --mark: #9a4a00; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e8e8; --dim: #a8a8a8; --back: #16181a; --line: #43474b; --head: #24282b;
    --mark: #ffb066; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 82rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 3rem; border-top: 1px solid var(--line);
  padding-top: 1rem; } h3 { font-size: 1rem; margin: 2rem 0 0.3rem; }
a { color: inherit; }
p, figcaption { color: var(--dim); margin: 0.3rem 0; font-size: 0.9rem; }
figure { margin: 1.5rem 0; }
.scroll { overflow: auto; max-height: 80vh; border: 1px solid var(--line); border-radius: 6px; }
.picture { max-height: none; background: #ffffff; }
.picture img { display: block; width: 100%; min-width: 38rem; max-width: 68rem; height: auto;
  margin: 0 auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums;
  min-width: 100%; }
th, td { padding: 0.25rem 0.6rem; text-align: left; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--head); z-index: 1; vertical-align: bottom; padding: 0; }
th button { all: unset; cursor: pointer; display: block; padding: 0.35rem 0.6rem; white-space: normal;
  min-width: 4rem; max-width: 11rem; overflow-wrap: normal; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--mark); outline-offset: -2px; }
th button::after { content: " \\2195"; color: var(--dim); }
th[aria-sort=ascending] button::after { content: " \\2191"; color: var(--mark); }
th[aria-sort=descending] button::after { content: " \\2193"; color: var(--mark); }
td.number { text-align: right; }
td.zero { color: var(--dim); font-style: italic; }
td.predicted, .predicted { color: var(--mark); font-style: italic; }
pre { margin: 0.4rem 0; padding: 0.5rem 0.7rem; background: var(--head); border-radius: 6px; overflow-x: auto;
  font-size: 0.8rem; }
@media (max-width: 40rem) { body { padding: 0.6rem; } th, td { padding: 0.2rem 0.4rem; } }
"""
_SCRIPT = """
function sorted(rows, column, sign) {
  const value = row => row.cells[column].dataset.value;
  return rows.sort((a, b) => {
    const x = value(a), y = value(b);
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return sign * order;
  });
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, table = head.closest("table"), body = table.tBodies[0];
    const order = head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", order);
    body.append(...sorted([...body.rows], head.cellIndex, order === "ascending" ? 1 : -1));
  });
}
"""


@dataclass(frozen=True)
class Section:
    """What was measured under one title, and what was made of it."""

    title: str
    tables: Sequence[Table]
    pictures: Sequence[Picture]


def page(sections: Sequence[Section]) -> str:
    """Return the whole page."""
    contents = "".join(
        f'<li><a href="#{slug(section.title)}">{escape(section.title)}</a></li>' for section in sections
    )
    body = "".join(_section(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>decdec-eval: results</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        "<h1>decdec-eval: results</h1>\n"
        f"<p>Made from runs/*.json by <code>{escape(COMMAND)}</code>. A table is sorted by a click on the "
        'head of a column. What was not measured but predicted is <span class="predicted">marked'
        "</span>.</p>\n"
        f"<ul>{contents}</ul>\n{body}<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    parts = [f'<section>\n<h2 id="{slug(section.title)}">{escape(section.title)}</h2>\n']
    parts += [_picture(picture) for picture in section.pictures]
    parts += [_table(table) for table in section.tables]
    return "".join([*parts, "</section>\n"])


def _picture(picture: Picture) -> str:
    encoded = base64.b64encode(picture.path.read_bytes()).decode()
    return (
        f'<figure>\n<div class="scroll picture"><img alt="{escape(f"{picture.title}. {picture.caption}")}" '
        f'src="data:image/svg+xml;base64,{encoded}"></div>\n'
        f"<figcaption>{escape(picture.title)}. {escape(picture.caption)}</figcaption>\n"
        f"{_commands(picture.commands)}</figure>\n"
    )


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{escape(name)}</button></th>'
        for name in table.head
    )
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in table.rows)
    return (
        f"<h3>{escape(table.title)}</h3>\n<p>{escape(table.caption)}</p>\n"
        f'<div class="scroll" tabindex="0"><table id="{escape(table.name)}">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n{_commands(table.commands)}"
    )


def _cell(cell: Cell) -> str:
    classes = [*(["number"] if isinstance(cell.value, _NUMBERS) else []), *cell.marks]
    named = f' class="{" ".join(classes)}"' if classes else ""
    value = "" if cell.value is None else f' data-value="{escape(str(cell.value))}"'
    return f"<td{named}{value}>{escape(cell.text)}</td>"


def _commands(commands: Sequence[str]) -> str:
    return f"<pre>{escape(chr(10).join([*commands, COMMAND]))}</pre>\n"
