"""Planar images as they are meant, held against Pillow, SimpleITK and the arrays written."""

import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
import tifffile
from dicoms import PATIENT, make, save, write
from imagecodecs import jpeg2k_encode, jpeg_encode, ljpeg_encode, png_encode
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SegmentationStorage,
    UltrasoundMultiFrameImageStorage,
    VLWholeSlideMicroscopyImageStorage,
)

from wsi_pipeline.errors import SourceError
from wsi_pipeline.files.formats import kind_of
from wsi_pipeline.sources.radiology.image import open_image

RNG = np.random.default_rng(5)
GREY8 = RNG.integers(0, 256, (23, 31), dtype=np.uint8)
GREY16 = RNG.integers(0, 1 << 16, (23, 31), dtype=np.uint16)
GREY12 = GREY16 >> 4
SIGNED = RNG.integers(-2000, 3000, (23, 31), dtype=np.int16)
RGB8 = RNG.integers(0, 256, (23, 31, 3), dtype=np.uint8)
RGB16 = RNG.integers(0, 1 << 16, (23, 31, 3), dtype=np.uint16)


def read_all(path, **options):
    with open_image(path, **options) as image:
        values = image.read((0, 0), image.shape)
    assert values.dtype == np.float32
    assert values.shape == (*image.shape, image.channels)
    return values[..., 0] if image.channels == 1 else values


