"Memristors and crossbars: statistics, edges, and wires against another solver."
import itertools
import warnings

import numpy as np
import pytest
import torch

from hkust_demos.memristor.crossbar import Crossbar, CrossbarConfig, adc_quantize, dac_quantize, solve_ir_drop, tiled_mvm, wire_transfer
from hkust_demos.memristor.device import DeviceModel, program, ternarize, write, write_sigma

N = 400_000


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("kind", ["proportional", "range", "wan2022"])
@pytest.mark.parametrize("level", [10.0, 25.0, 50.0])
def test_write_noise_has_the_spread_it_claims(kind, level):
    device = DeviceModel(write_noise=0.05, noise_kind=kind)
    asked = torch.full((N,), level, dtype=torch.float64)
    written, sigma = write(asked, device, generator=seeded()), write_sigma(asked[:1], device).item()
    assert abs(written.mean().item() - level) < 5 * sigma / N**0.5 + 1e-3 * sigma
    assert abs(written.std().item() / sigma - 1) < 5 / (2 * N) ** 0.5 + 1e-3


def test_stuck_cells_come_in_the_asked_share():
    device = DeviceModel(write_noise=0.0, stuck_on=0.1, stuck_off=0.3)
    written = write(torch.full((N,), 20.0), device, generator=seeded())
    for value, share in ((50.0, 0.1), (2.0, 0.3)):
        assert abs((written == value).double().mean().item() - share) < 5 * (share * (1 - share) / N) ** 0.5


def test_conductance_is_never_negative():
    written = write(torch.full((N,), 2.0), DeviceModel(write_noise=0.3, noise_kind="range"), generator=seeded())
    assert written.min() == 0 and (written == 0).double().mean() > 0.3


def test_one_seed_is_one_chip_and_the_global_stream_is_untouched():
    weight, before = torch.randn(20, 30, generator=seeded(3)), torch.get_rng_state()
    chips = [program(weight, DeviceModel(), generator=seeded(seed)) for seed in (1, 1, 2)]
    assert torch.equal(chips[0].g_pos, chips[1].g_pos) and not torch.equal(chips[0].g_pos, chips[2].g_pos)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mapping", ["ternary", "linear"])
@pytest.mark.parametrize("per", ["tensor", "row"])
def test_no_noise_returns_the_weight(mapping, per):
    weight = torch.randn(6, 40, generator=seeded())
    effective = program(weight, DeviceModel(write_noise=0.0), mapping=mapping, per=per).effective()
    wanted = weight if mapping == "linear" else ternarize(weight, per=per).effective()
    assert torch.allclose(effective, wanted, atol=1e-6)


def test_ternary_signs_do_not_depend_on_scale():
    weight = torch.randn(8, 50, generator=seeded())
    small, large = ternarize(weight), ternarize(4 * weight)
    assert torch.equal(small.sign, large.sign) and torch.allclose(4 * small.scale, large.scale)


@pytest.mark.parametrize("bad, word", [(dict(g_off=60.0), "g_off"), (dict(stuck_on=0.6, stuck_off=0.6), "stuck"), (dict(write_noise=-1.0), "write_noise"),
                                       (dict(noise_kind="pink"), "noise_kind"), (dict(read_noise=float("nan")), "read_noise")])
def test_devices_that_make_no_sense_are_named(bad, word):
    with pytest.raises(ValueError, match=word):
        DeviceModel(**bad)


@pytest.mark.parametrize("rows, signed", itertools.product([1, 7, 64, 128, 500], [False, True]))
def test_ideal_converters_make_tiles_invisible(rows, signed):
    x, weight = torch.rand(33, 150, generator=seeded()) - 0.5 * signed, torch.randn(17, 150, generator=seeded(1))
    found = tiled_mvm(x, weight, rows=rows, dac_bits=None, adc_bits=None)
    assert torch.allclose(found, x @ weight.T, atol=2e-4)
    fine = tiled_mvm(x, weight, rows=rows, dac_bits=16, adc_bits=16)
    assert torch.allclose(fine, x @ weight.T, atol=0.02)


