"Properties of EoRA (section numbers of the method's spec are left out: each name says what must hold)."
import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hkust_demos.data.text import demo_corpora
from hkust_demos.files import DataNotInstalled
from hkust_demos.llm import eora
from hkust_demos.llm.adapters import base_hash
from hkust_demos.llm.calibration import InputStatistics, auto_shrinkage, collect_input_statistics, linear_layers
from hkust_demos.llm.compress import Compressor, compress_model, prune_sparsegpt, quantize_gptq
from hkust_demos.llm.eora import (allocate_ranks, compress_and_compensate, layer_error, low_rank_path, output_energy, plain_factors,
                                  predicted_error_curve, solve_paths)
from hkust_demos.llm.eora_apply import best_text, calibration_corpora
from hkust_demos.llm.eora_study import build_study
from hkust_demos.llm.eora_tokens import calibration_rows, reading_lengths, rivals, token_variants
from hkust_demos.llm.evaluate import perplexity
from hkust_demos.llm.lowrank import CompensatedLinear, attach_paths, compensation_disabled
from hkust_demos.llm.models import load_demo_lm

SHAPES = [(12, 20), (20, 12), (16, 16)]


def problem(shape, seed=0, tokens=200):
    "A compression error, the second moment and the mean absolute input of correlated inputs."
    generator = torch.Generator().manual_seed(seed)
    n_out, n_in = shape
    inputs = torch.randn(tokens, n_in, generator=generator) @ torch.randn(n_in, n_in, generator=generator) * torch.logspace(-1, 1, n_in)
    return torch.randn(n_out, n_in, generator=generator), inputs.T @ inputs / tokens, inputs.abs().mean(0)


def close(a, b, tolerance):
    "Relative difference in the Frobenius norm."
    assert (a - b).norm() <= tolerance * b.norm().clamp(min=1e-12), ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
def test_no_other_path_of_the_rank_is_better(shape):
    delta, cov, mean_abs = problem(shape)
    best = layer_error(delta, low_rank_path(delta, 4, "eora", cov), cov)
    for method in ("svd", "act", "rms"):
        assert best <= layer_error(delta, low_rank_path(delta, 4, method, cov, mean_abs), cov) * (1 + 1e-5)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        path = low_rank_path(delta, 4, "eora", cov)
        B = path.B + 0.05 * torch.randn(path.B.shape, generator=generator)
        error = (delta - B @ path.A)
        assert best <= (error @ cov * error).sum() * (1 + 1e-5)


