"""RoLoRA's costs, each beside what it replaces, in one run.

    python benchmarks/rotation.py [--rows 64] [--out results/benchmark_rotation.json]

1. The Hadamard transform of rows: two small matrix products (what the project uses) against the butterfly of log2(n) steps and against the
   product with the whole n x n matrix, at the widths of small and large models. All three give the same numbers.
2. A linear layer in integers, 8-bit weights and packed 4-bit weights with 8-bit activations, against the float32 layer: time and bytes. The
   integer products are PyTorch's own.
3. What R4 adds to one MLP of SmolLM2's size: the transform and the rounding of its inputs, as a share of the MLP's time.
"""
import argparse
import json
import os
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import nn

from hkust_demos.llm.hadamard import hadamard_matrix, hadamard_plan, hadamard_transform
from hkust_demos.llm.quantize import IntegerLinear, fake_quant_activation, quantize_weight_rtn


def timed(action, repeats: int = 9) -> tuple[float, object]:
    "(median seconds of this process, result) of a call, after one that is not counted; other programs do not count."
    result, seconds = action(), []
    for _ in range(repeats):
        begun = time.process_time()
        result = action()
        seconds.append(time.process_time() - begun)
    return median(seconds), result


WIDTHS = (576, 1536, 2048, 4096, 11008)
LAYERS = ((576, 576), (1536, 576), (4096, 4096))  # (out, in)


def butterfly(x: torch.Tensor, pieces: torch.Tensor, power: int) -> torch.Tensor:
    "The textbook fast transform: log2(power) rounds of sums and differences, then the pieces that are no power of two."
    table = x.reshape(len(x), len(pieces), power)
    half = 1
    while half < power:
        pairs = table.reshape(len(x), len(pieces), -1, 2, half)
        table = torch.stack((pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]), -2).reshape(len(x), len(pieces), power)
        half *= 2
    return (pieces @ table).reshape(x.shape) / x.shape[1] ** 0.5


def transforms(rows: int) -> list[dict]:
    "Seconds of three ways for each width."
    found = []
    for n in WIDTHS:
        x, (orders, power, _) = torch.randn(rows, n), hadamard_plan(n)
        dense = hadamard_matrix(n, torch.float32) / n**0.5
        pieces = hadamard_matrix(int(torch.tensor(orders or (1,)).prod()), torch.float32)
        ways = {"two_factors": lambda: hadamard_transform(x), "butterfly": lambda: butterfly(x, pieces, power), "dense": lambda: x @ dense.T}
        seconds, results = {}, {}
        for name, way in ways.items():
            seconds[name], results[name] = timed(way)
        differences = [(results[name] - results["dense"]).abs().max().item() for name in ("two_factors", "butterfly")]
        found.append({"n": n, **{f"{name}_s": s for name, s in seconds.items()}, "dense_over_two_factors": seconds["dense"] / seconds["two_factors"],
                      "butterfly_over_two_factors": seconds["butterfly"] / seconds["two_factors"], "largest_difference": max(differences)})
    return found


def integers(rows: int) -> list[dict]:
    "Seconds and bytes of integer layers against float32."
    found = []
    for out, width in LAYERS:
        linear, x = nn.Linear(width, out, bias=False).requires_grad_(False), torch.randn(rows, width)
        float_s, _ = timed(lambda: linear(x))
        for w_bits in (8, 4):
            whole = IntegerLinear(linear, w_bits, 8, n_shares=20)
            integer_s, result = timed(lambda: whole(x))
            expected = fake_quant_activation(x, 8) @ quantize_weight_rtn(linear.weight, w_bits, n_shares=20)[0].T
            found.append({"out": out, "in": width, "w_bits": w_bits, "float32_s": float_s, "integer_s": integer_s, "speed_up": float_s / integer_s,
                          "float32_bytes": 4 * linear.weight.numel(), "integer_bytes": whole.num_bytes, "bytes_ratio": 4 * linear.weight.numel() / whole.num_bytes,
                          "difference_to_simulated": ((result - expected).norm() / expected.norm()).item()})
    return found


def online(rows: int) -> dict:
    "What the transform R4 and the rounding of activations add to an MLP of SmolLM2."
    gate, up, down = nn.Linear(576, 1536, bias=False), nn.Linear(576, 1536, bias=False), nn.Linear(1536, 576, bias=False)
    x = torch.randn(rows, 576)
    with torch.inference_mode():
        inner = torch.nn.functional.silu(gate(x)) * up(x)
        mlp_s, _ = timed(lambda: down(torch.nn.functional.silu(gate(x)) * up(x)))
        transform_s, _ = timed(lambda: hadamard_transform(inner))
        rounding_s, _ = timed(lambda: (fake_quant_activation(x, 4), fake_quant_activation(inner, 4)))
    return {"mlp_s": mlp_s, "transform_s": transform_s, "simulated_rounding_s": rounding_s, "transform_share": transform_s / mlp_s, "rounding_share": rounding_s / mlp_s}


def main() -> None:
    "Run all and write the table."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=64, help="tokens a call (default 64)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "benchmark_rotation.json", help="where the table goes")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    table = {"rows": options.rows, "threads": 1, "transforms": transforms(options.rows), "integers": integers(options.rows), "online": online(options.rows)}
    for line in table["transforms"]:
        print(f"n {line['n']:>6}: dense / two factors {line['dense_over_two_factors']:6.1f}   butterfly / two factors {line['butterfly_over_two_factors']:6.1f}   difference {line['largest_difference']:.1e}")
    for line in table["integers"]:
        print(f"{line['out']} x {line['in']}, {line['w_bits']}-bit weights: float32 / integer time {line['speed_up']:5.2f}, bytes {line['bytes_ratio']:5.2f}")
    print(f"R4 adds {table['online']['transform_share']:.1%} to an MLP, simulated rounding {table['online']['rounding_share']:.1%}")
    at_4096 = next(line for line in table["transforms"] if line["n"] == 4096)
    assert at_4096["dense_over_two_factors"] > 5, at_4096
    assert max(line["largest_difference"] for line in table["transforms"]) < 1e-4
    assert max(line["difference_to_simulated"] for line in table["integers"]) < 1e-4
    options.out.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
