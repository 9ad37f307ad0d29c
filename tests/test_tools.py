"The tools, each on small notebooks made here: what is right passes, and every check has an example that fails."
import html
import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import build_docs  # noqa: E402
import build_readme  # noqa: E402
import check_export  # noqa: E402
import check_style  # noqa: E402
import notebook_files  # noqa: E402
import run_notebooks  # noqa: E402
import time_budget  # noqa: E402

HEAD = "# A title\n\n> One sentence.\n\nThis is a machinery notebook with a few words, because every line of code needs company from a reader's language."
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
SETTINGS = (ROOT / "settings.ini").read_text(encoding="utf-8")


def markdown(source):
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def code(source, outputs=()):
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": list(outputs), "source": source}


def result(**data):
    return {"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": data}


def write(path, *cells):
    "A clean notebook of these cells."
    from execnb.nbio import nb2str

    cells = [{**cell, "id": f"{number:08x}", "source": cell["source"].splitlines(True)} for number, cell in enumerate(cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(nb2str({"cells": cells, "metadata": notebook_files.METADATA, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    return path


def problems(tmp_path, *cells, **role):
    "What check_style says about a notebook of these cells."
    return check_style.check_notebook(write(tmp_path / "nbs" / "page.ipynb", *cells), **role)


EXPORTED = "#| export\ndef double(\n    number: int,  # any\n) -> int:\n    \"Twice.\"\n    return 2 * number"
GOOD = [markdown(HEAD), code("#| default_exp page"), code("#| hide\nfrom fastcore.test import *"), code("#| export\nimport math"),
        code(EXPORTED), code("four = double(2)"), code("assert four == 4")]


# the notebooks themselves

def test_every_page_has_a_name_of_its_own_in_the_navigation():
    names = [build_docs.title_of(path).split(":")[0] for path in notebook_files.notebook_paths(ROOT)]
    assert sorted(names) == sorted(set(names)) and not {"App", "Study", "Apply"} & {*names}


# run_notebooks

def test_metadata_name_kernel_and_language_and_survive_cleaning(tmp_path):
    "What JupyterLab needs to open a notebook without a question, set once and kept by nbdev_clean."
    path = write(tmp_path / "nbs" / "page.ipynb", *GOOD)
    (tmp_path / "settings.ini").write_text(SETTINGS)
    full = json.loads(path.read_text())
    lab = {"kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
           "language_info": {"name": "python", "version": "3.11.7", "file_extension": ".py"}, "jupytext": {"main_language": "python"}}
    for metadata in (lab, {"kernelspec": lab["kernelspec"]}, {}):
        path.write_text(json.dumps({**full, "metadata": metadata}))
        assert any("--metadata" in problem for problem in check_style.check_notebook(path))
        assert run_notebooks.set_metadata(path) and not run_notebooks.set_metadata(path)
        assert not any("--metadata" in problem for problem in check_style.check_notebook(path))
    before = path.read_bytes()
    check_export.run("nbdev_clean", tmp_path)
    assert path.read_bytes() == before and json.loads(before)["metadata"]["language_info"] == {"name": "python"}


def test_runner_stores_outputs_twice_the_same(tmp_path):
    path = write(tmp_path / "nbs" / "page.ipynb", markdown(HEAD), code("import sys, warnings"),
                 code("print('\\r 10%\\r100%'); print('noise', file=sys.stderr); warnings.warn('noise')\nobject()"),
                 code("#| eval: false\nraise RuntimeError"), code("#| slow\nraise RuntimeError"),
                 code("from matplotlib.figure import Figure\nfigure = Figure(figsize=(1, 1)); figure.subplots().plot([1, 2])\nfigure"))
    assert run_notebooks.main(["--root", str(tmp_path), str(path)]) == 0
    first = path.read_bytes()
    cells = notebook_files.read_notebook(path)["cells"]
    assert cells[2]["outputs"][0]["text"] == ["100%\n"]
    assert "noise" not in json.dumps([cell.get("outputs") for cell in cells])
    assert cells[2]["outputs"][1]["data"]["text/plain"] == ["<object>"]
    assert "image/png" in cells[5]["outputs"][0]["data"]
    assert cells[3]["outputs"] == cells[4]["outputs"] == []
    assert all(cell["execution_count"] is None for cell in cells[1:])
    assert run_notebooks.main(["--root", str(tmp_path), str(path)]) == 0
    assert path.read_bytes() == first
    subprocess.run([sys.executable, "-c", f"from nbdev.clean import nbdev_clean; nbdev_clean({str(path)!r})"], cwd=ROOT, check=True)
    assert path.read_bytes() == first


def test_runner_leaves_out_widgets():
    widget = {"output_type": "display_data", "metadata": {}, "data": {run_notebooks.WIDGET: {"model_id": "1"}, "text/plain": "x"}}
    assert run_notebooks.stable_outputs([widget]) == []


def test_runner_writes_nothing_when_a_cell_fails(tmp_path, capsys):
    path = write(tmp_path / "nbs" / "page.ipynb", markdown(HEAD), code("1 + 1"), code("1 / 0"))
    before = path.read_bytes()
    assert run_notebooks.main(["--root", str(tmp_path), str(path)]) == 1
    assert "cell 3 (1 / 0)" in (said := capsys.readouterr().out) and "ZeroDivisionError" in said
    assert path.read_bytes() == before


def test_runner_stops_what_hangs(tmp_path, capsys):
    path = write(tmp_path / "nbs" / "page.ipynb", markdown(HEAD), code("import time\ntime.sleep(600)"))
    begun = time.monotonic()
    assert run_notebooks.main(["--root", str(tmp_path), "--timeout", "2", str(path)]) == 1
    assert time.monotonic() - begun < 30
    assert "longer than 2 s" in capsys.readouterr().out


@pytest.mark.parametrize("cells, message", [
    ([code("1 + 1")], "stores no output at all"),
    ([code("1", [{"output_type": "error", "ename": "ValueError", "evalue": "bad", "traceback": []}])], "stores an error: ValueError: bad"),
    ([code("1", [result(**{"text/plain": "x" * 3_000_000})])], "is 3.0 MB"),
])
def test_check_refuses_bad_outputs(tmp_path, capsys, cells, message):
    write(tmp_path / "nbs" / "page.ipynb", markdown(HEAD), *cells)
    assert run_notebooks.main(["--root", str(tmp_path), "--check"]) == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("cells", [
    [code("1 + 1", [result(**{"text/plain": "2"})])],
    [code("#| export\n'docs'"), code("x = 1"), code("test_eq(1, 1)"), code("#| eval: false\n1"), code("#| gpu\n1"), code("#| hide\n1"), code("1;")],
])
def test_check_accepts_outputs_and_notebooks_that_show_nothing(tmp_path, cells):
    write(tmp_path / "nbs" / "page.ipynb", markdown(HEAD), *cells)
    assert run_notebooks.main(["--root", str(tmp_path), "--check"]) == 0


# check_export

@pytest.fixture
def project(tmp_path):
    "A tiny exported project."
    root = tmp_path / "project"
    write(root / "nbs" / "page.ipynb", *GOOD)
    (root / "settings.ini").write_text(SETTINGS, encoding="utf-8")
    check_export.run("nbdev_export", root)
    return root


def test_export_check_passes_and_changes_nothing(project):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in project.rglob("*") if path.is_file()}
    assert (project / "hkust_demos" / "page.py").exists()
    assert check_export.find_differences(project) == []
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in project.rglob("*") if path.is_file()}


def test_export_check_finds_every_kind_of_drift(project, capsys):
    module = project / "hkust_demos" / "page.py"
    module.write_text(module.read_text().replace("2 * number", "3 * number"))
    (project / "hkust_demos" / "extra.py").write_text("x = 1\n")
    page = project / "nbs" / "page.ipynb"
    page.write_text(page.read_text().replace('"execution_count": null', '"execution_count": 7', 1))
    write(project / "nbs" / "new.ipynb", markdown(HEAD), code("#| default_exp new"), code(EXPORTED))
    assert check_export.main(["--root", str(project)]) == 1
    said = capsys.readouterr().out
    assert "page.py differs from its notebook" in said and "-    return 3 * number" in said and "+    return 2 * number" in said
    assert "extra.py comes from no notebook" in said
    assert "new.py is missing" in said
    assert "page.ipynb is not clean" in said


# check_style

def test_style_accepts_a_good_notebook(tmp_path):
    assert problems(tmp_path, *GOOD) == []


WORDY = markdown("word " * 400)


@pytest.mark.parametrize("cells, message", [
    ([markdown("No title. This is a machinery notebook.\n\n> One sentence.")], "no `# Title`"),
    ([markdown("# Title\n\nA machinery notebook without a sentence.")], "no `> ` sentence"),
    ([markdown(HEAD), WORDY, code("\n".join(f"a{i} = {i}" for i in range(26)))], "has 26 lines of code; at most 25"),
    ([markdown(HEAD), WORDY, *[code("\n".join(f"a{i} = {i}" for i in range(16)))] * 2, code("1")], "2 of 3 code cells have over 15 lines"),
    ([markdown("# Title\n\n> A machinery sentence."), code("a = 1\nb = 2\nc = 3\nd = 4")], "words of text per line of code; at least 2"),
    ([markdown(HEAD), WORDY, code(EXPORTED), code("double(2)")], "exported function double has no assertion below it"),
    ([markdown(HEAD), WORDY, code("assert True"), code(EXPORTED)], "exported function double has no assertion below it"),
    ([markdown(HEAD), code("import math\nmath.pi")], "has imports and other statements"),
    ([markdown(HEAD), code("from math import *")], "has `import *`"),
    ([markdown(HEAD), code("#| export\nfrom fastcore.basics import L")], "exports code that imports fastcore.basics"),
    ([markdown(HEAD), code("print(f'The error is {1} percent')")], "prints a sentence"),
    ([markdown(HEAD), code("1", [result(**{"image/png": "A" * 310_000})])], "has an output of 310 KB"),
    ([markdown(HEAD + "\n\n[next](gone.ipynb)")], "link gone.ipynb leads to no file"),
    ([markdown(HEAD + "\n\n![picture](gone.png)")], "link gone.png leads to no file"),
    ([markdown(HEAD + "\n\n[next](#Gone)")], "link #Gone leads to no heading"),
    ([markdown(HEAD + "\n\n[next](/srv/gone.ipynb)")], "is not relative"),
    ([markdown("# Title\n\n> A sentence.")], "do not call it machinery"),
])
def test_style_refuses(tmp_path, cells, message):
    found = problems(tmp_path, *cells)
    assert len(found) == 1 and message in found[0]


@pytest.mark.parametrize("cells", [
    [code(EXPORTED), code("double(2)\nassert True")],
    [code(EXPORTED), code("with ExceptionExpected(ValueError): double('2')")],
    [code("#| export\ndef fill(box):\n    box.append(1)"), code("box = []"), code("fill(box)"), code("test_eq(box, [1])")],
    [code("#| export\ndef _private():\n    pass")],
])
def test_style_follows_results_to_their_assertion(tmp_path, cells):
    assert problems(tmp_path, markdown(HEAD), WORDY, *cells) == []


def test_style_counts_signatures_and_docstrings_as_text():
    signature = "def f(\n    a,  # one\n    b,  # two\n) -> int:  # sum\n    \"\"\"Two\n    lines.\"\"\"\n    # comment\n    c = a\n\n    return c + b"
    assert check_style.code_lines(code("#| export\n" + signature)) == 3
    assert check_style.code_lines(code("%time f(1, 2)\nx = 1")) == 1


def test_style_reads_links_and_headings(tmp_path):
    write(tmp_path / "nbs" / "other.ipynb", markdown("# Other\n\n> s\n\n## See *it* here"))
    source = HEAD + "\n\n[a](other.ipynb#See-it-here) [b](#A-title) [c](https://example.org) `[d](gone.md)`\n\n```text\n[e](gone.md)\n```"
    assert problems(tmp_path, markdown(source)) == []


def test_style_wants_a_picture_and_a_measure_in_method_notebooks(tmp_path):
    late = [markdown(HEAD), *[code(f"a{i} = {i}") for i in range(5)], code("1", [result(**{"image/png": PIXEL})])]
    assert any("no picture" in problem for problem in problems(tmp_path, *late, is_method=True))
    early = [markdown(HEAD), code("#| hide\n1"), code("import math"), *late[1:4], late[-1]]
    assert problems(tmp_path, *early, is_method=True) == []
    assert any("at most 7" in problem for problem in problems(tmp_path, markdown(HEAD), WORDY, code("1", late[-1]["outputs"]), is_method=True))


def test_style_command_reads_the_catalog(tmp_path, capsys):
    (tmp_path / "hkust_demos").mkdir()
    source = "from types import SimpleNamespace as N\nMETHODS = {'x': N(name='x', ready=True, notebook='nbs/llm/10_x.ipynb')}\n"
    (tmp_path / "hkust_demos" / "catalog.py").write_text(source)
    write(tmp_path / "nbs" / "index.ipynb", markdown("# Index\n\n> A sentence."))
    assert check_style.main(["--root", str(tmp_path)]) == 1
    assert "nbs/llm/10_x.ipynb does not exist" in capsys.readouterr().out
    write(tmp_path / "nbs" / "llm" / "10_x.ipynb", markdown("# X\n\n> s\n\n![p](../p.png)"))
    (tmp_path / "nbs" / "p.png").touch()
    assert check_style.main(["--root", str(tmp_path)]) == 0
    assert re.search(r"^check_style: 2 notebooks, 0 problems", capsys.readouterr().out, re.M)


# build_readme

def test_readme_is_built_and_found_stale(tmp_path, capsys):
    (tmp_path / "LICENSE").touch()
    (tmp_path / "number.txt").write_text("41")
    write(tmp_path / "nbs" / "index.ipynb", markdown("# Title\n\n[terms](../LICENSE) [me](index.ipynb#Title) `[x](y)`"),
          code("#| hide\nfrom IPython.display import Markdown"),
          code("#| echo: false\nMarkdown('| a |\\n| --- |\\n| ' + open('../number.txt').read() + ' |')"), code("value = 2\nvalue"))
    arguments = ["--root", str(tmp_path)]
    assert build_readme.main([*arguments, "--check"]) == 1
    assert not (tmp_path / "README.md").exists()
    assert build_readme.main(arguments) == 0
    made = (tmp_path / "README.md").read_text()
    assert "[terms](LICENSE) [me](nbs/index.ipynb#Title) `[x](y)`" in made and "| 41 |" in made
    assert "IPython" not in made and "#|" not in made and "open(" not in made
    assert "```python\nvalue = 2\nvalue\n```\n\n```\n2\n```" in made
    assert build_readme.main([*arguments, "--check"]) == 0
    (tmp_path / "number.txt").write_text("42")
    assert build_readme.main([*arguments, "--check"]) == 1
    assert "stale: nbs/index.ipynb, README.md" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "nbs").iterdir()] == ["index.ipynb"]


def test_readme_names_dead_links_and_failures(tmp_path, capsys, monkeypatch):
    write(tmp_path / "nbs" / "index.ipynb", markdown("# Title\n\n![p](../gone.png)"))
    with monkeypatch.context() as patch:
        patch.setattr(build_readme, "run_in_child", lambda *_, **options: None)  # a page of text has nothing to run
        assert build_readme.main(["--root", str(tmp_path)]) == 1
    assert "gone.png" in capsys.readouterr().out
    write(tmp_path / "nbs" / "index.ipynb", markdown("# Title"), code("1 / 0"))
    assert build_readme.main(["--root", str(tmp_path)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    with pytest.raises(ValueError, match="out of the repository"):
        build_readme.rebase("../../other")


# build_docs

def render(path):
    "A stand-in for the reader: links and headings of the text cells."
    source = "\n".join(notebook_files.text(cell["source"]) for cell in notebook_files.read_notebook(path)["cells"])
    source = re.sub(r"!\[(.*?)\]\((.*?)\)", r'<img alt="\1" src="\2">', source)
    source = re.sub(r"\[(.*?)\]\((.*?)\)", r'<a href="\2">\1</a>', source)
    source = re.sub(r"^#+ (.*)$", r"<h2>\1</h2>", source, flags=re.M)
    return f"<html><head><style>p{{}}</style><script>1</script></head><body><main><nav>old</nav>{source}</main></body></html>"


@pytest.fixture
def site(tmp_path):
    "A project of three notebooks and where its site goes."
    (tmp_path / "p.png").write_bytes(b"png")
    write(tmp_path / "nbs" / "index.ipynb", markdown("# Start\n\n[x](llm/10_x.ipynb#See-it) ![p](../p.png)"))
    write(tmp_path / "nbs" / "00_a.ipynb", markdown("# A: b\n\n[back](index.ipynb)"))
    write(tmp_path / "nbs" / "llm" / "10_x.ipynb", markdown("# X & Y\n\n## See it\n\n[up](../00_a.ipynb) [short](../index)"))
    return SimpleNamespace(root=tmp_path, out=tmp_path / "_docs")


def test_docs_hang_together(site):
    assert build_docs.build(site.root, site.out, render) == []
    start, method = (site.out / "index.html").read_text(), (site.out / "llm" / "10_x.html").read_text()
    assert 'href="llm/10_x.html#See-it"' in start and 'src="files/p.png"' in start and (site.out / "files" / "p.png").exists()
    assert 'href="../00_a.html"' in method and 'href="../index.html">short' in method and 'id="See-it"' in method
    assert 'rel="next" href="00_a.html"' in start and 'rel="prev" href="../00_a.html"' in method
    assert 'aria-current="page">X &amp; Y<' in method and "<script" not in start and "old" not in start
    assert build_docs.build(site.root, site.out, render) == []  # a second time over the first


@pytest.mark.parametrize("source, message", [
    ("[x](gone.ipynb)", "gone.ipynb leads to no file"),
    ("[x](00_a.ipynb#Gone)", "leads to no heading"),
    ("[x](../../secret.txt)", "leads to no file of the repository"),
    ("![x](https://example.org/p.png)", "fetches https://example.org/p.png"),
])
def test_docs_refuse_dead_links_and_the_network(site, source, message):
    (site.root.parent / "secret.txt").touch()
    write(site.root / "nbs" / "index.ipynb", markdown(f"# Start\n\n{source}"))
    found = build_docs.build(site.root, site.out, render)
    assert len(found) == 1 and message in found[0]


def test_docs_spare_a_folder_of_someone_else(site):
    site.out.mkdir()
    (site.out / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"):
        build_docs.build(site.root, site.out, render)
    assert (site.out / "thesis.txt").exists()


def test_docs_of_this_project(tmp_path, monkeypatch):
    "All pages and the links between them; their code without its colors, which is most of the work and holds no link."
    from hkust_demos.apps import reader

    monkeypatch.setattr(reader, "_code_html", lambda source: f"<pre>{html.escape(source)}</pre>")
    reader._notebook_body.cache_clear()
    assert build_docs.build(ROOT, tmp_path / "site", reader.notebook_page) == []
    reader._notebook_body.cache_clear()


# what the commands in the texts name

def test_makefile_has_every_target_that_is_written_about():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for name in ("README.md", "CONTRIBUTING.md", ".ci/run", ".github/workflows/test.yml"):
        source = (ROOT / name).read_text(encoding="utf-8")
        named = set(re.findall(r"(?:^|`)make ([a-z]+)", source, re.M)) | set(re.findall(r"run: make ([a-z]+)", source))
        assert named and named <= targets, name
    assert {"demo", "test", "lab", "nbs", "study", "bench", "docs", "weights", "clean", "help"} <= targets


def test_requirements_are_pinned():
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    settings = dict(re.findall(r"^(\w*requirements) = (.*)$", SETTINGS, re.M))
    assert set(settings) >= {"requirements", "dev_requirements", "lab_requirements", "eval_requirements"}
    for requirement in " ".join(settings.values()).split():
        name = re.split(r"[<>=!~\[]", requirement)[0].lower().replace("_", "-")
        assert name in pins, f"{name} is not in constraints.txt"


# time_budget

BUSY = "import time\nbegun = time.process_time()\nwhile time.process_time() < begun + 0.6: pass"
CHILD = f"import subprocess, sys\nchild = subprocess.run([sys.executable, '-c', {BUSY!r}], check=True)"
RECORDS = {"one": SimpleNamespace(name="one", title="One", family="apart", notebook="nbs/apart/10_one.ipynb", module="hkust_demos.apart.one",
                                  study="hkust_demos.apart.one_study", command="hkust_demos.apart.one_apply", app="hkust_demos.apps.one"),
           "two": SimpleNamespace(name="two", title="Two", family="shared", notebook="nbs/shared/10_two.ipynb", module="hkust_demos.shared.two",
                                  study="hkust_demos.shared.two_study", command="hkust_demos.shared.two_apply", app="hkust_demos.apps.two"),
           "three": SimpleNamespace(name="three", title="Three", family="shared", notebook="nbs/shared/20_three.ipynb", module="hkust_demos.shared.three",
                                    study="hkust_demos.shared.three_study", command="hkust_demos.shared.three_apply", app="hkust_demos.apps.three")}
MODULES = {"hkust_demos.apart.one_study": "nbs/apart/30_evidence.ipynb", "hkust_demos.apps.one": "nbs/apps/20_page.ipynb"}


@pytest.mark.parametrize("name, expected", [("nbs/apart/10_one.ipynb", "one"), ("nbs/apart/30_evidence.ipynb", "one"), ("nbs/apps/20_page.ipynb", "one"),
                                            ("nbs/apart/12_other.ipynb", "one"), ("nbs/apart/00_machinery.ipynb", None), ("nbs/shared/12_other.ipynb", None),
                                            ("nbs/shared/13_two_views.ipynb", "two"), ("tests/test_app_three.py", "three"), ("tests/test_threes.py", None),
                                            ("tests/test_one_resume.py", "one"), ("nbs/index.ipynb", None), ("imports", None)])
def test_budget_knows_whose_each_file_is(name, expected):
    assert time_budget.owner(name, RECORDS, MODULES) == expected


def test_budget_charges_a_room_to_the_one_method_that_uses_it():
    imports = {"hkust_demos.apart.one": {"hkust_demos.shared.alone"}, "hkust_demos.shared.alone": {"hkust_demos.shared.deep", "hkust_demos.shared.both"},
               "hkust_demos.shared.two_views": {"hkust_demos.shared.both"}, "hkust_demos.shared.deep": set(), "hkust_demos.shared.both": set()}
    served = time_budget.served_methods(imports, RECORDS)
    modules = {f"hkust_demos.shared.{name}": f"nbs/shared/0{n}_{name}.ipynb" for n, name in enumerate(("alone", "deep", "both", "nobody"))}
    assert [time_budget.owner(notebook, RECORDS, modules, served) for notebook in modules.values()] == ["one", "one", None, None]


def test_budget_table_marks_what_is_over_and_nothing_else():
    notebooks = {"nbs/apart/10_one.ipynb": 46.0, "nbs/apart/30_evidence.ipynb": 19.0, "nbs/shared/10_two.ipynb": 45.0, "imports": 5.0}
    tests = {"tests/test_one.py": 40.0, "tests/test_app_one.py": 30.0, "tests/test_cli.py": 10.0}
    rows = {text.split("  <--")[0].split()[0]: text for text in time_budget.table(notebooks, tests, RECORDS, MODULES).splitlines()}
    over = {name for name, text in rows.items() if text.endswith("<-- over")}
    assert over == {"apart/10_one.ipynb", "tests"}  # the page, and 70 s of tests
    assert rows["everything"].split()[-1] == "195.0" and rows["time_budget:"].startswith("time_budget: 2 rows")
    assert "Three" not in rows  # nothing of it ran


def test_budget_counts_processor_time_of_a_notebook_and_its_children(tmp_path):
    for name, cell in {"busy": BUSY, "child": CHILD, "asleep": "import time\ntime.sleep(0.6)"}.items():
        write(tmp_path / "nbs" / f"{name}.ipynb", markdown(HEAD), code(cell))
    (tmp_path / "settings.ini").write_text(SETTINGS)
    command = [sys.executable, str(ROOT / "tools" / "time_budget.py"), "notebooks", "--imports", "unittest", "--root", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    costs = json.loads((tmp_path / "build/budget/notebooks.json").read_text())
    assert costs["nbs/busy.ipynb"] > 0.55 and costs["nbs/child.ipynb"] > 0.55 and costs["nbs/asleep.ipynb"] < 0.5 and "imports" in costs
    write(tmp_path / "nbs" / "busy.ipynb", markdown(HEAD), code("1 / 0"))
    (tmp_path / "nbs" / "child.ipynb").unlink(), (tmp_path / "nbs" / "asleep.ipynb").unlink()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr and "busy.ipynb" in done.stderr


def test_budget_counts_processor_time_of_a_test_file(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    inside = lambda source: "    " + source.replace("\n", "\n    ") + "\n"
    (tmp_path / "tests" / "test_busy.py").write_text("def test_it():\n" + inside(BUSY))
    (tmp_path / "tests" / "test_child.py").write_text("def test_it():\n" + inside(CHILD))
    (tmp_path / "tests" / "test_idle.py").write_text("import pytest\n@pytest.fixture(scope='session')\ndef shared():\n" + inside(BUSY) + "def test_it(shared):\n    pass\n")
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "tests"], cwd=tmp_path, check=True,
                   capture_output=True, timeout=120)
    costs = json.loads((tmp_path / "build/budget/tests.json").read_text())
    assert costs["tests/test_busy.py"] > 0.55 and costs["tests/test_child.py"] > 0.55 and costs["tests/test_idle.py"] < 0.3
    assert costs["the shared hub and browser"] > 0.55