@pytest.mark.parametrize("method", ["eora", "rms", "svd"])
@pytest.mark.parametrize("shape", [*SHAPES, (40, 9), (9, 40)])
def test_fast_path_is_the_plain_path(shape, method):
    "The machinery computes what the four lines of the page compute, spectrum included."
    delta, cov, _ = problem(shape)
    metric = {"eora": cov, "rms": torch.diag(cov.diagonal()), "svd": torch.eye(shape[1])}[method]
    for rank in (1, 4, min(shape)):
        B, A, spectrum = plain_factors(delta.double(), metric.double(), rank)
        path = low_rank_path(delta, rank, method, cov)
        close(path.product().double(), B @ A, 1e-3)
        close(path.error_spectrum.double(), spectrum[:min(shape)], 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_predicted_curve_is_the_error_of_every_rank(shape):
    delta, cov, _ = problem(shape)
    curve, total = predicted_error_curve(delta, cov), layer_error(delta, None, cov)
    assert len(curve) == min(shape) + 1
    for rank in range(1, min(shape) + 1):
        assert abs(layer_error(delta, low_rank_path(delta, rank, "eora", cov), cov) - curve[rank]) < 1e-4 * total
    assert abs(curve[0] - total) < 1e-5 * total


@pytest.mark.parametrize("shape", SHAPES)
def test_no_input_becomes_worse(shape):
    delta, cov, _ = problem(shape)
    left = delta - low_rank_path(delta, 5, "eora", cov).product()
    inputs = torch.randn(1000, shape[1], generator=torch.Generator().manual_seed(3))
    assert ((inputs @ left.T).norm(dim=1) <= (inputs @ delta.T).norm(dim=1) * (1 + 1e-4)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_are_nested_and_the_full_rank_restores(shape):
    delta, cov, _ = problem(shape)
    full = low_rank_path(delta, min(shape), "eora", cov)
    close(full.product(), delta, 1e-3)
    for rank in (1, 3, 7):
        close(full.truncate(rank).product(), low_rank_path(delta, rank, "eora", cov).product(), 1e-3)


def test_no_error_gives_a_zero_path_without_nan():
    _, cov, mean_abs = problem((12, 20))
    for method in ("eora", "svd", "act", "rms"):
        path = low_rank_path(torch.zeros(12, 20), 3, method, cov, mean_abs)
        assert path.product().abs().max() == 0 and torch.isfinite(path.A).all() and torch.isfinite(path.B).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_special_metrics(shape):
    delta, cov, _ = problem(shape)
    close(low_rank_path(delta, 4, "eora", torch.eye(shape[1])).product(), low_rank_path(delta, 4, "svd").product(), 1e-4)
    diagonal = torch.diag(cov.diagonal())
    close(low_rank_path(delta, 4, "eora", diagonal).product(), low_rank_path(delta, 4, "rms", cov).product(), 1e-3)
    close(low_rank_path(delta, 4, "act", mean_abs=cov.diagonal().sqrt()).product(), low_rank_path(delta, 4, "rms", cov).product(), 1e-3)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("shape", SHAPES)
def test_scale_of_the_second_moment_does_not_matter(shape, scale):
    delta, cov, _ = problem(shape)
    close(low_rank_path(delta, 4, "eora", cov * scale).product(), low_rank_path(delta, 4, "eora", cov).product(), 1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_turning_the_input_space_commutes(shape):
    delta, cov, _ = problem(shape)
    turn = torch.linalg.qr(torch.randn(shape[1], shape[1], generator=torch.Generator().manual_seed(5))).Q
    turned = low_rank_path(delta @ turn, 4, "eora", (turn.T @ cov @ turn + (turn.T @ cov @ turn).T) / 2)
    close(turned.product() @ turn.T, low_rank_path(delta, 4, "eora", cov).product(), 1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_published_form_agrees_and_refuses_singular_moments(shape):
    delta, cov, _ = problem(shape)
    close(low_rank_path(delta, 4, "eora-reference", cov).product(), low_rank_path(delta, 4, "eora", cov).product(), 1e-3)
    few = problem(shape, tokens=3)[1]
    with pytest.raises(ValueError, match="singular"):
        low_rank_path(delta, 4, "eora-reference", few)
    assert torch.isfinite(low_rank_path(delta, 4, "eora", few).product()).all()


def test_statistics_do_not_depend_on_order_or_batching():
    inputs = torch.randn(6, 10, 8, generator=torch.Generator().manual_seed(0)) + 1
    whole = InputStatistics(8).update(inputs)
    parts = InputStatistics(8)
    for row in inputs.flip(0):
        parts.update(row)
    close(parts.second_moment, whole.second_moment, 1e-6)
    merged = InputStatistics(8).update(inputs[:2]).merge(InputStatistics(8).update(inputs[2:]))
    close(merged.second_moment, whole.second_moment, 1e-6)
    flat = inputs.reshape(-1, 8)
    centered = (flat - flat.mean(0)).T @ (flat - flat.mean(0)) / len(flat)
    assert (whole.second_moment - centered).abs().max() > 0.5
    close(whole.second_moment, flat.T @ flat / len(flat), 1e-6)


def test_statistics_survive_a_file(tmp_path):
    one = InputStatistics(4).update(torch.randn(9, 4))
    one.save(tmp_path / "one.safetensors")
    two = InputStatistics.load(tmp_path / "one.safetensors")
    assert two.n_tokens == 9 and torch.equal(one.second_moment, two.second_moment) and torch.equal(one.mean_abs, two.mean_abs)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_few_tokens_and_dead_channels(shape, tokens):
    delta, cov, mean_abs = problem(shape, tokens=tokens)
    cov, mean_abs = cov.clone(), mean_abs.clone()
    cov[2], cov[:, 2], mean_abs[2] = 0, 0, 0
    for method in ("eora", "act", "rms"):
        path = low_rank_path(delta, 4, method, cov, mean_abs)
        assert torch.isfinite(path.product()).all()
        assert layer_error(delta, path, cov) <= layer_error(delta, None, cov) * (1 + 1e-4)


def test_weak_directions_are_separated_from_a_strong_one():
    "One direction a million times stronger than the rest must not blur the cut in single precision."
    delta, cov, _ = problem((40, 60))
    cov = cov + 1e7 * torch.outer(torch.ones(60), torch.ones(60))
    values, vectors = torch.linalg.eigh(delta.double() @ cov.double() @ delta.T.double())
    U = vectors.flip(1)[:, :10].float()
    close(low_rank_path(delta, 10, "eora", cov).product(), U @ (U.T @ delta), 1e-3)
    assert values[-1] > 1e5 * values[-11]


def test_allocation_matches_trying_everything():
    spectra = {"a": torch.tensor([9.0, 4.0, 1.0]), "b": torch.tensor([8.0, 7.0, 0.5]), "c": torch.tensor([3.0, 2.9, 2.8])}
    shapes, importance = {n: (5, 5) for n in spectra}, {n: 1.0 for n in spectra}
    for items in range(10):
        ranks = allocate_ranks(spectra, shapes, items * 20, importance=importance)
        gained = sum(spectra[n][:r].sum().item() for n, r in ranks.items())
        best = max(sum(s[:r].sum().item() for s, r in zip(spectra.values(), choice))
                   for choice in itertools.product(range(4), repeat=3) if sum(choice) <= items)
        assert abs(gained - best) < 1e-6 and sum(ranks.values()) <= items
    assert set(allocate_ranks(spectra, shapes, 1e9, multiple_of=2).values()) == {2}


@pytest.fixture()
def tiny():
    "A random Llama with tied embeddings and its tokens."
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, tie_word_embeddings=True)
    return LlamaForCausalLM(config).eval().requires_grad_(False), torch.randint(0, 100, (6, 40))


def test_path_beside_a_layer_equals_merged_and_off_is_exact():
    delta, cov, _ = problem((12, 20))
    linear = torch.nn.Linear(20, 12).requires_grad_(False)
    layer, inputs = CompensatedLinear(linear, low_rank_path(delta, 4, "eora", cov)), torch.randn(30, 20)
    close(layer(inputs), layer.merge()(inputs), 1e-5)
    layer.enabled = False
    assert torch.equal(layer(inputs), linear(inputs))


def test_original_model_and_tied_head_stay(tiny):
    model, tokens = tiny
    before, statistics = base_hash(model), collect_input_statistics(model, tokens)
    repaired = compress_and_compensate(model, statistics, Compressor(bits=3), 6)
    assert base_hash(model) == before
    assert torch.equal(repaired.model.lm_head.weight, model.lm_head.weight)
    assert repaired.model.lm_head.weight is repaired.model.model.embed_tokens.weight
    with compensation_disabled(repaired.model):
        off = repaired.model(tokens).logits
    assert torch.equal(off, compress_model(model, statistics, Compressor(bits=3))(tokens).logits)
    assert max(path.rank for path in repaired.paths.values()) == 6


def test_key_and_value_get_their_largest_rank(tiny):
    model, tokens = tiny
    repaired = compress_and_compensate(model, collect_input_statistics(model, tokens), Compressor(bits=2), 24)
    ranks = {n.split(".")[-1]: p.rank for n, p in repaired.paths.items()}
    assert ranks["k_proj"] == ranks["v_proj"] == 16 and ranks["q_proj"] == 24


def test_hooks_are_gone_after_an_error(tiny, monkeypatch):
    model, tokens = tiny

    def stop(inputs):
        raise IndexError

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", stop)
    with pytest.raises(IndexError):
        collect_input_statistics(model, tokens)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_non_finite_inputs_name_the_layer(tiny):
    model, tokens = tiny
    model.model.layers[1].input_layernorm.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.self_attn\.q_proj.*NaN"):
        collect_input_statistics(model, tokens)


def test_in_place_changes_the_given_model(tiny):
    model, tokens = tiny
    statistics = collect_input_statistics(model, tokens)
    expected = compress_and_compensate(model, statistics, Compressor(bits=3), 4).model(tokens).logits
    repaired = compress_and_compensate(model, statistics, Compressor(bits=3), 4, in_place=True)
    assert repaired.model is model
    close(model(tokens).logits, expected, 1e-5)


def test_sequential_follows_the_repaired_prefix(tiny):
    model, tokens = tiny
    before = base_hash(model)
    lean = compress_and_compensate(model, None, Compressor(bits=2), 6, sequential=True, batches=tokens)
    assert base_hash(model) == before and set(lean.paths) == set(linear_layers(model))
    one_pass = compress_and_compensate(model, collect_input_statistics(model, tokens), Compressor(bits=2), 6)
    last = "model.layers.1.mlp.down_proj"
    assert (lean.paths[last].product() - one_pass.paths[last].product()).abs().max() > 1e-5


def test_pruning_and_rounding_walks_reduce_to_each_other():
    delta, cov, _ = problem((12, 20))
    close(prune_sparsegpt(delta, cov, n=None, bits=4), quantize_gptq(delta, cov, 4), 1e-6)
    close(prune_sparsegpt(delta, cov, n=None), delta, 1e-5)
    zeros = (prune_sparsegpt(delta, cov) == 0).reshape(12, -1, 4).sum(2)
    assert (zeros == 2).all()
    both = Compressor(bits=4, sparsity="2:4")(delta, _statistics(cov))
    assert ((both == 0).reshape(12, -1, 4).sum(2) >= 2).all()


def _statistics(cov):
    "Statistics with a given second moment."
    one = InputStatistics(len(cov))
    one._outer, one._abs, one.n_tokens = cov.clone(), cov.diagonal().sqrt(), 1
    return one


def test_progress_counts_layers(tiny):
    model, tokens = tiny
    statistics, seen = collect_input_statistics(model, tokens), []
    compressed = compress_model(model, statistics, Compressor(bits=3))
    solve_paths(model, compressed, statistics, 4, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (14, 14) and [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert build_study().variants and output_energy(torch.eye(2), torch.eye(2)) == 2


def test_spec_names_are_importable():
    for name in ("InputStatistics collect_input_statistics quantize_rtn quantize_gptq prune_nm prune_sparsegpt low_rank_path LowRankPath "
                 "predicted_error_curve layer_error allocate_ranks compress_and_compensate CompensatedModel CompensatedLinear "
                 "compensation_disabled export_peft load_peft perplexity Perplexity multiple_choice_accuracy load_demo_lm demo_corpora "
                 "capital_questions").split():
        assert hasattr(eora, name), name


def test_eora_beats_svd_on_the_real_model():
    "Wanda 2:4 on ten of thirty blocks at rank 64, in domain: at most 0.9 of the perplexity of plain SVD."
    model, tokenizer = load_demo_lm()
    text, first = demo_corpora(tokenizer)["python"], tuple(f"model.layers.{block}." for block in range(10))
    statistics = collect_input_statistics(model, text["calibration"][:5], lambda name, module: name.startswith(first))
    repaired = compress_and_compensate(model, statistics, Compressor(sparsity="2:4", pruning="wanda"), 64)
    ours = perplexity(repaired.model, text["evaluation"][:1]).value
    plain = perplexity(attach_paths(repaired.model, solve_paths(model, repaired.model, statistics, 64, "svd")), text["evaluation"][:1]).value
    assert ours < 0.9 * plain


def test_without_the_archive_its_rows_are_skipped_and_the_others_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("HKUST_DEMOS_CACHE", str(tmp_path))
    study = build_study()
    (sentence,) = study.skipped()
    n = sum(v.startswith(("c4/", "mixed/", "other/")) for v in study.variants)
    assert n > 100 and sentence.startswith(f"{n} variants (c4/released, ...) were not run: ") and "hkust-demos data get c4-wiki-text" in sentence
    assert any(v.startswith("python/") for v in study.variants)
    assert best_text() == "embedded"
    with pytest.raises(DataNotInstalled, match="data get c4-wiki-text"):
        calibration_corpora("c4")


def test_draws_of_the_fair_test_share_no_row_and_no_draw_reads_what_judges():
    rows = torch.arange(272)[:, None].expand(272, 512)
    laboratory = SimpleNamespace(archive={"calibration": rows}, embedded={"python": {"calibration": -torch.arange(1, 65)[:, None].expand(64, 512)}})
    draws = [set(calibration_rows(laboratory, "c4", draw)[:80, 0].tolist()) for draw in range(3)]
    assert [len(d) for d in draws] == [80] * 3 and len(set.union(*draws)) == 240
    assert torch.equal(calibration_rows(laboratory, "c4", 0), rows)
    mixed = calibration_rows(laboratory, "mixed", 0)[:, 0]
    assert mixed[:4].tolist() == [0, -1, 1, -2] and len(mixed) == 128


def test_rows_of_the_fair_test_compare_like_with_like():
    "A repaired row and its rivals read a common text; a row on other text keeps the compression of the web text."
    assert rivals("mixed/2560/gptq-3bit-row/eora/r64") == {"ratio": "c4/2560/gptq-3bit-row/svd/r64", "to_rms": "mixed/2560/gptq-3bit-row/rms/r64"}
    assert rivals("c4/131072/sparsegpt-2:4/none") == rivals("c4/released") == {}
    for variant in token_variants():
        for rival in rivals(variant).values():
            own, other = reading_lengths(variant, 0), reading_lengths(rival, 0)
            common = set(own) & set(other)
            assert rival in token_variants() and common and set(own) - common <= {"python"} and all(own[text] <= other[text] for text in common), variant


def test_shrinkage_is_on_by_default_and_zero_is_the_published_rule(tiny):
    model, tokens = tiny
    statistics = collect_input_statistics(model, tokens)
    compressed = compress_model(model, statistics, Compressor(bits=2))
    name, layer = next(iter(linear_layers(model).items()))
    delta, one = layer.weight.data - compressed.get_submodule(name).weight.data, statistics[name]
    alpha = auto_shrinkage(one.n_tokens, one.in_features)
    for given, used in (({}, alpha), ({"shrinkage": 0}, 0.0), ({"shrinkage": 1.0}, 1.0)):
        close(solve_paths(model, compressed, statistics, 4, **given)[name].product(), low_rank_path(delta, 4, "eora", one.second_moment, shrinkage=used).product(), 1e-4)
    close(solve_paths(model, compressed, statistics, 4, shrinkage=1.0)[name].product(), solve_paths(model, compressed, statistics, 4, "rms")[name].product(), 1e-4)
    found = [auto_shrinkage(t, d) for d in (576, 1536) for t in (10, 2_560, 10_240, 131_072)]
    assert found[:4] == sorted(found[:4], reverse=True) and set(found) <= {0.1, 0.15, 0.225, 0.5} and found[1] < found[5]


def test_sums_collected_apart_can_be_joined(tiny):
    "Parts of a text that were read at different times, as the study does."
    model, tokens = tiny
    whole, part = collect_input_statistics(model, tokens), collect_input_statistics(model, tokens[:2])
    rest = collect_input_statistics(model, tokens[2:])
    for name, one in {id(s): (n, s) for n, s in part.items()}.values():
        one.merge(rest[name])
    for name in whole:
        close(part[name].second_moment, whole[name].second_moment, 1e-5)
        assert part[name].n_tokens == whole[name].n_tokens
