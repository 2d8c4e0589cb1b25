"""A slide's mask, probabilities and polygons as DICOM, written in bounded memory.

Masks are Label Map Segmentations (PS3.3 A.51, Supplement 243): a pixel is the number of its
segment. With one bit for each class nothing is compressed, and a file ends at 4 GiB. Probabilities
are a fractional Segmentation, polygons Microscopy Bulk Simple Annotations (PS3.3 A.87). Frames are
TILED_FULL in JPEG-LS, which viewers of slides decode, and are found by an extended offset table.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import shapely
from pydicom import Dataset, dcmread, dcmwrite, uid
from pydicom.dataset import FileMetaDataset
from pydicom.filebase import DicomIO
from pydicom.filewriter import write_data_element, write_file_meta_info
from pydicom.sr.coding import Code
from pydicom.valuerep import DSfloat
from skimage.color import rgb2lab

from wsi_pipeline.bundle import ClassInfo
from wsi_pipeline.errors import StoreError
from wsi_pipeline.export import MaskLike, level_shapes
from wsi_pipeline.export.dicom_seg import MAY_BE_EMPTY, NEEDED, SCHEME, as_text, codes_of
from wsi_pipeline.export.features import FeatureOptions, sound_shapes
from wsi_pipeline.export.ome_tiff import TILE, encoded_tiles
from wsi_pipeline.export.polygons.arcs import ranges
from wsi_pipeline.export.polygons.build import map_polygons
from wsi_pipeline.export.polygons.trace import Outlines
from wsi_pipeline.files.atomic import written_beside
from wsi_pipeline.files.formats import dicom_slides, has_preamble, slide_header
from wsi_pipeline.files.paths import quiet

LABEL_MAP = uid.UID("1.2.840.10008.5.1.4.1.1.66.7")
BULK_ANNOTATIONS = uid.MicroscopyBulkSimpleAnnotationsStorage
MASK, PROBABILITY, ANNOTATIONS = 1001, 1002, 1003
"""Numbers of the series."""
PATIENT = (
    *MAY_BE_EMPTY[:-1], "StudyInstanceUID", "StudyDescription", "IssuerOfAccessionNumberSequence",
    "IssuerOfPatientID", "IssuerOfPatientIDQualifiersSequence", "PatientAge", "ContentDate",
    "ContentTime", "PatientIdentityRemoved", "DeidentificationMethod",
    "DeidentificationMethodCodeSequence",
)  # fmt: skip
"""What all files say of patient and study, as the slide does."""
PLACE = (
    "FrameOfReferenceUID", "PositionReferenceIndicator", "TotalPixelMatrixOriginSequence",
    "ImageOrientationSlide", "ContainerIdentifier", "IssuerOfTheContainerIdentifierSequence",
    "ContainerTypeCodeSequence", "SpecimenDescriptionSequence",
)  # fmt: skip
"""What images say, too, of the specimen and where it lies."""
EVERY_FILE = {
    **dict.fromkeys(MAY_BE_EMPTY[:-1], ""), "ContentDate": "19700101", "ContentTime": "000000",
    "ContentCreatorName": "", "SpecificCharacterSet": "ISO_IR 192", "Manufacturer": "wsi_pipeline",
    "ManufacturerModelName": "wsi_pipeline", "DeviceSerialNumber": "none",
    "SoftwareVersions": version("wsi-pipeline"),
}  # fmt: skip
EVERY_IMAGE = {
    "ImageType": ["DERIVED", "PRIMARY"], "ContentLabel": "SEGMENTATION", "SamplesPerPixel": 1,
    "PhotometricInterpretation": "MONOCHROME2", "PresentationLUTShape": "IDENTITY", "Rows": TILE,
    "Columns": TILE, "BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PixelRepresentation": 0,
    "LossyImageCompression": "00", "TotalPixelMatrixFocalPlanes": 1,
    "DimensionOrganizationType": "TILED_FULL",
}  # fmt: skip
BACKGROUND = Code("125040", "DCM", "Background")
AREA = Code("42798000", "SCT", "Area"), Code("um2", "UCUM", "square micrometer")
NUMBER = Code("1", "UCUM", "no units")
CHANCE = Code("MEAN_PROBABILITY", SCHEME, "Mean probability"), NUMBER
HOLE_OF = Code("HOLE_OF", SCHEME, "Number of the annotation that it is a hole of"), NUMBER
INTELLIGENCE = Code("123110", "DCM", "Artificial Intelligence")
ITEM = struct.Struct("<HHI")
"""Head of an item: group, element, length."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What all files of one run say of where they come from.

    Attributes:
        headers: what the files of a DICOM slide's level 0 say; none = the slide is no DICOM.
        facts: what `run.json` says of the slide; by its `fingerprint` one that is no DICOM gets
            study and frame of reference.
        model: what it says of the model.
        key: of the run.
        classes: in the mask's order.
    """

    headers: Sequence[Dataset]
    facts: Mapping[str, Any]
    model: Mapping[str, Any]
    key: str
    classes: Sequence[ClassInfo]

    def uid(self, *what: object) -> str:
        """Return the identifier of something in this run: the same whenever it is asked for."""
        return _uid(self.key, EVERY_FILE["SoftwareVersions"], *what)

    @cached_property
    def slide(self) -> Dataset:
        """Return what the slide says of itself, or what is said in place of one that is no DICOM.

        Raises:
            StoreError: a slide that lacks what others must name it by.
        """
        if self.headers:
            if missing := [name for name in NEEDED if not self.headers[0].get(name)]:
                raise StoreError(f"the slide has no {', '.join(missing)} to refer to")
            return self.headers[0]
        own = self.facts["fingerprint"]
        # As scanners lay it: a row of pixels runs down the slide's own y, a column down its x, and
        # the last pixel lies on the slide's corner.
        y, x = map(_decimal, np.multiply(self.facts["size"], self.facts["mpp"]) / 1000)
        corner = _item(XOffsetInSlideCoordinateSystem=x, YOffsetInSlideCoordinateSystem=y)
        return _item(
            StudyInstanceUID=_uid(own, "study"), FrameOfReferenceUID=_uid(own, *self.facts["mpp"]),
            PositionReferenceIndicator="SLIDE_CORNER", TotalPixelMatrixOriginSequence=[corner],
            ImageOrientationSlide=[0, -1, 0, -1, 0, 0],
        )  # fmt: skip

    def shared(self, downsample: Sequence[float]) -> list[Dataset]:
        """Return what all frames say of pixels, so many times as large (y, x) as level 0's."""
        shared = self.slide.get("SharedFunctionalGroupsSequence") or [Dataset()]
        found = (shared[0].get("PixelMeasuresSequence") or [Dataset()])[0]
        spacing = found.get("PixelSpacing") or [um / 1000 for um in reversed(self.facts["mpp"])]
        measures = _item(
            PixelSpacing=[_decimal(mm * f) for mm, f in zip(spacing, downsample, strict=True)],
            # Of a section nobody has measured; highdicom reads no pixel's size without.
            SliceThickness=found.get("SliceThickness") or "0.001",
        )
        return [_item(PixelMeasuresSequence=[measures])]

    @property
    def algorithm(self) -> list[Dataset]:
        """Return what a sequence says of the model."""
        found = _item(AlgorithmFamilyCodeSequence=_coded(INTELLIGENCE))
        found.AlgorithmName = as_text(self.model["name"])
        found.AlgorithmVersion = self.model["weights_sha256"][:16]
        return [found]

    def begin(
        self, sop_class: str, kind: str, path: Path, series: int, number: int, *content: str
    ) -> Dataset:
        """Return what a file begins with, the number-th of a series.

        Args:
            content: digest of what it holds, where the run alone does not tell.
        """
        found = _item(
            **EVERY_FILE, SOPClassUID=sop_class, SOPInstanceUID=self.uid(path.name, *content),
            SeriesInstanceUID=self.uid(series), SeriesNumber=series, InstanceNumber=number,
            Modality=kind, ContentDescription=as_text(f"Made by {self.model['name']}"),
        )  # fmt: skip
        for keyword in PATIENT if kind == "ANN" else PATIENT + PLACE:
            if keyword in self.slide:
                found[keyword] = self.slide[keyword]
        instances = [(h.SOPClassUID, h.SOPInstanceUID) for h in self.headers]
        if kind == "ANN" and not instances:
            instances = [(LABEL_MAP, self.uid("mask.dcm"))]
        if instances:
            names = ("ReferencedSOPClassUID", "ReferencedSOPInstanceUID")
            named = [_item(**dict(zip(names, one, strict=True))) for one in instances]
            refers = _item(SeriesInstanceUID=self.slide.get("SeriesInstanceUID", self.uid(MASK)))
            refers.ReferencedInstanceSequence = named
            found.ReferencedSeriesSequence = [refers]
            if kind == "SEG":
                found.SourceImageSequence = named
            else:
                found.ReferencedImageSequence = named[:1]
        found.file_meta = FileMetaDataset()
        found.file_meta.MediaStorageSOPClassUID = found.SOPClassUID
        found.file_meta.MediaStorageSOPInstanceUID = found.SOPInstanceUID
        return found


