"""One HTML file that holds everything: summary, figures, tables, themes. It needs no network."""

import html
from pathlib import Path
from string import Template

import samon
from samon.report.content import Content
from samon.report.draw import svg
from samon.report.figures import Figure, figures
from samon.report.tables import Table, tables

HERE = Path(__file__).parent


def render(content: Content, title: str, command: str) -> str:
    """The page. Nothing of the content is markup: all of it is escaped."""
    drawn, tabled, looks = figures(content), tables(content), content.looks()
    sections = {table.name: _table(table) for table in tabled}
    first = [sections.pop("summary", "")]
    links = {table.name: table.title for table in tabled if table.name != "summary"}
    for i, (heading, part) in enumerate(drawn.items()):
        shown = "".join(_figure(figure, looks) for figure in part)
        head = f'<section id="figures-{i}"><h2>{html.escape(heading)}</h2>'
        first.append(f'{head}<div class="grid">{shown}</div></section>')
    counts = f"{len(content.runs)} runs, {len(content.scores)} rows of scores"
    about = f"{counts}, {len(content.evaluations)} evaluation rows. Made by samon {samon.__version__}: {command}"
    parts = {
        "title": html.escape(title),
        "about": html.escape(about),
        "style": (HERE / "page.css").read_text(),
        "links": "".join(f'<a href="#{name}">{html.escape(text)}</a>' for name, text in links.items()),
        "body": "".join([*first, *sections.values()]),
    }
    page = (HERE / "page.html").read_text()
    return Template(page).substitute(parts)  # one pass: a name such as $body in the content is never filled


def _figure(figure: Figure, looks: dict[str, int]) -> str:
    title, caption = html.escape(figure.title), html.escape(figure.caption)
    image = f'<div class="plot" role="img" aria-label="{title}">{svg(figure, looks)}</div>'
    return f'<figure id="{html.escape(figure.name)}"><h3>{title}</h3>{image}<figcaption>{caption}</figcaption></figure>'


def _table(table: Table) -> str:
    copies = "".join(
        f"<details><summary>{kind}</summary><pre>{html.escape(text)}</pre></details>"
        for kind, text in (("LaTeX", table.latex()), ("CSV", table.csv()))
    )
    title, caption = html.escape(table.title), html.escape(table.caption)
    shown = f'<div class="wide">{table.html()}</div><p>{caption}</p>{copies}'
    if table.name in ("evaluations", "settings", "made") and len(table.rows) > 12:  # to look something up in
        shown = f"<details><summary>{len(table.rows)} rows</summary>{shown}</details>"
    return f'<section id="{table.name}"><h2>{title}</h2>{shown}</section>'
