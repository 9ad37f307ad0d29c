"The virtual chip behind the app and the command line: determinism, bad inputs, weights, reports."
import importlib
import json
import subprocess
import sys
import types
from argparse import ArgumentParser
from dataclasses import FrozenInstanceError, replace
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image

import hkust_demos.memristor as package
from hkust_demos.checkpoints import shipped_folder
from hkust_demos.data import digits
from hkust_demos.memristor import apply, core, settings, shipped, sweeps
from hkust_demos.memristor.chip import build_chip
from hkust_demos.memristor.settings import ChipSettings
from hkust_demos.memristor.ternary import chip_layers


@pytest.fixture(scope="module", autouse=True)
def quick_chips():
    "Chips that measure themselves on fewer samples; the test samples, and so every count below, stay."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "CALIBRATION", {"digits": 300, "mnist": 300, "shapes": 200})
        patch.setattr(shipped, "MOVED", {"digits": 300, "mnist": 100, "shapes": 50})
        shipped.load_task.cache_clear()
        yield
    shipped.load_task.cache_clear()


@pytest.fixture(scope="module")
def chip():
    "The chip of the default settings, for digits."
    return build_chip("digits")


@pytest.fixture
def digit_png(chip, tmp_path):
    "A test digit, large, dark on bright."
    path = tmp_path / "digit.png"
    Image.fromarray((255 - 255 * np.kron(chip.task.picture(0), np.ones((12, 12)))).astype(np.uint8)).save(path)
    return path


def run(*words):
    "The command, without a process of its own."
    parser = ArgumentParser()
    apply.add_arguments(parser)
    return apply.run_command(parser.parse_args(list(map(str, words))))


# settings

@pytest.mark.parametrize("wrong", [{"noise_kind": "pink"}, {"write_noise": -0.1}, {"write_noise": float("nan")}, {"read_noise": "much"}, {"stuck_on": 0.6, "stuck_off": 0.6},
                                   {"adc_bits": 1}, {"dac_bits": 40}, {"rows": 0}, {"rows": 5000}, {"wire_resistance": -1}, {"tolerance": 1.5},
                                   {"tolerance": "none"}, {"mapping": "cubic"}, {"seed": -1}, {"seed": 1.5}, {"wan_time": "9d"}, {"wan_scale": -1}])
def test_settings_name_what_is_wrong(wrong):
    with pytest.raises(ValueError, match="|".join(wrong)):
        ChipSettings(**wrong)


def test_settings_are_frozen_and_hashable():
    assert hash(ChipSettings()) == hash(ChipSettings()) and ChipSettings() != ChipSettings(seed=1)
    with pytest.raises(FrozenInstanceError):
        ChipSettings().seed = 3


@pytest.mark.parametrize("text", ["", ":", "range", "range:", "range:nan", "range:inf", "range:99", "wan2022:1d:x", "wan2022:2", "proportional:0.1:3", "RANGE:0.1"])
def test_noise_words_are_checked(text):
    with pytest.raises(ValueError, match="write range:0.15"):
        settings.parse_noise(text)


# chips

def test_same_settings_give_the_same_chip_bit_for_bit(chip):
    made = core.make_core(chip.task, core.core_settings(chip.settings))
    for name, layer in chip_layers(made.dynamic.network).items():
        assert torch.equal(layer.g_pos, chip_layers(chip.dynamic.network)[name].g_pos)
    assert torch.equal(made.test.sims, chip.core.test.sims) and torch.equal(made.search.logits, chip.core.search.logits)
    other = build_chip("digits", replace(chip.settings, seed=1), live=True)
    assert not torch.equal(chip_layers(other.dynamic.network)["stem.0"].g_pos, chip_layers(chip.dynamic.network)["stem.0"].g_pos)


def test_answers_do_not_depend_on_what_was_asked_before(chip):
    inputs, _ = chip.task.sample(5)
    first = chip.explain(inputs)
    chip.energy(inputs), chip.through_tiles(inputs), chip.explain(chip.task.sample(6)[0])
    chip.core.kept.clear()  # the answers that stay with a chip
    assert torch.equal(chip.explain(inputs).sims, first.sims)