def level_headers(path: Path, size: tuple[int, int]) -> list[Dataset]:
    """Return what the files of a DICOM slide's level 0 say, none of a slide that is no DICOM.

    Args:
        path: one of its files, or the folder of all.
        size: of the level, (x, y).
    """
    files = sorted((path if path.is_dir() else path.parent).iterdir())
    if path.is_dir():
        path = next(iter(dicom_slides(filter(has_preamble, files))), path)
    found, series = dict[str, Dataset](), None
    with quiet():
        for file in filter(has_preamble, [path, *files] if has_preamble(path) else []):
            # pydicom raises anything on damaged files.
            with suppress(Exception):
                header: Any = slide_header(file)
                series = series or header.SeriesInstanceUID
                own = (header.TotalPixelMatrixColumns, header.TotalPixelMatrixRows)
                is_level_0 = own == size and "VOLUME" in header.ImageType
                if is_level_0 and header.SeriesInstanceUID == series:
                    tags = [*PATIENT, *PLACE, *NEEDED, "SharedFunctionalGroupsSequence"]
                    header = dcmread(file, stop_before_pixels=True, specific_tags=list(tags))
                    header.decode()
                    # Copies may lie beside it.
                    found.setdefault(header.SOPInstanceUID, header)
    return list(found.values())