@pytest.mark.parametrize("pixels", [GREY8, GREY16, RGB8, RGB16], ids=["L", "I16", "RGB", "RGB16"])
@pytest.mark.parametrize("kind", ["png", "tif", "planes.tif", "tiles.tif"])
def test_pictures_are_what_was_written(tmp_path, pixels, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "png":
        path.write_bytes(png_encode(pixels))
    elif kind == "planes.tif" and pixels.ndim == 3:
        tifffile.imwrite(
            path, np.moveaxis(pixels, -1, 0), photometric="rgb", planarconfig="separate"
        )
    else:
        colors = "rgb" if pixels.ndim == 3 else "minisblack"
        tile = (16, 16) if kind == "tiles.tif" else None
        tifffile.imwrite(path, pixels, photometric=colors, tile=tile, compression="zlib")
    assert (read_all(path) == pixels).all()
    with open_image(path) as image:
        assert image.value_range == (0, np.iinfo(pixels.dtype).max)
        assert image.spacing_mm is None
        assert image.doubts == ()


def test_a_part_is_that_part(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_encode(RGB8))
    with open_image(path) as image:
        assert (image.read((3, 7), (5, 11)) == RGB8[3:8, 7:18]).all()


def test_a_jpeg_is_as_pillow_has_it(tmp_path):
    for pixels in (GREY8, RGB8):
        Image.fromarray(pixels).save(tmp_path / "a.jpg", subsampling=0)
        other = np.asarray(Image.open(tmp_path / "a.jpg"), float)
        assert np.abs(read_all(tmp_path / "a.jpg") - other).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_palettes_become_their_colours(tmp_path, suffix):
    picture = Image.fromarray(RGB8).quantize(13)
    picture.save(tmp_path / f"a.{suffix}")
    assert (read_all(tmp_path / f"a.{suffix}") == np.asarray(picture.convert("RGB"))).all()
    grey = Image.fromarray(GREY8).quantize(13)  # a palette of greys is grey
    grey.save(tmp_path / f"b.{suffix}")
    assert (read_all(tmp_path / f"b.{suffix}") == np.asarray(grey.convert("L"))).all()


def test_alpha_is_left_out_and_said_where_it_hides(tmp_path):
    for name, alpha in {"full": 255, "half": 100}.items():
        hidden = np.full(GREY8.shape, 255, np.uint8)
        hidden[:4] = alpha
        path = tmp_path / f"{name}.png"
        path.write_bytes(png_encode(np.dstack([RGB8, hidden])))
        assert (read_all(path) == RGB8).all()
        (tmp_path / "grey.png").write_bytes(png_encode(np.dstack([GREY8, hidden])))
        assert (read_all(tmp_path / "grey.png") == GREY8).all()
        assert ("transparency" in " ".join(open_image(path).doubts)) == (alpha == 100)


@pytest.mark.parametrize("kind", ["L", "RGB", "P"])
def test_a_value_that_is_transparent_is_said_where_it_hides(tmp_path, kind):
    picture = Image.fromarray(RGB8 if kind == "RGB" else GREY8)
    picture = picture.quantize(7) if kind == "P" else picture
    there = picture.getpixel((0, 0))
    hiding = bytes([255, *[80] * 6]) if kind == "P" else there
    for name, value in {"hides": hiding, "none": b"\xff" * 7}.items():
        seen = {"transparency": value} if name == "hides" or kind == "P" else {}
        picture.save(tmp_path / f"{name}.png", **seen)
        said = " ".join(open_image(tmp_path / f"{name}.png").doubts)
        assert ("transparency" in said) == (name == "hides")


def test_white_is_zero_is_turned(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GREY16, photometric="miniswhite")
    assert (read_all(tmp_path / "a.tif") == 65535.0 - GREY16).all()


def test_real_numbers_have_their_own_range(tmp_path):
    values = GREY16.astype(np.float32) / 7
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack")
    assert (read_all(tmp_path / "a.tif") == values).all()
    assert open_image(tmp_path / "a.tif").value_range == (values.min(), values.max())


def test_of_several_pages_one_is_read_and_it_is_said(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.stack([GREY8, GREY8[::-1]]), photometric="minisblack")
    assert (read_all(path) == GREY8).all()
    assert (read_all(path, frame=1) == GREY8[::-1]).all()
    assert open_image(path).doubts == ("frame 1 of 2 is read",)
    assert open_image(path).fingerprint != open_image(path, frame=1).fingerprint
    with pytest.raises(SourceError, match="has 2 frames"):
        open_image(path, frame=2)


def test_a_turned_picture_is_read_as_stored(tmp_path):
    tifffile.imwrite(
        tmp_path / "a.tif", GREY8, photometric="minisblack", extratags=[(274, "H", 1, 6, True)]
    )
    assert (read_all(tmp_path / "a.tif") == GREY8).all()
    assert "Orientation" in open_image(tmp_path / "a.tif").doubts[0]


def test_real_pictures_are_as_pillow_has_them(data_dir):
    paths = [*data_dir.glob("us/busi/images/*.png"), *data_dir.glob("mammo/*/images/*.png")]
    if not paths:
        pytest.skip("no ultrasound and no mammograms in the real data")
    for path in paths:
        assert (read_all(path) == np.asarray(Image.open(path).convert("RGB"))).all()


@pytest.mark.parametrize("pixels", [GREY8, GREY16, SIGNED], ids=["8", "16", "signed"])
def test_dicom_values_are_rescaled(tmp_path, pixels):
    path = write(tmp_path / "a.dcm", pixels, RescaleSlope="0.5", RescaleIntercept="-1024")
    meant = np.float32(pixels * 0.5 - 1024)
    assert (read_all(path) == meant).all()
    low, high = open_image(path).value_range
    if pixels.dtype == np.int16:
        assert (low, high) == (meant.min(), meant.max())
    else:
        assert (low, high) == (-1024, np.iinfo(pixels.dtype).max * 0.5 - 1024)


def test_monochrome1_is_turned_within_its_bits(tmp_path):
    about = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    path = write(tmp_path / "a.dcm", GREY12, **about, WindowCenter=1000.5, WindowWidth=401)
    assert (read_all(path) == 4095.0 - GREY12).all()
    # the window is 800 to 1200 of what is stored
    assert open_image(path).value_range == (2895, 3295)
    path = write(tmp_path / "b.dcm", GREY12, **about, RescaleSlope=2, RescaleIntercept=-100)
    assert (read_all(path) == 2 * (4095.0 - GREY12) - 100).all()
    assert open_image(path).value_range == (-100, 8090)
    path = write(tmp_path / "c.dcm", SIGNED, PhotometricInterpretation="MONOCHROME1")
    assert (read_all(path) == -1.0 - SIGNED).all()


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"WindowCenter": 40, "WindowWidth": 400}, (-160, 239)),
        ({"WindowCenter": [40, 50], "WindowWidth": [400, 20]}, (-160, 239)),
        ({"WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "LINEAR_EXACT"}, (-160, 240)),
        ({"WindowCenter": 40, "WindowWidth": 1}, (0, 4095)),  # none
        ({}, (0, 4095)),
    ],
)
def test_the_window_is_the_range(tmp_path, about, expected):
    path = write(tmp_path / "a.dcm", GREY12, BitsStored=12, HighBit=11, **about)
    assert open_image(path).value_range == expected
    assert (read_all(path) == GREY12).all()


def test_a_modality_table_is_looked_up(tmp_path):
    table = Dataset()
    table.LUTDescriptor = [256, 0, 16]
    table.ModalityLUTType = "US"
    looked_up = (np.arange(256, dtype=np.uint16) ** 2).astype(np.uint16)
    table.add_new("LUTData", "OW", looked_up.tobytes())
    path = write(tmp_path / "a.dcm", GREY8, ModalityLUTSequence=[table])
    assert (read_all(path) == looked_up[GREY8]).all()
    assert open_image(path).value_range == (0, 65535)


