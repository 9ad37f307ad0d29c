"""What a simulated crossbar costs beside a plain product, and its short-cuts beside what they replace, in one run.

    python benchmarks/crossbar.py [--threads 1] [--out results/benchmark_crossbar.json]

1. Three layers (vectors, rows, columns): DAC, tiles of 128 rows and 8-bit ADC, as factor over torch.nn.functional.linear; the same with the
   steps written one after the other (fresh memory at each), with read noise at the outputs, bit-serial, and bit-serial where nothing is lost.
2. Read noise of 16 vectors drawn at the outputs against fresh noise on every cell for every vector.
3. Transfer matrix of a 128 x 128 tile with wires: row after row against one sparse factorization with a right-hand side for each row.

Repeats of all variants are interleaved, and the fast ways must return what the slow ones do.
"""
import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

from hkust_demos.memristor.crossbar import Crossbar, CrossbarConfig, adc_quantize, dac_quantize, solve_ir_drop, wire_transfer
from hkust_demos.memristor.device import DeviceModel, program

LAYERS = [(256, 512, 512), (4096, 144, 16), (1024, 1152, 128)]
LIMITS = {(256, 512, 512): 2.0, (4096, 144, 16): 6.0}  # tiled over linear


def seeded(seed: int) -> torch.Generator:
    "A generator of its own."
    return torch.Generator().manual_seed(seed)


