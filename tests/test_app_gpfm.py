"The GPFM app as a program and a person see it."
import h5py
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from federated_pages import empty_boxes, ends_on_a_phone
from hkust_demos.apps.gpfm import ENCODERS, LIVE_KNOBS, TASKS
from hkust_demos.data.he_phantom import he_phantom
from hkust_demos.vision.gpfm_views import NAMES
from hkust_demos.vision.pathology_benchmark import TASKS as ALL


@pytest.fixture(scope="module")
def client(hub):
    "A page of the running app."
    return Client(f"{hub.url}/gpfm/", verbose=False)


def run(client, upload=None, **changed):
    "Press Encode."
    settings = dict(source="my picture" if upload else "a painted region", upload=handle_file(upload) if upload else None, level=0, size=64, min_tissue=0.3, encoder="GPFM")
    return client.predict(*{**settings, **changed}.values(), api_name="/run")


def test_names_on_the_page_are_those_of_the_library():
    assert {*ENCODERS.values()} == {*NAMES} and {*TASKS} == {"average rank", "mean", *ALL} and {*LIVE_KNOBS["encoder"]} <= {*ENCODERS}


def test_selectors_change_tile_and_chart(client):
    tile, chart = client.predict(api_name="/live")
    assert tile.count("<img") == 13 and "data:image/svg+xml" in chart
    other, same = client.predict(index=5, encoder="stain expert", api_name="/live")
    assert other != tile and same == chart and client.predict(task="retrieval", api_name="/live")[1] != chart
    with pytest.raises(AppError, match="task is|not in"):
        client.predict(task="mitoses", api_name="/live")


def test_the_default_region_is_encoded(client):
    words, pictures, file = client.predict(api_name="/run")
    assert "12 tiles of 64 pixels" in words and "Painted tiles" in words and pictures.count("<img") == 2
    with h5py.File(file) as found:
        assert found["painted/features"].shape == (12, 64)


def test_an_upload_and_one_without_tissue(client, tmp_path):
    rows = np.uint8(255 * np.concatenate([*he_phantom(2, 1).images.permute(0, 2, 3, 1).numpy()], 1))
    Image.fromarray(rows).convert("L").save(tmp_path / "gray.png")  # gray is taken as it is
    assert "tiles of 32 pixels" in run(client, tmp_path / "gray.png", size=32, encoder="handcrafted numbers")[0]
    Image.new("RGB", (200, 200), (245, 245, 245)).save(tmp_path / "glass.png")
    with pytest.raises(AppError, match="one of 9 tiles holds 30% tissue"):
        run(client, tmp_path / "glass.png")
    with pytest.raises(AppError, match="has levels 0 to 0"):
        run(client, tmp_path / "gray.png", level=2)
    (tmp_path / "broken.svs").write_bytes(b"II*\x00")
    with pytest.raises(AppError, match="broken.svs") as error:
        run(client, tmp_path / "broken.svs")
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(AppError, match="o file was uploaded"):
        run(client, source="my picture")


def test_too_large_a_picture_is_a_sentence(client, tmp_path):
    Image.new("RGB", (5000, 100), (180, 80, 140)).save(tmp_path / "wide.png")
    with pytest.raises(AppError, match="at most 4096 a side"):
        run(client, tmp_path / "wide.png")


def test_a_person_moves_and_encodes_by_keyboard(hub, watched):
    page = watched(f"{hub.url}/gpfm/", width=1366, height=768)
    page.locator("#finished img").first.wait_for(timeout=30_000)
    assert empty_boxes(page) == 0
    first = page.locator("#finished img").first.get_attribute("alt")
    page.get_by_label("range slider for Tile of the held-out laboratory").press("ArrowRight")
    page.wait_for_function(f"() => document.querySelector('#finished img').alt !== {first!r}", timeout=30_000)
    page.get_by_role("button", name="Encode", exact=True).press("Enter")
    page.get_by_text("12 tiles of 64 pixels").wait_for(timeout=60_000)
    ends_on_a_phone(page)
