"""Rotated models say what they said, in every supported family; records, copies and refusals."""
import copy
import itertools
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM,
                          Qwen3Config, Qwen3ForCausalLM)

from hkust_demos.llm.hadamard import hadamard_matrix, hadamard_plan, hadamard_transform
from hkust_demos.llm.quantize import QuantConfig, QuantizedLinear, quantize_model, set_activation_bits
from hkust_demos.llm.rotation import RotationRecord, RotationSpec, fuse_norms, invariance_error, rotate_model, untie_embeddings

SIZES = dict(vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12)
FAMILIES = {"llama": (LlamaForCausalLM, LlamaConfig, dict(attention_bias=True, mlp_bias=True)), "mistral": (MistralForCausalLM, MistralConfig, {}),
            "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}), "qwen3": (Qwen3ForCausalLM, Qwen3Config, {})}
IDS = torch.arange(40).reshape(2, 20)


class DoubleNorm(nn.Module):
    "An RMS norm in the precision of its input, where the stock one goes through float32."

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


def make(family, tied=False, dtype=torch.float64, exact_norms=True):
    "A tiny model with random gains and biases."
    model_class, config_class, more = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES, **more, tie_word_embeddings=tied)).to(dtype).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if "norm" in name:
            value.copy_(0.5 + torch.rand(value.shape))
        elif name.endswith("bias"):
            value.normal_()
    if exact_norms:
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                model.set_submodule(name, DoubleNorm(module))
    return model


@pytest.mark.parametrize("family, tied", list(itertools.product(FAMILIES, [False, True])))
def test_every_subset_of_rotations_is_invisible(family, tied):
    model = make(family, tied)
    for parts in itertools.product([False, True], repeat=4):
        rotated = rotate_model(model, RotationSpec(*parts, seed=2), inplace=False)
        assert invariance_error(model, rotated, IDS)["max_abs"] < 1e-9, parts


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-3), (torch.float64, 1e-5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_norms_hold_the_published_bounds(family, dtype, bound):
    model = make(family, dtype=dtype, exact_norms=False)
    assert invariance_error(model, rotate_model(model, RotationSpec(r2=True), inplace=False), IDS)["max_abs"] < bound


def test_a_random_rotation_and_one_of_your_own_are_invisible_too():
    model, R1 = make("llama"), torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64))[0]
    for rotated in (rotate_model(model, RotationSpec(mode="random"), inplace=False), rotate_model(model, R1=R1, inplace=False)):
        assert invariance_error(model, rotated, IDS)["max_abs"] < 1e-9
        assert rotated.rotation.tensors["R1"].shape == (48, 48)


def test_a_copy_leaves_the_original_alone():
    model = make("llama", tied=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rotate_model(model, inplace=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.config.tie_word_embeddings


def test_untying_survives_saving_and_loading(tmp_path):
    model = fuse_norms(make("llama", tied=True, dtype=torch.float32, exact_norms=False))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    again.tie_weights()
    assert again.get_output_embeddings().weight.data_ptr() != again.get_input_embeddings().weight.data_ptr()
    assert invariance_error(model, again, IDS)["max_abs"] < 1e-5


def test_untying_twice_keeps_one_copy():
    model = untie_embeddings(make("llama", tied=True))
    head = model.get_output_embeddings().weight
    assert untie_embeddings(model).get_output_embeddings().weight is head


def test_rotations_keep_singular_values_and_norms():
    model = fuse_norms(make("llama"))
    rotated = rotate_model(model, RotationSpec(), inplace=False)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            ours, theirs = (torch.linalg.svdvals(m.get_submodule(name).weight) for m in (model, rotated))
            assert torch.allclose(ours, theirs, atol=1e-10), name


def test_greedy_text_stays_the_same_with_a_cache():
    model = make("llama", dtype=torch.float32, exact_norms=False)
    rotated = rotate_model(model, RotationSpec(r1=True, r2=True, r3=True, r4=True), inplace=False)
    written = [m.generate(IDS[:1, :6], max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None) for m in (model, rotated)]
    assert torch.equal(*written)


def test_adapters_find_their_layers_in_a_rotated_and_quantized_model():
    model = quantize_model(rotate_model(make("llama", dtype=torch.float32, exact_norms=False)), QuantConfig(16, 8))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    names = [name for name, _ in wrapped.named_parameters() if "lora_A" in name]
    assert len(names) == 4 and any(name.endswith("mlp.down_proj.lora_A.default.weight") for name in names)
    assert isinstance(wrapped.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer"), QuantizedLinear)


def test_down_proj_sees_turned_inputs():
    model, seen = make("llama"), {}
    rotated = rotate_model(model, RotationSpec(r1=False), inplace=False)
    for name, m in (("plain", model), ("turned", rotated)):
        m.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0]))
        m(IDS)
    assert torch.allclose(hadamard_transform(seen["plain"]), seen["turned"], atol=1e-10)


