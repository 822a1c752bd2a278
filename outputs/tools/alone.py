"""One section alone: python outputs/tools/alone.py SECTION [papermill's options, such as -p PROFILE smoke].

SECTION is foundations, exercise-1 to exercise-5, stability, speed or summary. A copy of the notebook with the set-up and that
section runs in the repository's folder and is kept as SECTION.ipynb in OUTPUT_DIR (-p OUTPUT_DIR folder).
"""

import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Choose the cells, run them by papermill, and return its exit status."""
    notebook = nbformat.read(ROOT / "hw.diffusion.ipynb", 4)
    tags = [{*cell.metadata.get("tags", [])} for cell in notebook.cells]
    sections = set().union(*tags) - {"parameters", "setup", "plumbing"}
    section, *options = sys.argv[1:] or ["--help"]
    if section in ("-h", "--help"):
        sys.exit(__doc__)
    if section not in sections:
        sys.exit(f"{section!r} is not a section; allowed: {', '.join(sorted(sections))}.")
    title = f"# {section.capitalize().replace('-', ' ')} alone\nThe set-up comes first, then the section."
    wanted, kept = {section, "parameters", "setup"}, [nbformat.v4.new_markdown_cell(title, id="alone")]
    chapters = [k for k, cell in enumerate(notebook.cells) if cell.cell_type == "markdown" and cell.source.startswith("# ")]
    for start, end in itertools.pairwise([*chapters, len(notebook.cells)]):
        if wanted & set().union(*tags[start:end]):  # a chapter of which nothing runs goes with its text
            kept += [c for c, t in zip(notebook.cells[start:end], tags[start:end], strict=True) if not t or t & wanted]
    notebook.cells = kept
    given = dict(itertools.pairwise(options))
    folder = ROOT / Path(given.get("OUTPUT_DIR", "outputs/run")).expanduser()
    with tempfile.TemporaryDirectory() as scratch:
        nbformat.write(notebook, part := Path(scratch) / f"{section}.ipynb")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            sys.exit(f"OUTPUT_DIR = {str(folder)!r} cannot be made ({error.strerror}); choose another folder.")
        command = [sys.executable, "-m", "papermill", str(part), str(folder / part.name), "--cwd", str(ROOT), *options]
        return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
