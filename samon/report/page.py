"""The report as one HTML file with summary, figures and tables, which needs no network."""

from html import escape
from pathlib import Path
from string import Template

import samon
from samon.report.content import Content
from samon.report.draw import svg
from samon.report.figures import figures
from samon.report.tables import Table, tables

HERE = Path(__file__).parent
LOOK_UP = ("evaluations", "settings", "origin")  # long ones are folded


def render(content: Content, title: str, command: str) -> str:
    """The page. All text of the content is escaped."""
    numbers = content.style_numbers()
    sections = {table.name: _table_section(table) for table in tables(content)}
    links = {table.name: table.title for table in tables(content) if table.name != "summary"}
    body = [sections.pop("summary", "")]
    for i, (heading, section) in enumerate(figures(content).items()):
        body.append(f'<section id="figures-{i}"><h2>{escape(heading)}</h2><div class="grid">')
        for figure in section:
            name, alt = escape(figure.name), escape(figure.title)
            plot = f'<div class="plot" role="img" aria-label="{alt}">{svg(figure, numbers)}</div>'
            caption = f"<figcaption>{escape(figure.caption)}</figcaption>"
            body.append(f'<figure id="{name}"><h3>{alt}</h3>{plot}{caption}</figure>')
        body.append("</div></section>")
    counts = f"{len(content.runs)} runs, {len(content.scores)} rows of scores"
    about = f"{counts}, {len(content.evaluations)} evaluation rows. Made by samon {samon.__version__}: {command}"
    # `substitute` fills in one pass: a name such as $body in the content is not replaced.
    return Template((HERE / "page.html").read_text()).substitute(
        title=escape(title),
        about=escape(about),
        style=(HERE / "page.css").read_text(),
        links="".join(f'<a href="#{name}">{escape(text)}</a>' for name, text in links.items()),
        body="".join([*body, *sections.values()]),
    )


def _table_section(table: Table) -> str:
    copies = "".join(
        f"<details><summary>{kind}</summary><pre>{escape(text)}</pre></details>"
        for kind, text in (("LaTeX", table.latex()), ("CSV", table.csv()))
    )
    content = f'<div class="wide">{table.html()}</div><p>{escape(table.caption)}</p>{copies}'
    if table.name in LOOK_UP and len(table.rows) > 12:
        content = f"<details><summary>{len(table.rows)} rows</summary>{content}</details>"
    return f'<section id="{table.name}"><h2>{escape(table.title)}</h2>{content}</section>'