@pytest.mark.parametrize("signed", [False, True])
def test_bit_serial_equals_one_pass_when_nothing_is_lost(signed):
    generator = seeded()
    x = torch.randint(-255 if signed else 0, 256, (20, 100), generator=generator).float()
    weight = torch.randint(-1, 2, (9, 100), generator=generator).float()
    serial = tiled_mvm(x, weight, rows=50, bit_serial=True, adc_bits=8, full_scale=127.0, x_max=255.0)
    assert torch.allclose(serial, x @ weight.T, atol=1e-2)


def test_converters_round_half_to_even_and_saturate():
    assert adc_quantize(torch.tensor([0.5, 1.5, 2.5, -9.0]), 3, 3.0).tolist() == [0.0, 2.0, 2.0, -3.0]
    assert dac_quantize(torch.tensor([0.5, 9.0]), 1, 1.0).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="adc_bits"):
        adc_quantize(torch.zeros(1), 1, 1.0)


def test_read_noise_at_the_output_equals_noise_on_every_cell():
    device, x = DeviceModel(write_noise=0.0, read_noise=0.05), torch.rand(1, 12, generator=seeded())
    layer = program(torch.randn(1, 12, generator=seeded(1)), device)
    chip = Crossbar(layer, CrossbarConfig(dac_bits=None, adc_bits=None))
    short = chip.mvm(x.expand(N, -1), generator=seeded(2))[:, 0]
    noise = torch.randn(2, N, 12, generator=seeded(3)) * 0.05
    cells = layer.scale * (layer.g_pos * (1 + noise[0]) - layer.g_neg * (1 + noise[1]))
    long = (x * cells).sum(1)
    assert abs((short.std() / long.std()).item() - 1) < 5 / N**0.5
    assert abs((short.mean() - long.mean()).item()) < 5 * long.std().item() * (2 / N) ** 0.5


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (6, 1), (16, 12), (12, 20)])
@pytest.mark.parametrize("r_wire", [0.5, 10.0])
def test_wires_agree_with_another_solver(shape, r_wire):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # its drawings need Cairo, its solver does not
        badcrossbar = pytest.importorskip("badcrossbar")
    generator = np.random.default_rng(0)
    g, v = np.where(generator.random(shape) < 0.4, 50e-6, 2e-6), generator.random((shape[0], 3))
    theirs = badcrossbar.compute(v, 1 / g, r_wire).currents.output.T
    ours = solve_ir_drop(g, v, r_wire)
    assert np.abs(ours / theirs - 1).max() < 1e-10


def test_wires_with_dead_cells_and_bad_arrays():
    g = np.full((5, 4), 5e-5)
    g[:, 1] = 0
    currents = solve_ir_drop(g, np.ones(5), 3.0)
    assert abs(currents[1]) < 1e-12 and (currents[[0, 2, 3]] > 0).all()
    assert np.array_equal(wire_transfer(g, 0.0), g)
    for bad in (np.full((2, 2), np.nan), np.full((2, 2), -1.0), np.ones(3)):
        with pytest.raises(ValueError, match="g has shape"):
            wire_transfer(bad, 1.0)
    with pytest.raises(ValueError, match="v has shape"):
        solve_ir_drop(g, np.ones(4), 1.0)


def test_crossbar_refuses_what_does_not_fit():
    layer = program(torch.randn(4, 10, generator=seeded()), DeviceModel(write_noise=0.0))
    chip = Crossbar(layer).calibrate(torch.rand(8, 10, generator=seeded()))
    with pytest.raises(ValueError, match="is needed"):
        chip.mvm(torch.rand(2, 9))
    with pytest.raises(ValueError, match="finite"):
        chip.calibrate(torch.full((2, 10), float("nan")))
    with pytest.raises(ValueError, match="flatten"):
        Crossbar(program(torch.randn(4, 2, 3, generator=seeded()), DeviceModel(write_noise=0.0)))
    with pytest.raises(ValueError, match="wire_resistance"):
        CrossbarConfig(wire_resistance=-1.0)
    assert chip.mvm(torch.zeros(1, 10)).abs().max() == 0
