"""The memristor study: splits that nobody tuned on, a test set that chooses nothing, networks kept on disk, rows that can be resumed."""
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import trimesh

import hkust_demos.memristor.chip_study as room
from hkust_demos.memristor.dynamic2d import evaluation_features
from hkust_demos.memristor.chip_study import (ABLATIONS, CHIP_DESIGNS, METRICS, NOISES, SETTINGS, TILES, all_variants, build_study, compare_rates,
                                               exits_for, picture, run, samples, setting, thin, trained)
from hkust_demos.memristor.real_shapes import load_clouds

RESULTS = Path(__file__).parent.parent / "results"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    "A cache of its own, a setting that trains in a second, and nothing remembered; what other tests have trained stays."
    monkeypatch.setenv("HKUST_DEMOS_CACHE", str(tmp_path))
    monkeypatch.setitem(SETTINGS, "digits", SETTINGS["digits"]._replace(sizes=(128, 50, 50), epochs=1))
    for name in ("samples", "trained", "_software"):
        monkeypatch.setattr(room, name, lru_cache(getattr(room, name).__wrapped__))
    return tmp_path


@pytest.fixture
def count_trainings(monkeypatch):
    "How often a network is trained."
    calls, train = [], room.train_network
    monkeypatch.setattr(room, "train_network", lambda *args, **options: calls.append(options) or train(*args, **options))
    return calls


def pictures_of(part):
    "Every picture or cloud of a part as bytes."
    inputs = part[0][0] if isinstance(part[0], tuple) else part[0]
    return {one.numpy().tobytes() for one in inputs}


@pytest.mark.parametrize("data", ["digits", "mnist", "shapes", "extruded"])
def test_parts_do_not_overlap(data):
    train, fit, validation, test = (pictures_of(part) for part in samples(data, 1, True))
    assert fit <= train and not train & validation and not train & test and not validation & test


def test_the_split_of_the_pages_is_not_used():
    from hkust_demos.data.digits import load_digits8, split
    pages = split(load_digits8(), [1000, 297, 500])[2]
    for seed in range(3):
        assert len(pictures_of((pages.images, None)) & pictures_of(samples("digits", seed).test)) < 250