def test_colours_of_every_kind_become_rgb(tmp_path):
    assert (read_all(write(tmp_path / "a.dcm", RGB8)) == RGB8).all()
    planes = make(RGB8, PlanarConfiguration=1)
    planes.PixelData = np.moveaxis(RGB8, -1, 0).tobytes()
    assert (read_all(save(tmp_path / "b.dcm", planes)) == RGB8).all()
    ycc = np.asarray(Image.fromarray(RGB8).convert("YCbCr"))
    found = read_all(write(tmp_path / "c.dcm", ycc, PhotometricInterpretation="YBR_FULL"))
    assert np.abs(found - RGB8).max() <= 3  # rounded twice
    palette = make(GREY8, PhotometricInterpretation="PALETTE COLOR")
    colors = RNG.integers(0, 1 << 16, (256, 3), dtype=np.uint16)
    for i, name in enumerate(("Red", "Green", "Blue")):
        setattr(palette, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(palette, f"{name}PaletteColorLookupTableData", colors[:, i].tobytes())
    assert (read_all(save(tmp_path / "d.dcm", palette)) == colors[GREY8]).all()


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1])
@pytest.mark.parametrize("bits", [8, 12])
def test_compressed_pixels_are_decoded(tmp_path, syntax, bits):
    pixels = GREY8 if bits == 8 else GREY12
    found = make(pixels, BitsStored=bits, HighBit=bits - 1)
    if syntax in (RLELossless, JPEGLSLossless):
        found.compress(syntax)
    elif syntax == JPEG2000Lossless:
        data = jpeg2k_encode(pixels, codecformat="j2k", level=0)
        found.PixelData, found.file_meta.TransferSyntaxUID = encapsulate([data]), syntax
    else:
        data = ljpeg_encode(pixels, bitspersample=bits)
        found.PixelData, found.file_meta.TransferSyntaxUID = encapsulate([data]), syntax
    assert (read_all(save(tmp_path / "a.dcm", found)) == pixels).all()


def test_of_a_film_the_frame_that_it_names_is_read(tmp_path):
    film = np.stack([RGB8, RGB8[::-1], RGB8[:, ::-1]])
    about = {"NumberOfFrames": 3, "SOPClassUID": UltrasoundMultiFrameImageStorage}
    path = write(tmp_path / "a.dcm", film, **about)
    assert (read_all(path) == film[0]).all()
    assert open_image(path).doubts == ("frame 1 of 3 is read",)
    path = write(tmp_path / "b.dcm", film, **about, RepresentativeFrameNumber=3)
    assert (read_all(path) == film[2]).all()
    assert (read_all(path, frame=1) == film[1]).all()


def ultrasound_region(y, x, *, kind=1, unit=3):
    region = Dataset()
    region.RegionSpatialFormat = kind
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = unit
    region.PhysicalDeltaY, region.PhysicalDeltaX = y, x
    return region


@pytest.mark.parametrize(
    ("about", "spacing", "doubt"),
    [
        ({}, None, ""),
        ({"PixelSpacing": [0.2, 0.1]}, (0.2, 0.1), ""),
        ({"PixelSpacing": [0.2, 0.1], "ImagerPixelSpacing": [1, 1]}, (0.2, 0.1), ""),
        ({"ImagerPixelSpacing": [0.2, 0.1]}, (0.2, 0.1), "detector"),
        (
            {"ImagerPixelSpacing": [0.2, 0.1], "EstimatedRadiographicMagnificationFactor": 2},
            (0.1, 0.05),
            "magnification",
        ),
        ({"NominalScannedPixelSpacing": [0.2, 0.1]}, (0.2, 0.1), "film"),
        ({"SequenceOfUltrasoundRegions": [ultrasound_region(-0.02, 0.01)]}, (0.2, 0.1), ""),
        ({"SequenceOfUltrasoundRegions": [ultrasound_region(1, 1, kind=3)]}, None, ""),
        ({"SequenceOfUltrasoundRegions": [ultrasound_region(1, 1, unit=5)]}, None, ""),
        (
            {
                "SequenceOfUltrasoundRegions": [ultrasound_region(1, 1, kind=3)],
                "PixelSpacing": [0.2, 0.3],
            },
            (0.2, 0.3),
            "",
        ),
        (
            {
                "SequenceOfUltrasoundRegions": [
                    ultrasound_region(0.01235, 0.01235),
                    ultrasound_region(0.0123500001, 0.01235),
                ]
            },
            (0.1235, 0.1235),
            "",
        ),
        (
            {"SequenceOfUltrasoundRegions": [ultrasound_region(1, 1), ultrasound_region(2, 2)]},
            None,
            "different sizes",
        ),
        ({"BurnedInAnnotation": "YES"}, None, "burnt"),
    ],
)
def test_the_spacing_is_what_the_file_says_of_the_body(tmp_path, about, spacing, doubt):
    with open_image(write(tmp_path / "a.dcm", GREY8, **about)) as image:
        assert image.spacing_mm == (spacing and pytest.approx(spacing))
        assert doubt in " ".join(image.doubts)
        assert bool(image.doubts) == bool(doubt)


