"D2UE's rows on real pictures, on tiny trees of the published layouts: who learns, who is judged, and what a row holds."
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hkust_demos.vision import d2ue_real
from hkust_demos.vision.d2ue_study import METRICS, REAL, build_study, evidence, outcome, real_sets, run, verdict


def pictures(folder, names, sick, rng):
    "Gray pictures of noise; sick ones are brighter."
    folder.mkdir(parents=True)
    for name, ill in zip(names, sick):
        Image.fromarray(np.uint8(rng.integers(0, 120, (24, 24)) + 110 * ill)).save(folder / name)


def eyes(root, rng):
    "ODIR-5K: 50 patients with two eyes; the last twenty have one sick eye, or two."
    rows = []
    for patient in range(50):
        for side in ("left", "right"):
            letter = "N" if patient < 30 or (side == "left" and patient < 40) else "DGCAM"[patient % 5]
            rows.append({"ID": patient, "labels": f"['{letter}']", "filename": f"{patient}_{side}.jpg", "letter": letter})
    table = pd.DataFrame(rows)
    for key in "NDGCAHMO":
        table[key] = (table.letter == key).astype(int)
    pictures(root / "odir5k" / "images", table.filename, table.letter != "N", rng)
    table.drop(columns="letter").to_csv(root / "odir5k" / "full_df.csv", index=False)


def chests(root, rng):
    "ChestX-ray14: two pictures a patient, both views; every tenth healthy picture belongs to a sick patient."
    table = pd.DataFrame([{"Image Index": f"{i:08d}_000.png", "Finding Labels": "No Finding" if i < 60 else "Pneumonia|Edema",
                           "Patient ID": 60 if i % 10 == 9 and i < 60 else i // 2, "View Position": ("AP", "PA")[i % 3 == 0]} for i in range(90)])
    pictures(root / "nih_chestxray14" / "images", table["Image Index"], table["Finding Labels"] != "No Finding", rng)
    table.to_csv(root / "nih_chestxray14" / "Data_Entry_2017_v2020.csv", index=False)


def children(root, rng):
    "PneumoniaMNIST: train, val, test."
    arrays = {}
    for side, n in (("train", 60), ("val", 20), ("test", 40)):
        labels = np.arange(n)[:, None] % 2
        arrays |= {f"{side}_labels": np.uint8(labels), f"{side}_images": np.uint8(rng.integers(0, 120, (n, 28, 28)) + 110 * labels[:, :, None])}
    (root / "pneumoniamnist").mkdir()
    np.savez(root / "pneumoniamnist" / "pneumoniamnist.npz", **arrays)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    "Three sets below HKUST_DEMOS_DATA; nothing of them stays in memory."
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for make in (eyes, chests, children):
        make(root, rng)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HKUST_DEMOS_DATA", str(root))
        yield root
    for cached in (d2ue_real.real_set, d2ue_real._ensemble, d2ue_real.ensemble_scores):
        cached.cache_clear()


@pytest.mark.parametrize("name", ["odir", "chest"])
def test_no_patient_learns_and_is_judged(sets, name):
    found = d2ue_real.open_collection(d2ue_real.SETS[name])
    train, test, sick, parts = d2ue_real._chosen(name, found)
    labels = found.labels.any(1) if found.labels.ndim == 2 else found.labels != 0
    assert not labels[train].any() and sick.sum() == labels.sum() and not set(train) & set(test)
    assert not set(found.groups[train]) & (set(found.groups[test]) | set(found.groups[labels]))
    assert all(rows.any() and sick[rows].any() and not sick[rows].all() for rows in parts.values())
    assert set(parts) == set(d2ue_real.PARTS[name])


def test_the_publishers_test_part_is_the_test_where_no_patients_are_named(sets):
    found = d2ue_real.open_collection(d2ue_real.SETS["pneumonia"])
    train, test, sick, _ = d2ue_real._chosen("pneumonia", found)
    official = np.array(found.official)
    assert set(official[test]) == {"test"} and set(official[train]) == {"train", "val"} and not found.labels[train].any()
    assert (len(train), len(test), sick.sum()) == (40, 40, 20)


@pytest.mark.parametrize("name", [*d2ue_real.SETS])
def test_rows_of_a_set(sets, name):
    bright = run(f"{name}/trivial/intensity", 0, quick=True)
    assert bright["image_auroc"] == pytest.approx(1) and bright["image_ap"] == pytest.approx(1) and 0.3 < bright["sick_share"] < 0.8  # sick pictures are brighter here
    plain, pushed = (run(f"{name}/{row}", 0, quick=True) for row in ("plain/std", "rar/dsu"))
    assert set(plain) <= set(METRICS) and 0 <= pushed["cka"] <= 1 and pushed["mse"] > 0 and pushed["seconds"] > 0
    difference = run(f"{name}/gain/d2ue-spread", 0, quick=True)
    assert difference["image_auroc"] == pytest.approx(pushed["image_auroc"] - plain["image_auroc"], abs=1e-9)
    assert difference["low"] <= difference["image_auroc"] <= difference["high"]
    assert {f"image_auroc_{part}" for part in d2ue_real.PARTS[name] if part != "all"} <= set(plain)


def test_views_are_judged_apart_and_learned_together(sets):
    place, row = d2ue_real.real_set("chest", True), run("chest/plain/ensemble", 0, quick=True)
    assert not (place.parts["AP"] & place.parts["PA"]).any()
    assert row["image_auroc"] == pytest.approx((row["image_auroc_AP"] + row["image_auroc_PA"]) / 2)


def test_a_draw_takes_all_pictures_of_a_patient_or_none():
    draws = d2ue_real.patient_draws(np.array([0, 0, 1, 2, 2, 2]), 30)
    assert (draws[0] == 1).all() and (draws[:, 0] == draws[:, 1]).all() and (draws[:, 3] == draws[:, 5]).all()
    assert (draws[1:, [0, 2, 3]].sum(1) == 3).all()


def test_without_the_sets_the_study_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HKUST_DEMOS_DATA", str(tmp_path))
    study = build_study()
    assert len(study.skipped()) == 3 and all("is not here" in sentence for sentence in study.skipped())
    assert not set(study.needs) & set(build_study(quick=True).needs)


def test_sentences_name_the_sets_that_were_run_and_which_way_they_went():
    rows = [{"variant": f"{setting}/{row}", "seed": 0, "image_auroc": 0.6, "brain_auroc": 0.6, "cka": 0.5} for setting in ("dense", "odir", "chest")
            for row in ("plain/std", "plain/dsu", "plain/ensemble", "rar/dsu", "trivial/pca16")]
    gains = {"odir": (0.1, 0.05, 0.15), "chest": (-0.1, -0.2, -0.01)}
    rows += [dict(zip(("variant", "seed", "image_auroc", "low", "high"), (f"{name}/gain/{which}", 0, *values))) for name, values in gains.items() for which in d2ue_real.GAINS]
    table = pd.DataFrame(rows)
    assert real_sets(table) == ["odir", "chest"]
    assert outcome(table, "d2ue-spread") == "ahead on ODIR-5K eyes (+0.10, +0.05 to +0.15); behind on ChestX-ray14 (-0.10, -0.20 to -0.01)"
    assert "+0.100 [+0.050, +0.150]" in evidence(table) and REAL["pneumonia"] not in evidence(table)
    assert all(REAL["odir"] in sentence for sentence in verdict(table))
    alone = table[table.variant.str.startswith("dense/")]
    assert "Real pictures" not in evidence(alone) and "real pictures" not in " ".join(verdict(alone)).lower()
