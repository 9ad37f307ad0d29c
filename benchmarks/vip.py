"""ViP's costs, each beside what it replaces, in one run.

    python benchmarks/vip.py [--out results/benchmark_vip.json] [--rounds 61]

1. Text features of all symptoms (four diseases, sixteen sentences): one pass of the text tower for each class, as the released code does it,
   and one pass for all, cut to the longest sentence; before the toy CLIP and before a text tower of the size of CLIP ViT-B/16 (random weights,
   77 places, float32), where the classes' passes have CLIP's full length.
2. A training step on kept features: with every attention weight of CLIP storing gradients, as the released code leaves them, and with CLIP
   frozen in full. Peak memory of the gradients in bytes beside it.
3. A step with the context frozen (merge only): text features computed in every step, and once.

The sides of a comparison take turns, round after round, and each is judged by its fastest round; the large tower runs a twentieth of the rounds.
"""
import argparse
import json
import os
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from hkust_demos.data.lesion_world import DISEASES, disease_set
from hkust_demos.vision.clip_towers import encode_images, encode_prompts, freeze
from hkust_demos.vision.prompt_training import training_step
from hkust_demos.vision.symptoms import load_symptoms
from hkust_demos.vision.toy_clip import load_toy_clip
from hkust_demos.vision.vip import ViPModel

from _timing import race

NAMES = list(DISEASES)


class OfficialSize(torch.nn.Module):
    "A text tower of the size of CLIP ViT-B/16 with random weights."

    def __init__(self):
        super().__init__()
        self.text_model = CLIPTextModel(CLIPTextConfig(hidden_size=512, intermediate_size=2048, num_attention_heads=8, num_hidden_layers=12))
        self.text_projection = torch.nn.Linear(512, 512, bias=False)


def class_by_class(model: ViPModel) -> list[torch.Tensor]:
    "One pass a class."
    prompts = model.context(model.embeddings, model.order, model.owner)
    return [encode_prompts(model.clip, prompts[rows], model.mask[rows]) for rows in torch.arange(len(prompts)).split(model.sizes)]


def leave_attention(clip: torch.nn.Module, trainable: bool) -> None:
    "Whether CLIP's attention layers store gradients."
    for name, parameter in clip.named_parameters():
        parameter.requires_grad_(trainable and "attn" in name)
        if not trainable:
            parameter.grad = None


def main() -> None:
    "Run all, print ratios, store them."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/benchmark_vip.json"))
    parser.add_argument("--rounds", type=int, default=61)
    args = parser.parse_args()
    torch.manual_seed(0)
    record = {"threads": torch.get_num_threads(), "load_before": os.getloadavg()[0]}

    def report(name: str, words: str, slow, fast, rounds: int = args.rounds):
        found, one, other = race(slow, fast, rounds)
        record[name] = found
        print(f"{words}: {found['slow_s'] * 1000:.1f} and {found['fast_s'] * 1000:.1f} ms, {found['ratio']:.2f}x (CPU time {found['ratio_cpu_time']:.2f}x; single rounds "
              f"{found['ratio_rounds']['slowest']:.2f}x at least, {found['ratio_rounds']['median']:.2f}x in the middle)", flush=True)
        return one, other

    clip, tokenizer = load_toy_clip()
    model = ViPModel(clip, tokenizer, load_symptoms("toy"), NAMES)
    with torch.no_grad():
        one, other = report("text", "text features of sixteen symptoms, class by class and in one pass (toy)", lambda: class_by_class(model), model.symptom_features)
    record["text"]["largest_difference"] = max((a - b).abs().max().item() for a, b in zip(one, other))

    large, words = freeze(OfficialSize()), torch.randn(16, 77, 512)
    mask = torch.zeros(16, 77, dtype=torch.long)
    mask[:, :12] = 1
    with torch.no_grad():
        one, other = report("text_official_size", "the same for a tower of the size of ViT-B/16: four passes of 77 places, and one cut to 12",
                            lambda: torch.cat([encode_prompts(large, words[rows], mask[rows]) for rows in torch.arange(16).split(4)]),
                            lambda: encode_prompts(large, words[:, :12], mask[:, :12]), max(2, args.rounds // 20))
    record["text_official_size"]["largest_difference"] = (one - other).abs().max().item()

    images, labels, _ = disease_set(32, 0)
    features, optimizer = encode_images(clip, images), torch.optim.SGD(model.parameters(), 1e-4)

    def with_gradients() -> float:
        leave_attention(clip, True)
        loss = training_step(model, optimizer, features, labels)
        record["gradient_bytes_of_clip"] = sum(p.grad.numel() * 4 for p in clip.parameters() if p.grad is not None)
        leave_attention(clip, False)
        return loss

    report("step", "a training step of 32 pictures, with gradients for CLIP's attention and without", with_gradients, lambda: training_step(model, optimizer, features, labels))

    merge = ViPModel(clip, tokenizer, load_symptoms("toy"), NAMES, context=False)
    merging = torch.optim.SGD(merge.parameters(), 1e-4)

    def anew() -> float:
        merge.kept = merge.encode(merge.embeddings)
        return training_step(merge, merging, features, labels)

    report("frozen_context", "a step without context, text features in every step and once", anew, lambda: training_step(merge, merging, features, labels))
    record["load_after"] = os.getloadavg()[0]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
