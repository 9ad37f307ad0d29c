"Memristors and crossbars: statistics, edges, and wires against another solver."
import itertools
import warnings

import numpy as np
import pytest
import torch

from hkust_demos.memristor.crossbar import Crossbar, CrossbarConfig, adc_quantize, dac_quantize, solve_ir_drop, tiled_mvm, wire_transfer
from hkust_demos.memristor.device import DeviceModel, drift, program, ternarize, write, write_sigma

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


@pytest.mark.parametrize("rows, signed", list(itertools.product([1, 7, 64, 128, 500], [False, True])))
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
    with pytest.raises(ValueError, match="outputs"):
        Crossbar(program(torch.randn(4, generator=seeded()), DeviceModel(write_noise=0.0)))
    with pytest.raises(ValueError, match="NaN"):
        chip.mvm(torch.full((1, 10), float("nan")))
    with pytest.raises(ValueError, match="calibrate"):
        Crossbar(layer).mvm(torch.rand(1, 10))
    for bad, word in ((dict(rows=0), "rows"), (dict(dac_bits=17), "dac_bits"), (dict(adc_bits=1), "adc_bits"), (dict(dac_bits=None, bit_serial=True), "bit_serial")):
        with pytest.raises(ValueError, match=word):
            CrossbarConfig(**bad)
    with pytest.raises(ValueError, match="wire_resistance"):
        CrossbarConfig(wire_resistance=-1.0)
    assert chip.mvm(torch.zeros(1, 10)).abs().max() == 0


@pytest.mark.parametrize("bad, word", [(torch.tensor([1, 2]), "floating"), (torch.tensor([0.0, float("nan")]), "NaN"), (torch.tensor([float("inf")]), "infinite"),
                                       (torch.zeros(0), "at least one"), ([0.1, 0.2], "list")])
def test_weights_that_cannot_be_mapped_are_refused(bad, word):
    for call in (ternarize, lambda weight: program(weight, DeviceModel(write_noise=0.0), mapping="linear")):
        with pytest.raises(ValueError, match=word):
            call(bad)


def test_ternary_edges():
    for per in ("tensor", "row"):
        assert ternarize(torch.zeros(3, 4), per=per).effective().abs().max() == 0
        assert program(torch.zeros(3, 4), DeviceModel(write_noise=0.0), mapping="linear", per=per).effective().abs().max() == 0
    assert ternarize(torch.tensor([1.0, 2.0, -3.0]), factor=1.0).sign.tolist() == [0, 0, -1]  # strict: 2 equals the threshold
    rows = ternarize(torch.randn(5, 2, 3, 3, generator=seeded()), per="row")
    assert rows.scale.shape == (5, 1, 1, 1) and rows.sign.dtype == torch.int8
    weight = torch.randn(4, 6, generator=seeded(), requires_grad=True)
    assert not ternarize(weight).scale.requires_grad and not program(weight, DeviceModel(write_noise=0.0)).g_pos.requires_grad
    with pytest.raises(ValueError, match="factor"):
        ternarize(torch.ones(3), factor=-0.1)
    with pytest.raises(ValueError, match="per"):
        ternarize(torch.ones(3), per="column")
    with pytest.raises(ValueError, match="mapping"):
        program(torch.ones(3), DeviceModel(), mapping="log")


@pytest.mark.parametrize("name", ["g_on", "g_off", "write_noise", "read_noise", "stuck_on", "stuck_off", "wan_scale"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "a lot", None])
def test_every_number_of_a_device_is_checked(name, value):
    with pytest.raises(ValueError, match=name):
        DeviceModel(**{name: value})


def test_measured_noise_scales_with_the_device():
    levels = torch.linspace(0, 40, 50)
    published = write_sigma(levels, DeviceModel(g_on=40.0, noise_kind="wan2022", wan_time="2d"))
    stretched = write_sigma(levels * 2.5, DeviceModel(g_on=100.0, noise_kind="wan2022", wan_time="2d", wan_scale=3.0))
    assert torch.allclose(stretched, 7.5 * published, rtol=1e-5)
    assert (published > 0).all()
    asked = torch.full((10,), 20.0)
    assert torch.equal(write(asked, DeviceModel(noise_kind="wan2022", wan_scale=0.0)), asked)


def test_write_leaves_what_was_asked_and_needs_a_generator():
    asked = torch.full((100,), 20.0)
    write(asked, DeviceModel(stuck_on=0.5), generator=seeded())
    assert torch.equal(asked, torch.full((100,), 20.0))
    assert (write(asked, DeviceModel(stuck_on=1.0), generator=seeded()) == 50).all()
    assert (write(asked, DeviceModel(stuck_off=1.0), generator=seeded()) == 2).all()
    for device in (DeviceModel(), DeviceModel(write_noise=0.0, stuck_off=0.1)):
        with pytest.raises(ValueError, match="generator"):
            write(asked, device)