def test_answers_survive_threads(chip):
    inputs = [chip.task.sample(i)[0] for i in range(6)]
    alone, together = [chip.explain(one).sims for one in inputs], [None] * 6
    energies, shared = [chip.energy(one).cim_total for one in inputs], [None] * 6

    chip.core.kept.clear()

    def ask(i):
        together[i], shared[i] = chip.explain(inputs[i]).sims, chip.energy(inputs[i]).cim_total

    threads = [Thread(target=ask, args=(i,)) for i in range(6)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert all(torch.equal(a, b) for a, b in zip(alone, together)) and energies == shared


def test_the_global_generator_and_the_task_stay_as_they_were(chip):
    torch.manual_seed(7)
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in chip.task.network.state_dict().items()}
    build_chip("digits", ChipSettings(seed=77), live=True).accuracy_report()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, weights[k]) for k, v in chip.task.network.state_dict().items())


def test_converters_and_tolerance_share_one_core(chip):
    for changed in ({"adc_bits": 5}, {"dac_bits": None}, {"bit_serial": False}, {"rows": 64}, {"tolerance": 0.05}):
        assert build_chip("digits", replace(chip.settings, **changed)).core is chip.core
    for changed in ({"write_noise": 0.1}, {"seed": 3}, {"wire_resistance": 1.0}, {"reestimate_bn": False}, {"mapping": "linear"}):
        assert core.core_settings(replace(chip.settings, **changed)) != core.core_settings(chip.settings)


def test_more_tolerance_saves_more(chip):
    loose = build_chip("digits", replace(chip.settings, tolerance=0.05)).accuracy_report()
    assert loose.budget_cut > chip.accuracy_report().budget_cut and loose.static == chip.accuracy_report().static


def test_a_report_is_consistent(chip):
    found = chip.accuracy_report()
    assert sum(found.exit_counts) == found.n == len(chip.task.test[1]) and sum(found.exit_right) == round(found.dynamic * found.n)
    assert all(right <= count for right, count in zip(found.exit_right, found.exit_counts))
    assert len(found.exit_counts) == len(chip.thresholds) + 1 == len(found.exit_accuracy) + 1


def test_noise_free_chip_equals_software(chip):
    quiet = build_chip("digits", ChipSettings(write_noise=0.0, read_noise=0.0, reestimate_bn=False))
    with torch.no_grad():
        logits = chip.task.network(chip.task.test[0])[0]
    torch.testing.assert_close(quiet.core.test.logits, logits, rtol=1e-4, atol=1e-4)


def test_coarse_converters_change_the_exact_path_only(chip):
    coarse = build_chip("digits", replace(chip.settings, adc_bits=3))
    inputs, _ = chip.task.sample(0)
    assert torch.equal(coarse.explain(inputs).sims, chip.explain(inputs).sims)
    far = lambda one: (one.through_tiles(inputs).sims - one.explain(inputs).sims).abs().max().item()
    assert far(coarse) > 2 * far(chip)


def test_one_sample_at_a_time(chip):
    with pytest.raises(ValueError, match="exactly 1"):
        chip.explain(chip.task.test[0][:2])


def test_a_blank_picture_is_unknown_not_an_error(chip):
    way = chip.explain(torch.zeros(1, 1, 8, 8))
    assert way.is_unknown and way.sims.isfinite().all()
    assert not chip.explain(chip.task.sample(0)[0]).is_unknown


def test_tiles_cover_a_layer(chip):
    name = "blocks.7.conv1"
    n_tiles, rows, columns = chip.layers[name]
    parts = [chip.conductances(name, tile).g_neg for tile in range(n_tiles)]
    assert np.concatenate(parts).shape == (rows, columns)
    assert np.array_equal(np.concatenate(parts), chip_layers(chip.dynamic.network)[name].g_neg.flatten(1).T.numpy())


def test_float_weights_fill_the_range(chip):
    linear = build_chip("digits", replace(chip.settings, mapping="linear"), live=True)
    target = linear.conductances("blocks.0.conv1").target_pos
    assert len(np.unique(target)) > 100 and target.min() == 2 and target.max() <= 50
    assert len(np.unique(chip.conductances("blocks.0.conv1").target_pos)) == 2


