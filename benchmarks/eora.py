"""EoRA's costs, each beside what it replaces, in one run.

    python benchmarks/eora.py [--rank 128] [--tokens 51200] [--out results/benchmark_eora.json]

1. All linear layers of SmolLM2-135M, Wanda 2:4: our solve against the published arithmetic (float64 eigendecomposition of C, SVD of the
   projected error, inverse; layer by layer, dense diagonal products as released) on the same matrices. Both are also held against
   a float64 solve without any inverse, so that a difference can be traced to its owner.
2. Input statistics of 51,200 tokens, streamed row by row: shared inputs against one matrix a layer, seconds a thousand tokens, and the
   memory of the sums, which does not grow with the text.
3. Compression of stacked layers against one sweep a layer (GPTQ, first blocks).
4. Peak memory of the default run of the app: statistics, compression, paths, perplexity.
"""
import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from hkust_demos.llm.calibration import collect_input_statistics
from hkust_demos.llm.compress import Compressor, compress_model
from hkust_demos.llm.eora import linear_layers, low_rank_path, solve_paths
from hkust_demos.llm.eora_apply import Recipe, best_text, calibration_corpora, calibration_rows, run_recipe
from hkust_demos.llm.models import load_llm


def timed(action):
    "(seconds, result) of a call."
    begun = time.perf_counter()
    result = action()
    return time.perf_counter() - begun, result


def peak_gb() -> float:
    "Largest memory of this process so far, in GB."
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def fair(cov: torch.Tensor) -> torch.Tensor:
    "A second moment that the published form can invert in single precision: its diagonal is raised by 1e-5 of the mean."
    return cov + 1e-5 * cov.diagonal().mean() * torch.eye(len(cov))


def exact(delta: torch.Tensor, cov: torch.Tensor, rank: int) -> torch.Tensor:
    "The optimal product in double precision."
    D = delta.double()
    U = torch.linalg.eigh(D @ cov.double() @ D.T).eigenvectors[:, -rank:]
    return U @ (U.T @ D)


def solves(model, statistics, rank: int) -> dict:
    "Our solve of the whole model against the published arithmetic."
    compressed = compress_model(model, statistics, Compressor(sparsity="2:4", pruning="wanda"))
    for one in {id(s): s for s in statistics.values()}.values():
        one._outer = fair(one._outer)
    layers, reference = linear_layers(model), {}
    times = [timed(lambda: solve_paths(model, compressed, statistics, rank, shrinkage=0))[0] for _ in range(3)]
    ours = solve_paths(model, compressed, statistics, rank, shrinkage=0)
    published_s, worst = 0.0, dict.fromkeys(("between", "ours", "published"), 0.0)
    for name, layer in layers.items():
        def published():
            delta = layer.weight - compressed.get_submodule(name).weight
            return low_rank_path(delta, min(rank, *delta.shape), "eora-reference", statistics[name].second_moment)
        seconds, reference = timed(published)
        published_s += seconds
        delta, cov = layer.weight - compressed.get_submodule(name).weight, statistics[name].second_moment
        best = exact(delta, cov, reference.rank)
        products = {"ours": ours[name].product().double(), "published": reference.product().double()}
        gaps = {who: product - best for who, product in products.items()} | {"between": products["ours"] - products["published"]}
        worst = {who: max(worst[who], (gaps[who].norm() / best.norm()).item()) for who in worst}
    ours_s = median(times + [timed(lambda: solve_paths(model, compressed, statistics, rank, shrinkage=0))[0] for _ in range(2)])
    return {"layers": len(layers), "rank": rank, "published_s": published_s, "ours_s": ours_s, "speed_up": published_s / ours_s,
            "largest_relative_difference": worst["between"], "ours_to_exact": worst["ours"], "published_to_exact": worst["published"]}


def stream_statistics(model, tokenizer, n_tokens: int) -> tuple[dict, dict]:
    "Seconds a thousand tokens of both ways to keep the sums, and the shared statistics."
    text = calibration_rows(calibration_corpora(best_text())[0], tokenizer, n_tokens)
    rows = text.repeat(-(-n_tokens // text.numel()), 1)[: n_tokens // text.shape[1]]  # embedded text is shorter: read it again
    collect_input_statistics(model, rows[:1])
    before = peak_gb()
    shared_s, statistics = timed(lambda: collect_input_statistics(model, rows))
    found = {"tokens": rows.numel(), "shared_s_per_1000": 1000 * shared_s / rows.numel(), "peak_gb_before": before, "peak_gb_after": peak_gb(),
             "sums_mb": sum(s._outer.nbytes for s in {id(s): s for s in statistics.values()}.values()) / 1e6}
    alone_s, _ = timed(lambda: collect_input_statistics(model, rows, share=False))
    return found | {"one_matrix_a_layer_s_per_1000": 1000 * alone_s / rows.numel(), "ratio": alone_s / shared_s}, statistics


def main() -> None:
    "Run all, print ratios, store them."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=51_200, help="of the statistics")
    parser.add_argument("--out", type=Path, default=Path("results/benchmark_eora.json"))
    args = parser.parse_args()

    def default_run():
        for step in run_recipe(Recipe(), methods=("eora", "svd", "act"), extra_ranks=(16,)):
            result = step.result
        return result.report["perplexity"]

    run_s, perplexities = timed(default_run)
    found = {"default_run": {"seconds": run_s, "peak_gb": peak_gb(), "perplexity": perplexities}}
    print(f"default run: {run_s:.0f} s, peak memory {found['default_run']['peak_gb']:.2f} GB")

    model, tokenizer = load_llm()
    found["statistics"], statistics = stream_statistics(model, tokenizer, args.tokens)
    s = found["statistics"]
    print(f"statistics of {s['tokens']:,} tokens: {s['one_matrix_a_layer_s_per_1000']:.2f} s a thousand with one matrix a layer, "
          f"{s['shared_s_per_1000']:.2f} s shared: {s['ratio']:.2f}x; {s['sums_mb']:.0f} MB of sums, peak {s['peak_gb_before']:.2f} before and {s['peak_gb_after']:.2f} GB after")

    first = {n: s for n, s in statistics.items() if n.startswith(("model.layers.0.", "model.layers.1."))}
    recipe = Compressor(bits=3, group_size=64)
    stacked_s, _ = timed(lambda: compress_model(model, first, recipe))
    single_s, _ = timed(lambda: compress_model(model, first, lambda weight, one: recipe(weight, one)))
    found["gptq_two_blocks"] = {"one_sweep_a_layer_s": single_s, "stacked_s": stacked_s, "ratio": single_s / stacked_s}
    print(f"GPTQ of two blocks: {single_s:.1f} s one sweep a layer, {stacked_s:.1f} s stacked: {single_s / stacked_s:.2f}x")

    found["solve"] = solves(model, statistics, args.rank)
    s = found["solve"]
    print(f"solve of {s['layers']} layers at rank {s['rank']}: published {s['published_s']:.1f} s, ours {s['ours_s']:.1f} s: "
          f"{s['speed_up']:.1f}x, largest relative difference {s['largest_relative_difference']:.1e} "
          f"(to a float64 solve: ours {s['ours_to_exact']:.1e}, published {s['published_to_exact']:.1e})")
    found["peak_gb_of_the_benchmark"] = peak_gb()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"peak memory of the whole benchmark {peak_gb():.2f} GB; written to {args.out}")


if __name__ == "__main__":
    main()