def test_more_stuck_cells_leave_the_noise_of_the_others():
    asked = torch.full((10_000,), 20.0)
    free, stuck = (write(asked, DeviceModel(stuck_on=share), generator=seeded()) for share in (0.0, 0.2))
    alive = stuck != 50
    assert torch.equal(free[alive], stuck[alive])


def test_retention_has_the_moments_of_its_law():
    asked, day = torch.full((N,), 30.0, dtype=torch.float64), 86400.0
    moved = drift(asked, day, law="ibm", generator=seeded())
    mean, spread = 30 - 0.089 * np.log(day), 0.4118 + 0.042 * np.log(day)
    assert abs(moved.mean().item() - mean) < 5 * spread / N**0.5
    assert abs(moved.std().item() / spread - 1) < 5 / (2 * N) ** 0.5
    assert drift(torch.zeros(1000), day, law="ibm", generator=seeded()).min() == 0
    assert torch.allclose(drift(asked, 100.0, nu=0.5), asked / 10) and torch.equal(drift(asked, 1.0), asked)
    for bad, word in ((dict(seconds=0.5), "seconds"), (dict(seconds=2.0, law="log"), "law"), (dict(seconds=2.0, nu=-1.0), "nu"), (dict(seconds=2.0, law="ibm"), "generator")):
        with pytest.raises(ValueError, match=word):
            drift(asked, **bad)


def oracle(x, matrix, config, x_max, full_scale):
    "The published steps one after the other: positive and negative read, pulses, tiles, converters."
    found = torch.zeros(len(x), matrix.shape[1], dtype=matrix.dtype)
    for sign in (1, -1):
        inputs = dac_quantize((sign * x).clamp(min=0), config.dac_bits, x_max)
        step = x_max / (2**config.dac_bits - 1)
        code = (inputs / step).round().long()
        pulses = [((code >> bit & 1).to(matrix.dtype), step * 2**bit) for bit in range(config.dac_bits)] if config.bit_serial else [(inputs, 1.0)]
        for pulse, value in pulses:
            for part, tile in zip(pulse.split(config.rows, 1), matrix.split(config.rows)):
                found += sign * value * adc_quantize(part @ tile, config.adc_bits, full_scale)
    return found


@pytest.mark.parametrize("bit_serial, mapping, per, dac_bits", list(itertools.product([False, True], ["ternary", "linear"], ["tensor", "row"], [4, 10])))
def test_the_fast_product_is_the_published_one(bit_serial, mapping, per, dac_bits):
    weight, x = torch.randn(6, 3, 5, 5, generator=seeded(), dtype=torch.float64), torch.randn(700, 75, generator=seeded(1), dtype=torch.float64)
    layer = program(weight, DeviceModel(), mapping=mapping, per=per, generator=seeded(2))
    config = CrossbarConfig(rows=32, dac_bits=dac_bits, adc_bits=6, bit_serial=bit_serial)
    chip = Crossbar(layer, config).calibrate(x)
    slow = oracle(x, (layer.g_pos - layer.g_neg).flatten(1).T, config, chip.reader.x_max, chip.reader.full_scale) * layer.scale.flatten()
    assert torch.allclose(chip.mvm(x), slow, atol=1e-9 * slow.abs().max().item())
    assert chip.reader.x_max == x.abs().max().item()


def test_the_short_cut_of_lossless_pulses_takes_no_other_turn():
    weight, x = torch.randint(-1, 2, (9, 100), generator=seeded()).double(), torch.randint(0, 256, (40, 100), generator=seeded(1)).double()
    for full_scale in (127.0, 63.5, 20.0, 100.0):  # whole steps, half steps, clipping, odd steps
        config = CrossbarConfig(rows=50, bit_serial=True)
        found = tiled_mvm(x, weight, rows=50, bit_serial=True, full_scale=full_scale, x_max=255.0)
        assert torch.allclose(found, oracle(x, weight.T.contiguous(), config, 255.0, full_scale), atol=1e-6)


@pytest.mark.parametrize("kind", ["proportional", "range", "wan2022"])
@pytest.mark.parametrize("bit_serial", [False, True])
def test_read_noise_of_tiles_and_pulses_adds_up(kind, bit_serial):
    device = DeviceModel(write_noise=0.0, wan_scale=0.0, read_noise=0.03, noise_kind=kind)
    layer, x = program(torch.randn(3, 20, generator=seeded()), device), torch.rand(1, 20, generator=seeded(1))
    chip = Crossbar(layer, CrossbarConfig(rows=8, dac_bits=3, adc_bits=None, bit_serial=bit_serial)).calibrate(x)
    many = x.expand(N, -1)
    found, again = (chip.mvm(many, generator=seeded(4)).double() for _ in range(2))
    sigma2 = torch.full_like(layer.g_pos, 2 * (0.03 * 50) ** 2) if kind == "range" else 0.03**2 * (layer.g_pos**2 + layer.g_neg**2)
    step = x.max().item() / 7
    code = (x / step).round().long()
    drawn = sum((code >> bit & 1) * 4.0**bit for bit in range(3)) if bit_serial else code.double() ** 2
    spread = layer.scale * step * (drawn.double() @ sigma2.double().T).sqrt()
    assert torch.equal(found, again)
    assert ((found.std(0) / spread - 1).abs() < 5 / (2 * N) ** 0.5).all()
    assert ((found.mean(0) - chip.mvm(x).double()).abs() < 5 * spread / N**0.5 + 1e-5).all()


