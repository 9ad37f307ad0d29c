#!/usr/bin/env python
"""Run notebooks and store their outputs in place.

    python tools/run_notebooks.py                        every notebook below nbs/
    python tools/run_notebooks.py nbs/llm/10_eora.ipynb  some of them
    python tools/run_notebooks.py PATH --flags slow      cells marked `#| slow` too, whose outputs are kept otherwise
    python tools/run_notebooks.py --check                run nothing; are outputs there, free of errors and small?
    python tools/run_notebooks.py --metadata             run nothing; give every notebook the metadata of the house

Cells with `#| eval: false` or a flag of settings.ini's tst_flags are left alone, as nbdev_test leaves them. Each
notebook runs in a process of its own, in its own folder, and is stopped after --timeout seconds. A notebook is
written only if all its cells ran. What is stored is made stable, so that a second run gives no `git diff`: no
stderr (warnings, progress bars), no widgets (their ids change), no execution counts, no memory addresses, and of
the metadata the kernel and the language alone, so that JupyterLab opens it without a question and in color.
"""
import argparse
import ast
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from notebook_files import METADATA, ROOT, code, directives, is_skipped, label, notebook_paths, read_notebook, skip_flags, text

WIDGET = "application/vnd.jupyter.widget-view+json"


def stable_outputs(outputs):
    "Outputs as they are stored: without what changes from run to run."
    kept = []
    for output in outputs:
        if output["output_type"] == "stream" and output["name"] == "stderr":
            continue
        if WIDGET in output.get("data", {}):
            continue
        if output["output_type"] == "stream":
            lines = "".join(line.rsplit("\r", 1)[-1] for line in text(output["text"]).splitlines(True))
            output = {**output, "text": lines.splitlines(True)}
        kept.append(output)
    return kept


def set_metadata(path):
    "Kernel and language in a notebook's metadata, and nothing else there; True if something changed."
    from execnb.nbio import write_nb

    notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    changed = notebook["metadata"] != METADATA
    if changed:
        write_nb({**notebook, "metadata": METADATA}, path)
    return changed


def run_here(path, root, wanted=()):
    "Run one notebook in this process and write it back with its outputs; cells with a wanted flag run too."
    from execnb.nbio import nb2dict, read_nb, write_nb
    from execnb.shell import CaptureShell
    from nbdev.clean import clean_nb

    path, flags = Path(path).resolve(), skip_flags(root) - set(wanted)
    notebook = read_nb(path)
    sys.path.insert(0, str(Path(root).resolve()))
    os.chdir(path.parent)
    os.environ.setdefault("IN_TEST", "1")
    shell = CaptureShell(path, mpl_format="png")
    for cell in notebook.cells:
        if is_skipped(cell, flags):
            continue
        outputs = shell.run(cell.source)
        if shell.exc:
            print(f"{label(cell.idx_, cell)}\n{''.join(next(o['traceback'] for o in outputs if o['output_type'] == 'error'))}", file=sys.stderr)
            return 1
        cell.outputs = stable_outputs([dict(output) for output in outputs])
    notebook = nb2dict(notebook)
    clean_nb(notebook)
    notebook["metadata"] = METADATA
    write_nb(json.loads(json.dumps(notebook)), path)
    return 0


def run_in_child(path, *, root=ROOT, timeout=900, wanted=()):
    "Run one notebook in a child process; None if it went well, else what went wrong."
    command = [sys.executable, str(Path(__file__).resolve()), "--here", "--root", str(root), str(path), *(["--flags", *wanted] if wanted else [])]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                             text=True, errors="replace", stdin=subprocess.DEVNULL)
    try:
        log, _ = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return f"took longer than {timeout:g} s and was stopped"
    return None if child.returncode == 0 else "\n".join(log.strip().splitlines()[-25:]) or f"ended with code {child.returncode}"


def shows_something(cell, flags):
    "True if running this cell should leave an output: it runs, is not hidden and ends in a plain expression."
    if is_skipped(cell, flags) or {"hide", "export", "exporti", "default_exp"} & directives(cell).keys():
        return False
    try:
        body = ast.parse(code(cell)).body
    except SyntaxError:  # a magic
        return False
    if not body or not isinstance(body[-1], ast.Expr) or code(cell).rstrip().endswith(";"):
        return False
    value = body[-1].value
    called = getattr(value, "func", None)
    name = getattr(called, "id", getattr(called, "attr", ""))
    return not name.startswith("test_")


def problems_of(path, *, root=ROOT, size_mb=1.5):
    "What is wrong with the stored outputs of a notebook."
    notebook, flags, found = read_notebook(path), skip_flags(root), []
    size = Path(path).stat().st_size / 1e6
    if size > size_mb:
        found.append(f"is {size:.1f} MB; at most {size_mb:g} MB are allowed: fewer or smaller pictures")
    for index, cell in enumerate(notebook["cells"]):
        errors = [output for output in cell.get("outputs", []) if output["output_type"] == "error"]
        found += [f"{label(index, cell)} stores an error: {error['ename']}: {error['evalue']}" for error in errors]
    live = [cell for cell in notebook["cells"] if shows_something(cell, flags)]
    if live and not any(cell.get("outputs") for cell in notebook["cells"]):
        found.append("stores no output at all; run `make nbs`")
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, help="notebooks (default: all below nbs/)")
    parser.add_argument("--check", action="store_true", help="run nothing, look at the stored outputs")
    parser.add_argument("--metadata", action="store_true", help="run nothing, set kernel and language")
    parser.add_argument("--flags", nargs="*", default=[], help="run cells with these flags too, such as slow")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a notebook may take (default 900)")
    parser.add_argument("--size-mb", type=float, default=1.5, help="largest notebook in MB (default 1.5)")
    parser.add_argument("--workers", type=int, default=1, help="notebooks at a time (default 1)")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.here:
        return run_here(args.paths[0], args.root, args.flags)
    paths, failed = args.paths or notebook_paths(args.root), 0
    if args.metadata:
        print(f"run_notebooks: metadata set in {sum(map(set_metadata, paths))} of {len(paths)} notebooks")
        return 0

    def work(path):
        started = time.time()
        error = None if args.check else run_in_child(path, root=args.root, timeout=args.timeout, wanted=args.flags)
        found = [error] if error else problems_of(path, root=args.root, size_mb=args.size_mb)
        return path, found, time.time() - started

    with ThreadPoolExecutor(1 if args.check else args.workers) as pool:
        for path, found, seconds in pool.map(work, paths):
            failed += bool(found)
            if found or not args.check:
                print(f"{'FAILED' if found else 'ok':6} {seconds:6.1f} s  {path}", *found, sep="\n  ", flush=True)
    print(f"run_notebooks: {len(paths)} notebooks, {failed} with problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
