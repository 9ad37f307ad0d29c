"ViP's properties: what learns and what does not, what may be reordered, what is refused."
import json
import os
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from hkust_demos.vision.clip_sources import load_clip
from hkust_demos.vision.clip_towers import encode_images, encode_prompts, text_features, token_table, tokenize
from hkust_demos.vision.prompt_training import fit_prompts
from hkust_demos.vision.symptoms import ChatEndpoint, SymptomGenerator, load_symptoms, sort_phrases
from hkust_demos.vision.toy_clip import toy_tokenizer
from hkust_demos.vision.training import seeded
from hkust_demos.vision.vip import CoCoOp, CoOp, ContextPrompt, MergePrompt, ViPModel, zero_shot
from hkust_demos.vision.vip_views import live_view

NAMES = ["melanoma", "nevus"]
TOLD = {"melanoma": ["jagged edge", "several colors", "dark dots"], "nevus": ["brown color"]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "A random Hugging Face CLIP, saved to a folder and opened as a user's; its joint dimension is not its width, as in RN50."
    folder = tmp_path_factory.mktemp("clip")
    text = CLIPTextConfig(vocab_size=len(toy_tokenizer()), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                          max_position_embeddings=16, bos_token_id=2, eos_token_id=3, pad_token_id=0)
    vision = CLIPVisionConfig(hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
    seeded(lambda: CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)), 0).save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)
    return load_clip(folder)


