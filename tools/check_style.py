#!/usr/bin/env python
"""The checks of the notebook style that a machine can make.

    python tools/check_style.py                        all notebooks
    python tools/check_style.py nbs/llm/10_eora.ipynb  some of them

In every notebook: the first cell is an H1 and a `> ` sentence; at least two words of text per line of code; no cell over
25 lines of code and at most 10 % (or one) over 15; every exported function is asserted about further down; cells with imports
hold nothing else; no `import *` outside hidden cells; no sentence inside `print`; no output over 300 KB; relative links and
their anchors resolve; exported code imports neither fastcore nor nbdev; the metadata are those of the house. Notebooks of the catalog's ready methods also show a
picture within the first five cells (plumbing not counted) and keep at most seven words per line of code. Every other
notebook calls itself a machinery notebook in its first lines.

A line of code is neither blank nor a comment nor a directive nor a docstring, and a signature written one parameter a line
counts as one. Plumbing (directives, hidden cells, cells of imports) is not counted.
"""
import argparse
import ast
import importlib.util
import json
import re
import sys
from pathlib import Path
from statistics import median
from urllib.parse import unquote

from notebook_files import METADATA, ROOT, code, directives, label, notebook_paths, read_notebook, text

MAX_LINES, LONG_LINES, LONG_SHARE = 25, 15, 0.10
MIN_WORDS, MAX_WORDS = 2.0, 7.0
MAX_OUTPUT_KB = 300
PLUMBING = {"hide", "default_exp"}
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|(?:href|src)=[\"']([^\"']+)[\"']")


def python(cell):
    "The cell's source without directives, magics and shell lines."
    return "\n".join("" if line.lstrip()[:1] in ("%", "!") else line for line in code(cell).splitlines())


def parse(cell):
    "The cell as a syntax tree, or None where it is not plain Python."
    try:
        return ast.parse(python(cell))
    except SyntaxError:
        return None


def code_lines(cell):
    """Lines of code: neither blank nor comment nor directive nor docstring; a signature written one parameter a line
    (its comments are text) counts as one."""
    source = python(cell)
    lines = {number for number, line in enumerate(source.splitlines(), 1) if line.strip() and not line.lstrip().startswith("#")}
    tree = parse(cell)
    for node in ast.walk(tree) if tree else []:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            lines -= set(range(node.lineno + 1, node.body[0].lineno))
            if ast.get_docstring(node, clean=False) is not None:
                docstring = node.body[0]
                lines -= set(range(docstring.lineno, docstring.end_lineno + 1)) - {node.lineno}
    return len(lines)


def words(cell):
    "Words of a text cell; fenced code, formulas, tags and addresses do not count."
    plain = re.sub(r"```.*?```|\$\$.*?\$\$", " ", text(cell["source"]), flags=re.S)
    plain = re.sub(r"\$[^$\n]*\$|<[^>]*>|\]\([^)]*\)", " ", plain)
    return len(re.findall(r"\w[\w'’-]*", plain))


def is_import(node):
    "True for an import statement."
    return isinstance(node, (ast.Import, ast.ImportFrom))


def is_plumbing(cell):
    "True for cells a reader skips: directives, hidden cells, cells of imports."
    if cell["cell_type"] != "code":
        return False
    tree = parse(cell)
    return bool(PLUMBING & directives(cell).keys()) or (tree is not None and all(is_import(node) for node in tree.body))


def has_picture(cell):
    "True if the cell shows a picture."
    if cell["cell_type"] == "markdown":
        return bool(re.search(r"!\[[^\]]*\]\(|<img\s|<svg", text(cell["source"])))
    mimes = {mime for output in cell.get("outputs", []) for mime in output.get("data", {})}
    return any(mime.startswith("image/") or "plotly" in mime for mime in mimes)


def slug(heading):
    "A heading as an anchor, upper and lower case ignored."
    plain = re.sub(r"[`*$]|\]\([^)]*\)|[\[\]]", "", heading).strip()
    return re.sub(r"\s+", "-", plain).lower()


def headings(path):
    "Anchors of a notebook or Markdown file."
    if path.suffix == ".ipynb":
        source = "\n".join(text(c["source"]) for c in read_notebook(path)["cells"] if c["cell_type"] == "markdown")
    else:
        source = path.read_text(encoding="utf-8")
    source = re.sub(r"```.*?```", "", source, flags=re.S)
    return {slug(h) for h in re.findall(r"^#{1,6}\s+(.*)$", source, re.M)} | {i.lower() for i in re.findall(r"id=[\"']([^\"']+)", source)}


