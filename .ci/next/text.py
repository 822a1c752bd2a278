"""The notebook as text and back: text.py dump NOTEBOOK TEXT, text.py build TEXT NOTEBOOK; ids and old outputs are kept."""

import json
import re
import sys
from pathlib import Path

command, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
if command == "dump":
    cells = json.loads(source.read_text(encoding="utf-8"))["cells"]
    parts = [f"#%%% {c['cell_type']} {c['id']} {json.dumps(c['metadata'])}\n" + "".join(c["source"]) for c in cells]
    target.write_text("\n".join(parts) + "\n", encoding="utf-8")
else:
    notebook = json.loads(target.read_text(encoding="utf-8"))
    old, cells = {c["id"]: c for c in notebook["cells"]}, []
    parts = re.split(r"^#%%% (\w+) (\S+) (\{.*\})\n", source.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    for kind, name, metadata, body in zip(*[iter(parts)] * 4, strict=True):
        lines = body.rstrip("\n").splitlines(keepends=True)
        cells.append({"cell_type": kind, "id": name, "metadata": json.loads(metadata), "source": lines})
        if kind == "code":
            before = old.get(name, {})
            cells[-1] |= {"outputs": before.get("outputs", []), "execution_count": before.get("execution_count")}
    target.write_text(json.dumps(notebook | {"cells": cells}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