def write_masks(
    path: Path, levels: Sequence[MaskLike], origin: Origin, downsample: tuple[float, float]
) -> None:
    """Write class indices and their reduced levels, `mask-1.dcm` and so on beside the path.

    Args:
        levels: those that there are, the whole one first.
        downsample: level-0 pixels of the slide per mask pixel, (y, x).
    """
    window = (0, 0, levels[0].shape[0], levels[0].shape[1])
    for level, shape in enumerate(level_shapes(window[2:])):
        target = path.with_name(f"{path.stem}-{level}.dcm") if level else path
        found = origin.begin(LABEL_MAP, "SEG", target, MASK, level + 1)
        found.SegmentationType, found.SegmentsOverlap = "LABELMAP", "NO"
        found.PyramidUID, found.PixelPaddingValue = origin.uid("pyramid"), 0
        found.SegmentSequence = [_segment(origin, n) for n in range(len(origin.classes))]
        found.SharedFunctionalGroupsSequence = origin.shared([f * 2**level for f in downsample])
        _write_image(target, found, shape, encoded_tiles(levels, window, level, _jpeg_ls))


def write_probability(
    path: Path, probability: MaskLike, origin: Origin, downsample: tuple[float, float]
) -> None:
    """Write probabilities as a fractional segmentation, the frames of each class in turn.

    Args:
        probability: uint8 (c, y, x), in 1/255, of each class but the background.
        downsample: level-0 pixels of the slide per pixel, (y, x).
    """
    count, height, width = probability.shape
    found = origin.begin(uid.SegmentationStorage, "SEG", path, PROBABILITY, 1)
    found.SegmentationType, found.SegmentationFractionalType = "FRACTIONAL", "PROBABILITY"
    found.MaximumFractionalValue, found.SegmentsOverlap = 255, "UNDEFINED"
    # What could not be read has no probabilities of its own.
    found.SegmentSequence = [_segment(origin, n) for n in range(1, count + 1)]
    found.SharedFunctionalGroupsSequence = origin.shared(downsample)
    window, planes = (0, 0, height, width), (_Plane(probability, i) for i in range(count))
    frames = (tile for p in planes for tile in encoded_tiles([p], window, 0, _jpeg_ls))
    _write_image(path, found, (height, width), frames, planes=count)