@pytest.mark.parametrize("call, word", [(lambda: sweeps.yield_over_chips("digits", n=0), "1 to 200"), (lambda: sweeps.yield_over_chips("digits", target=2), "share"),
                                        (lambda: sweeps.largest_noise("digits", target=0), "above 0"), (lambda: sweeps.largest_noise("digits", n_chips=0), "n_chips"),
                                        (lambda: build_chip("cats"), "digits, mnist, shapes"), (lambda: sweeps.noise_sweep("digits", "pink"), "range")])
def test_many_chips_refuse_nonsense(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_progress_is_told():
    seen, few = [], core.live_task(shipped.load_task("digits"))
    sweeps.yield_over_chips(few, n=2, progress=lambda *step: seen.append(step))
    sweeps.largest_noise(few, ChipSettings(read_noise=0.0), n_chips=1, steps=1, progress=lambda *step: seen.append(step))
    assert seen == [(1, 2), (2, 2), (1, 3), (2, 3), (3, 3)]


# the three tasks

@pytest.mark.parametrize("name, floor, saved", [("digits", 0.94, 0.3), ("mnist", 0.9, 0.2), ("shapes", 0.82, 0.1)])
def test_every_task_works_from_weights_to_exits(name, floor, saved):
    one = build_chip(name, ChipSettings(noise_kind="proportional", write_noise=0.1, read_noise=0.0))
    found = one.accuracy_report()
    assert found.dynamic > floor and found.budget_cut > saved
    way = one.explain(one.task.sample(1)[0])
    assert way.label in one.task.classes and len(way.classes) == 10 and way.scores.shape == way.thresholds.shape


def test_stored_sweeps_tell_the_message():
    for name in shipped.TASKS:
        ranged, proportional = sweeps.noise_sweep(name, "range"), sweeps.noise_sweep(name, "proportional")
        at = ranged.amounts.index(0.15)
        gain = lambda sweep: sweep.ternary[at].mean() - sweep.linear[at].mean()
        assert gain(ranged) > 0.1 and gain(ranged) > gain(proportional) + 0.1


# weights

def test_weights_are_small_and_say_where_they_come_from():
    folder = shipped_folder("memristor")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3e6
    card = json.loads((folder / "card.json").read_text())
    assert card["command"] == "hkust-demos train memristor" and set(card["metrics"]) == set(card["data"]) == set(shipped.TASKS)
    assert len(card["sha256"]) == 64 and card["seed"] == 20


def copy_weights(target, change=None):
    "The shipped weights in another folder, changed."
    target.mkdir()
    for path in shipped_folder("memristor").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    if change:
        change(target)
    return str(target)


def flip(folder):
    "Change one byte of the weights."
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(data)


def rewrite_card(**changes):
    "A change of the card alone."
    def change(folder):
        card = json.loads((folder / "card.json").read_text()) | changes
        (folder / "card.json").write_text(json.dumps(card))
    return change


@pytest.mark.parametrize("change, word", [(flip, "do not fit their card"), (rewrite_card(tasks={}), "holds no networks for digits"),
                                          (rewrite_card(tasks=[]), "holds no networks"), (rewrite_card(tasks={"digits": {"classes": ["a", "b"]}}), "holds no networks")])
def test_changed_weights_are_refused(tmp_path, change, word):
    with pytest.raises(ValueError, match=word):
        shipped.load_task("digits", copy_weights(tmp_path / "mine", change))


def test_a_missing_folder_is_told(tmp_path):
    with pytest.raises(ValueError, match="make them with: hkust-demos train memristor"):
        shipped.load_task("digits", str(tmp_path / "nothing"))


def test_copied_weights_work(tmp_path):
    task = shipped.load_task("digits", copy_weights(tmp_path / "mine"))
    assert torch.equal(task.network(task.test[0][:4])[0], shipped.load_task("digits").network(task.test[0][:4])[0])


@pytest.mark.parametrize("options, word", [({"variant": "cats"}, "digits, mnist, shapes"), ({"epochs": 0, "out": "x"}, "epochs is 0"), ({"epochs": 3}, "need --out"),
                                           ({"data": "x", "out": "y"}, "--variant"), ({"data": "nowhere", "out": "OUT", "variant": "mnist"}, "nowhere"),
                                           ({"data": "nowhere", "out": "OUT", "variant": "shapes"}, "nowhere"), ({"data": "nowhere", "out": "OUT", "variant": "digits"}, "mnist")])
def test_training_refuses_early(tmp_path, options, word):
    options = {key: str(tmp_path / "weights") if value == "OUT" else value for key, value in options.items()}
    with pytest.raises(ValueError, match=word):
        apply.train(**options)


def test_training_never_replaces_weights(tmp_path):
    with pytest.raises(FileExistsError, match="choose another folder"):
        apply.train(out=copy_weights(tmp_path / "mine"), variant="digits")


# reading

@pytest.mark.parametrize("name, data, word", [("a.png", b"", "cannot be read"), ("a.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "cannot be read"),
                                              ("a.jpg", b"\xff\xd8\xff\xe0" + b"\0" * 30, "cannot be read"), ("a.pdf", b"%PDF-1.4", "cannot be read"),
                                              ("a.svg", b"<svg/>", "cannot be read"), ("a.pkl", b"\x80\x04.", "cannot be read")])
def test_broken_pictures_give_one_sentence(tmp_path, name, data, word):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=word) as caught:
        digits.read_digit(tmp_path / name)
    assert str(caught.value).startswith(name) and "\n" not in str(caught.value)


def test_a_cut_off_picture_is_refused(digit_png):
    digit_png.write_bytes(digit_png.read_bytes()[:-200])
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        digits.read_digit(digit_png)


def test_huge_pictures_are_refused_before_decoding(tmp_path):
    wide = tmp_path / "wide.png"
    Image.new("1", (20000, 8001)).save(wide)
    with pytest.raises(ValueError, match="wide.png"):
        digits.read_digit(wide)
    heavy = tmp_path / "heavy.png"
    with heavy.open("wb") as file:
        file.truncate(21_000_000)
    with pytest.raises(ValueError, match="at most 20 MB"):
        digits.read_digit(heavy)


@pytest.mark.parametrize("mode, format", [("L", "png"), ("RGB", "jpeg"), ("RGBA", "png"), ("1", "png"), ("P", "gif"), ("L", "bmp"), ("RGB", "webp"), ("L", "tiff")])
def test_all_formats_and_modes_give_the_same_digit(digit_png, tmp_path, mode, format):
    two_tones, path = Image.open(digit_png).point(lambda value: 255 * (value > 127)), tmp_path / f"other.{format}"
    two_tones.convert(mode).save(path)
    two_tones.save(digit_png)
    torch.testing.assert_close(digits.read_digit(path, size=8)[0], digits.read_digit(digit_png, size=8)[0], rtol=0, atol=0.15)


def test_blank_files_are_answered_and_blank_drawings_refused(chip, tmp_path):
    Image.new("L", (90, 90), 200).save(tmp_path / "blank.png")
    sample, doubts = digits.read_digit(tmp_path / "blank.png", size=8)
    assert not sample.any() and doubts == [digits.BLANK]
    with pytest.raises(ValueError, match="nothing is drawn"):
        digits.read_digit(np.full((90, 90), 200, np.uint8))
    with pytest.raises(ValueError, match="blank.png is blank"):
        run(tmp_path / "blank.png", "--task", "digits", "--out", tmp_path / "out")


def test_arrays_and_editor_dictionaries_are_read():
    drawing = np.zeros((60, 60), np.uint8)
    drawing[10:50, 28:33] = 255
    for given in (drawing, {"composite": np.stack([drawing] * 3, 2)}, Image.fromarray(drawing)):
        assert digits.read_digit(given)[0].shape == (1, 1, 28, 28)
    with pytest.raises(ValueError, match="nothing is drawn"):
        digits.read_digit(np.zeros((60, 60)))


@pytest.mark.parametrize("name, text, word", [("few.xyz", "0 0 0\n1 1 1\n", "64"), ("nan.xyz", "nan 0 0\n" * 100, "nan.xyz"), ("one.xyz", "1 1 1\n" * 100, "same"),
                                              ("bad.off", "hello", "OFF"), ("flat.off", "OFF\n3 1 0\n0 0 0\n1 0 0\n2 0 0\n3 0 1 2\n", "surface"), ("a.glb", "", "give .off")])
def test_bad_shapes_give_one_sentence(tmp_path, name, text, word):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=word):
        apply.read_shape(tmp_path / name)


