"What the tools share: finding notebooks in reading order and taking them apart. Standard library only."
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["", "data", "llm", "vision", "federated", "memristor", "apps"]  # reading order of the folders below nbs/
# What every notebook's metadata hold. The display name is the one that nbdev_clean writes.
METADATA = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
TAG = re.compile(r"^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")


def notebook_paths(root):
    "All notebooks below root/nbs in reading order: index first, then folder by folder."
    top = Path(root) / "nbs"

    def order(path):
        folder = path.parent.relative_to(top).as_posix()
        folder = "" if folder == "." else folder
        first = folder.split("/")[0]
        return (path != top / "index.ipynb", FOLDERS.index(first) if first in FOLDERS else len(FOLDERS), folder, path.name)

    found = (p for p in top.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(top).parts))
    return sorted(found, key=order)


def read_notebook(path):
    "The notebook as a dictionary, each cell's source as one string."
    notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def text(value):
    "A notebook's string, whether stored whole or as a list of lines."
    return value if isinstance(value, str) else "".join(value)


def directives(cell):
    "The `#|` lines that open a code cell, name -> argument."
    found = {}
    if cell["cell_type"] != "code":
        return found
    for line in text(cell["source"]).splitlines():
        match = TAG.match(line)
        if match:
            found[match[1].lower()] = match[2]
        elif line.strip():
            break
    return found


def code(cell):
    "The cell's source without its directives."
    return "\n".join(line for line in text(cell["source"]).splitlines() if not TAG.match(line)).strip("\n")


def skip_flags(root):
    "Flags of cells that do not run by default (`tst_flags` in settings.ini)."
    settings = Path(root) / "settings.ini"
    match = re.search(r"^tst_flags\s*=\s*(.*)$", settings.read_text(encoding="utf-8"), re.M) if settings.exists() else None
    return set(match[1].split()) if match else {"slow", "gpu"}


def is_skipped(cell, flags):
    "True for cells that neither nbdev_test nor the runner executes."
    found = directives(cell)
    return cell["cell_type"] != "code" or found.get("eval", "").lower() == "false" or bool(flags & found.keys())


def label(cell_index, cell):
    "How a report names a cell."
    first = next((line.strip() for line in code(cell).splitlines() if line.strip()), "")
    return f"cell {cell_index + 1} ({first[:50]})"