@pytest.mark.parametrize("wrong", [b"NaN  ", b"inf  ", b"1,500", b"a, b ", b"     "])
@pytest.mark.parametrize("which", ["WindowCenter", "WindowWidth"])
def test_a_window_of_no_numbers_is_none(tmp_path, which, wrong):
    about = {"WindowCenter": "40", "WindowWidth": "400"} | {which: "77.25"}
    path = write(tmp_path / "a.dcm", GREY8, **about)
    path.write_bytes(path.read_bytes().replace(b"77.25", wrong))
    with open_image(path) as image:
        assert image.value_range == (0, 255)
        assert (image.stored[..., 0] == GREY8).all()


@pytest.mark.parametrize("wrong", [b"NaN  ", b"inf  "])
@pytest.mark.parametrize("which", ["RescaleSlope", "RescaleIntercept"])
def test_values_that_are_scaled_by_no_number_are_refused(tmp_path, which, wrong):
    about = {"RescaleSlope": "2", "RescaleIntercept": "0"} | {which: "77.25"}
    path = write(tmp_path / "a.dcm", GREY8, **about)
    path.write_bytes(path.read_bytes().replace(b"77.25", wrong))
    with pytest.raises(SourceError, match="the slope or intercept of its values is no number"):
        open_image(path)


def test_real_slices_are_as_simpleitk_has_them(data_dir):
    paths = sorted(data_dir.glob("volumes/ct_dicom_pydicom/*.dcm"))
    if not paths:
        pytest.skip("no DICOM in the real data")
    for path in paths:
        other = SimpleITK.ReadImage(str(path))
        assert (read_all(path) == SimpleITK.GetArrayFromImage(other)[0]).all()
        spacing = other.GetSpacing()
        assert open_image(path).spacing_mm == pytest.approx((spacing[1], spacing[0]))


def broken(tmp_path, name):
    """Write one file that is refused; return its path."""
    path = tmp_path / name
    if name == "cut.png":
        path.write_bytes(png_encode(RGB8)[:900])
    elif name == "cut.jpg":
        path.write_bytes(jpeg_encode(RGB8)[:600])
    elif name == "cut.dcm":
        write(path, GREY16)
        path.write_bytes(path.read_bytes()[:-100])
    elif name == "empty.png":
        path.write_bytes(b"")
    elif name == "slide.svs":
        tifffile.imwrite(path, RGB8, photometric="rgb")
    elif name == "cmyk.tif":
        tifffile.imwrite(path, np.dstack([RGB8, GREY8]), photometric="separated")
    elif name == "nan.tif":
        tifffile.imwrite(path, np.full((4, 4), np.nan, np.float32), photometric="minisblack")
    elif name == "syntax.dcm":
        found = make(GREY8)
        found.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG2
        found.PixelData = encapsulate([b"\0" * 64])
        save(path, found)
    elif name == "text.dcm":
        path.write_text("no image")
    elif name == "slide.dcm":
        write(path, RGB8, SOPClassUID=VLWholeSlideMicroscopyImageStorage)
    elif name == "seg.dcm":
        write(path, GREY8, SOPClassUID=SegmentationStorage)
    elif name == "hsv.dcm":
        write(path, RGB8, PhotometricInterpretation="HSV")
    elif name == "rows.dcm":
        write(path, GREY8, Rows=0)
    elif name == "huge.dcm":
        write(path, GREY8, Rows=65535, Columns=65535)
    return path