def test_pickled_arrays_are_never_opened(tmp_path):
    np.save(tmp_path / "evil.npy", np.array([{"a": 1}] * 100), allow_pickle=True)
    with pytest.raises(ValueError, match="evil.npy"):
        apply.read_shape(tmp_path / "evil.npy")


# the command

def test_command_writes_report_and_pictures(digit_png, tmp_path, monkeypatch):
    written = run(digit_png, "--task", "digits", "--noise", "wan2022:1s", "--stuck", "0.002", "--adc-bits", "0", "--out", tmp_path / "out")
    assert [path.name for path in written] == ["report.json", "ladder.png", "energy.png", "conductances.png"]
    report = json.loads(written[0].read_text())
    assert report["settings"]["adc_bits"] is None and report["settings"]["stuck_on"] == 0.001 and report["settings"]["wan_time"] == "1s"
    assert set(report["energy"]["engines"]) >= {"int8 engine", "fp32 engine", "GPU (upper estimate)"}
    assert all(Image.open(path).size[0] > 300 for path in written[1:])
    with pytest.raises(FileExistsError, match="--force"):
        run(digit_png, "--task", "digits", "--out", tmp_path / "out")
    monkeypatch.setattr(apply, "figure_png", lambda figure: b"drawn once above")
    run(digit_png, "--task", "digits", "--out", tmp_path / "out", "--force")
    assert json.loads(written[0].read_text())["settings"]["noise_kind"] == "range"