def interleaved(actions: dict, repeats: int) -> tuple[dict[str, float], dict]:
    "Median seconds and results of calls that take turns, after one round that is not counted."
    results, seconds = {name: action() for name, action in actions.items()}, {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            begun = time.perf_counter()
            results[name] = action()
            seconds[name].append(time.perf_counter() - begun)
    return {name: median(values) for name, values in seconds.items()}, results


def step_by_step(chip: Crossbar, x: torch.Tensor) -> torch.Tensor:
    "The published steps, each with memory of its own: DAC, then product and ADC of each tile."
    reader = chip.reader
    codes, total = dac_quantize(x, reader.dac_bits, reader.x_max) / reader.step, 0
    pulses = [((codes.round().int() >> bit & 1).to(x.dtype), 2.0**bit * reader.step) for bit in range(reader.dac_bits)] if reader.bit_serial else [(codes, 1.0)]
    for pulse, value in pulses:
        unit = 1.0 if reader.bit_serial else reader.step
        for part, tile in zip(pulse.split(reader.rows, 1), chip.difference.split(reader.rows)):
            total = total + value * adc_quantize(part @ tile * unit, reader.adc_bits, reader.full_scale)
    return total * chip.scale


def check(weight: torch.Tensor, x: torch.Tensor, config: CrossbarConfig) -> None:
    "In double precision the fast and the plain way are equal; in single precision a sum may fall on the other side of an ADC edge."
    chip = Crossbar(program(weight.double(), DeviceModel(), generator=seeded(2)), config).calibrate(x.double())
    assert torch.allclose(chip.mvm(x.double()), step_by_step(chip, x.double()), atol=1e-8 * weight.std().item())


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    "Distance over length."
    return ((found - wanted).norm() / wanted.norm()).item()


def layer_ratios(shape: tuple[int, int, int], repeats: int) -> dict:
    "One layer: every way of computing it over the plain product."
    n_vectors, n_rows, n_columns = shape
    x, weight = torch.rand(n_vectors, n_rows, generator=seeded(0)), torch.randn(n_columns, n_rows, generator=seeded(1))
    written, perfect = program(weight, DeviceModel(), generator=seeded(2)), program(weight, DeviceModel(write_noise=0.0))
    chip, serial = (Crossbar(written, CrossbarConfig(bit_serial=pulses)).calibrate(x) for pulses in (False, True))
    lossless = Crossbar(perfect, CrossbarConfig(bit_serial=True)).calibrate(x)
    lossless.reader = replace(lossless.reader, full_scale=127 * 48.0)  # one level for each pair of cells that is on
    effective, noise = written.effective(), seeded(3)
    seconds, results = interleaved({
        "linear": lambda: F.linear(x, effective), "tiled": lambda: chip.mvm(x), "step by step": lambda: step_by_step(chip, x),
        "read noise": lambda: chip.mvm(x, generator=noise), "bit-serial": lambda: serial.mvm(x),
        "bit-serial, step by step": lambda: step_by_step(serial, x), "bit-serial, lossless": lambda: lossless.mvm(x)}, repeats)
    for config in (chip.config, serial.config):
        check(weight, x[:64], config)
    assert relative(results["tiled"], results["step by step"]) < 0.005 and relative(results["bit-serial"], results["bit-serial, step by step"]) < 0.005
    assert relative(results["bit-serial, lossless"], step_by_step(lossless, x)) < 1e-4
    error = relative(results["tiled"], results["linear"])
    assert error < 0.05, error
    return {"shape": shape, "linear_s": seconds["linear"], "relative_error": error,
            "ratios": {name: value / seconds["linear"] for name, value in seconds.items() if name != "linear"}}


def read_noise(repeats: int) -> dict:
    "Noise of 16 vectors at the outputs against noise on the cells."
    device, x = DeviceModel(write_noise=0.0), torch.rand(16, 512, generator=seeded(0))
    layer = program(torch.randn(512, 512, generator=seeded(1)), device)
    chip, noise = Crossbar(layer, CrossbarConfig(dac_bits=None, adc_bits=None)), seeded(2)

    def on_cells() -> torch.Tensor:
        "Fresh conductances for each vector."
        draw = lambda g: (g * (1 + device.read_noise * torch.randn(g.shape, generator=noise))).T
        return torch.stack([one @ (draw(layer.g_pos) - draw(layer.g_neg)) for one in x]) * layer.scale

    seconds, results = interleaved({"outputs": lambda: chip.mvm(x, generator=noise), "cells": on_cells}, repeats)
    quiet = chip.mvm(x)
    spread = {name: (found - quiet).std().item() for name, found in results.items()}
    assert abs(spread["outputs"] / spread["cells"] - 1) < 5 * (1 / quiet.numel()) ** 0.5, spread
    return {"vectors": 16, "outputs_s": seconds["outputs"], "cells_s": seconds["cells"], "ratio": seconds["cells"] / seconds["outputs"], "spread": spread}


def wires(repeats: int) -> dict:
    "Transfer matrix of a tile of 128 x 128 with 2 ohm a segment."
    g = np.where(np.random.default_rng(0).random((128, 128)) < 0.4, 50e-6, 2e-6)
    seconds, results = interleaved({"rows": lambda: wire_transfer(g, 2.0), "sparse": lambda: solve_ir_drop(g, np.eye(128), 2.0).T}, repeats)
    difference = np.abs(results["rows"] / results["sparse"] - 1).max()
    assert difference < 1e-10, difference
    return {"rows_s": seconds["rows"], "sparse_s": seconds["sparse"], "ratio": seconds["sparse"] / seconds["rows"], "largest_difference": difference}


def main() -> None:
    "Run all, print ratios, store them."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark_crossbar.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {"threads": args.threads, "layers": [layer_ratios(shape, args.repeats) for shape in LAYERS], "read_noise": read_noise(5), "wires": wires(5)}
    print(f"{'vectors, rows, columns':24}{'linear ms':>10}" + "".join(f"{name:>26}" for name in found["layers"][0]["ratios"]))
    for row in found["layers"]:
        print(f"{', '.join(map(str, row['shape'])):24}{row['linear_s'] * 1000:10.2f}" + "".join(f"{ratio:25.1f}x" for ratio in row["ratios"].values()))
    for shape, limit in LIMITS.items():
        ratio = next(row["ratios"]["tiled"] for row in found["layers"] if row["shape"] == shape)
        print(f"{shape}: tiled + ADC {ratio:.2f}x of linear, allowed {limit:g}x: {'holds' if ratio <= limit else 'MISSED'}")
    noise, tile = found["read_noise"], found["wires"]
    print(f"read noise of 16 vectors: {noise['cells_s'] * 1000:.0f} ms on cells, {noise['outputs_s'] * 1000:.1f} ms at outputs: {noise['ratio']:.0f}x")
    print(f"wires of a 128 x 128 tile: {tile['sparse_s'] * 1000:.0f} ms by sparse solves, {tile['rows_s'] * 1000:.0f} ms row after row: {tile['ratio']:.1f}x, "
          f"largest difference {tile['largest_difference']:.0e}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
