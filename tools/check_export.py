#!/usr/bin/env python
"""Is the library what the notebooks export, and are the notebooks clean?

The notebooks are exported and cleaned in a temporary copy and compared with the work tree, which stays as it is.
A difference means that someone edited a generated module, or forgot `nbdev_export` or `nbdev_clean`.
"""
import argparse
import difflib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from notebook_files import ROOT, notebook_paths

HIDDEN = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__", ".*", "_*")


def run(name, folder):
    "Run an nbdev command in a folder."
    module = {"nbdev_export": "nbdev.doclinks", "nbdev_clean": "nbdev.clean"}[name]
    environment = {key: value for key, value in os.environ.items() if key != "IN_TEST"}  # nbdev exports nothing under it
    done = subprocess.run([sys.executable, "-c", f"from {module} import {name}; {name}()"], cwd=folder, env=environment,
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stdout}{done.stderr}")


def excerpt(ours, expected, name):
    "The first lines of the difference between two texts."
    lines = list(difflib.unified_diff(ours.splitlines(), expected.splitlines(), f"{name} (work tree)", f"{name} (from the notebooks)", "", "", 1, ""))
    return "\n".join("    " + line for line in lines[:16])


def find_differences(root=ROOT, library="hkust_demos"):
    "Every file that differs from a fresh export, as printable paragraphs."
    root, found = Path(root), []
    with tempfile.TemporaryDirectory(prefix="check-export-") as folder:
        copy = Path(folder) / "project"
        copy.mkdir()
        shutil.copy(root / "settings.ini", copy)
        shutil.copytree(root / "nbs", copy / "nbs", ignore=HIDDEN)
        run("nbdev_export", copy)
        modules = lambda top: {p.relative_to(top).as_posix(): p for p in (top / library).rglob("*.py") if "__pycache__" not in p.parts}
        ours, expected = modules(root), modules(copy)
        for name in sorted(ours.keys() | expected.keys()):
            if name not in expected:
                found.append(f"{name} comes from no notebook: write it as a notebook, or remove it")
            elif name not in ours:
                found.append(f"{name} is missing: run nbdev_export")
            elif (mine := ours[name].read_text(encoding="utf-8")) != (fresh := expected[name].read_text(encoding="utf-8")):
                found.append(f"{name} differs from its notebook: edit the notebook, then run nbdev_export\n{excerpt(mine, fresh, name)}")
        run("nbdev_clean", copy)
        for path in notebook_paths(root):
            name = path.relative_to(root)
            if path.read_bytes() != (copy / name).read_bytes():
                found.append(f"{name.as_posix()} is not clean: run nbdev_clean")
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    found = find_differences(args.root)
    print(*found, f"check_export: {len(notebook_paths(args.root))} notebooks, {len(found)} problems", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
