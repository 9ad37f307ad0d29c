"A study's real rows: run where the set is, skipped with a sentence where not, never two versions of a set in one table."
import importlib
import json
import shlex

import pandas as pd
import pytest
from PIL import Image

from hkust_demos.catalog import get_method
from hkust_demos.cli import build_parser
from hkust_demos.data.collections import VARIABLE, open_collection, source_of
from hkust_demos.study import Study

NEEDS = {"brain/": "brain-mri"}


def run(variant, seed, quick):
    "One metric, which counts pictures where a set is read."
    return {"n": float(len(open_collection("brain-mri"))) if variant.startswith("brain/") else 1.0}


def study(**more):
    "One embedded and one real row."
    return Study("demo", ["painted", "brain/all"], ["n"], run, **{"needs": NEEDS, **more})


@pytest.fixture
def here(tmp_path, monkeypatch):
    "Three tiny brain slices below HKUST_DEMOS_DATA."
    for name, shade in (("yes/a.png", 1), ("yes/b.png", 2), ("no/c.png", 3)):
        path = tmp_path / "sets/brain_mri" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), shade).save(path)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "sets"))
    return tmp_path


def test_a_real_row_carries_set_version_and_licence(here):
    study().write(here / "out", 2)
    table = pd.read_csv(here / "out/demo.csv", keep_default_na=False)
    assert list(table.columns) == ["variant", "seed", "quick", "set", "set_version", "set_license", "n"]
    assert table[table.variant == "painted"]["set"].tolist() == ["embedded"] * 2
    real = table[table.variant == "brain/all"]
    assert real.n.tolist() == [3.0, 3.0] and real["set"].tolist() == ["brain-mri"] * 2
    assert set(real.set_version) == {source_of("brain-mri").version} and set(real.set_license) == {"unknown"}
    record = json.loads((here / "out/demo.json").read_text())
    assert record["sets"]["brain-mri"]["version"].startswith("3 pictures, ") and record["skipped"] == []


def test_without_the_set_the_row_is_skipped_and_the_sentence_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(VARIABLE, raising=False)
    study().write(tmp_path, 1)
    assert pd.read_csv(tmp_path / "demo.csv").variant.tolist() == ["painted"]
    said = capsys.readouterr().err
    assert said.startswith("brain/all was not run: Brain MR slices") and "kaggle.com" in said and said.count("\n") == 1
    assert json.loads((tmp_path / "demo.json").read_text())["skipped"] == [said.strip()]
    with pytest.raises(ValueError, match="nothing can be run: brain/all"):
        study().only(["brain/"]).table(1)


def test_rows_of_another_machine_stay(here, monkeypatch):
    study().write(here / "out", 1)
    monkeypatch.delenv(VARIABLE)
    table = study().table(1, path=here / "out/demo.csv")
    assert table.variant.tolist() == ["painted", "brain/all"] and table.n.tolist() == [1.0, 3.0]


def test_two_versions_of_a_set_are_never_mixed(here):
    study().write(here / "out", 1)
    Image.new("L", (8, 8), 9).save(here / "sets/brain_mri/no/d.png")
    with pytest.raises(ValueError, match="holds brain/all on brain-mri as 3 pictures, .* and here lies 4 pictures, "):
        study().table(2, path=here / "out/demo.csv")
    assert len(pd.read_csv(here / "out/demo.csv")) == 2


def test_a_table_from_before_the_real_rows_goes_on(here):
    Study("demo", ["painted"], ["n"], run).write(here / "out", 2)
    study().write(here / "out", 2)
    table = pd.read_csv(here / "out/demo.csv", keep_default_na=False)
    assert table.variant.tolist() == ["painted"] * 2 + ["brain/all"] * 2 and table["set"].tolist() == ["embedded"] * 2 + ["brain-mri"] * 2


def test_a_study_without_real_rows_keeps_its_columns(tmp_path):
    Study("demo", ["painted"], ["n"], run).write(tmp_path, 1)
    assert pd.read_csv(tmp_path / "demo.csv").columns.tolist() == ["variant", "seed", "quick", "n"]
    assert "sets" not in json.loads((tmp_path / "demo.json").read_text())


def test_the_longest_beginning_names_the_set(here):
    both = Study("demo", ["brain/all", "brain/ph2/x"], ["n"], run, needs={"brain/": "brain-mri", "brain/ph2/": "ph2"})
    assert both.table(1).variant.tolist() == ["brain/all"] and "PH2 is not here" in both.skipped()[0]


def test_summary_leaves_out_what_was_not_run(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    whole = Study("demo", ["painted", "brain/all"], ["n"], run, baseline="brain/all", needs=NEEDS)
    summary = whole.summary(whole.table(3))
    assert summary.variant.tolist() == ["painted"] and summary.difference.isna().all()


@pytest.mark.parametrize("name", ["fednpr", "fedia", "fedmlp"])  # written in several calls, their real rows not all run
def test_the_stored_commands_give_the_stored_rows(root, name):
    "A table that commands cannot make again says more than it may."
    asked, stored = {}, pd.read_csv(root / f"results/{name}.csv").groupby("variant").seed.apply(set)
    for command in json.loads((root / f"results/{name}.json").read_text())["command"].split(" && "):
        chosen = build_parser().parse_args(shlex.split(command)[1:])
        for variant in importlib.import_module(get_method(name).study).build_study().only(chosen.only).variants:
            assert variant not in asked, f"{variant} is asked for twice"
            asked[variant] = set(range(chosen.seeds) if isinstance(chosen.seeds, int) else chosen.seeds)
    assert {variant: asked.get(variant) for variant in stored.index} == stored.to_dict()
