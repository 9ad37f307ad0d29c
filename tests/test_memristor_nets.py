"""Ternary networks on chips and the dynamic network: edge cases and properties that teach nothing on a page."""
import math
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from hkust_demos.data.digits import load_digits8, split
from hkust_demos.memristor.crossbar import CrossbarConfig
from hkust_demos.memristor.device import DeviceModel, drift, ternarize
from hkust_demos.memristor.dynamic2d import TernaryResNet, chip_accuracy, evaluation_features, make_dynamic, program_network, train_network, tune_thresholds
from hkust_demos.memristor.shipped import load_digit_network, train_digit_networks
from hkust_demos.memristor.ternary import (ProgrammedLayer, TernaryConv2d, TernaryLinear, build_seeded, calibrate, chip_layers, count_macs,
                                           deploy, exit_costs, in_batches, load_network, pack_network, recalibrate_bn, save_network,
                                           ternary_weight, unpack_network)

QUIET = DeviceModel(write_noise=0.0, read_noise=0.0)
RANGE = DeviceModel(write_noise=0.15, read_noise=0.02, noise_kind="range")
SMALL = partial(TernaryResNet, (4, 8), blocks=2)


@pytest.fixture(scope="module")
def digits():
    return tuple((part.images, part.labels) for part in split(load_digits8(), [400, 150, 200]))


@pytest.fixture(scope="module")
def network(digits):
    return train_network(build_seeded(SMALL, seed=0), *digits[0], epochs=10, seed=0)


@pytest.fixture(scope="module")
def dynamic(network, digits):
    return make_dynamic(network, digits[0], digits[1], seed=0)


def logits_of(network, inputs):
    return evaluation_features(network, inputs)[0]


# layers

@pytest.mark.parametrize("per", ["tensor", "row"])
def test_ternary_values_and_scale(per):
    weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    effective, larger = (ternary_weight(c * weight, per=per) for c in (1, 4))
    assert torch.allclose(larger, 4 * effective)
    for row in effective if per == "row" else [effective]:
        assert len(row.abs().unique()) == 2 and row.abs().min() == 0


def test_straight_through_layers_train():
    layer = TernaryConv2d(2, 3, 3, padding=1)
    layer(torch.rand(2, 2, 5, 5)).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    dead = TernaryLinear(3, 2)
    nn.init.zeros_(dead.weight)
    assert torch.equal(dead(torch.ones(1, 3)), torch.zeros(1, 2))


@pytest.mark.parametrize("options, word", [({"bias": True}, "bias"), ({"factor": -1}, "factor"), ({"factor": math.nan}, "factor"), ({"per": "cell"}, "per")])
def test_layers_refuse(options, word):
    with pytest.raises(ValueError, match=word):
        TernaryLinear(3, 2, **options)
    with pytest.raises(ValueError, match=word):
        TernaryConv2d(3, 2, 3, **options)


def test_point_layer_equals_linear_on_flat_points():
    layer, points = TernaryLinear(3, 5, quantize=False), torch.rand(2, 7, 3)
    assert torch.allclose(layer(points), points @ layer.weight.T)


# deployment

@pytest.mark.parametrize("quantize, mapping", [(True, "ternary"), (True, "linear"), (False, "linear")])
@pytest.mark.parametrize("config", [None, CrossbarConfig(rows=20, dac_bits=None, adc_bits=None)])
def test_noise_free_chip_equals_software(digits, quantize, mapping, config):
    images = digits[2][0][:20]
    network = build_seeded(partial(SMALL, quantize=quantize), seed=2).eval()
    chip = deploy(network, QUIET, config, mapping=mapping)
    expected, found = logits_of(network, images), logits_of(chip, images)
    assert torch.allclose(found, expected, atol=1e-5 * max(1.0, expected.abs().max().item()))


