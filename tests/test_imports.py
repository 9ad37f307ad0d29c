"""What may import what: no circle anywhere, no arrow back, and a method that knows neither its study nor its command nor its app."""
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import hkust_demos
from hkust_demos.catalog import METHODS, ready_methods

ROOT = Path(hkust_demos.__file__).resolve().parent
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from package_imports import arrows  # noqa: E402


def circles(found):
    "Every circle of imports, each as the modules on it in order."
    state, way, seen = {}, [], []

    def visit(name):
        state[name] = "open"
        way.append(name)
        for target in sorted(found[name]):
            if state.get(target) == "open":
                seen.append(way[way.index(target):])
            elif target not in state:
                visit(target)
        way.pop()
        state[name] = "done"

    for name in sorted(found):
        if name not in state:
            visit(name)
    return seen


@pytest.fixture(scope="module")
def imports():
    "The arrows of the library."
    return arrows(ROOT)


def test_no_circle_of_imports(imports):
    assert circles({name: targets - {"hkust_demos"} for name, targets in imports.items()}) == []


def test_a_circle_would_be_found(tmp_path):
    package = tmp_path / "toy"
    (package / "a").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "a" / "__init__.py").write_text("")
    (package / "a" / "one.py").write_text("from .two import f\n")
    (package / "a" / "two.py").write_text("def f():\n    from toy.a import three\n")
    (package / "a" / "three.py").write_text("from ..a.one import f\n")
    assert [sorted(circle) for circle in circles(arrows(package))] == [["toy.a.one", "toy.a.three", "toy.a.two"]]


def test_a_method_knows_neither_study_nor_command_nor_app(imports):
    for method in METHODS.values():
        reached, front = set(), [method.module] if method.module in imports else []
        while front:
            fresh = imports[front.pop()] - reached
            reached |= fresh
            front += fresh
        assert not reached & ({method.study, method.command, method.app} - {method.module}), method.name


def test_arrows_run_one_way(imports):
    "Data and pictures know no method; families do not know each other; nothing but the command line knows an app."
    families = {method.family for method in METHODS.values()}
    for name, reached in imports.items():
        room = name.split(".")[1] if "." in name else ""
        others = families - {room} if room in families or room in ("data", "viz", "sketch", "study", "files", "checkpoints") else set()
        assert not [target for target in reached if target.split(".")[1:2] and target.split(".")[1] in others], name
        assert room in ("apps", "cli") or not [target for target in reached if target.startswith("hkust_demos.apps")], name


@pytest.mark.parametrize("name", ready_methods())
def test_the_record_names_modules_that_hold_what_it_says(name):
    method = METHODS[name]
    study, command, app = map(importlib.import_module, (method.study, method.command, method.app))
    assert study.build_study(True).method == name
    assert callable(command.add_arguments) and callable(command.run_command) and callable(app.build) and app.LIVE_KNOBS


@pytest.mark.parametrize("words", [["list"], ["--help"]])
def test_help_and_list_load_nothing_heavy(words):
    program = (f"import sys; from hkust_demos.cli import main\ntry: main({words!r})\nexcept SystemExit: pass\n"
               "print([m for m in ('torch', 'pandas', 'numpy', 'matplotlib', 'gradio') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
