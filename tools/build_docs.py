#!/usr/bin/env python
"""A site of all notebooks in _docs/: plain pages that open from the disk, without network and without scripts.

    python tools/build_docs.py [--out _docs]

The pages' contents come from `hkust_demos.apps.reader.notebook_page`, which the hub serves too; here they get a table
of contents, links to the page before and after, and links that stay inside the site. Files that a notebook links or
shows are copied along. The build fails if a link leads nowhere or a page would ask the network for something.
"""
import argparse
import html
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, unquote

from notebook_files import ROOT, notebook_paths, read_notebook, text

SECTIONS = {"": "Start here", "data": "Data", "llm": "Language models", "vision": "Medical images", "federated": "Federated learning",
            "memristor": "Memristors", "apps": "Apps"}
STYLE = """
:root{--site-ink:#1b1f24;--site-paper:#fff;--site-soft:#f5f6f8;--site-line:#d5d9df;--site-link:#0a5aa6}
@media(prefers-color-scheme:dark){:root{--site-ink:#e4e7eb;--site-paper:#15181c;--site-soft:#1d2126;--site-line:#363c44;--site-link:#7cbcf5}}
.site{display:grid;grid-template-columns:17rem minmax(0,1fr);background:var(--site-paper);color:var(--site-ink);font:16px/1.6 system-ui,sans-serif}
.site a{color:var(--site-link)}
.site-nav{position:sticky;top:0;align-self:start;max-height:100vh;overflow:auto;padding:1.2rem;background:var(--site-soft);border-right:1px solid var(--site-line);font-size:.9rem}
.site-nav details{border:0;padding:0;margin:0}
.site-nav summary{color:var(--site-ink);font-weight:600;cursor:pointer;padding:.4rem 0}
.site-nav h2{color:var(--site-ink);font-size:.8rem;text-transform:uppercase;letter-spacing:.05em;margin:1rem 0 .3rem}
.site-nav ol{list-style:none;margin:0;padding:0}
.site-nav li{margin:.2rem 0}
.site-nav [aria-current]{font-weight:700;color:var(--site-ink);text-decoration:none}
.site-page{box-sizing:border-box;width:100%;margin:0;padding:1.2rem 2rem 4rem;max-width:58rem;min-width:0}
.site-page code{overflow-wrap:anywhere}
.site-page math{max-width:100%;overflow-x:auto}
.site-page pre code{overflow-wrap:normal}
.site-to-nav{display:none}
.site-page img,.site-page svg{max-width:100%;height:auto}
.site-page img{background:#fff}
.site-page pre{overflow:auto;background:var(--site-soft);border:1px solid var(--site-line);border-radius:4px;padding:.6rem}
.site-page table{border-collapse:collapse;display:block;overflow-x:auto}
.site-page th,.site-page td{border:1px solid var(--site-line);padding:.25rem .6rem;text-align:left}
.site-page blockquote{margin:1rem 0;padding:.1rem 1rem;border-left:4px solid var(--site-line)}
.site-turn{display:flex;justify-content:space-between;gap:1rem;margin-top:3rem;padding-top:1rem;border-top:1px solid var(--site-line)}
body{margin:0}
@media(max-width:52rem){.site{grid-template-columns:minmax(0,1fr)}.site-to-nav{display:block}.site-nav{order:2;position:static;max-height:none;border-right:0;border-top:1px solid var(--site-line)}.site-page{padding:1rem}}
"""


class Addresses(HTMLParser):
    "Collects links, sources and ids of a page."

    def __init__(self):
        super().__init__()
        self.links, self.sources, self.ids = [], [], set()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids |= {values[key] for key in ("id", "name") if values.get(key)}
        if tag in ("a", "area") and values.get("href"):
            self.links.append(values["href"])
        elif values.get("src"):
            self.sources.append(values["src"])
        elif tag == "link" and values.get("href"):
            self.sources.append(values["href"])


def addresses(page):
    "Links, sources and ids of a page."
    parser = Addresses()
    parser.feed(page)
    return parser


def title_of(path):
    "A notebook's H1, without formatting."
    first = text(read_notebook(path)["cells"][0]["source"]).splitlines()[0]
    return re.sub(r"[`*]", "", first.lstrip("# ")).strip()


def split_page(page):
    "Styles and content of a page (of its <main>, without navigation); a fragment is all content. Scripts are left out."
    page = re.sub(r"<script\b.*?</script\s*>", "", page, flags=re.S | re.I)
    body = re.search(r"<body\b[^>]*>(.*)</body\s*>", page, flags=re.S | re.I)
    if not body:
        return "", page
    inner = re.search(r"<main\b[^>]*>(.*)</main\s*>", body[1], flags=re.S | re.I)
    content = re.sub(r"<nav\b.*?</nav\s*>", "", inner[1] if inner else body[1], count=1, flags=re.S | re.I)
    return "\n".join(re.findall(r"<style\b[^>]*>.*?</style\s*>", page[:body.start()], flags=re.S | re.I)), content


def name_headings(body):
    "Give every heading without an id the one Jupyter gives it, so that links to it work."
    def name(match):
        words = html.unescape(re.sub(r"<[^>]*>", "", match[2])).strip()
        return f'<h{match[1]} id="{html.escape(words.replace(" ", "-"))}">{match[2]}</h{match[1]}>'

    return re.sub(r"<h([1-6])>(.*?)</h\1>", name, body, flags=re.S)


