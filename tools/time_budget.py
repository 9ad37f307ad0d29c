#!/usr/bin/env python
"""The time budget of `make test`, in CPU seconds.

    python tools/time_budget.py notebooks    nbdev_test on two cores, and what each notebook cost
    python tools/time_budget.py table        the costs of the notebooks and of the test files beside their budget

CPU seconds, since wall time depends on what else the machine does. Each cost counts the process and the children it
waited for. Imports of the big libraries are paid once, before the two workers part, and have a row of their own. A room
that one method alone imports counts as that method's. The costs of the test files come from tests/conftest.py. The table informs; it fails nothing.
"""
import argparse
import importlib
import json
import os
import re
import resource
import sys
import time
from functools import partial
from pathlib import Path

from check_style import read_catalog
from notebook_files import ROOT, directives, notebook_paths, read_notebook
from package_imports import arrows

FOLDER = Path("build") / "budget"  # ignored by git, below the root
PAGE_S, SIDE_S, METHOD_NOTEBOOKS_S, METHOD_TESTS_S, SHARED_S = 45, 20, 90, 65, 360
BIG = ("torch", "pandas", "matplotlib.figure", "plotly.graph_objects", "gradio")


def cpu_s():
    "CPU seconds of this process and of the children it has waited for."
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def timed(test, fn, *, log, root, **options):
    "nbdev's test of one notebook, with its cost noted."
    begun = cpu_s()
    done = test(fn, **options)
    with Path(log).open("a", encoding="utf-8") as file:
        file.write(json.dumps({Path(fn).relative_to(root).as_posix(): round(cpu_s() - begun, 2)}) + "\n")
    return done


def run_notebooks(root, n_workers=2, path=None, imports=BIG):
    "nbdev_test, as its command runs it, on notebooks whose costs are written to build/budget/notebooks.json."
    import nbdev.test

    folder, parallel = Path(root) / FOLDER, nbdev.test.parallel
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "notebooks.jsonl"
    log.write_text("", encoding="utf-8")
    begun = cpu_s()
    for name in imports:
        importlib.import_module(name)
    costs = {"imports": round(cpu_s() - begun, 2)}
    nbdev.test.parallel = lambda test, files, **options: parallel(partial(timed, test), files, log=str(log), root=str(root), **options)
    try:
        nbdev.test.nbdev_test(path=path, n_workers=n_workers)
    finally:
        nbdev.test.parallel = parallel
        for line in log.read_text(encoding="utf-8").splitlines():
            costs |= json.loads(line)
        (folder / "notebooks.json").write_text(json.dumps(costs, indent=1), encoding="utf-8")
        log.unlink()


def modules_of(root):
    "Module that a notebook makes -> the notebook, relative to the root."
    found = {}
    for path in notebook_paths(root):
        named = [directives(cell).get("default_exp") for cell in read_notebook(path)["cells"]]
        found |= {f"hkust_demos.{name}".removesuffix(".__init__"): path.relative_to(root).as_posix() for name in named if name}
    return found


def row_budgets(methods, modules):
    "Notebook -> its own budget: a method's page, and its study and command."
    rows = {}
    for method in methods.values():
        rows[method.notebook] = PAGE_S
        rows |= {modules[name]: SIDE_S for name in (method.study, method.command) if name in modules}
    return rows


def served_methods(imports, methods):
    "Module -> the methods that reach it by imports from the modules of their own."
    found = {}
    for method in methods.values():
        own = {module for module in imports if _named(module.rpartition(".")[2], methods) == [method.name]}
        front = [*own, method.module, method.study, method.command, method.app]
        reached = set()
        while front:
            module = front.pop()
            if module not in reached:
                reached.add(module)
                front += imports.get(module, ())
        for module in reached:
            found.setdefault(module, set()).add(method.name)
    return found


def _named(stem, methods):
    "The methods whose names a file carries."
    return [method.name for method in methods.values() if re.search(rf"(^|_){method.name}(_|$)", stem)]


def owner(name, methods, modules, served=None):
    "The method that a notebook or a test file belongs to, alone in using it; None for shared rooms."
    for method in methods.values():
        if name == method.notebook or name in [modules.get(module) for module in (method.module, method.study, method.command, method.app)]:
            return method.name
    path = Path(name)
    named = _named(path.stem, methods)
    if named or path.suffix == ".py":
        return named[0] if named else None
    users = set().union(*((served or {}).get(module, ()) for module, notebook in modules.items() if notebook == name))
    if len(users) == 1:
        return users.pop()
    family = [method.name for method in methods.values() if method.family == path.parent.name]
    return family[0] if len(family) == 1 and re.match(r"[1-9]\d_", path.name) else None  # below ten is machinery


def line(name, cost, budget=None, indent=0):
    "One row; an arrow marks what is over."
    over = budget is not None and cost > budget
    return f"{'  ' * indent + name:46}{cost:8.1f}{'' if budget is None else format(budget, '8d')}{'  <-- over' if over else ''}".rstrip()


def part(title, costs, budget, rows):
    "A group with its rows, the dearest first; nothing where nothing ran."
    if not costs:
        return []
    names = sorted(costs, key=costs.get, reverse=True)
    return [line(title, sum(costs.values()), budget, 1), *(line(re.sub(r"^(nbs|tests)/", "", name), costs[name], rows.get(name), 2) for name in names)]


def table(notebooks, tests, methods, modules, served=None):
    "The whole table as text."
    rows = row_budgets(methods, modules)
    of = {name: owner(name, methods, modules, served) for name in [*notebooks, *tests]}
    lines = [f"{'time budget of make test, CPU seconds':46}{'cost':>8}{'budget':>8}"]
    for method in methods.values():
        mine, checks = ({name: cost for name, cost in costs.items() if of[name] == method.name} for costs in (notebooks, tests))
        if mine or checks:
            lines += [method.title, *part("notebooks", mine, METHOD_NOTEBOOKS_S, rows), *part("tests", checks, METHOD_TESTS_S, rows)]
    shared = {name: cost for name, cost in {**notebooks, **tests}.items() if of[name] is None}
    lines += ["Shared rooms", *part("notebooks and tests", shared, SHARED_S, rows)]
    n_over = sum(text.endswith("over") for text in lines)
    everything = sum({**notebooks, **tests}.values())
    return "\n".join([*lines, line("everything", everything), f"time_budget: {n_over} rows over budget (this informs, it fails nothing)"])


def read_costs(root, kind):
    "Costs that a run has left, or none."
    path = Path(root) / FOLDER / f"{kind}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["notebooks", "table"])
    parser.add_argument("--path", help="notebooks: a notebook, or a folder of them (default: all)")
    parser.add_argument("--n_workers", type=int, default=2)
    parser.add_argument("--imports", nargs="*", default=BIG, help="notebooks: modules imported once, before the workers part")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    root = args.root.resolve()
    if args.what == "notebooks":
        os.chdir(root)
        return run_notebooks(root, args.n_workers, args.path, args.imports)
    methods = read_catalog(root)
    served = served_methods(arrows(root / "hkust_demos"), methods)
    print(table(read_costs(root, "notebooks"), read_costs(root, "tests"), methods, modules_of(root), served))
    return 0


if __name__ == "__main__":
    import time_budget  # by its name: a notebook's shell takes __main__ away from the workers

    sys.exit(time_budget.main())
