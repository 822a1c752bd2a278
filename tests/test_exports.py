"""What a grader opens: the page in a real browser, its print, LaTeX, and JupyterLab itself."""

import base64
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import sync_playwright
from shared import ENVIRONMENT, NOTEBOOK, ROOT, code_cells, figures_of

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here (apt-get install chromium)")
SCROLLS = "document.documentElement.scrollWidth > innerWidth"
RAW = r"""() => {
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode;
    if (/[$]|\\[a-z]{2,}/.test(node.data) && !node.parentElement.closest("pre, code")) found.push(node.data.slice(0, 60));
  }
  return found;
}"""
DEAD = """() => [...document.querySelectorAll('a[href^="#"]')].map(a => a.getAttribute("href"))
  .filter(h => !document.getElementById(decodeURIComponent(h.slice(1))))"""


def readme_line(start):
    """The words of the command in README that starts so."""
    (line,) = re.findall(f"`({re.escape(start)} [^`]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    return shlex.split(line)


def html_of(source, folder):
    """README's line: the page that it makes of a notebook."""
    _, *options, _ = readme_line("jupyter nbconvert --config")
    command = [sys.executable, "-m", *options, "--output-dir", str(folder), str(source)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / f"{Path(source).stem}.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The committed notebook's page."""
    return html_of(NOTEBOOK, tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


def opened(browser, path, width, height=800):
    """(page in a window of that size, what its console said, what it asked the network for)."""
    window, said, asked = browser.new_page(viewport={"width": width, "height": height}), [], []
    window.on("console", lambda message: said.append(message.text))
    window.on("pageerror", lambda error: said.append(str(error)))
    window.on("request", lambda request: asked.append(request.url))
    window.goto(path.as_uri(), wait_until="load")
    return window, said, [url for url in asked if not url.startswith("data:")]


def test_the_page_is_one_file_of_7_mb(page, committed):
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) <= 7 * 2**20
    assert not re.findall(r"<script|<link |<iframe|url\(|@import|src=\"(?!data:)", text)
    assert len(re.findall(r'<img [^>]{,300}src="data:image/png;base64,', text)) == len(figures_of(committed))
    folded = [c for c in code_cells(committed) if "plumbing" in c.metadata.tags and not c.metadata.get("transient")]
    assert text.count('<details class="folded">') == len(folded) > 10, "bookkeeping is folded"


@in_a_browser
def test_the_page_in_a_browser(page, browser, committed):
    window, said, asked = opened(browser, page, 1280)
    assert said == []
    assert asked == [page.as_uri()], "nothing leaves the page"
    images = window.evaluate(
        "[...document.images].map(i => [i.complete && i.naturalWidth * i.naturalHeight, i.alt, i.clientWidth])"
    )
    assert len(images) == len(figures_of(committed)) > 20
    assert all(pixels and len(alt) >= 20 and width > 100 for pixels, alt, width in images)
    assert window.evaluate("document.querySelectorAll('math').length") > 60
    assert window.evaluate(RAW) == [], "formulas that stayed raw"
    assert not window.evaluate(SCROLLS)
    assert window.evaluate(DEAD) == []
    contents = window.locator("nav a").all_inner_texts()
    assert {f"Exercise {k}" for k in range(1, 6)} <= {line.split(":")[0] for line in contents}
    window.get_by_role("navigation").get_by_role("link", name="Exercise 3: number of steps").click()
    top = window.evaluate("document.getElementById('Exercise-3:-number-of-steps').getBoundingClientRect().top")
    assert 0 <= top < 100, "the link lands"
    window.close()


@in_a_browser
@pytest.mark.parametrize("width", [390, 768])
def test_the_page_on_a_narrow_screen(page, browser, width):
    window, said, _ = opened(browser, page, width, 844)
    assert said == []
    assert not window.evaluate(SCROLLS)
    window.close()


@in_a_browser
def test_html_in_a_text_is_shown_and_not_run(browser, tmp_path):
    """In a table, in a sentence, as printed, as a link, and from an output of type HTML."""
    evil = "<script>document.title = 'evil'</script><img src=x onerror=\"document.title = 'evil'\">"
    link = "[press](javascript:document.title='evil')"
    formula = "$\\text{<meta/http-equiv='refresh'/content='0;url=https://example.org'><b>bold</b>}$ price_$, cost_$"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Title"), nbformat.v4.new_code_cell("1")])
    data = [{"text/markdown": f"| a |\n|---|\n| {evil} |\n\n{evil} {link}\n\n{formula}"}, {"text/html": evil, "text/plain": "x"}]
    notebook.cells[1].outputs = [nbformat.v4.new_output("display_data", d) for d in data]
    notebook.cells[1].outputs += [nbformat.v4.new_output("stream", text=evil)]
    nbformat.write(notebook, tmp_path / "evil.ipynb")
    window, said, asked = opened(browser, html_of(tmp_path / "evil.ipynb", tmp_path), 1280)
    window.get_by_text("press").click()
    window.wait_for_timeout(300)
    assert window.title() == "Title"
    assert window.locator("img, script, main b, main meta").count() == 0
    assert "price_$, cost_$" in window.locator("main").inner_text(), "what is no formula stays as it was written"
    assert len(asked) == 1
    assert window.locator("main").inner_text().count("onerror") == 4, "it is shown as it was written"
    assert said == []
    window.close()


@in_a_browser
def test_hostile_table_and_prompts_in_the_exported_page(watched, browser):
    _, folder, _ = watched
    window, said, asked = opened(browser, html_of(folder / "done.ipynb", folder), 1280)
    assert window.title() != "evil"
    assert window.locator("script").count() == 0
    assert len(asked) == 1
    assert said == []
    assert "<script>document.title='evil'</script>" in window.locator("main").inner_text()
    window.close()


PAGE = re.compile(rb"/Type\s*/Page\b(?!s)")


@in_a_browser
@pytest.mark.skipif(not shutil.which("pdftotext"), reason="the print is read by poppler-utils")
def test_the_page_prints_on_60_sheets_and_cuts_nothing(page, browser, committed, tmp_path):
    """By README's line; each figure, table row and formula is drawn on one sheet."""
    _, *options, _ = readme_line("chromium --headless")
    printed = tmp_path / Path(options[-1].removeprefix("--print-to-pdf=")).name
    command = [CHROMIUM, *QUIET, f"--user-data-dir={tmp_path}", *options[:-1], f"--print-to-pdf={printed}", str(page)]
    subprocess.run(command, check=True, capture_output=True)
    assert 20 < len(PAGE.findall(printed.read_bytes())) <= 60
    listed = subprocess.run(["pdfimages", "-list", printed], capture_output=True, text=True, check=True).stdout.splitlines()[2:]
    drawn = [line.split() for line in listed if line.split()[2] == "image"]
    assert len({k[10] for k in drawn}) == len(figures_of(committed)), "each figure is printed"
    assert len({(k[0], k[10]) for k in drawn}) == len({k[10] for k in drawn}), "a figure on two sheets"
    text = subprocess.run(["pdftotext", printed, "-"], capture_output=True, text=True, check=True).stdout
    printed_code = "".join(c.source for c in code_cells(committed) if "plumbing" not in c.metadata.tags)
    raw = r"\\(?:bar|alpha|frac|epsilon|sqrt)"
    assert len(re.findall(raw, text)) <= len(re.findall(raw, printed_code)), "a formula printed raw (some stand in the code)"
    window, _, _ = opened(browser, page, 700)  # about the width of a sheet
    window.emulate_media(media="print")
    assert not window.evaluate(SCROLLS), "something is wider than the sheet"
    kept = "[...document.querySelectorAll('img, tr, .formula')].every(e => getComputedStyle(e).breakInside == 'avoid')"
    assert window.evaluate(kept)
    assert window.evaluate("Math.max(...[...document.querySelectorAll('img')].map(i => i.clientHeight))") < 960, (
        "a sheet's height"
    )
    window.close()


@pytest.mark.skipif(not shutil.which("pandoc"), reason="nbconvert writes LaTeX by pandoc (apt-get install pandoc)")
def test_latex_has_every_figure_and_table(committed, tmp_path):
    command = [sys.executable, "-m", "nbconvert", "--to", "latex", "--output-dir", str(tmp_path), str(NOTEBOOK)]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    tex = (tmp_path / "hw.diffusion.tex").read_text(encoding="utf-8")
    files = re.findall(r"\\adjustimage\{.*\{([^{}]+\.png)\}", tex)
    assert len(files) == len(figures_of(committed))
    assert all((tmp_path / f).stat().st_size > 1000 for f in files)
    shown = [o["data"].get("text/markdown", "") for c in code_cells(committed) for o in c.outputs if "data" in o]
    texts = [*shown, *(c.source for c in committed.cells if c.cell_type == "markdown")]
    tables = sum(len(re.findall(r"(?m)^\|[ :|-]+\|$", text)) for text in texts)
    assert tex.count(r"\begin{longtable}") == tables > 10
    assert "IPython.core.display" not in tex


# ------------------------------------------------------------------------------------------------------- JupyterLab


@pytest.fixture
def lab(tmp_path):
    """(address, folder) of a JupyterLab server on a copy of the repository, with PROFILE smoke."""
    folder = tmp_path / "Übung 1"
    (folder / "outputs").mkdir(parents=True)
    for name in ("checkpoints", "results", "figures", "tools"):
        shutil.copytree(ROOT / "outputs" / name, folder / "outputs" / name)
    notebook = nbformat.read(NOTEBOOK, 4)
    (cell,) = [c for c in code_cells(notebook) if c.id == "parameters"]
    cell.source = cell.source.replace('PROFILE = "auto"', 'PROFILE = "smoke"')
    nbformat.write(notebook, folder / NOTEBOOK.name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = tmp_path / "settings/@jupyterlab"
    (settings / "notebook-extension").mkdir(parents=True)
    (settings / "notebook-extension/tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')  # all cells in the page
    (settings / "apputils-extension").mkdir(parents=True)
    (settings / "apputils-extension/notification.jupyterlab-settings").write_text(
        '{"fetchNews": "false", "checkForUpdates": false}'
    )
    own = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    environment = (
        ENVIRONMENT | own | {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"), "IPYTHONDIR": str(tmp_path / "ipython")}
    )
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"
        for _ in range(120):
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{address}/api", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        yield address, folder
        server.terminate()
        server.wait(30)


PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(p => p.innerText.trim())"


@in_a_browser
def test_run_all_in_jupyterlab(lab, browser):
    address, folder = lab
    window = browser.new_page(viewport={"width": 1400, "height": 900})
    window.goto(f"{address}/lab/tree/{NOTEBOOK.name}")
    window.wait_for_selector(".jp-CodeCell .jp-InputArea-prompt", timeout=60_000)
    cells = code_cells(nbformat.read(folder / NOTEBOOK.name, 4))
    window.wait_for_function(f"document.querySelectorAll('.jp-CodeCell').length == {len(cells)}", timeout=60_000)
    hidden = [c for c in cells if c.metadata.get("jupyter", {}).get("source_hidden")]
    assert window.locator(".jp-CodeCell .jp-InputPlaceholder").count() == len(hidden), "plumbing is folded"
    window.get_by_role("tab", name="Table of Contents").first.click()
    contents = window.locator(".jp-TableOfContents .jp-tocItem-content").all_inner_texts()
    chapters = ["Set-up", "Foundations", *(f"Exercise {k}" for k in range(1, 6)), "Training stability", "Speed", "Summary"]
    assert [c for c in chapters if any(line.startswith(c) for line in contents)] == chapters
    window.get_by_role("menuitem", name="Run", exact=True).click()
    window.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    bars, started = set(), time.monotonic()
    while time.monotonic() - started < 900:
        bars |= set(window.evaluate("(document.querySelector('.jp-Notebook').innerText.match(/[█░]{20} \\d+\\/\\d+/g) || [])"))
        prompts = window.evaluate(PROMPTS)
        if not any("*" in p for p in prompts) and time.monotonic() - started > 20:  # done, or stopped by an error
            break
        window.wait_for_timeout(150)
    numbers = [f"[{k}]:" for k, c in enumerate(cells, 1) if c not in hidden]  # a folded cell shows no prompt
    assert window.evaluate(PROMPTS) == numbers, "every cell has run, once"
    assert len(bars) >= 10, f"no progress was seen moving: {bars}"
    assert "█" not in window.evaluate("[...document.querySelectorAll('.jp-OutputArea')].map(o => o.innerText).join('')")
    window.keyboard.press("Control+s")
    window.wait_for_function("!document.querySelector('.jp-mod-dirty')", timeout=30_000)
    window.wait_for_timeout(2000)
    window.close()
    saved = nbformat.read(folder / NOTEBOOK.name, 4)
    assert "widgets" not in saved.metadata
    outputs = [o for c in code_cells(saved) for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert not [o for o in outputs if "█" in json.dumps(o, ensure_ascii=False)], "a bar was left"
    assert {frozenset(o["data"]) for o in outputs if "data" in o} == {
        frozenset({"image/png", "text/plain"}), frozenset({"text/markdown", "text/plain"}),
    }  # fmt: skip
    assert all(base64.b64decode(o["data"]["image/png"])[:4] == b"\x89PNG" for o in figures_of(saved))
    assert len(figures_of(saved)) > 20
    assert len(list((folder / "outputs/run/results").glob("*.csv"))) == 9
    assert os.path.exists(folder / "outputs/run/results/answers.md")