def relative(target, page):
    "Address of a file of the site as seen from a page of the site."
    up = len(Path(page).parent.parts)
    return quote("../" * up + Path(target).as_posix())


def place_of(path, root):
    "Where a notebook's page or a copied file lies in the site."
    inside = path.relative_to(root)
    if path.suffix == ".ipynb" and inside.parts[0] == "nbs":
        return inside.relative_to("nbs").with_suffix(".html")
    return Path("files") / inside


def turn_links(body, source, root, copied):
    "Point links of a notebook to its neighbors in the site; collect the files to copy."
    page = place_of(source, root)

    def turn(match):
        before, address, after = match.groups()
        address = html.unescape(address)
        if re.match(r"[a-z][a-z0-9+.-]*:|#|//", address, re.I) or not address:
            return match[0]
        target, mark, anchor = address.partition("#")
        file = (source.parent / unquote(target)).resolve()
        if not file.exists() and (notebook := file.with_name(file.name + ".ipynb")).exists():
            file = notebook  # a reader that leaves the suffix out
        if target.startswith("/") or not file.is_file() or root not in file.parents:
            raise ValueError(f"{source.relative_to(root)}: link {address} leads to no file of the repository")
        place = place_of(file, root)
        if place.suffix != ".html" or place.parts[0] == "files":
            copied[file] = place
        return before + html.escape(relative(place, page) + mark + anchor) + after

    return re.sub(r"(<(?:a|img|source|video|audio)\b[^>]*?\s(?:href|src)=\")([^\"]*)(\")", turn, body, flags=re.I)


def navigation(pages, current):
    "The table of contents, with the current page marked."
    parts, section = [], None
    for place, title in pages.items():
        folder = place.parts[0] if len(place.parts) > 1 else ""
        if folder != section:
            parts += ["</ol>"] * bool(parts) + [f"<h2>{html.escape(SECTIONS.get(folder, folder))}</h2><ol>"]
            section = folder
        mark = ' aria-current="page"' if place == current else ""
        parts.append(f'<li><a href="{relative(place, current)}"{mark}>{html.escape(title.split(":")[0])}</a></li>')
    return "\n".join([*parts, "</ol>"])


def wrap(body, styles, place, pages):
    "A whole page of the site."
    order = list(pages)
    number = order.index(place)
    before = order[number - 1] if number else None
    after = order[number + 1] if number + 1 < len(order) else None
    turn = "".join([f'<a rel="prev" href="{relative(before, place)}">&larr; {html.escape(pages[before])}</a>' if before else "<span></span>",
                    f'<a rel="next" href="{relative(after, place)}">{html.escape(pages[after])} &rarr;</a>' if after else ""])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(pages[place])}</title>
{styles}
<style>{STYLE}</style>
</head>
<body>
<div class="site">
<nav class="site-nav" id="all-pages" aria-label="All pages"><details open><summary>hkust-demos</summary>
{navigation(pages, place)}
</details></nav>
<main class="site-page">
<a class="site-to-nav" href="#all-pages">All pages</a>
{body}
<div class="site-turn">{turn}</div>
</main>
</div>
</body>
</html>
"""


def check_site(site):
    "Every link that leads nowhere and every thing fetched from elsewhere."
    parsed = {path: addresses(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html")) if "files" not in path.relative_to(site).parts[:1]}
    problems = []
    for path, page in parsed.items():
        name = path.relative_to(site)
        problems += [f"{name} fetches {source[:80]}" for source in page.sources if re.match(r"(https?:)?//", source)]
        if re.search(r"<script\b", path.read_text(encoding="utf-8"), re.I):
            problems.append(f"{name} holds a script")
        for link in [*page.links, *page.sources]:
            if re.match(r"[a-z][a-z0-9+.-]*:|//", link, re.I):
                continue
            target, _, anchor = link.partition("#")
            file = (path.parent / unquote(target)).resolve() if target else path
            if not file.is_file():
                problems.append(f"{name}: {link} leads to no file")
            elif anchor and file in parsed and unquote(anchor) not in parsed[file].ids:
                problems.append(f"{name}: {link} leads to no heading")
    return problems


def build(root, out, render):
    "Build the site with a function from notebook path to HTML; the problems found."
    root, out = Path(root).resolve(), Path(out).resolve()
    sources = {place_of(path, root): path for path in notebook_paths(root)}
    pages, copied, problems = {place: title_of(path) for place, path in sources.items()}, {}, []
    if out.exists():
        if any(out.iterdir()) and not (out / ".hkust-demos-docs").exists():
            raise ValueError(f"{out} holds something else; name an empty or new folder")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / ".hkust-demos-docs").touch()
    for place, path in sources.items():
        styles, body = split_page(render(path))
        try:
            body = turn_links(name_headings(body), path, root, copied)
        except ValueError as error:
            problems.append(str(error))
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        (out / place).write_text(wrap(body, styles, place, pages), encoding="utf-8")
    for file, place in copied.items():
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out / place)
    return problems or check_site(out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "_docs", help="folder of the site (default _docs)")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    sys.path.insert(0, str(args.root))
    from hkust_demos.apps.reader import notebook_page

    try:
        problems = build(args.root, args.out, notebook_page)
    except ValueError as error:
        problems = [str(error)]
    print(*problems, f"build_docs: {len(notebook_paths(args.root))} pages, {len(problems)} problems; open {args.out / 'index.html'}", sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