def test_reading_leaves_the_global_stream_and_the_inputs_alone():
    layer, x = program(torch.randn(5, 40, generator=seeded()), DeviceModel(), generator=seeded(1)), torch.randn(30, 40, generator=seeded(2))
    before, kept = torch.get_rng_state(), x.clone()
    Crossbar(layer, CrossbarConfig(bit_serial=True)).calibrate(x).mvm(x, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(x, kept)


def test_calibration_of_odd_inputs():
    layer = program(torch.randn(5, 40, generator=seeded()), DeviceModel(write_noise=0.0))
    silent = Crossbar(layer).calibrate(torch.zeros(4, 40))
    assert silent.mvm(torch.rand(2, 40, generator=seeded())).abs().max() == 0
    rare = torch.zeros(5000, 40)
    rare[0, 0] = 1.0  # 99.9 % of the sums are zero
    assert Crossbar(layer).calibrate(rare).mvm(rare[:1]).abs().max() > 0
    assert Crossbar(layer).calibrate(rare).mvm(torch.zeros(0, 40)).shape == (0, 5)
    half = Crossbar(layer).calibrate(torch.rand(100, 40, generator=seeded()))
    assert half.mvm(torch.full((1, 40), 50.0)).isfinite().all()  # saturates


@pytest.mark.parametrize("bit_serial", [False, True])
def test_energy_is_the_sum_over_cells_and_pulses(bit_serial):
    layer, x = program(torch.randn(7, 50, generator=seeded()), DeviceModel(), generator=seeded(1)), torch.rand(6, 50, generator=seeded(2)) - 0.3
    config = CrossbarConfig(rows=16, dac_bits=4, bit_serial=bit_serial, v_read=0.3, t_read=2e-9)
    chip = Crossbar(layer, config).calibrate(x)
    code = (x.abs() / chip.reader.x_max * 15).round().long()
    pulses = [(code >> bit & 1).double() for bit in range(4)] if bit_serial else [code.double() / 15]
    cells = (layer.g_pos + layer.g_neg).double() * 1e-6
    wanted = sum(((0.3 * pulse[:, None]) ** 2 * cells).sum((1, 2)) for pulse in pulses) * 2e-9
    found = chip.energy(x)
    assert torch.allclose(found["crossbar"], wanted, rtol=1e-6)
    assert (found["adc"], found["dac"]) == (2 * len(pulses) * 7 * 4, 2 * len(pulses) * 50)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2), (30, 11), (11, 30), (64, 64)])
@pytest.mark.parametrize("r_wire", [1e-3, 2.0, 1e4])
def test_both_ways_through_the_wires_agree(shape, r_wire):
    generator = np.random.default_rng(0)
    g, v = np.where(generator.random((2, *shape)) < 0.4, 50e-6, 2e-6), generator.random((shape[0], 3))
    g[0, 0, 0] = 0
    for one, transfer in zip(g, wire_transfer(g, r_wire)):
        nodal = solve_ir_drop(one, v, r_wire)
        assert (np.abs(transfer.T @ v - nodal) <= 1e-10 * np.abs(nodal)).all()
        assert np.allclose(wire_transfer(one, r_wire), transfer, rtol=1e-12, atol=0)


def test_a_crossbar_with_wires_is_its_arrays_side_by_side():
    layer, x = program(torch.randn(6, 50, generator=seeded()), DeviceModel(), generator=seeded(1)), torch.rand(4, 50, generator=seeded(2))
    chip = Crossbar(layer, CrossbarConfig(rows=20, dac_bits=None, adc_bits=None, wire_resistance=5.0))
    currents = np.zeros((6, 4))
    for sign, cells in ((1, layer.g_pos), (-1, layer.g_neg)):
        for part, inputs in zip(cells.split(20, 1), x.split(20, 1)):
            currents += sign * solve_ir_drop(part.T.double().numpy() * 1e-6, inputs.T.numpy(), 5.0)
    wanted = torch.from_numpy(currents.T).float() * 1e6 * layer.scale
    assert torch.allclose(chip.mvm(x), wanted, atol=1e-5 * wanted.abs().max().item())
    dead = Crossbar(layer, CrossbarConfig(dac_bits=None, adc_bits=None)).mvm(x)
    assert (chip.mvm(x) - dead).abs().max() > 1e-3 * dead.abs().max()


def test_match_currents_follow_the_voltages():
    layer, x = program(torch.randn(6, 50, generator=seeded()), DeviceModel(), generator=seeded(1)), torch.rand(4, 50, generator=seeded(2))
    chip = Crossbar(layer).calibrate(x)
    wanted = 0.2 * x / x.max() @ (layer.g_pos - layer.g_neg).T
    assert torch.allclose(chip.match_currents(x), wanted, atol=1e-4)