@pytest.mark.parametrize(
    ("name", "says"),
    {
        "cut.png": "cannot be decoded as PNG",
        "cut.jpg": "cannot be decoded as JPEG",
        "cut.dcm": "damaged or cut off",
        "empty.png": "no image that is known here",
        "slide.svs": "bundle for slides",
        "cmyk.tif": "CMYK",
        "nan.tif": "NaN",
        "syntax.dcm": "MPEG2",
        "text.dcm": "no image that is known here",
        "slide.dcm": "whole-slide image",
        "seg.dcm": "Segmentation",
        "hsv.dcm": "colours of a kind",
        "rows.dcm": "nothing to see",
        "huge.dcm": "too many to hold",
        "missing.png": "No such file",
    }.items(),
)
def test_what_is_no_image_is_refused_in_one_sentence(tmp_path, name, says):
    path = broken(tmp_path, name)
    with pytest.raises(SourceError, match=says) as caught:
        open_image(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert "previous exception" not in str(caught.value)


def test_malformed_files_are_refused_or_read(data_dir):
    paths = [p for p in sorted(data_dir.glob("malformed/*/*")) if p.is_file()]
    if not paths:
        pytest.skip("no malformed files in the real data")
    for path in paths:
        with suppress(SourceError), open_image(path) as image:
            assert image.read((0, 0), image.shape).size


def test_nothing_of_the_patient_is_told(tmp_path, caplog, capfd, recwarn):
    caplog.set_level(0)
    about = {"PatientBirthDate": "not a date SECRET", "PatientAge": "SECRET old"}
    good = write(tmp_path / "a.dcm", GREY8, **about)
    bad = broken(tmp_path, "cut.dcm")
    caplog.clear()  # of what writing them said
    recwarn.clear()
    told = [repr(open_image(good).doubts)]
    with pytest.raises(SourceError) as caught:
        open_image(bad)
    told += [str(caught.value), caplog.text, *capfd.readouterr(), *(str(w) for w in recwarn)]
    for value in (*PATIENT.values(), "SECRET"):
        if len(value) > 2:
            assert value not in " ".join(told)


def test_what_lies_behind_a_damaged_value_is_not_told(tmp_path):
    path = write(tmp_path / "a.dcm", GREY8)
    data = bytearray(path.read_bytes())
    at = data.index(b"UI", data.index(b"\x08\x00\x16\x00"))  # the class, whose length becomes wrong
    data[at + 2 : at + 4] = len(data[at:-2000]).to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(SourceError) as caught:
        open_image(path)
    assert b"SECRET" in data
    assert "SECRET" not in str(caught.value)


def itk_pixels(path):
    """Return what SimpleITK decodes of a file, values as they are meant."""
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    return SimpleITK.GetArrayFromImage(reader.Execute())


KNOWN_OTHERWISE = {
    "SC_rgb_rle_16bit.dcm", "SC_rgb_rle_16bit_2frame.dcm", "SC_rgb_rle_32bit.dcm",
    "SC_rgb_rle_32bit_2frame.dcm",  # GDCM swaps the bytes of RLE in colours
    "examples_palette.dcm",  # it leaves palettes of 16 bits at 8
}  # fmt: skip


def test_pydicoms_own_files_are_as_simpleitk_has_them_or_refused_in_words():
    """Go through the files that problems of pydicom's users have left, as its wheel holds them."""
    root = Path(pydicom.__file__).parent / "data" / "test_files"
    equal, refused = [], {}
    for path in sorted(p for p in root.rglob("*") if p.is_file() and kind_of(p) == "DICOM"):
        try:
            with open_image(path) as image:
                pixels, frame = image.read((0, 0), image.shape), image.frame
        except SourceError as error:
            refused[path] = str(error)
            continue
        if path.name in KNOWN_OTHERWISE:
            continue
        other = itk_pixels(path)
        if other.size != pixels.size:
            other = other[frame]
        np.testing.assert_allclose(pixels, other.reshape(pixels.shape), rtol=1e-6, atol=2e-4)
        equal.append(path.name)
    assert len(equal) >= 74, sorted(equal)
    # damaged, without pixels, or no image
    assert all(said.startswith(f"{path}: ") for path, said in refused.items())
    assert "image_dfl.dcm" in equal


def test_a_deflated_file_is_unpacked_in_bounds(tmp_path):
    header = make(np.zeros((4, 4), np.uint8))
    header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    save(tmp_path / "a.dcm", header)
    assert read_all(tmp_path / "a.dcm").shape == (4, 4)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    data = (tmp_path / "a.dcm").read_bytes()
    start = 144 + int.from_bytes(data[140:144], "little")
    bomb = b"".join(packer.compress(bytes(1 << 24)) for _ in range(20)) + packer.flush()
    (tmp_path / "b.dcm").write_bytes(data[:start] + bomb)
    with pytest.raises(SourceError, match="unpacks to more than 256 MiB"):
        open_image(tmp_path / "b.dcm")