def test_quantization_refuses_nothing_to_switch():
    with pytest.raises(ValueError, match="call quantize_model first"):
        set_activation_bits(make("llama"), 4)
    broken = make("llama")
    broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.*NaN"):
        quantize_model(broken, QuantConfig(4, 4))
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.*NaN"):
        rotate_model(broken)


def test_gptq_does_not_lose_to_rounding_on_its_own_text():
    model = make("llama", dtype=torch.float32, exact_norms=False)
    logits = model(IDS).logits
    rtn, gptq = (quantize_model(model, QuantConfig(3, 16, w_method=method), IDS)(IDS).logits for method in ("rtn", "gptq"))
    assert (gptq - logits).norm() < (rtn - logits).norm()


@pytest.mark.parametrize("damage", ["json", "tensors", "spec"])
def test_a_damaged_record_is_refused(tmp_path, damage):
    rotate_model(make("llama")).rotation.save(tmp_path)
    if damage == "json":
        (tmp_path / "rotation.json").write_text("{")
    elif damage == "spec":
        (tmp_path / "rotation.json").write_text('{"spec": {"r9": true}, "base_sha256": "", "rotated_sha256": ""}')
    else:
        (tmp_path / "rotation.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="no readable rotation record"):
        RotationRecord.load(tmp_path)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 28, 36, 44, 52, 60, 76, 108, 148, 344, 576, 1536])
def test_hadamard_matrices(n):
    H = hadamard_matrix(n)
    assert torch.equal(H.abs(), torch.ones(n, n, dtype=torch.float64)) and torch.equal(H @ H.T, n * torch.eye(n, dtype=torch.float64))
    x = torch.randn(3, n, dtype=torch.float64)
    assert torch.allclose(hadamard_transform(x, normalize=False), x @ H.T, atol=1e-9)


@pytest.mark.parametrize("n", [11008, 13824, 14336, 18944, 4864, 960, 2560])
def test_widths_of_large_models_have_a_plan_of_signs(n):
    pieces, power, is_hadamard = hadamard_plan(n)
    assert is_hadamard and np.prod(pieces) * power == n
    x = torch.randn(2, n)
    assert torch.allclose(hadamard_transform(x).norm(dim=1), x.norm(dim=1), rtol=1e-4)


def test_half_precision_and_turned_tensors():
    x = torch.randn(12, 36).T.half()
    assert torch.allclose(hadamard_transform(x).double(), hadamard_transform(x.double().contiguous()), atol=2e-3)


def test_an_odd_width_is_a_rotation():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Q = hadamard_transform(torch.eye(33 * 2, dtype=torch.float64))
    assert torch.allclose(Q @ Q.T, torch.eye(66, dtype=torch.float64), atol=1e-10)


def test_rotation_does_not_touch_a_rotated_copy():
    rotated = rotate_model(make("llama"))
    with pytest.raises(ValueError, match="rotated already"):
        rotate_model(copy.deepcopy(rotated))
