"Features of slides and the benchmark from the command line: a pyramid, a folder, a kill, and what cannot be read."
import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from hkust_demos.cli import main
from hkust_demos.data.he_phantom import he_phantom
from hkust_demos.data.slides import open_slide, read_tiles, slide_places
from hkust_demos.vision import gpfm_apply, tile_folders


@pytest.fixture(scope="module")
def tissue():
    "A region of 128 x 128 pixels."
    rows = he_phantom(4, 0).images.permute(0, 2, 3, 1).numpy()
    return np.uint8(255 * np.concatenate([np.concatenate([*rows[:2]], 1), np.concatenate([*rows[2:]], 1)]))


@pytest.fixture(scope="module")
def slide(tissue, tmp_path_factory):
    "A pyramid of three levels with tissue in one corner."
    path = tmp_path_factory.mktemp("slides") / "slide.tiff"
    whole = np.full((256, 256, 3), 243, np.uint8)
    whole[:128, :128] = tissue
    with tifffile.TiffWriter(path) as file:
        options = dict(tile=(64, 64), photometric="rgb", metadata=None, compression="jpeg", compressionargs={"level": 95})
        file.write(whole, subifds=0, **options)
        for k in (2, 4):
            file.write(np.ascontiguousarray(whole[::k, ::k]), subfiletype=1, **options)
    return path


def features(path, name):
    with h5py.File(path) as file:
        return file[f"{name}/features"][:], file[f"{name}/coords"][:]


def test_a_pyramid_becomes_features(slide, tmp_path, capfd):
    out = tmp_path / "f.h5"
    assert main(["gpfm", str(slide), "--out", str(out), "--size", "64"]) == 0
    said = capfd.readouterr()
    found, places = features(out, "slide.tiff")
    assert found.shape == (4, 64) and {*map(tuple, places.tolist())} == {(0, 0), (64, 0), (0, 64), (64, 64)}
    assert str(out) in said.out and "4 of 4 tiles" in said.err
    assert main(["gpfm", str(slide), "--out", str(out), "--size", "64"]) == 2 and "exists already" in capfd.readouterr().err


def test_another_level_is_another_picture(slide):
    opened = open_slide(slide)
    try:
        assert opened.levels == [(256, 256), (128, 128), (64, 64)] and opened.shrink(2) == 4
        places = slide_places(opened, 32, level=1)
        tile = next(read_tiles(opened, places[:1], 32, 1))
        whole = next(read_tiles(opened, np.array([[0, 0]]), 64, 0))
        assert abs(tile.mean() - whole.mean()) < 0.05 and (places < 64).all()
    finally:
        opened.close()


def test_a_folder_of_mixed_sizes(slide, tissue, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "slide.tiff").write_bytes(slide.read_bytes())
    Image.fromarray(tissue[:100, :70]).save(folder / "small.png")
    assert main(["gpfm", str(folder), "--out", str(tmp_path / "f.h5"), "--size", "64", "--encoder", "handcrafted"]) == 0
    assert len(features(tmp_path / "f.h5", "slide.tiff")[0]) == 4 and len(features(tmp_path / "f.h5", "small.png")[0]) == 1


def test_a_killed_run_goes_on(slide, tmp_path, monkeypatch):
    out, calls, real = tmp_path / "f.h5", [], gpfm_apply.extract_features
    command = ["gpfm", str(slide), "--out", str(out), "--size", "32", "--batch-size", "4", "--encoder", "random"]

    def breaks(*parts):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*parts)

    monkeypatch.setattr(gpfm_apply, "extract_features", breaks)
    assert main(command) == 130 and not out.exists()
    with (tmp_path / "f.h5.part" / "00000.f32").open("ab") as file:
        file.write(b"half a row")
    assert main([*command[:-2], "--encoder", "handcrafted"]) == 2  # other settings do not mix
    assert main(command) == 0 and len(calls) == 5
    monkeypatch.undo()
    assert main([*command[:3], str(tmp_path / "g.h5"), *command[4:]]) == 0
    assert np.array_equal(features(out, "slide.tiff")[0], features(tmp_path / "g.h5", "slide.tiff")[0]) and not (tmp_path / "f.h5.part").exists()


@pytest.mark.parametrize("make, told", [
    (lambda p: Image.new("RGB", (128, 128), (244, 244, 244)).save(p.with_suffix(".png")), "holds 30% tissue"),
    (lambda p: p.with_suffix(".svs").write_bytes(b"II*\x00" + bytes(60)), "damaged|no slide"),
    (lambda p: p.with_suffix(".png").write_text("words"), "cannot be read"),
    (lambda p: Image.new("RGB", (20, 200), (150, 60, 120)).save(p.with_suffix(".png")), "less than one tile"),
    (lambda p: None, "no such file")])
def test_what_is_no_tissue_or_no_slide_is_a_sentence(make, told, tmp_path, capfd):
    import re
    make(tmp_path / "bad")
    path = next(iter(tmp_path.glob("bad.*")), tmp_path / "bad.svs")
    assert main(["gpfm", str(path), "--out", str(tmp_path / "f.h5"), "--size", "64"]) == 2
    error = capfd.readouterr().err
    assert re.search(told, error) and "Traceback" not in error and path.name in error


def test_a_cut_slide_is_found_out_before_it_is_read(slide, tmp_path):
    (tmp_path / "cut.tiff").write_bytes(slide.read_bytes()[:9000])
    with pytest.raises(ValueError, match="cut.tiff"):
        open_slide(tmp_path / "cut.tiff")


def test_training_on_own_tiles_and_the_benchmark_of_its_result(tmp_path, capsys):
    data = tmp_path / "tiles"
    for k, name in enumerate(("loose", "dense")):
        (data / name).mkdir(parents=True)
        for i, tile in enumerate(he_phantom(18, k, fiber=2 * k, size=40 + 24 * k).images):
            Image.fromarray(np.uint8(255 * tile.permute(1, 2, 0))).save(data / name / f"{i}.png")
    assert main(["train", "gpfm", "--data", str(data), "--out", str(tmp_path / "own"), "--variant", "self-only", "--epochs", "1"]) == 0
    assert (tmp_path / "own" / "card.json").exists() and main(["train", "gpfm", "--data", str(data), "--out", str(tmp_path / "own")]) == 2
    parser = __import__("argparse").ArgumentParser()
    tile_folders.add_arguments(parser)
    written = tile_folders.run_command(parser.parse_args(["pathology", "--encoders", f"{tmp_path / 'own'},handcrafted", "--data", str(data), "--size", "48", "--out", str(tmp_path / "scores")]))
    lines = written[0].read_text().splitlines()
    assert len(lines) == 1 + 2 * 3 and lines[0] == "encoder,task,score,low,high" and "patients are not named" in capsys.readouterr().err


def test_an_unreadable_tile_is_named_and_not_replaced(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.new("RGB", (32, 32), (200, 90, 120)).save(tmp_path / name / f"{i}.png")
    (tmp_path / "b" / "5.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match="5.png"):
        tile_folders.folder_tiles(tmp_path)
