"""Images of every mode that PIL has, and folders of images with whatever a file system allows."""

from __future__ import annotations

import os
import socket
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.diffusion import write_images
from PIL import Image

from asr_downstream.engine.data.images import Images, build_images
from asr_downstream.engine.data.sources import ImageFolder
from asr_downstream.errors import DataError

RAMP = np.linspace(0, 1, 64).reshape(8, 8)
GREY = (RAMP * 255).round().astype(np.uint8)


def images_of(image: Image.Image, path: Path, channels: int = 1) -> Images:
    """Save an image and read its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return build_images(dict(type='ImageFolder', path=str(path.parent), resolution=8), channels)


def levels(image: Image.Image, path: Path, channels: int = 1) -> np.ndarray:
    """Grey levels in [0, 255] that a training would see."""
    pixels = images_of(image, path, channels)[0].mean(0).numpy()
    return (pixels + 1) * 127.5


# Modes ----------------------------------------------------------------------------------------------------------------


def test_float_images_are_scaled(tmp_path: Path) -> None:
    found = levels(Image.fromarray(RAMP.astype(np.float32)), tmp_path / 'a/x.tif')
    np.testing.assert_allclose(found, RAMP * 255, atol=0.51)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (RAMP * 255, r'x.tif: .*float.* 0 to 255.*\[0, 1\]'),
        (RAMP - 0.5, r'-0.5 to 0.5'),
        (np.where(RAMP > 0.5, np.nan, RAMP), 'not finite'),
        (np.where(RAMP > 0.5, np.inf, RAMP), 'not finite'),
    ],
    ids=['of 255', 'negative', 'nan', 'inf'],
)
def test_float_images_of_another_scale_are_refused_by_name(tmp_path: Path, values: np.ndarray, message: str) -> None:
    images = images_of(Image.fromarray(values.astype(np.float32)), tmp_path / 'a/x.tif')
    with pytest.raises(DataError, match=message):
        images[0]


@pytest.mark.parametrize('most', [255, 65535, 2**31 - 1])
def test_integers_of_32_bits_have_no_known_scale(tmp_path: Path, most: int) -> None:
    images = images_of(Image.fromarray((RAMP * most).astype(np.int32)), tmp_path / 'a/x.tif')
    with pytest.raises(DataError, match='x.tif: .*32 bits.*save it with 8 or 16'):
        images[0]


def test_a_portable_grey_map_of_16_bits_is_scaled(tmp_path: Path) -> None:
    (tmp_path / 'a').mkdir()
    content = (RAMP * 65535).round().astype('>u2').tobytes()
    (tmp_path / 'a/x.pgm').write_bytes(b'P5 8 8 65535\n' + content)
    images = build_images(dict(type='ImageFolder', path=str(tmp_path / 'a'), resolution=8), 1)
    np.testing.assert_allclose((images[0][0].numpy() + 1) * 127.5, RAMP * 255, atol=0.51)


@pytest.mark.parametrize(
    'image',
    [
        Image.fromarray((RAMP * 65535).round().astype(np.uint16)),
        Image.frombytes('I;16B', (8, 8), (RAMP * 65535).round().astype('>u2').tobytes()),
        Image.fromarray(GREY),
        Image.fromarray(GREY).convert('P'),
        Image.fromarray(GREY).convert('LA'),
        Image.fromarray(GREY).convert('RGB'),
        Image.fromarray(GREY).convert('RGBA'),
        Image.fromarray(GREY).convert('RGB').convert('CMYK'),
        Image.fromarray(GREY).convert('RGB').convert('YCbCr'),
    ],
    ids=['I;16', 'I;16B', 'L', 'P', 'LA', 'RGB', 'RGBA', 'CMYK', 'YCbCr'],
)
@pytest.mark.parametrize('channels', [1, 3, 4])
def test_other_modes_show_the_same_picture(tmp_path: Path, image: Image.Image, channels: int) -> None:
    read = images_of(image, tmp_path / 'a/x.tif', channels)[0][:3].mean(0)
    np.testing.assert_allclose((read.numpy() + 1) * 127.5, GREY, atol=1.01)


@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize(
    'mode',
    ['RGBa', 'La', 'PA', 'HSV', '1'],
)
def test_modes_that_no_file_has_are_read_too(channels: int, mode: str) -> None:
    class Decoded:  # as a data set of the hub gives it
        def read(self, index: int) -> Image.Image:
            grey = Image.fromarray(GREY)
            return {
                'RGBa': lambda: grey.convert('RGBA').convert('RGBa'),
                'La': lambda: grey.convert('LA').convert('La'),
                'PA': lambda: grey.convert('P').convert('PA'),
                'HSV': lambda: grey.convert('RGB').convert('HSV'),
                '1': lambda: grey.point(lambda value: 255 * (value > 127)).convert('1'),
            }[mode]()

        def name(self, index: int) -> str:
            return 'row 0'

    read = Images(Decoded(), 8, channels)[0][:3].mean(0)  # type: ignore[arg-type]
    expected = GREY if mode != '1' else np.where(GREY > 127, 255, 0)
    np.testing.assert_allclose((read.numpy() + 1) * 127.5, expected, atol=2)


def test_grey_of_16_bits_is_turned_as_its_orientation_says(tmp_path: Path) -> None:
    (tmp_path / 'a').mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray((RAMP * 65535).round().astype(np.uint16)).save(tmp_path / 'a/x.png', exif=exif)
    images = build_images(dict(type='ImageFolder', path=str(tmp_path / 'a'), resolution=8), 1)
    np.testing.assert_allclose((images[0][0].numpy() + 1) * 127.5, RAMP[::-1, ::-1] * 255, atol=0.51)


def test_what_is_wrong_with_the_files_is_said(tmp_path: Path) -> None:
    images = images_of(Image.fromarray(np.full((8, 8), 7.0, np.float32)), tmp_path / 'a/x.tif')
    with pytest.raises(DataError, match=r'x.tif: cannot be decoded \(float values from 7 to 7'):
        images.decodable(0)


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(30)
@pytest.mark.parametrize('links', [1, 2, 3])
def test_links_in_a_circle_are_followed_once(tmp_path: Path, links: int) -> None:
    folder = write_images(tmp_path / 'images', each=4)
    expected = ImageFolder(str(folder)).paths
    for number in range(min(links, 1 if links == 1 else 2)):
        (folder / f'again{number}').symlink_to(folder)
    if links == 3:
        (folder / 'cat/dog').symlink_to(folder / 'dog')
        (folder / 'dog/cat').symlink_to(folder / 'cat')
    with pytest.warns(UserWarning, match='again0.*is read already'):
        found = ImageFolder(str(folder))
    assert found.paths == expected
    assert found.classes == ('cat', 'dog', 'owl')


def test_links_to_folders_elsewhere_are_followed(tmp_path: Path) -> None:
    write_images(tmp_path / 'elsewhere', ('cat', 'dog'))
    (tmp_path / 'images').mkdir()
    for name in ('cat', 'dog'):
        (tmp_path / 'images' / name).symlink_to(tmp_path / 'elsewhere' / name)
    (tmp_path / 'images/cat/0.png').rename(tmp_path / 'x.png')
    (tmp_path / 'images/cat/0.png').symlink_to(tmp_path / 'x.png')
    found = ImageFolder(str(tmp_path / 'images'))
    assert len(found) == 8
    assert found.classes == ('cat', 'dog')
    assert found.read(0).size == (18, 16)


@pytest.mark.timeout(30)
@pytest.mark.parametrize('kind', ['fifo', 'socket', 'device'])
def test_only_files_are_images(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_images(tmp_path / 'images', each=1)
    odd = folder / 'cat/pipe.png'
    if kind == 'fifo':
        os.mkfifo(odd)
    elif kind == 'socket':
        monkeypatch.chdir(odd.parent)  # the path of a socket is short
        socket.socket(socket.AF_UNIX).bind(odd.name)
    else:
        odd.symlink_to('/dev/zero')
    with pytest.warns(UserWarning, match='cat/pipe.png: is no file'):
        found = ImageFolder(str(folder))
    assert [Path(p).name for p in found.paths] == ['0.png'] * 3


def test_a_link_to_nothing_counts_as_a_bad_file(tmp_path: Path) -> None:
    folder = write_images(tmp_path / 'images', each=1)
    (folder / 'cat/lost.png').symlink_to(folder / 'nowhere.png')
    images = Images(ImageFolder(str(folder)), 8)
    assert len(images) == 4
    with pytest.raises(DataError, match='lost.png: cannot be decoded'):
        images[1]


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_images(tmp_path / 'images', each=1)
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if Path(path).name == 'cat':
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', denied)
    with pytest.raises(DataError, match='cat: cannot be read'):
        ImageFolder(str(folder))


def test_a_png_that_unpacks_to_gigabytes_is_a_bad_file(tmp_path: Path) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, 'big') + name + content + zlib.crc32(name + content).to_bytes(4, 'big')

    side = (60_000).to_bytes(4, 'big')
    header = chunk(b'IHDR', side + side + bytes([8, 0, 0, 0, 0]))
    body = chunk(b'IDAT', zlib.compress(bytes(10_000)))
    (tmp_path / 'bomb.png').write_bytes(b'\x89PNG\r\n\x1a\n' + header + body + chunk(b'IEND', b''))
    with pytest.raises(DataError, match=r'bomb.png: cannot be decoded .*exceeds limit'):
        Images(ImageFolder(str(tmp_path)), 8)[0]
