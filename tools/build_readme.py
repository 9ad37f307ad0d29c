#!/usr/bin/env python
"""README.md, the page of results and the gallery from nbs/index.ipynb, nbs/08_results.ipynb and results/.

    python tools/build_readme.py          run both notebooks, store their outputs, write README.md and the gallery
    python tools/build_readme.py --check  write nothing; fail if one of them is stale

Text cells come as they are, with links turned from nbs/ to the root. Of a code cell comes the code, unless it is
hidden (`#| hide`), silent (`#| echo: false`: its output only) or exported, and then its output: Markdown as Markdown,
tables as tables, anything else as text. The index is run afresh, so a changed catalog or a new results/*.csv makes
the README stale, and the page of results with it. The gallery (pictures and sentences of the hub's cards, pictures
of the README) holds copies of results/METHOD.png and the two sentences which each study draws from its table.
"""
import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path, PurePosixPath

from notebook_files import ROOT, code, directives, read_notebook, text
from run_notebooks import run_in_child

LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\()([^)\s]+)|((?:src|href)=\")([^\"]+)")
NOTE = "<!-- Made from nbs/index.ipynb by tools/build_readme.py; edit the notebook, then run `make readme`. -->"


def rebase(address, folder="nbs"):
    "A link written in a notebook of this folder, as seen from the root."
    if re.match(r"[a-z][a-z+.-]*:|#|/", address, re.I):
        return address
    target, mark, anchor = address.partition("#")
    parts = []
    for part in PurePosixPath(folder, target).parts:
        if part == "..":
            if not parts:
                raise ValueError(f"link {address} leads out of the repository")
            parts.pop()
        else:
            parts.append(part)
    return "/".join(parts) + mark + anchor


def rebase_links(source, folder="nbs"):
    "Markdown with every relative link turned to the root; code stays as it is."
    def turn(match):
        return (match[1] or match[3]) + rebase(match[2] or match[4], folder)

    pieces = re.split(r"(```.*?```|`[^`\n]*`)", source, flags=re.S)
    return "".join(piece if number % 2 else LINK.sub(turn, piece) for number, piece in enumerate(pieces))


def output_markdown(output):
    "One stored output as Markdown."
    if output["output_type"] == "error":
        raise ValueError(f"the index notebook stores an error: {output['ename']}: {output['evalue']}")
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "text/markdown" in data:
        return rebase_links(text(data["text/markdown"])).strip()
    if any(mime.startswith("image/") for mime in data):
        raise ValueError("the index notebook draws a picture; show a stored one with ![what it shows](path) instead")
    return "```\n" + text(data.get("text/plain", "")).rstrip() + "\n```"


def readme(notebook):
    "The README's text from a notebook with outputs."
    parts = [NOTE]
    for cell in notebook["cells"]:
        tags = directives(cell)
        if cell["cell_type"] == "markdown":
            parts.append(rebase_links(text(cell["source"])).strip())
        elif cell["cell_type"] == "code" and not {"hide", "default_exp", "export", "exporti"} & tags.keys():
            if tags.get("echo", "").lower() != "false" and code(cell).strip():
                parts.append(f"```python\n{code(cell)}\n```")
            parts += map(output_markdown, cell.get("outputs", []))
    return "\n\n".join(part for part in parts if part) + "\n"


def missing_targets(source, root):
    "Relative links of the README that lead to no file."
    plain = re.sub(r"```.*?```|`[^`\n]*`", "", source, flags=re.S)
    addresses = [match[2] or match[4] for match in LINK.finditer(plain)]
    local = [a.partition("#")[0] for a in addresses if not re.match(r"[a-z][a-z+.-]*:|#", a, re.I)]
    return sorted({a for a in local if not (Path(root) / a).exists()})


def fresh(page):
    "A notebook as text, run now, beside the original so that its paths hold."
    with tempfile.NamedTemporaryFile(dir=page.parent, prefix=f".{page.stem}-", suffix=".ipynb", delete=False) as file:
        copy = Path(file.name)
    try:
        shutil.copyfile(page, copy)
        if error := run_in_child(copy, root=page.parent.parent, timeout=300):
            raise ValueError(f"nbs/{page.name} does not run: {error}")
        return read_notebook(copy), copy.read_text(encoding="utf-8")
    finally:
        copy.unlink()


def gallery(root):
    "What the studies drew last and what they say, by path."
    from hkust_demos.evidence import verdicts

    folder, sentences = Path(root) / "hkust_demos" / "apps" / "gallery", verdicts(Path(root) / "results")
    found = {folder / picture.name: picture.read_bytes() for picture in sorted((Path(root) / "results").glob("*.png"))}
    if sentences:
        found[folder / "verdicts.json"] = (json.dumps(sentences, indent=1, ensure_ascii=False) + "\n").encode()
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if README.md, its notebooks or the gallery are stale")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        pages = {page: fresh(page) for page in (args.root / "nbs" / "index.ipynb", args.root / "nbs" / "08_results.ipynb") if page.exists()}
        source = readme(pages[args.root / "nbs" / "index.ipynb"][0])
    except ValueError as error:
        print(f"build_readme: {error}")
        return 1
    wanted = {page: stored.encode() for page, (_, stored) in pages.items()} | {args.root / "README.md": source.encode(), **gallery(args.root)}
    stale = [path for path, content in wanted.items() if not path.exists() or path.read_bytes() != content]
    for path in [] if args.check else stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(wanted[path])
    stale = [str(path.relative_to(args.root)) for path in stale]
    missing = missing_targets(source, args.root)
    if missing:
        print(f"build_readme: README.md links to what is not there: {', '.join(missing)}")
    if args.check and stale:
        print(f"build_readme: stale: {', '.join(stale)}; run `make readme`")
    if not missing and not (args.check and stale):
        print(f"build_readme: {'up to date' if args.check or not stale else 'wrote ' + ', '.join(stale)}")
    return 1 if missing or (args.check and stale) else 0


if __name__ == "__main__":
    sys.exit(main())
