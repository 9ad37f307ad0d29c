"""D2UE's costs, each beside what it replaces, in one run.

    python benchmarks/d2ue.py [--out results/benchmark_d2ue.json] [--rounds 15]

1. Maps of 64 images from the three shipped learners: all of them in one batch against the dual-space map alone, one image and one
   learner at a time (as released), and the largest difference of that map. The comparison is made in double precision; in single
   precision a ReLU within rounding of its kink makes even two plain programs differ on about one image in seventy.
2. The same batch with the plain networks against their lean form, which the library uses.
3. The gradients of the batch with the learners stacked into one network (torch.func.stack_module_state and vmap) against one lean
   learner after the other.
4. A training step with the senior's features computed once for all images against anew in each step.
5. The spread over three learners from differences against torch.std.

The sides of a comparison take turns, round after round, and each is judged by its fastest round, so that other work on the machine
disturbs both alike and least. `ratio_rounds` holds the slowest and the median ratio of single rounds.
"""
import argparse
import copy
import json
import os
from pathlib import Path

import torch
from torch.func import functional_call, grad, stack_module_state, vmap

from hkust_demos.data.phantoms import mni_slices
from hkust_demos.vision.autoencoders import ConvAutoencoder, layer_features
from hkust_demos.vision.d2ue import reconstruction_loss, repulsion_loss
from hkust_demos.vision.d2ue_ensembles import SHAPE, load_ensemble
from hkust_demos.vision.lean import lean
from hkust_demos.vision.uncertainty import _combine, _learner_maps, _spread, dual_space_uncertainty

from _timing import race


def released_dual(learners, image: torch.Tensor) -> torch.Tensor:
    "The dual-space map of one image, one learner after the other, in the released code's steps."
    products = []
    for learner in learners:
        x = image.clone().requires_grad_()
        residual = learner(x).recon - x
        gradient, = torch.autograd.grad(residual.abs().mean(), x)
        products.append(residual.detach().abs() * gradient)
    return torch.stack(products).std(0).mean(1)


def plain_maps(learners, images: torch.Tensor):
    "All maps of a batch from the networks as they are."
    return _combine(images, [_learner_maps(learner, images) for learner in learners])


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
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    images = torch.from_numpy(mni_slices(64, 0).images)[:, None] * 2 - 1
    learners = load_ensemble("rar").learners
    record = {"threads": torch.get_num_threads(), "load_before": os.getloadavg()[0]}

    def report(name: str, words: str, slow, fast, rounds: int) -> tuple[object, object]:
        record[name], *results = race(slow, fast, rounds)
        f = record[name]
        print(f"{words}: {f['slow_s'] * 1000:.1f} and {f['fast_s'] * 1000:.1f} ms, {f['ratio']:.2f}x (CPU time {f['ratio_cpu_time']:.2f}x; single "
              f"rounds {f['ratio_rounds']['slowest']:.2f}x at least, {f['ratio_rounds']['median']:.2f}x in the middle)", flush=True)
        return results

    released, batch = report("maps", "maps of 64 images, one image and learner at a time and in a batch",
                             lambda: torch.cat([released_dual(learners, image) for image in images.split(1)]),
                             lambda: dual_space_uncertainty(learners, images), args.rounds)
    exact_learners, exact_images = [copy.deepcopy(learner).double() for learner in learners], images.double()
    exact = torch.cat([released_dual(exact_learners, image) for image in exact_images.split(1)])
    double = (dual_space_uncertainty(exact_learners, exact_images).dual - exact).abs().max().item()
    single = {name: (found - exact).abs().flatten(1).amax(1) for name, found in (("one_at_a_time", released), ("batch", batch.dual))}
    record["maps"].update(images=64, learners=3, largest_value=exact.max().item(), largest_difference_double=double, single_precision={
        name: {"median_image": error.median().item(), "largest": error.max().item()} for name, error in single.items()})
    print(f"   largest difference {double:.1e} in double precision (the map's largest value is {exact.max():.1e}); in single precision from there, "
          + ", ".join(f"{name}: {error.max():.1e} (median image {error.median():.1e})" for name, error in single.items()))
    report("lean", "the same batch, plain networks and lean", lambda: plain_maps(learners, images),
           lambda: dual_space_uncertainty(learners, images), args.rounds)
    quick = [lean(learner) for learner in learners]
    report("stacked", "gradients of all learners, stacked into one network and one after the other", lambda: stacked_gradients(learners, images),
           lambda: [_learner_maps(learner, images) for learner in quick], args.rounds)

    junior = ConvAutoencoder(**SHAPE).train()
    optimizer, known = torch.optim.Adam(junior.parameters()), layer_features(learners[0], images)
    report("senior_features", "training step with the senior's features anew and at hand",
           lambda: step(junior, optimizer, images, layer_features(learners[0], images)), lambda: step(junior, optimizer, images, known), args.rounds)

    answers = torch.randn(3, *images.shape)
    report("spread", "spread over three learners, torch.std and differences", lambda: answers.std(0), lambda: _spread(answers), args.rounds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
