"The energy account of the virtual chip: what must hold whatever the constants are."
from dataclasses import fields, replace

import pytest
import torch

from hkust_demos.memristor.cam import SemanticMemory
from hkust_demos.memristor.crossbar import CrossbarConfig
from hkust_demos.memristor.device import DeviceModel
from hkust_demos.memristor.dynamic2d import TernaryResNet, evaluation_features
from hkust_demos.memristor.energy import COMPONENTS, EnergyModel, energy_report, layer_energies, search_energies
from hkust_demos.memristor.pointnet import PointNet2Lite
from hkust_demos.memristor.ternary import build_seeded, count_macs, deploy

N_EXITS, N_SAMPLES = 4, 12
QUIET = DeviceModel(write_noise=0.0, read_noise=0.0)


@pytest.fixture(scope="module")
def chip():
    "A small untrained network, inputs, memory and an exit for each sample."
    network = build_seeded(lambda: TernaryResNet((4, 8), blocks=2), 0).eval()
    images = torch.rand(N_SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    features = evaluation_features(network, images)[1]
    memory = SemanticMemory.fit(features, torch.arange(N_SAMPLES) % 3, 3)
    return network, images, memory, torch.arange(N_SAMPLES) % (N_EXITS + 1)


def report(chip, exits="own", **model):
    "The account of the small network."
    network, images, memory, exit_index = chip
    return energy_report(network, images, exit_index if isinstance(exits, str) else exits, memory=memory, model=EnergyModel(**model))


def test_adds_up_over_blocks_components_and_samples(chip):
    found = report(chip)
    assert found.by_block.shape == (N_EXITS + 1,) and found.per_sample.shape == (N_SAMPLES,)
    for total in (found.by_block.sum().item(), sum(found.by_component.values()), found.per_sample.mean().item()):
        assert total == pytest.approx(found.cim_total, rel=1e-12)
    assert set(found.by_component) == {*COMPONENTS, "search"}


def test_blocks_are_the_layers_that_were_reached(chip):
    network, images, memory, exit_index = chip
    layers, features = layer_energies(network, images)
    parts = layers + search_energies(memory, features)
    for block, joules in enumerate(report(chip).by_block):
        reached = (exit_index >= block).double()
        expected = sum((reached * (one.crossbar + sum(one.fixed.values()))).mean() for one in parts if one.block == block)
        assert joules.item() == pytest.approx(float(expected), rel=1e-12)


def test_layers_count_the_macs_of_the_network(chip):
    network, images, *_ = chip
    layers, _ = layer_energies(network, images)
    blocks, head = count_macs(network, images[:1])
    for block, macs in enumerate([*blocks, head]):
        assert sum(one.macs for one in layers if one.block == block) == macs


def test_an_earlier_exit_is_cheaper_for_every_sample(chip):
    costs = torch.stack([report(chip, torch.full((N_SAMPLES,), e)).per_sample for e in range(N_EXITS + 1)])
    assert (costs.diff(dim=0) > 0).all()


def test_never_leaving_costs_the_searches_on_top(chip):
    static, never = report(chip, None), report(chip, torch.full((N_SAMPLES,), N_EXITS))
    assert static.by_component["search"] == 0 and never.by_component["search"] > 0
    assert never.cim_total == pytest.approx(static.cim_total + never.by_component["search"], rel=1e-12)
    assert never.cim_static == pytest.approx(static.cim_total, rel=1e-12) and never.cut < 0
    assert static.cut == 0 and static.cim_total == static.cim_static


def test_baselines_are_always_there_and_do_not_know_about_the_chip(chip):
    static, dynamic = report(chip, None), report(chip)
    for name in ("digital_fp32", "digital_int8", "gpu"):
        assert getattr(static, name) == getattr(dynamic, name) > 0
    assert static.digital_fp32 > static.digital_int8
    assert dynamic.digital_int8_dynamic < dynamic.digital_int8 == pytest.approx(static.digital_int8_dynamic)


@pytest.mark.parametrize("constant, component", [("adc", "adc"), ("dac", "dac"), ("buffer", "buffer")])
def test_a_constant_scales_its_component_alone(chip, constant, component):
    before = report(chip, None)
    after = report(chip, None, **{constant: 3 * getattr(EnergyModel(), constant)})
    for name in COMPONENTS:
        assert after.by_component[name] == pytest.approx((3 if name == component else 1) * before.by_component[name], rel=1e-12)


def test_digital_constants_act_on_the_digital_part(chip):
    before = report(chip, None)
    for changed in ({"shift_add": 1e-12}, {"digital": 5e-12}, {"digital_ops": 9.0}):
        after = report(chip, None, **changed)
        assert after.by_component["digital"] > before.by_component["digital"]
        assert {**after.by_component, "digital": 0} == {**before.by_component, "digital": 0}


def test_engine_constants_leave_the_chip_alone(chip):
    before = report(chip)
    after = report(chip, mac_fp32=9.2e-12, mac_int8=0.6e-12, gpu_use=0.6)
    assert after.cim_total == before.cim_total
    assert after.digital_fp32 > before.digital_fp32 and after.digital_int8 > before.digital_int8
    assert after.gpu == pytest.approx(before.gpu / 2, rel=1e-12)


def test_free_converters_leave_only_the_cells(chip):
    free = dict.fromkeys(("adc", "dac", "shift_add", "digital", "buffer"), 0.0)
    found = report(chip, None, **free)
    assert found.cim_total == pytest.approx(found.by_component["crossbar"], rel=1e-12) and found.cim_total > 0
    assert report(chip, None, **free, config=CrossbarConfig(bit_serial=True, v_read=0.0)).cim_total == 0


def test_converters_follow_bits_tiles_and_pulses(chip):
    adc = lambda **config: report(chip, None, config=CrossbarConfig(**{"bit_serial": True, **config})).by_component["adc"]
    assert adc(adc_bits=7) == pytest.approx(adc() / 2, rel=1e-12)
    assert adc(bit_serial=False) == pytest.approx(adc() / 8, rel=1e-12)
    assert adc(dac_bits=4) == pytest.approx(adc() / 2, rel=1e-12)
    assert adc(rows=16) > adc()
    dac = lambda rows: report(chip, None, config=CrossbarConfig(rows=rows, bit_serial=True)).by_component["dac"]
    assert dac(16) == dac(128)


def test_the_cells_alone_follow_the_sample(chip):
    network, images, *_ = chip
    one_dark = images.clone()
    one_dark[0] = 0
    layers, _ = layer_energies(network, one_dark)
    assert layers[0].crossbar[0] == 0 and (layers[0].crossbar[1:] > 0).all()
    found = energy_report(network, one_dark)
    assert found.per_sample[0] < found.per_sample[1:].min()


def test_voltage_and_time_act_on_the_cells_alone(chip):
    account = lambda **config: report(chip, None, config=CrossbarConfig(bit_serial=True, **config)).by_component
    before, after = account(), account(v_read=0.4, t_read=30e-9)
    assert after["crossbar"] == pytest.approx(12 * before["crossbar"], rel=1e-6)
    assert {**after, "crossbar": 0} == {**before, "crossbar": 0}


def test_a_perfect_chip_costs_what_the_trained_network_is_billed(chip):
    network, images, memory, exit_index = chip
    written = energy_report(deploy(network, QUIET), images, exit_index, memory=memory.program(QUIET, seed=0))
    asked = report(chip)
    assert written.cim_total == pytest.approx(asked.cim_total, rel=1e-6)
    noisy = energy_report(deploy(network, DeviceModel(noise_kind="range", write_noise=0.3, read_noise=0.0)), images)
    assert noisy.by_component["crossbar"] != pytest.approx(report(chip, None).by_component["crossbar"], rel=1e-3)
    assert noisy.by_component["adc"] == pytest.approx(report(chip, None).by_component["adc"], rel=1e-12)


def test_point_networks_have_an_account():
    network = build_seeded(PointNet2Lite, 0).eval()
    points = torch.rand(3, 128, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    found = energy_report(network, points)
    assert found.by_block.shape == (7,) and found.by_block.sum().item() == pytest.approx(found.cim_total, rel=1e-12)
    assert sum(one.macs for one in layer_energies(network, points)[0]) == sum(count_macs(network, points)[0]) + count_macs(network, points)[1]
    assert layer_energies(network, points)[0][0].fixed["dac"] > 0  # coordinates are signed: two passes


@pytest.mark.parametrize("name", [field.name for field in fields(EnergyModel) if field.name not in ("config", "device")])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "much"])
def test_refuses_senseless_constants(name, value):
    with pytest.raises(ValueError, match=name):
        EnergyModel(**{name: value})


@pytest.mark.parametrize("changed", [{"gpu_use": 0.0}, {"gpu_use": 1.5}, {"gpu_macs": 0.0}])
def test_refuses_an_impossible_gpu(changed):
    with pytest.raises(ValueError, match="gpu_use is .* gpu_macs"):
        EnergyModel(**changed)


def test_refuses_exits_without_their_memory(chip):
    network, images, memory, exit_index = chip
    short = replace(memory, means=memory.means[:2], centers=memory.centers[:2])
    for given in (None, short):
        with pytest.raises(ValueError, match="memory is"):
            energy_report(network, images, exit_index, memory=given)


@pytest.mark.parametrize("wrong", [torch.zeros(3, dtype=torch.long), torch.full((N_SAMPLES,), N_EXITS + 1), torch.full((N_SAMPLES,), -1)])
def test_refuses_exits_that_do_not_exist(chip, wrong):
    network, images, memory, _ = chip
    with pytest.raises(ValueError, match="exit_index has shape"):
        energy_report(network, images, wrong, memory=memory)