def check_head(cells):
    "Title and one-sentence subtitle in one cell."
    first = text(cells[0]["source"]) if cells and cells[0]["cell_type"] == "markdown" else ""
    if not re.match(r"# \S", first):
        yield "the first cell is no `# Title`"
    if not re.search(r"^> \S", first, re.M):
        yield "the first cell has no `> ` sentence below its title"


def check_picture(cells):
    "Method notebooks: a picture early on."
    seen = [cell for cell in cells if not is_plumbing(cell)][:5]
    if not any(map(has_picture, seen)):
        yield "no picture within the first five cells (plumbing not counted); were outputs stored (`make nbs`)?"


def check_lengths(cells):
    "Short cells."
    sizes = [(index, cell, code_lines(cell)) for index, cell in enumerate(cells) if cell["cell_type"] == "code" and not is_plumbing(cell)]
    for index, cell, size in sizes:
        if size > MAX_LINES:
            yield f"{label(index, cell)} has {size} lines of code; at most {MAX_LINES}"
    long = [f"cell {index + 1}: {size}" for index, _, size in sizes if size > LONG_LINES]
    if len(long) > max(1, LONG_SHARE * len(sizes)):
        yield (f"{len(long)} of {len(sizes)} code cells have over {LONG_LINES} lines; at most {LONG_SHARE:.0%} may ({', '.join(long)})")


def words_per_line(cells):
    "Words of text for each line of code; None without code."
    lines = sum(code_lines(c) for c in cells if c["cell_type"] == "code" and not is_plumbing(c))
    return sum(words(c) for c in cells if c["cell_type"] == "markdown") / lines if lines else None


def check_words(cells, is_method):
    "Enough text, and in method notebooks not too much."
    ratio = words_per_line(cells)
    if ratio is not None and ratio < MIN_WORDS:
        yield f"{ratio:.2f} words of text per line of code; at least {MIN_WORDS:g}"
    if is_method and ratio is not None and ratio > MAX_WORDS:
        yield f"{ratio:.2f} words of text per line of code; at most {MAX_WORDS:g}"


def names_in(node, context=None):
    "Names (and attributes) used in a tree, or only those stored or loaded."
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and (context is None or isinstance(n.ctx, context))}
    return found if context else found | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def asserts(node):
    "True if a statement checks something."
    for n in ast.walk(node):
        if isinstance(n, ast.Assert):
            return True
        if isinstance(n, ast.Call):
            name = getattr(n.func, "id", getattr(n.func, "attr", ""))
            if name.startswith(("test_", "assert_")) or name in ("ExceptionExpected", "raises"):
                return True
    return False


def check_assertions(cells):
    "Every exported function meets an assertion below it, directly or through what it returned."
    trees = [parse(cell) if cell["cell_type"] == "code" else None for cell in cells]
    for index, cell in enumerate(cells):
        if "export" not in directives(cell) or trees[index] is None:
            continue
        for function in trees[index].body:
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) or function.name.startswith("_"):
                continue
            followed, checked = {function.name}, False
            for tree, later in zip(trees[index + 1:], cells[index + 1:]):
                if tree is None or {"export", "exporti"} & directives(later).keys():
                    continue
                used = names_in(tree) & followed  # beside it in one cell, or through what it returned
                checked = bool(used) and any(map(asserts, tree.body))
                for node in tree.body:
                    if names_in(node) & followed:
                        followed |= names_in(node, ast.Store)
                        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                            followed.add(node.name)
                        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):  # it may change its arguments
                            followed |= {a.id for a in node.value.args if isinstance(a, ast.Name)}
                if checked:
                    break
            if not checked:
                yield f"cell {index + 1}: exported function {function.name} has no assertion below it"