def test_deploy_is_private_and_repeatable(network, digits):
    images, state, before = digits[2][0], torch.get_rng_state(), deepcopy(network.state_dict())
    first, again, other = (deploy(network, RANGE, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(logits_of(first, images), logits_of(again, images))
    assert not torch.equal(first.head.g_pos, other.head.g_pos)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(values, before[name]) for name, values in network.state_dict().items())
    assert not chip_layers(network) and not any(p.requires_grad for p in first.parameters())


def test_layers_have_streams_of_their_own():
    network = nn.Sequential(TernaryLinear(50, 50), TernaryLinear(50, 50))
    network[1].load_state_dict(network[0].state_dict())
    chip = deploy(network, RANGE)
    assert not torch.equal(chip[0].g_pos, chip[1].g_pos)


def test_zero_noise_of_every_kind_is_no_noise(network, digits):
    for kind in ("proportional", "range", "wan2022"):
        device = DeviceModel(write_noise=0.0, read_noise=0.0, noise_kind=kind, wan_scale=0.0)
        assert torch.equal(logits_of(deploy(network, device), digits[2][0]), logits_of(deploy(network, QUIET), digits[2][0]))


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("config", [None, CrossbarConfig(dac_bits=None, adc_bits=None)])
def test_read_noise_variance(config, per):
    layer, n = TernaryConv2d(2, 3, 3, per=per), 200_000
    device = DeviceModel(write_noise=0.1, read_noise=0.2)
    chip = deploy(nn.Sequential(layer), device, config)[0]
    image = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    draws = chip(image.expand(n, -1, -1, -1)).flatten(1)
    cells = chip.scale**2 * 0.2**2 * (chip.g_pos**2 + chip.g_neg**2)
    expected = (image**2 * cells).flatten(1).sum(1)
    assert torch.allclose(draws.var(0), expected, rtol=5 * math.sqrt(2 / n))
    assert not torch.equal(draws[0], draws[1])


def test_read_noise_can_be_switched_off(network, digits):
    chip = deploy(network, RANGE, read_noise=False)
    assert torch.equal(logits_of(chip, digits[2][0]), logits_of(chip, digits[2][0]))


def test_age_is_applied(network):
    young, old = deploy(network, QUIET), deploy(network, QUIET, age=lambda programmed, generator: drift(programmed, 100.0, nu=0.1))
    assert torch.allclose(old.head.weight, young.head.weight * 100**-0.1)


@pytest.mark.parametrize("shape", [dict(stride=2, padding=1), dict(padding=(0, 2), dilation=2), dict(stride=(1, 3)), dict(kernel_size=(1, 3))])
def test_patches_equal_convolution(shape):
    layer = TernaryConv2d(3, 4, **{"kernel_size": 3, **shape}).eval()
    images = torch.randn(2, 3, 9, 12, generator=torch.Generator().manual_seed(0))
    chip = deploy(nn.Sequential(layer), QUIET, CrossbarConfig(rows=5, dac_bits=None, adc_bits=None))
    assert torch.allclose(chip(images), layer(images), atol=1e-5)


def test_crossbar_refuses_what_patches_cannot_do():
    for layer in (TernaryConv2d(4, 4, 3, groups=2), TernaryConv2d(4, 4, 3, padding="same")):
        deploy(nn.Sequential(layer), QUIET)(torch.rand(1, 4, 5, 5))
        with pytest.raises(ValueError, match="groups=1"):
            deploy(nn.Sequential(layer), QUIET, CrossbarConfig())
    with pytest.raises(ValueError, match="no TernaryConv2d"):
        deploy(nn.Linear(2, 2), QUIET)


def test_converters_need_calibration(network, digits):
    chip = deploy(network, QUIET, CrossbarConfig())
    with pytest.raises(ValueError, match="calibrate"):
        logits_of(chip, digits[2][0])
    calibrate(chip, digits[0][0])
    assert not any(layer.calibrating for layer in chip_layers(chip).values())
    same = logits_of(chip, digits[2][0]).argmax(1) == logits_of(network, digits[2][0]).argmax(1)
    assert same.float().mean() > 0.9


def test_chip_survives_deepcopy(network, digits):
    chip = deploy(network, RANGE)
    assert torch.equal(logits_of(deepcopy(chip), digits[2][0]), logits_of(chip, digits[2][0]))


# batch normalization

def test_recalibration_leaves_affine_and_momentum(network, digits):
    chip = deploy(network, RANGE)
    before = deepcopy(chip.state_dict())
    assert recalibrate_bn(chip, digits[0][0], batch=64) is chip and not chip.training
    changed = {name for name, values in chip.state_dict().items() if not torch.equal(values, before[name])}
    assert changed and all("running" in name or "num_batches" in name for name in changed)
    assert all(layer.momentum == 0.1 for layer in chip.modules() if isinstance(layer, nn.BatchNorm2d))


def test_recalibration_is_a_plain_average():
    network, inputs = nn.Sequential(nn.BatchNorm1d(3)), torch.randn(60, 3)
    recalibrate_bn(network, inputs, batch=20)
    assert torch.allclose(network[0].running_mean, inputs.mean(0), atol=1e-6)
    with pytest.raises(ValueError, match="inputs"):
        recalibrate_bn(network, inputs[:0])


# costs

def test_costs_of_the_digit_network():
    network = TernaryResNet()
    blocks, head = count_macs(network, torch.zeros(1, 1, 8, 8))
    assert blocks[0] == 9 * 12 * 64 + 2 * 9 * 12 * 12 * 64 and head == 480
    assert blocks[3] == 9 * 12 * 24 * 16 + 9 * 24 * 24 * 16 + 12 * 24 * 16  # shortcut counted
    cost, static = exit_costs(network, torch.zeros(1, 1, 8, 8), 10, [12] * 3 + [24] * 3 + [48] * 3)
    assert len(cost) == 10 and (cost.diff() > 0).all() and static == sum(blocks) + head
    assert cost[-1] - static == 10 * 3 * (12 + 24 + 48)


def test_batches_share_samples_evenly():
    parts = list(in_batches((torch.arange(10), torch.arange(10) * 2), 4))
    assert [len(a) for a, _ in parts] == [4, 3, 3] and all(torch.equal(2 * a, b) for a, b in parts)


# files

@pytest.mark.parametrize("quantize", [True, False])
def test_network_files(tmp_path, digits, quantize):
    network = train_network(build_seeded(partial(SMALL, quantize=quantize), seed=0), *digits[0], epochs=1, seed=0)
    save_network(tmp_path / "net", network, {"command": "test", "data": "digits", "seed": 0, "metrics": {}})
    again = load_network(tmp_path / "net", TernaryResNet)
    assert torch.equal(logits_of(again, digits[2][0]), logits_of(network, digits[2][0]))
    assert torch.equal(logits_of(deploy(again, RANGE), digits[2][0]), logits_of(deploy(network, RANGE), digits[2][0]))


def test_full_size_file_is_small(tmp_path, digits):
    files = train_digit_networks(tmp_path, epochs=1, kinds=["ternary"])
    assert files[0].stat().st_size < 150_000
    assert load_digit_network(files[0].parent).settings["widths"] == [12, 24, 48]


def test_unpack_refuses_another_architecture(network):
    for other in (TernaryResNet((4, 8), blocks=3), TernaryResNet((4, 8, 8), blocks=2), TernaryResNet((8, 16), blocks=2)):
        with pytest.raises(ValueError, match="do not fit"):
            unpack_network(other, pack_network(network))


def test_training_again_starts_from_the_file(network):
    again = unpack_network(SMALL(), pack_network(network)).train()
    assert again.head.frozen is None
    assert torch.allclose(again.head.effective_weight(), network.head.effective_weight(), atol=1e-6)


# the dynamic network

def test_extreme_thresholds(dynamic, digits):
    images, labels = digits[2]
    never = replace(dynamic, thresholds=torch.full((4,), math.inf)).evaluate(images, labels)
    assert never["dynamic"] == never["static"] and never["budget_cut"] < 0 and never["exit_counts"][-1] == len(labels)
    at_once = replace(dynamic, thresholds=torch.full((4,), -math.inf)).decide(images)
    assert (at_once.exit_index == 0).all() and (at_once.cost == dynamic.exit_cost[0]).all()


def test_lower_thresholds_never_delay(dynamic, digits):
    before = dynamic.decide(digits[2][0]).exit_index
    for exit_index in range(4):
        lower = dynamic.thresholds.clone().clamp(max=2)
        lower[exit_index] -= 0.3
        assert (replace(dynamic, thresholds=lower).decide(digits[2][0]).exit_index <= before).all()


def test_similarities_are_cosines(dynamic, digits):
    sims, _ = dynamic.search(digits[2][0])
    assert sims.abs().max() <= 1 and sims.isfinite().all()
    blank, _ = dynamic.search(torch.zeros(1, 1, 8, 8))
    assert blank.isfinite().all()


def test_dynamic_chip_is_repeatable(network, digits):
    first, again = (make_dynamic(network, digits[0], digits[1], device=RANGE, seed=2).evaluate(*digits[2]) for _ in range(2))
    assert first == again


def test_thresholds_are_searched_where_told(network, digits):
    for search in ("val", "val+augmented"):
        found = make_dynamic(network, digits[0], digits[1], search=search).evaluate(*digits[1])
        assert found["dynamic"] > found["static"] - 0.05
    with pytest.raises(ValueError, match="search"):
        make_dynamic(network, digits[0], digits[1], search="test")


@pytest.mark.parametrize("method", ["coordinate", "global"])
def test_methods_of_search(dynamic, digits, method):
    tuned = tune_thresholds(dynamic, [digits[1]], method=method, tolerance=0.02)
    found = tuned.evaluate(*digits[1])
    assert found["dynamic"] >= found["static"] - 0.03


@pytest.mark.parametrize("options", [dict(ternary=False), dict(center=False), dict(score="margin")])
def test_ablations_run(network, digits, options):
    found = make_dynamic(network, digits[0], digits[1], device=RANGE, **options).evaluate(*digits[2])
    assert 0 <= found["dynamic"] <= 1 and found["budget_cut"] < 1


def test_dynamic_through_converters(network, digits):
    config = CrossbarConfig(rows=32, dac_bits=8, adc_bits=8)
    tiled = make_dynamic(network, digits[0], digits[1], device=QUIET, config=config)
    assert all(isinstance(layer, ProgrammedLayer) and layer.crossbar for layer in chip_layers(tiled.network).values())
    effective = make_dynamic(network, digits[0], digits[1], device=QUIET)
    assert abs(tiled.evaluate(*digits[2])["static"] - effective.evaluate(*digits[2])["static"]) < 0.06


def test_program_network_without_statistics_is_deploy(network, digits):
    chip = program_network(network, digits[0][0], device=RANGE, seed=1, reestimate_bn=False)
    assert torch.equal(logits_of(chip, digits[2][0]), logits_of(deploy(network, RANGE, seed=1), digits[2][0]))


def test_training_is_private(digits):
    state = torch.get_rng_state()
    nets = [train_network(build_seeded(SMALL, seed=1), *digits[0], epochs=1, seed=1, deep_supervision=deep) for deep in (True, True, False)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(nets[0].head.weight, nets[1].head.weight) and not torch.equal(nets[0].head.weight, nets[2].head.weight)


def test_bad_arguments(network, digits):
    with pytest.raises(ValueError, match="same number"):
        train_network(SMALL(), digits[0][0], digits[0][1][:3])
    with pytest.raises(ValueError, match="labels reach"):
        train_network(SMALL(), digits[0][0], digits[0][1] + 5)
    with pytest.raises(ValueError, match="pool"):
        TernaryResNet(pool=3)
    with pytest.raises(ValueError, match="widths"):
        TernaryResNet(())
    labels = torch.where(digits[0][1] == 3, 4, digits[0][1])
    with pytest.raises(ValueError, match="class 3"):
        make_dynamic(network, (digits[0][0], labels), digits[1])
    with pytest.raises(ValueError, match="seeds is empty"):
        chip_accuracy(network, digits[1], device=DeviceModel(), seeds=[])
    for wrong in (dict(epochs=0), dict(batch=1), dict(lr=0.0)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            train_network(SMALL(), *digits[0], **wrong)
    with pytest.raises(ValueError, match="blocks"):
        TernaryResNet(blocks=(1, 2))


def test_stages_may_differ_in_depth():
    network = build_seeded(lambda: TernaryResNet((4, 6, 8), blocks=(1, 2, 3)), seed=0)
    assert len(network.blocks) == 6 and [f.shape[1] for f in network(torch.zeros(2, 1, 8, 8))[1]] == [4, 6, 6, 8, 8, 8]


def test_ternary_rule_matches_the_device(network):
    layer = network.blocks[0].conv1
    assert torch.equal(layer.ternary().sign, ternarize(layer.weight).sign)
