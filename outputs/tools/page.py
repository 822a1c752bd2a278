"""A notebook as one page that needs no network: jupyter nbconvert --config outputs/tools/page.py NOTEBOOK.ipynb.

nbconvert reads this file as its configuration. Formulas become MathML, which browsers draw by themselves, HTML in a text is
shown and not executed, and the template page/ adds a table of contents and a print style.
"""

import html
import re
import xml.etree.ElementTree as xml
from pathlib import Path

from latex2mathml.converter import convert_to_element
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath


class Renderer(IPythonRenderer):
    """Markdown to HTML with formulas in MathML."""

    def block_math(self, body: str) -> str:
        """A formula on a line of its own."""
        return self.inline_math(body, "block")

    def inline_math(self, body: str, display: str = "inline") -> str:
        """A formula within a line, as MathML; what is no formula, such as two prices in dollars, stays as it was written."""
        known = re.sub(r"\\[bB]igg?[lr](?=\\)", "", body.strip())  # latex2mathml knows no larger \lVert
        try:  # serialised here, because the library's own text has its characters unescaped
            mathml = xml.tostring(convert_to_element(known, display=display), encoding="unicode").replace("&amp;#x", "&#x")
        except Exception:  # it raises whatever it stumbles over
            return f"${html.escape(body)}$"
        mathml = mathml.replace("<mo>&#x02016;", '<mo stretchy="false">&#x02016;')
        return f'<span class="formula {display}">{mathml}</span>'


def markdown(source: str, escape: bool = False) -> str:
    """Markdown as HTML; the HTML that stands in it is shown as text where `escape` is set, as for outputs.

    A wide table scrolls by itself.
    """
    page = MarkdownWithMath(renderer=Renderer(escape=escape, allow_harmful_protocols=None)).render(source)
    return page.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")


c = get_config()  # noqa: F821 -- nbconvert hands it over
c.NbConvertApp.export_format = "html"
c.TemplateExporter.extra_template_basedirs = [str(Path(__file__).parent)]
c.HTMLExporter.template_name = "page"
c.HTMLExporter.filters = {"markdown2html": markdown}