def write_annotations(
    path: Path, outlines: Outlines, options: FeatureOptions, origin: Origin
) -> None:
    """Write polygons as annotations of a DICOM slide's level 0, or of `mask.dcm`.

    A class has a group for the outer rings of its polygons, and one for its holes, which
    annotations do not have. Vertices wait on the disk until all groups are known.

    Args:
        outlines: made with the options' `tolerance` and `min_pixels`.
        options: in pixels of the image that is referred to.
    """
    # There must be a group, if one of nothing.
    told: dict[tuple[int, bool], list[npt.NDArray[np.float64]]] = {(1, False): [np.zeros((3, 0))]}
    digest = hashlib.sha256()
    with TemporaryDirectory(dir=path.parent) as folder, ExitStack() as closing:
        waiting = {
            (number, kind): closing.enter_context(Path(folder, f"{number}{kind}").open("w+b"))
            for number in range(1, len(options.classes))
            for kind in (False, True)
        }
        for number, kind, rows, vertices in _iter_rings(outlines, options):
            told.setdefault((number, kind), []).append(rows)
            waiting[number, kind].write(vertices)
            digest.update(rows.tobytes() + vertices)
        content = digest.hexdigest()
        found = origin.begin(BULK_ANNOTATIONS, "ANN", path, ANNOTATIONS, 1, content)
        found.ContentLabel, found.AnnotationCoordinateType = "ANNOTATIONS", "2D"
        found.PixelOriginInterpretation, found.AnnotationGroupSequence = "VOLUME", []
        filled = [kind for kind, rows in sorted(told.items()) if any(r.size for r in rows)]
        for nth, (number, kind) in enumerate(filled or [(1, False)], 1):
            sizes, *values = np.concatenate(told[number, kind], axis=1)
            info, starts = origin.classes[number], 1 + 2 * (np.cumsum(sizes) - sizes)
            group = _item(
                AnnotationGroupNumber=nth,
                AnnotationGroupUID=origin.uid("group", number, kind, content),
                AnnotationGroupLabel=as_text(f"holes in {info.name}" if kind else info.name),
                AnnotationGroupGenerationType="AUTOMATIC", GraphicType="POLYGON",
                AnnotationGroupAlgorithmIdentificationSequence=origin.algorithm,
                AnnotationPropertyCategoryCodeSequence=_coded(codes_of(info)[0]),
                AnnotationPropertyTypeCodeSequence=_coded(codes_of(info)[1]),
                AnnotationAppliesToAllOpticalPaths="YES", NumberOfAnnotations=len(sizes),
                RecommendedDisplayCIELabValue=_as_lab(info), MeasurementsSequence=[],
                LongPrimitivePointIndexList=starts.astype("<u4").tobytes(),
            )  # fmt: skip
            waiting[number, kind].seek(0)
            group.DoublePointCoordinatesData = waiting[number, kind]
            measures = [HOLE_OF] if kind else [AREA, CHANCE]
            for (name, unit), measured in zip(measures, values, strict=True):
                if not np.isnan(measured).any():
                    listed = _item(FloatingPointValues=measured.astype("<f4").tobytes())
                    measure = _item(ConceptNameCodeSequence=_coded(name))
                    measure.MeasurementUnitsCodeSequence = _coded(unit)
                    measure.MeasurementValuesSequence = [listed]
                    group.MeasurementsSequence.append(measure)
            found.AnnotationGroupSequence.append(group)
        found.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        with written_beside(path) as beside, beside.open("wb") as out:
            out.write(bytes(128) + b"DICM")
            write_file_meta_info(stream := DicomIO(out), found.file_meta)
            stream.is_little_endian, stream.is_implicit_VR = True, False
            _write_elements(stream, found)


def _iter_rings(
    outlines: Outlines, options: FeatureOptions
) -> Iterator[tuple[int, bool, npt.NDArray[np.float64], bytes]]:
    """Yield rings of a class, or its holes: which, (1 + measures, n) sizes and measures, and xy."""
    regions, count = outlines.regions, np.zeros(len(options.classes), np.int64)
    chance = np.full(len(regions), np.nan) if regions.probability is None else regions.probability
    for shapes, region, _, area in map_polygons(
        outlines, lambda part, shapes: sound_shapes(regions, options, part, shapes, [])
    ):
        if not len(shapes):
            continue
        _, xy, (first, shells) = shapely.to_ragged_array(shapes)
        owner = np.repeat(np.arange(len(shapes)), np.diff(shells))
        is_hole = np.diff(owner, prepend=-1) == 0
        # The first vertex is there again as the last.
        sizes, value = np.diff(first).astype(np.int64) - 1, regions.value[region]
        for number in np.unique(value).tolist():
            own = value == number
            nth = count[number] + np.cumsum(own)
            count[number] = nth[-1]
            for kind in (False, True):
                rings = np.flatnonzero((is_hole == kind) & own[owner])
                of = owner[rings]
                more = [nth[of]] if kind else [area[of] * 1e6, chance[region[of]]]
                rows = np.stack([sizes[rings], *more]).astype(np.float64)
                vertices = xy[ranges(first[rings].astype(np.int64), sizes[rings])].astype("<f8")
                yield number, kind, rows, vertices.tobytes()


