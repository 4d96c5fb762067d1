"""One HTML file that holds everything: Plotly's library, figures, tables, themes. It needs no network."""

import html
import json
from pathlib import Path
from string import Template
from typing import Any

import plotly.offline

import samon
from samon.report.content import Content
from samon.report.figures import Figure, figures
from samon.report.tables import Table, tables

HERE = Path(__file__).parent


def render(content: Content, title: str, command: str) -> str:
    """The page. Nothing of the content is markup: it is escaped in HTML, and JSON without `<` for the script."""
    drawn, tabled = figures(content), tables(content)
    body = [f"<section><h2>Figures</h2>{''.join(map(_figure, drawn))}</section>"] if drawn else []
    body += [_table(table) for table in tabled]
    counts = f"{len(content.runs)} runs, {len(content.scores)} rows of scores"
    about = f"{counts}, {len(content.evaluations)} evaluation rows. Made by samon {samon.__version__}: {command}"
    links: list[Figure | Table] = [*drawn, *tabled]
    parts = {
        "title": html.escape(title),
        "about": html.escape(about),
        "style": (HERE / "page.css").read_text(),
        "links": "".join(f'<a href="#{html.escape(part.name)}">{html.escape(part.title)}</a>' for part in links),
        "body": "".join(body),
        "data": script_json(data_of(drawn)),
        "script": (HERE / "page.js").read_text(),
        "plotly": plotly.offline.get_plotlyjs(),
    }
    page = (HERE / "page.html").read_text()
    return Template(page).substitute(parts)  # one pass: a name such as $data in the content is never filled


def data_of(drawn: list[Figure]) -> dict[str, Any]:
    """What the page's script draws, by figure."""
    return {figure.name: {"data": figure.traces, "x": figure.x, "y": figure.y} for figure in drawn}


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _figure(figure: Figure) -> str:
    title, caption = html.escape(figure.title), html.escape(figure.caption)
    return (
        f'<figure id="{html.escape(figure.name)}"><h3>{title}</h3><div class="plot" role="img" aria-label="{title}">'
        f"</div><figcaption>{caption}</figcaption></figure>"
    )


def _table(table: Table) -> str:
    copies = "".join(
        f"<details><summary>{kind}</summary><pre>{html.escape(text)}</pre></details>"
        for kind, text in (("LaTeX", table.latex()), ("CSV", table.csv()))
    )
    title, caption = html.escape(table.title), html.escape(table.caption)
    return (
        f'<section id="{table.name}"><h2>{title}</h2><div class="wide">{table.html()}</div>'
        f"<p>{caption}</p>{copies}</section>"
    )