def test_seeds_differ_and_repeat():
    first, again, other = (samples("shapes", seed, True).test[0][0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_thin_keeps_all_classes_of_sorted_sets():
    inputs, labels = thin(samples("shapes", 0, True).train, 50)
    assert labels.bincount().tolist() == [5] * 10 and len(inputs[0]) == len(inputs[1]) == 50


def test_test_samples_choose_nothing(monkeypatch):
    before = exits_for("digits", "ternary", 0, True).thresholds
    rates = compare_rates("digits", [6e-3], quick=True, epochs=1, kinds=["float"])
    hidden = {seed: samples("digits", seed, True)._replace(test=None) for seed in (0, room.TUNING_SEED)}
    monkeypatch.setattr(room, "samples", lambda data, seed, quick=False: hidden[seed])
    assert torch.equal(exits_for("digits", "ternary", 0, True).thresholds, before)
    pd.testing.assert_frame_equal(compare_rates("digits", [6e-3], quick=True, epochs=1, kinds=["float"]), rates)


def test_float_and_ternary_start_alike():
    nets = [setting("digits").build(quantize=quantize) for quantize in (True, False)]
    assert [p.shape for p in nets[0].parameters()] == [p.shape for p in nets[1].parameters()]
    assert all(set(one.lr) == {"ternary", "float"} for one in SETTINGS.values())


def test_a_network_is_trained_once_and_read_back(own_cache, count_trainings):
    network = room.trained("digits", "ternary", 0)
    assert len(count_trainings) == 1 and len(list((own_cache / "memristor-study").iterdir())) == 1
    room.trained.cache_clear()
    again = room.trained("digits", "ternary", 0)
    images = room.samples("digits", 0).test[0]
    assert len(count_trainings) == 1
    assert torch.equal(evaluation_features(network, images)[0], evaluation_features(again, images)[0])


def test_a_changed_recipe_trains_anew(own_cache, count_trainings, monkeypatch):
    room.trained("digits", "float", 0)
    monkeypatch.setitem(SETTINGS, "digits", SETTINGS["digits"]._replace(lr={"ternary": 6e-3, "float": 1e-3}))
    room.trained.cache_clear()
    room.trained("digits", "float", 0)
    assert len(count_trainings) == 2 and count_trainings[1]["lr"] == 1e-3 != count_trainings[0]["lr"]


def test_a_half_written_network_is_trained_anew_and_a_damaged_one_refused(own_cache, count_trainings):
    room.trained("digits", "ternary", 0)
    folder = next((own_cache / "memristor-study").iterdir())
    (folder / "card.json").unlink()
    room.trained.cache_clear()
    room.trained("digits", "ternary", 0)
    assert len(count_trainings) == 2
    (folder / "weights.safetensors").write_bytes(b"damaged")
    room.trained.cache_clear()
    with pytest.raises(ValueError, match="changed or is incomplete"):
        room.trained("digits", "ternary", 0)


def test_quick_networks_stay_off_the_disk(own_cache):
    room.trained("digits", "ternary", 0, True)
    assert not (own_cache / "memristor-study").exists()


def test_deep_supervision_is_what_plain_lacks(count_trainings, own_cache):
    room.trained("digits", "ternary", 0, True), room.trained("digits", "plain", 0, True)
    assert [call["deep_supervision"] for call in count_trainings] == [True, False]
    assert len({call["lr"] for call in count_trainings}) == len({call["seed"] for call in count_trainings}) == 1


SLOW_ROWS = ["extruded/dynamic/ternary", "shapes/static/float", "mnist-2x2/dynamic/ternary", "shapes/noise/range-15/ternary+bn", "shapes/chip/range-15", "shapes/energy/levels-8"]


@pytest.mark.parametrize("variant", ["mnist/ablation/float-all", "digits/rival/confidence-plain", "digits/ablation/no-deep-global", "digits/ablation/uncentered",
                                     "digits/tiles/6-one-day", "digits/noise/stuck-5/float", "digits/rival/int8",
                                     "digits/rival/blocks-5", "digits/mapping/range-30/clipped+bn", "digits/mapping/range-15/aware", *(pytest.param(row, marks=pytest.mark.slow) for row in SLOW_ROWS)])
def test_rows_of_every_kind_run(variant):
    row = run(variant, 0, True)
    assert set(row) <= set(METRICS) and all(isinstance(value, float) for value in row.values())
    for name in ("accuracy", "static"):
        assert name not in row or 0 <= row[name] <= 1
    assert "budget_cut" not in row or row["budget_cut"] < 1
    assert "int8" not in variant or row["int8_dynamic_nj"] < 1.02 * row["int8_nj"]
    assert "/dynamic/" not in variant or math.isclose(row["mean_cost"], (1 - row["budget_cut"]) * row["static_cost"])


def test_rows_are_reproducible():
    for variant in ("digits/noise/range-15/float+bn", "digits/chip/range-15"):
        first, again = ({name: value for name, value in run(variant, 0, True).items() if value == value} for _ in range(2))
        assert first == again and len(first) > 1 - ("/noise/" in variant)


def test_ideal_converters_change_nothing(monkeypatch):
    monkeypatch.setitem(TILES, "0-ideal", dict(rows=room.WHOLE, dac_bits=None, adc_bits=None))
    plain, ideal = (room._tiles("digits", name, 0, True) for name in ("0-effective-weights", "0-ideal"))
    assert abs(plain["static"] - ideal["static"]) <= 0.01 and abs(plain["exit_9"] - ideal["exit_9"]) <= 0.02


def test_a_stopped_study_goes_on(tmp_path, monkeypatch):
    small, calls = build_study(quick=True).only(["digits/static", "digits/dynamic"]), []
    small.run = lambda variant, seed, quick: calls.append((variant, seed)) or run(variant, seed, quick)
    small.only(["digits/static"]).table(2, quick=True, path=tmp_path / "memristor.csv")
    before = len(calls)
    table = small.table(2, quick=True, path=tmp_path / "memristor.csv")
    assert before == 4 and len(calls) == 6 and len(table) == 6
    compared = small.summary(table).set_index(["variant", "metric"]).loc[("digits/dynamic/ternary", "accuracy")]
    assert compared.baseline == "digits/static/ternary" and math.isfinite(compared.difference)


def test_names_and_baselines():
    names, baselines = all_variants(), build_study()._baselines()
    assert len(names) == len(set(names)) and set(baselines) | set(baselines.values()) <= set(names)
    assert baselines["digits/noise/stuck-1/ternary"] == "digits/noise/stuck-1/float"
    assert baselines["mnist/tiles/adc-5"] == "mnist/tiles/0-effective-weights"
    assert {name.split("/")[2] for name in names if name.startswith("digits/ablation")} == set(ABLATIONS)
    assert {name.split("/")[2] for name in names if name.startswith("shapes/energy")} == set(CHIP_DESIGNS)
    assert {name.split("/")[2] for name in names if name.startswith("digits/noise")} == set(NOISES)
    with pytest.raises(ValueError, match="digits/luck"):
        run("digits/luck/none", 0, True)


def test_noise_of_other_chips_in_training_leaves_no_trace():
    network = trained("digits", "aware", 0, True)
    images = samples("digits", 0, True).test[0]
    assert torch.equal(evaluation_features(network, images)[0], evaluation_features(network, images)[0])
    layer = network.stem[0]
    assert "effective_weight" not in vars(layer) and layer.weight.abs().max() <= 2.3 * layer.weight.std()


def voxels(folder, n):
    "A copy of ModelNet as bits: blocks and plates."
    folder.mkdir(parents=True)
    for name, corner in (("chair", (4, 4, 20)), ("monitor", (20, 2, 16))):
        cubes = torch.zeros(n, 32, 32, 32, dtype=torch.bool)
        for i in range(n):
            cubes[i, 4:4 + corner[0] + i % 3, 5:5 + corner[1], 6:6 + corner[2]] = True
        np.savez(folder / f"{name}.npz", voxels=np.packbits(cubes.numpy().reshape(n, -1), axis=1), shape=np.array(cubes.shape))


def test_real_voxels_are_two_classes(tmp_path, monkeypatch):
    voxels(tmp_path / "modelnet_voxels", 8)
    monkeypatch.setenv("HKUST_DEMOS_DATA", str(tmp_path))
    parts = load_clouds("modelnet-voxels", (100, 4, 4), seed=1)
    assert [len(part) for part in parts] == [8, 4, 4] and parts[0].names == ("chair", "monitor")
    assert len({tuple(cloud.points.flatten().tolist()) for part in parts for cloud in [part.take([i]) for i in range(len(part))]}) == 16
    assert all(part.points.norm(dim=2).max() <= 1.001 for part in parts)
    with pytest.raises(ValueError, match="more than 21 are needed"):
        load_clouds("modelnet-voxels", (10, 10, 10))


def test_meshes_keep_their_published_test_part(tmp_path, monkeypatch):
    for name, size in (("bed", (2, 3, 1)), ("desk", (1, 1, 2))):
        for part, n in (("train", 4), ("test", 2)):
            (tmp_path / "ModelNet10" / name / part).mkdir(parents=True)
            for i in range(n):
                trimesh.creation.box(size).export(tmp_path / "ModelNet10" / name / part / f"{name}_{i:04d}.off")
    monkeypatch.setenv("HKUST_DEMOS_DATA", str(tmp_path))
    train, validation, test = load_clouds("modelnet", (100, 2, 100), n_points=64)
    assert [len(part) for part in (train, validation, test)] == [6, 2, 4] and test.labels.bincount().tolist() == [2, 2]
    assert test.points.shape == (4, 64, 3)


def test_no_picture_without_rows():
    assert picture(pd.DataFrame({"variant": ["digits/static/float"], "accuracy": [0.9]})) is None


@pytest.mark.skipif(not (RESULTS / "memristor.csv").exists(), reason="no results stored")
def test_stored_rows_belong_to_this_study():
    table = pd.read_csv(RESULTS / "memristor.csv")
    beside = ["set", "set_version", "set_license"]  # of rows on real sets
    assert [name for name in table.columns if name not in beside] == ["variant", "seed", "quick", *METRICS]
    assert set(table.variant) <= set(all_variants()) and not table.quick.any() and not table.duplicated(["variant", "seed"]).any()


def test_stored_rates_are_the_ones_in_use():
    chosen = room.best_rates(pd.read_csv(RESULTS / "memristor.lr.csv"))
    assert {(data, kind): SETTINGS[data].lr[kind] for data, kind in chosen} == chosen
    assert SETTINGS["mnist-2x2"].lr == SETTINGS["mnist"].lr and SETTINGS["extruded"].lr == SETTINGS["shapes"].lr