def _write_elements(out: DicomIO, found: Dataset) -> None:
    """Write a dataset element by element: pydicom holds a whole sequence in memory."""
    for element in found:
        if element.VR != "SQ":
            write_data_element(out, element, [EVERY_FILE["SpecificCharacterSet"]])
            continue
        head = struct.pack("<HH2sHI", element.tag.group, element.tag.element, b"SQ", 0, 0xFFFFFFFF)
        out.write(head)
        for item in element.value:
            out.write(ITEM.pack(0xFFFE, 0xE000, 0xFFFFFFFF))
            _write_elements(out, item)
            out.write(ITEM.pack(0xFFFE, 0xE00D, 0))
        out.write(ITEM.pack(0xFFFE, 0xE0DD, 0))


class _Plane:
    """A channel of an array (c, y, x), to slice."""

    def __init__(self, array: MaskLike, channel: int) -> None:
        self.shape, self._array, self._channel = array.shape[1:], array, channel

    def __getitem__(self, key: Any, /) -> Any:
        return self._array[(self._channel, *key)]


def _segment(origin: Origin, number: int) -> Dataset:
    """Return what is said of a class by its number."""
    info = origin.classes[number]
    category, kind = codes_of(info) if number else (BACKGROUND, BACKGROUND)
    return _item(
        SegmentNumber=number, SegmentLabel=as_text(info.name), SegmentAlgorithmType="AUTOMATIC",
        SegmentAlgorithmName=as_text(origin.model["name"]),
        SegmentationAlgorithmIdentificationSequence=origin.algorithm,
        SegmentedPropertyCategoryCodeSequence=_coded(category),
        SegmentedPropertyTypeCodeSequence=_coded(kind),
        RecommendedDisplayCIELabValue=_as_lab(info),
    )  # fmt: skip


def _write_image(
    path: Path, found: Dataset, shape: Sequence[int], frames: Iterable[bytes], planes: int = 1
) -> None:
    """Write an image, whose frames go to the file one by one."""
    height, width = shape
    count = planes * -(-height // TILE) * -(-width // TILE)
    found.update(_item(**EVERY_IMAGE, NumberOfFrames=count))
    found.TotalPixelMatrixRows, found.TotalPixelMatrixColumns = height, width
    tiles = _item(DimensionOrganizationUID=_uid(found.SeriesInstanceUID, "tiles"))
    found.DimensionOrganizationSequence = [tiles]
    # Filled in once it is known.
    found.ExtendedOffsetTable = found.ExtendedOffsetTableLengths = bytes(8 * count)
    found.file_meta.TransferSyntaxUID = uid.JPEGLSLossless
    sizes = np.zeros(count, "<u8")
    with written_beside(path) as beside, beside.open("w+b") as file:
        dcmwrite(file, found, enforce_file_format=True)
        end = file.tell()
        file.write(b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff" + ITEM.pack(0xFFFE, 0xE000, 0))
        for number, frame in enumerate(frames):
            sizes[number] = len(frame)
            padded = frame + bytes(len(frame) % 2)
            file.write(ITEM.pack(0xFFFE, 0xE000, len(padded)) + padded)
        file.write(ITEM.pack(0xFFFE, 0xE0DD, 0))
        steps = ITEM.size + sizes + sizes % 2
        file.seek(end - 8 * count)
        file.write(sizes.tobytes())
        # Before the lengths, and their head of twelve bytes.
        file.seek(end - 16 * count - 12)
        file.write((np.cumsum(steps) - steps).astype("<u8").tobytes())


def _jpeg_ls(tile: npt.NDArray[np.uint8]) -> bytes:
    return bytes(imagecodecs.jpegls_encode(tile))


def _uid(*what: object) -> str:
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, '/'.join(map(str, what))).int}"


def _item(**values: Any) -> Dataset:
    """Return a dataset of elements by their keywords."""
    found = Dataset()
    for keyword, value in values.items():
        setattr(found, keyword, value)
    return found


def _coded(code: Code) -> list[Dataset]:
    value, scheme, meaning = code[:3]
    return [_item(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)]


def _decimal(value: float) -> DSfloat:
    """Return a number in the sixteen characters that there are for it."""
    return DSfloat(value, auto_format=True)


def _as_lab(info: ClassInfo) -> list[int]:
    """Return a class's colour in CIELab as DICOM has it (PS3.3 C.10.7.1.1)."""
    lightness, a, b = rgb2lab(np.array(info.color or (128, 128, 128)) / 255)
    return [round(float(v)) for v in (lightness * 655.35, (a + 128) * 257, (b + 128) * 257)]
