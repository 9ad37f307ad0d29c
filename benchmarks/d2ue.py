"""D2UE's costs, each beside what it replaces, in one run.

    python benchmarks/d2ue.py [--out results/benchmark_d2ue.json]

1. Maps of 64 images from three learners of the shipped shape: all of them in one batch against the dual-space map alone, one image and one
   learner at a time (as released), and the largest difference of that map.
2. The gradients of the same batch with the learners stacked into one network (torch.func.stack_module_state and vmap) against one learner
   after the other, as the library does it.
3. A training step with the senior's features computed once for all images against anew in each step.
4. The spread over three learners from differences against torch.std.
"""
import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from torch.func import functional_call, grad, stack_module_state, vmap

from hkust_demos.data.phantoms import mni_slices
from hkust_demos.vision.autoencoders import ConvAutoencoder
from hkust_demos.vision.d2ue import _learner_maps, _spread, dual_space_uncertainty, layer_features, reconstruction_loss, repulsion_loss
from hkust_demos.vision.d2ue_apply import SHAPE


def timed(action, repeats: int = 5) -> tuple[float, object]:
    "(median seconds, result) of a call, after one that is not counted."
    result, seconds = action(), []
    for _ in range(repeats):
        begun = time.perf_counter()
        result = action()
        seconds.append(time.perf_counter() - begun)
    return median(seconds), result


def released_dual(learners, image: torch.Tensor) -> torch.Tensor:
    "The dual-space map of one image, one learner after the other, in the released code's steps."
    products = []
    for learner in learners:
        x = image.clone().requires_grad_()
        residual = learner(x).recon - x
        gradient, = torch.autograd.grad(residual.abs().mean(), x)
        products.append(residual.detach().abs() * gradient)
    return torch.stack(products).std(0).mean(1)


def stacked_gradients(learners, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    "Input gradients and residuals with all learners as one stacked network."
    parameters, buffers = stack_module_state(learners)

    def loss(x, weights, state):
        residual = functional_call(learners[0], (weights, state), (x,)).recon - x
        return residual.abs().flatten(1).mean(1).sum(), residual

    return vmap(grad(loss, has_aux=True), (None, 0, 0))(images, parameters, buffers)


def step(junior, optimizer, images: torch.Tensor, senior_features: torch.Tensor) -> None:
    "One training step of a junior."
    output = junior(images)
    loss = reconstruction_loss(output, images) + repulsion_loss(output.features[4], [senior_features])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def main() -> None:
    "Run all, print ratios, store them."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark_d2ue.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    images = torch.from_numpy(mni_slices(64, 0).images)[:, None] * 2 - 1
    learners = [ConvAutoencoder(**SHAPE).eval().requires_grad_(False) for _ in range(3)]

    batch_s, batch = timed(lambda: dual_space_uncertainty(learners, images))
    released_s, released = timed(lambda: torch.cat([released_dual(learners, image) for image in images.split(1)]), 3)
    difference = (batch.dual - released).abs().max().item()
    found = {"maps": {"images": 64, "learners": 3, "one_at_a_time_s": released_s, "batch_s": batch_s, "ratio": released_s / batch_s,
                      "largest_difference": difference}}
    print(f"maps of 64 images: {released_s:.2f} s one image and learner at a time, {batch_s:.3f} s in a batch: {released_s / batch_s:.1f}x, "
          f"largest difference {difference:.1e}")

    stacked_s, _ = timed(lambda: stacked_gradients(learners, images))
    looped_s, _ = timed(lambda: [_learner_maps(learner, images) for learner in learners])
    found["stacked"] = {"stacked_s": stacked_s, "one_after_the_other_s": looped_s, "ratio": stacked_s / looped_s}
    print(f"gradients of all learners: {stacked_s:.3f} s stacked into one network, {looped_s:.3f} s one after the other: {stacked_s / looped_s:.2f}x")

    junior = ConvAutoencoder(**SHAPE).train()
    optimizer, known = torch.optim.Adam(junior.parameters()), layer_features(learners[0], images)
    anew_s, _ = timed(lambda: step(junior, optimizer, images, layer_features(learners[0], images)))
    once_s, _ = timed(lambda: step(junior, optimizer, images, known))
    found["senior_features"] = {"anew_s": anew_s, "once_s": once_s, "ratio": anew_s / once_s}
    print(f"training step with one senior: {anew_s:.3f} s with its features anew, {once_s:.3f} s with them at hand: {anew_s / once_s:.2f}x")

    answers = torch.randn(3, *images.shape)
    std_s, _ = timed(lambda: answers.std(0))
    spread_s, _ = timed(lambda: _spread(answers))
    found["spread"] = {"torch_std_s": std_s, "differences_s": spread_s, "ratio": std_s / spread_s}
    print(f"spread over three learners: {std_s * 1000:.1f} ms with torch.std, {spread_s * 1000:.1f} ms from differences: {std_s / spread_s:.1f}x")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