def check_imports(cells):
    "Imports stand alone, name what they take, and the library needs no development tool."
    for index, cell in enumerate(cells):
        tree = parse(cell) if cell["cell_type"] == "code" else None
        if tree is None:
            continue
        top = [is_import(node) for node in tree.body]
        if any(top) and not all(top):
            yield f"{label(index, cell)} has imports and other statements; give imports a cell of their own"
        exported = {"export", "exporti"} & directives(cell).keys()
        for node in filter(is_import, ast.walk(tree)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            if any(alias.name == "*" for alias in node.names) and "hide" not in directives(cell):
                yield f"{label(index, cell)} has `import *`; name what you take, or hide the cell"
            for module in modules:
                if exported and module.split(".")[0] in ("fastcore", "nbdev", "execnb"):
                    yield f"{label(index, cell)} exports code that imports {module}, a development tool"


def check_prints(cells):
    "Sentences belong in text cells."
    for index, cell in enumerate(cells):
        tree = parse(cell) if cell["cell_type"] == "code" else None
        if tree is None or {"export", "exporti"} & directives(cell).keys():
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                strings = [s.value for a in node.args for s in ast.walk(a) if isinstance(s, ast.Constant) and isinstance(s.value, str)]
                if any(len(re.findall(r"[A-Za-z]{2,}", s)) >= 3 for s in strings):
                    yield f"{label(index, cell)} prints a sentence; write it as text"


def check_outputs(cells):
    "Small outputs."
    for index, cell in enumerate(cells):
        for output in cell.get("outputs", []):
            size = len(json.dumps(output, ensure_ascii=False).encode()) / 1000
            if size > MAX_OUTPUT_KB:
                yield f"{label(index, cell)} has an output of {size:.0f} KB; at most {MAX_OUTPUT_KB}"


def links_in(source):
    "Addresses linked from Markdown; code is left out."
    source = re.sub(r"```.*?```|`[^`\n]*`", "", source, flags=re.S)
    return [match[1] or match[2] for match in LINK.finditer(source)]


def check_link(path, address):
    "None if a relative link from this file leads somewhere, else why not."
    target, _, anchor = address.partition("#")
    if re.match(r"(https?|mailto|data|attachment):", address):
        return None
    if re.match(r"[a-z][a-z+.-]*:|/", address, re.I):
        return f"link {address} is not relative, so it works on one machine only"
    file = (path.parent / unquote(target)).resolve() if target else path
    if not file.exists():
        return f"link {address} leads to no file"
    if anchor and file.suffix in (".ipynb", ".md") and slug(unquote(anchor)) not in headings(file):
        return f"link {address} leads to no heading"
    return None


def check_links(cells, path):
    "Relative links resolve."
    for index, cell in enumerate(cells):
        if cell["cell_type"] == "markdown":
            for address in links_in(text(cell["source"])):
                if problem := check_link(Path(path), address):
                    yield f"cell {index + 1}: {problem}"


def check_role(cells):
    "What is no method calls itself machinery, at the start."
    start = " ".join(text(cell["source"]) for cell in [c for c in cells if c["cell_type"] == "markdown"][:3])
    if not re.search(r"\bmachinery\b", start, re.I):
        yield "is no notebook of the catalog, and its first three text cells do not call it machinery"


def check_metadata(metadata):
    "Kernel and language, the same in all notebooks: JupyterLab opens them without a question and in color."
    if metadata != METADATA:
        yield "its metadata do not name kernel and language as the others do: run tools/run_notebooks.py --metadata"


def check_notebook(path, *, is_method=False, is_index=False):
    "All problems of one notebook."
    notebook = read_notebook(path)
    cells = notebook["cells"]
    found = [*check_metadata(notebook["metadata"]), *check_head(cells), *check_lengths(cells), *check_words(cells, is_method), *check_assertions(cells), *check_imports(cells),
             *check_prints(cells), *check_outputs(cells), *check_links(cells, path)]
    if is_method:
        found += check_picture(cells)
    elif not is_index:
        found += check_role(cells)
    return found


def read_catalog(root):
    "METHODS of the generated catalog, loaded without the package around it."
    spec = importlib.util.spec_from_file_location("catalog_under_check", Path(root) / "hkust_demos" / "catalog.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.METHODS


def summary(path, name):
    "One line of the report."
    code_cells = [c for c in read_notebook(path)["cells"] if c["cell_type"] == "code" and not is_plumbing(c)]
    sizes = sorted(code_lines(c) for c in code_cells) or [0]
    ratio = words_per_line(read_notebook(path)["cells"])
    p90 = sizes[min(len(sizes) - 1, int(0.9 * len(sizes)))]
    return f"{name:34}{len(code_cells):6}{median(sizes):8g}{p90:5}{sizes[-1]:5}{'-' if ratio is None else format(ratio, '.1f'):>8}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks (default: all below nbs/)")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    root = args.root.resolve()
    methods = {root / method.notebook: method for method in read_catalog(root).values()}
    paths, report = [path.resolve() for path in args.paths] or notebook_paths(root), {}
    for path in paths:
        name = path.relative_to(root).as_posix()
        found = check_notebook(path, is_method=path in methods, is_index=path == root / "nbs" / "index.ipynb")
        if found:
            report[name] = found
    for path, method in methods.items():
        if method.ready and not path.exists():
            report.setdefault("hkust_demos/catalog.py", []).append(f"{method.name} is ready, but {method.notebook} does not exist")
    print(f"{'notebook':34}{'cells':>6}{'median':>8}{'p90':>5}{'max':>5}{'words/l':>8}")
    print(*(summary(path, path.relative_to(root).as_posix()) for path in paths), sep="\n")
    for name, found in report.items():
        print(f"\n{name}", *found, sep="\n  ")
    print(f"\ncheck_style: {len(paths)} notebooks, {sum(map(len, report.values()))} problems")
    return 1 if report else 0


if __name__ == "__main__":
    sys.exit(main())
