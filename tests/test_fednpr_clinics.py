"The real clinics of FedNPR on a tiny tree of the published layout: split, leak, marked labels, and rows of the study with both kinds of input."
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from hkust_demos.data import backbones
from hkust_demos.data.skin import CLASSES
from hkust_demos.federated import fednpr_clinics as fc
from hkust_demos.federated.engine import History
from hkust_demos.federated.fednpr_study import CLINIC_METRICS, METRICS, build_study, run

DX = {"MEL": "mel", "NV": "nv", "BCC": "bcc", "BKL": "bkl", "AK": "akiec", "SCC": "akiec", "DF": "df", "VASC": "vasc"}
KINDS = {1: "MEL NV BKL", 2: "MEL NV BCC BKL DF", 3: "MEL NV AK SCC VASC", 5: "MEL NV"}  # of each center


def rows():
    "Picture, lesion, kind, center, fold: three to train on and two to test; the second test picture of a kind shows a lesion of the training."
    number = 0
    for center, kinds in KINDS.items():
        for kind in kinds.split():
            for fold, place in (("train", 0), ("train", 1), ("train", 2), ("test", 3), ("test", 0)):
                number += 1
                yield f"ISIC_{number:07d}", f"HAM_{center}{kind}{place}", kind, center, fold


@pytest.fixture(scope="module")
def clinics(tmp_path_factory):
    "HAM10000 as published, tiny, below HKUST_DEMOS_DATA; the frozen network answers with eight numbers that it sees in the corner."
    root = tmp_path_factory.mktemp("data") / "ham10000"
    (root / "images").mkdir(parents=True)
    table = list(rows())
    for name, _, kind, *_ in table:
        color = np.uint8([30 * CLASSES.index(kind), 90, 200 - 20 * CLASSES.index(kind)])
        Image.fromarray(np.broadcast_to(color, (64, 64, 3)).copy()).save(root / "images" / f"{name}.jpg")
    (root / "HAM10000_metadata.csv").write_text("lesion_id,image_id,dx,dx_type,age,sex,localization,dataset\n"
                                                + "\n".join(f"{lesion},{name},{DX[kind]},histo,60.0,male,back,center {c}" for name, lesion, kind, c, _ in table))
    (root / "fed_isic2019_train_test_split.csv").write_text("image,target,center,fold,fold2\n"
                                                            + "\n".join(f"{name},{CLASSES.index(kind)},{c},{fold},{fold}_{c}" for name, _, kind, c, fold in table))
    def seen(pictures, size):
        return np.stack([np.resize(np.asarray(one)[0, 0] / 255.0, 1280) for one in pictures]).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HKUST_DEMOS_DATA", str(root.parent))
        patch.setattr(backbones, "image_features", seen)
        fc.clinics_federation.cache_clear()
        yield root
    fc.clinics_federation.cache_clear()


def test_clinics_hold_the_official_split_and_leaks_are_marked(clinics):
    here = fc.clinics_federation("features")
    n = [len(kinds.split()) for kinds in KINDS.values()]
    assert [len(part) for part in here.train] == [3 * k for k in n] and [len(part) for part in here.test] == [2 * k for k in n]
    assert here.counts().sum() == sum(n) and here.counts(clean=False).sum() == 2 * sum(n)
    for part, kinds in zip(here.test, KINDS.values()):
        marked = Counter(part.tensors[1].tolist())
        assert marked == Counter([CLASSES.index(k) for k in kinds.split()] + [CLASSES.index(k) + 8 for k in kinds.split()])
    assert all(int(part.tensors[1].max()) < 8 for part in here.train) and "official split" in here.source


def test_both_kinds_of_input_are_the_same_pictures(clinics):
    seen, pictures = (fc.clinics_federation(kind) for kind in ("features", "pictures"))
    assert pictures.train[0].tensors[0].shape == (9, 3, 64, 64) and seen.train[0].tensors[0].shape == (9, 1280)
    assert torch.equal(seen.test[2].tensors[1], pictures.test[2].tensors[1])
    assert (pictures.train[1].tensors[0][:, :, 0, 0] - seen.train[1].tensors[0][:, :3]).abs().max() < 0.05


@pytest.mark.parametrize("variant", ["clinics/npr/paper", "clinics/local-head/npr-paper", "clinics/together/bsm", "clinics/alone/bsm", "pixels/fedavg/bsm"])
def test_a_row_of_each_form(clinics, variant):
    found = run(variant, 0, quick=True)
    assert set(found) == set(METRICS) - ({"probe"} if "alone" in variant else set())
    assert all(0 <= found[name] <= 1 for name in ("global", "own", "official", "official_own", "local", *CLINIC_METRICS))
    assert found["local"] == pytest.approx(np.mean([found[f"clinic_{name}"] for name in fc.CLINICS.values()]))
    assert found["global"] == pytest.approx(np.mean([found[f"recall_{name}"] for name in CLASSES]))
    if "together" in variant:
        assert found["own"] == found["global"]


def test_own_recalls_are_the_mean_of_the_last_rounds():
    history = History()
    for number in (1, 2, 3):
        for client in (0, 1):
            recalls = [number / 10 + client / 2, *[float("nan")] * 7]
            history.add(number, "local", client, {"recall": recalls, "official-recall": [r / 2 for r in recalls]})
    own = fc.own_recalls(history.frame(), after=1)
    assert own.shape == (2, 2, 8) and np.isnan(own[..., 1:]).all()
    assert own[..., 0] == pytest.approx(np.array([[0.25, 0.75], [0.125, 0.375]]))


def test_without_the_split_nothing_is_guessed(clinics, monkeypatch, tmp_path):
    (tmp_path / "ham10000").symlink_to(clinics)
    split = clinics / "fed_isic2019_train_test_split.csv"
    text = split.read_text()
    fc.clinics_federation.cache_clear()
    split.unlink()
    try:
        with pytest.raises(ValueError, match="no official split"):
            fc.clinics_federation("features")
    finally:
        split.write_text(text)
        fc.clinics_federation.cache_clear()


def test_rows_are_skipped_in_a_sentence_without_the_set(monkeypatch):
    monkeypatch.delenv("HKUST_DEMOS_DATA", raising=False)
    told = build_study().only(["clinics/", "pixels/"]).skipped()
    assert len(told) == 1 and "20 variants" in told[0] and "HAM10000" in told[0]