@pytest.fixture(scope="module")
def features(tiny):
    "Features and labels of random pictures."
    clip, _, preprocess = tiny
    pictures = torch.rand(12, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    return encode_images(clip, preprocess(pictures)), torch.arange(12) % 2


def made(tiny, **options):
    "A ViP on the tiny CLIP."
    return seeded(lambda: ViPModel(tiny[0], tiny[1], TOLD, NAMES, **options), 0)


@pytest.mark.parametrize("options, trained", [
    ({}, {"context.vectors", "merge.u", "merge.W_q", "merge.W_k"}), ({"context": False}, {"merge.u", "merge.W_q", "merge.W_k"}),
    ({"merge": False}, {"context.vectors"}), ({"class_specific": True, "position": "front"}, {"context.vectors", "merge.u", "merge.W_q", "merge.W_k"})])
def test_training_changes_the_prompts_and_nothing_of_clip(tiny, features, options, trained):
    clip, before = tiny[0], {name: value.clone() for name, value in tiny[0].state_dict().items()}
    model = made(tiny, **options)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    fit_prompts(model, *features, lr=0.1, epochs=3)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained == set(model.state_dict())
    assert all(not torch.equal(start[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(before[name], value) for name, value in clip.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters()) and not clip.training


def test_the_number_of_parameters_is_the_papers(tiny):
    width, dim, K = 16, 8, 2
    assert sum(p.numel() for p in made(tiny).parameters()) == 4 * width + K * dim + 2 * dim**2
    assert sum(p.numel() for p in made(tiny, class_specific=True, n_ctx=2).parameters()) == K * 2 * width + K * dim + 2 * dim**2


def test_the_initial_state_is_the_mean_of_raw_symptoms(tiny):
    model = made(tiny)
    with torch.no_grad():
        model.merge.u.zero_()
    t, attention = model.pooled()
    means = F.normalize(torch.stack([V.mean(0) for V in model.symptom_features()]), dim=1)
    assert torch.allclose(t, means, atol=1e-6) and torch.allclose(torch.cat(attention), torch.tensor([1 / 3] * 3 + [1.0]))


def test_zero_shot_normalizes_before_the_mean_and_merge_does_not(tiny, features):
    model = made(tiny, context=False, merge=False)
    sentences = [[f"{phrase}." for phrase in TOLD[name]] for name in NAMES]
    plain = zero_shot(tiny[0], tiny[1], sentences, features[0])
    assert not torch.allclose(plain, model(features[0]), atol=1e-4)
    V = [F.normalize(v, dim=1).mean(0) for v in model.symptom_features()]
    assert torch.allclose(plain, model.scale * F.normalize(features[0], dim=1) @ F.normalize(torch.stack(V), dim=1).T, atol=1e-4)


def test_symptoms_may_be_shuffled_classes_may_be_reordered_and_twice_said_counts(tiny, features):
    model, f = made(tiny), features[0]
    shuffled = seeded(lambda: ViPModel(*tiny[:2], {**TOLD, "melanoma": TOLD["melanoma"][::-1]}, NAMES), 0)
    assert torch.allclose(shuffled(f), model(f), atol=1e-4)
    turned = ViPModel(*tiny[:2], dict(reversed(TOLD.items())), NAMES[::-1])
    turned.load_state_dict({**model.state_dict(), "merge.u": model.merge.u.detach().flip(0)})
    assert torch.allclose(turned(f).flip(1), model(f), atol=1e-4)
    twice = seeded(lambda: ViPModel(*tiny[:2], {**TOLD, "melanoma": [*TOLD["melanoma"], "dark dots"]}, NAMES), 0)
    assert not torch.allclose(twice(f), model(f), atol=1e-4)


@pytest.mark.parametrize("position", ["end", "middle", "front"])
def test_what_stands_behind_the_end_does_not_matter(tiny, position):
    model = made(tiny, position=position)
    alone = seeded(lambda: ViPModel(*tiny[:2], {"melanoma": TOLD["melanoma"], "nevus": ["dark streaks and redness around"]}, NAMES, position=position), 0)
    assert alone.embeddings.shape[1] > model.embeddings.shape[1]  # more padding behind the same phrases
    assert torch.allclose(alone.symptom_features()[0], model.symptom_features()[0], atol=1e-5)


def test_class_by_class_gives_what_one_pass_gives(tiny):
    model = made(tiny)
    one_by_one = [encode_prompts(tiny[0], model.context(model.embeddings[rows], model.order[rows], model.owner[rows]), model.mask[rows])
                  for rows in torch.arange(4).split(model.sizes)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one_by_one, model.symptom_features()))


def test_the_features_of_a_frozen_context_are_computed_once(tiny, features, monkeypatch):
    model, calls = made(tiny, context=False), []
    monkeypatch.setattr("hkust_demos.vision.vip.encode_prompts", lambda *a: calls.append(1))
    fit_prompts(model, *features, epochs=2)
    assert not calls


def test_cocoop_sees_the_picture_and_coop_does_not(tiny, features):
    shared, child = CoOp(*tiny[:2], NAMES), seeded(lambda: CoCoOp(*tiny[:2], NAMES), 0)
    assert shared.class_features().shape == (2, 8) and child(features[0]).shape == (12, 2)
    child(features[0])[:, 0].sum().backward()
    assert child.net[0].weight.grad.abs().max() > 0 and all(p.grad is None for p in tiny[0].parameters())
    assert torch.allclose(child(features[0])[:3], child(features[0][:3]), atol=1e-4)


def test_the_eager_and_the_fused_attention_agree(tiny):
    clip = tiny[0]
    ids, mask = tokenize(clip, tiny[1], ["jagged edge.", "several colors and dark dots."])
    fused = encode_prompts(clip, token_table(clip)(ids), mask)
    clip.text_model.config._attn_implementation, before = "eager", clip.text_model.config._attn_implementation
    try:
        assert torch.allclose(encode_prompts(clip, token_table(clip)(ids), mask), fused, atol=1e-5)
    finally:
        clip.text_model.config._attn_implementation = before


def test_the_official_size_takes_the_same_path():
    "openai/clip-vit-base-patch16 by its shapes, on the meta device: no weight is made."
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(text_config={"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 12, "vocab_size": 49408},
                                    vision_config={"image_size": 224, "patch_size": 16}, projection_dim=512))
        found = encode_prompts(clip, torch.empty(8, 20, 512), torch.ones(8, 20, dtype=torch.long))
        image = clip.get_image_features(pixel_values=torch.empty(2, 3, 224, 224)).pooler_output
    assert found.shape == (8, 512) and image.shape == (2, 512)
    trained = [ContextPrompt(4, 512), MergePrompt(512, 2)]
    assert sum(p.numel() for part in trained for p in part.parameters()) == 527_360


@pytest.mark.parametrize("bad, words", [
    (dict(symptoms={"melanoma": ["x"]}), "same names"), (dict(symptoms={**TOLD, "wart": ["x"]}), "same names"), (dict(symptoms={**TOLD, "nevus": []}), "1 to 32 phrases"),
    (dict(symptoms={**TOLD, "nevus": [" "]}), "1 to 32 phrases"), (dict(symptoms={**TOLD, "nevus": "brown"}), "1 to 32 phrases"), (dict(symptoms=["brown"]), "same names"),
    (dict(position="back"), "end, middle, front"), (dict(position="middle", n_ctx=3), "even number"), (dict(n_ctx=0), "at least 1"),
    (dict(symptoms={**TOLD, "nevus": ["dark " * 14]}), "has 21 tokens"), (dict(class_names=["nevus"]), "at least two")])
def test_bad_arguments_are_sentences(tiny, bad, words):
    given = {"symptoms": TOLD, "class_names": NAMES, **bad}
    with pytest.raises(ValueError, match=words):
        ViPModel(*tiny[:2], given.pop("symptoms"), given.pop("class_names"), **given)


def test_bad_features_labels_and_pictures_are_sentences(tiny, features):
    model = made(tiny)
    with pytest.raises(ValueError, match=r"\(B, 8\) is needed"):
        model(torch.zeros(3, 9))
    with pytest.raises(ValueError, match="must lie from 0 to 1"):
        fit_prompts(model, features[0], torch.full((12,), 2))
    for pictures in (torch.rand(2, 1, 16, 16), torch.rand(0, 3, 16, 16), torch.rand(3, 16, 16)):
        with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
            encode_images(tiny[0], pictures)


def test_a_reordered_file_does_not_swap_classes(tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"nevus": ["b"], "melanoma": ["a"]}))
    assert load_symptoms(path, ["melanoma", "nevus"]) == {"melanoma": ["a"], "nevus": ["b"]}
    path.write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        load_symptoms(path)