def test_command_reads_a_shape(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(apply, "figure_png", lambda figure: drawn.append(figure) or b"drawn once above")
    points = shipped.load_task("shapes").picture(120)
    np.savetxt(tmp_path / "shape.xyz", points)
    written = run(tmp_path / "shape.xyz", "--noise", "proportional:0.1", "--read-noise", "0", "--out", tmp_path / "out")  # a chip that was made above
    assert written[-1].name == "shape.png" and json.loads(written[0].read_text())["task"] == "shapes"
    assert len(drawn) == len(written) - 1 == 4 and len(drawn[-1].axes) == 1


def test_failed_commands_leave_nothing(tmp_path, digit_png):
    for words, word in (((tmp_path / "none.png",), "no such file"), ((digit_png, "--noise", "loud"), "write range:0.15"), ((digit_png, "--rows", "0"), "rows"),
                        ((digit_png, "--task", "shapes"), "no shape"), ((digit_png, "--stuck", "3"), "stuck"), ((digit_png, "--weights", tmp_path / "w"), "holds no weights")):
        with pytest.raises(ValueError, match=word):
            run(*words, "--out", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digit.png"]


# the front door

def test_the_front_door_is_light():
    script = ("import time; t = time.perf_counter(); import sys, hkust_demos.memristor as m; took = time.perf_counter() - t;"
              "print(took < 0.3, 'torch' in sys.modules, 'numpy' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split() == ["True", "False", "False"]


def test_the_front_door_has_every_name_of_the_specification():
    names = """ternarize TernaryConv2d TernaryLinear DeviceModel CrossbarConfig program Crossbar adc_quantize dac_quantize tiled_mvm solve_ir_drop deploy recalibrate_bn
        count_macs SemanticMemory ExitPolicy search_thresholds EnergyModel energy_report farthest_point_sample ball_query SetAbstraction PointNet2Lite TernaryResNet
        load_mnist5k load_digits8 make_shapes read_off sample_surface ModelNetFolder""".split()
    assert all(callable(getattr(package, name)) for name in names) and set(names) <= set(package.__all__)


def test_rooms_do_not_shadow_functions():
    for room in set(package._PLACES.values()) | {"memristor.chip_study"}:
        importlib.import_module(f"hkust_demos.{room}")
    assert [name for name in package.__all__ if isinstance(getattr(package, name), types.ModuleType)] == []
