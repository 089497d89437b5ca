"""Sets of images that are measured or compared with: folders and .npz files."""

import numpy as np
import pytest
from conftest import write_images
from PIL import Image

from favae.errors import DataError
from favae.eval.image_sets import NpzImages, SampleFolder, open_samples, write_npz
from favae.eval.references import Reference


def test_a_folder_of_several_sets_is_no_set(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
        (tmp_path / name / "settings.json").write_text("{}")
    assert len(open_samples(tmp_path / "a")) == 1
    with pytest.raises(DataError, match="several sets of samples"):
        open_samples(tmp_path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [({"images": 1}, "neither images"), ({"mu": 1}, "mu and no sigma"), ({"arr_0": 1.0}, "must be")],
)
def test_references_that_cannot_be_used_are_refused_before_sampling(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **{name: np.full((2, 4, 4, 3), value) for name, value in arrays.items()})
    with pytest.raises(DataError, match=message):
        Reference(str(tmp_path / "x.npz"), [])


def test_npz_files_are_mapped_and_hold_every_image_once(tmp_path):
    folder = SampleFolder(write_images(tmp_path / "images", size=(20, 16)))
    write_npz(tmp_path / "samples.npz", folder)
    archive = np.load(tmp_path / "samples.npz")
    assert archive.files == ["arr_0"] and archive["arr_0"].shape == (12, 16, 20, 3)
    written = NpzImages(tmp_path / "samples.npz")
    assert isinstance(written.array, np.memmap) and written.size == (16, 20) == folder.size
    assert np.array_equal(written.array, archive["arr_0"])
    contents = [[images[i]["image"].numpy().tobytes() for i in range(12)] for images in (folder, written)]
    assert contents[0] != contents[1] and sorted(contents[0]) == sorted(contents[1])  # shuffled
    np.savez_compressed(tmp_path / "small.npz", arr_0=archive["arr_0"])
    assert np.array_equal(NpzImages(tmp_path / "small.npz").array, archive["arr_0"])


def test_bad_samples_are_one_line(tmp_path):
    def problem(name: str, **arrays) -> str:
        np.savez(tmp_path / name, **arrays)
        with pytest.raises(DataError) as caught:
            open_samples(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    images = np.zeros((4, 16, 16, 3), np.uint8)
    assert "must be (N, H, W, 3)" in problem("grey.npz", arr_0=images[..., :1])
    assert "must be uint8" in problem("float.npz", arr_0=np.full(images.shape, np.nan, np.float32))
    assert "no array 'arr_0'" in problem("named.npz", images=images)
    assert "must be (N, H, W, 3)" in problem("empty.npz", arr_0=images[:0])
    whole = (tmp_path / "grey.npz").read_bytes()
    (tmp_path / "torn.npz").write_bytes(whole[:300])
    with pytest.raises(DataError, match="torn.npz is damaged"):
        open_samples(tmp_path / "torn.npz")
    with pytest.raises(DataError, match="missing.npz: no such file"):
        open_samples(tmp_path / "missing.npz")
    folder = write_images(tmp_path / "mixed", classes=1)
    Image.new("RGB", (9, 9)).save(folder / "class0/z.png")
    with pytest.raises(DataError, match="z.png has 9 x 9 .*0.png has 24 x 20"):
        open_samples(folder)
    np.savez_compressed(
        tmp_path / "packed.npz", arr_0=np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    )
    packed = bytearray((tmp_path / "packed.npz").read_bytes())
    for start in range(200, len(packed) - 500, 97):  # not every damage looks the same to zlib
        damaged = bytes(packed[:start]) + bytes(50) + bytes(packed[start + 50 :])
        (tmp_path / "damaged.npz").write_bytes(damaged)
        with pytest.raises(DataError, match="damaged.npz is damaged"):
            open_samples(tmp_path / "damaged.npz")