def test_a_phrase_of_two_classes_is_warned_about_once_and_where_the_file_is_loaded(tiny, tmp_path):
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"melanoma": ["brown color", "dark dots"], "nevus": ["brown color"]}))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        ViPModel(*tiny[:2], load_symptoms(path), NAMES)
    assert [str(one.message) for one in heard] == ["'brown color' is listed for more than one class, so it cannot tell them apart"] and heard[0].filename == __file__


def test_a_move_of_the_live_page_says_it_beside_the_answer_and_warns_nobody():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        words = live_view(text="melanoma: sharp edge, dark dots\nnevus: sharp edge, brown color")[1]
    assert "'sharp edge' is listed for more than one class" in words


class Endpoint:
    "A chat endpoint on this machine that answers what it is told to."

    def __init__(self, answers):
        self.asked, left = [], list(answers)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((self.path, body, self.headers.get("Authorization")))
                data = json.dumps({"choices": [{"message": {"content": left.pop(0)}}]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint():
    "Makes endpoints and closes them."
    running = []

    def start(*answers):
        running.append(Endpoint(answers))
        return running[-1]

    yield start
    for one in running:
        one.server.shutdown()
        one.server.server_close()


def test_an_endpoint_writes_symptoms_and_a_bad_answer_falls_back(endpoint, monkeypatch):
    monkeypatch.setenv("MY_KEY", "k")
    served = endpoint("x", "1. ragged border\n2. many colors", "x", "I'm sorry, I cannot help with medical questions.")
    report = SymptomGenerator(ChatEndpoint(served.url, "m", "MY_KEY"), None, {"nevus": ["one brown color"]}).generate(NAMES, "dermoscopy")
    assert report.symptoms == {"melanoma": ["ragged border", "many colors"], "nevus": ["one brown color"]} and report.source["nevus"] == "curated"
    path, body, key = served.asked[0]
    assert path == "/v1/chat/completions" and body["temperature"] == 0 and key == "Bearer k" and "dermoscopy" in body["messages"][0]["content"]


@pytest.mark.parametrize("text, items", [
    ("1. jagged edge\n2. jagged edge\n3. many colors", ["jagged edge", "many colors"]),
    ("**Border:** ragged\n* `uneven color`", ["ragged", "uneven color"]),
    ("Chest pain\nCoughing blood\nFever\nBreathing difficulty", []),
    ("As an AI I cannot diagnose.\nConsult a doctor.", []),
    ("one\x00line\nred spots\nwhite veil", ["one line", "red spots", "white veil"]),
    ("It is characterized by an irregular border and a mixture of colors that vary from pale pink to light blue in most patients", []),
    ("", []), ("\n\n  \n", [])])
def test_answers_are_read_defensively(text, items):
    assert SymptomGenerator(None).parse(text) == items


@pytest.mark.slow
def test_the_embedded_model_is_repeatable_and_what_it_says_is_filtered():
    from hkust_demos.llm.models import load_demo_lm
    llm, tokenizer = load_demo_lm()
    told = load_symptoms("skin")
    phrases = [phrase for name in told for phrase in told[name]]
    given, lean = sort_phrases(llm, tokenizer, list(told), phrases)
    assert sorted(p for found in given.values() for p in found) == sorted(phrases)
    assert torch.allclose(lean.sum(0), torch.zeros(2), atol=1e-4) and torch.equal(lean, sort_phrases(llm, tokenizer, list(told), phrases)[1])
    report = SymptomGenerator(llm, tokenizer, told).generate(list(told), "dermoscopy", only=["nevus"])
    assert set(report.source.values()) <= {"llm", "curated"} and report.raw["nevus"]


@pytest.mark.skipif("VIP_CLIP" not in os.environ, reason="VIP_CLIP names no real CLIP (an id or folder); set it where one can be had")
def test_a_real_clip_is_the_same_command():
    clip, tokenizer, preprocess = load_clip(os.environ["VIP_CLIP"])
    model = ViPModel(clip, tokenizer, load_symptoms("skin"), ["melanoma", "nevus"])
    logits = model(encode_images(clip, preprocess(torch.rand(2, 3, 64, 64))))
    ids, mask = tokenize(clip, tokenizer, ["a dog.", "a cat on a mat."])
    with torch.no_grad():
        own = clip.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
    assert logits.shape == (2, 2) and torch.allclose(text_features(clip, tokenizer, ["a dog.", "a cat on a mat."]), own, atol=1e-3)
