"""DICOM and DICONDE, through pydicom where it is installed: files of one image, and frames (see `pages`)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from featprobe.datasets.images.pages import once_a_file, opened_file
from featprobe.datasets.images.pixels import Levels, Opened, check_page, to_levels, unusable, without_empty
from featprobe.errors import DataError
from featprobe.geometry import LEAST_SPACING, MOST_SPACING, Spacing
from featprobe.io.pictures import check_claim

DICOM_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
DEFLATED = "1.2.840.10008.1.2.1.99"  # the transfer syntax that compresses a whole file, without a size limit


@contextmanager
def open_dicom(path: Path, stream: BinaryIO, page: int | None) -> Iterator[Opened]:
    """Open a DICOM file of one image, or the frame of one that the path names."""
    file = path if page is None else path.parent
    header, start = _header(file)
    if not {"Rows", "Columns", "BitsAllocated", "PhotometricInterpretation"} <= set(header.dir()):
        raise DataError(f"{path} is a DICOM file without an image.")
    check_claim(path, header.Rows, header.Columns)
    check_page(path, page, int(header.get("NumberOfFrames") or 1))
    photometric, bits = header.PhotometricInterpretation, header.BitsAllocated
    channels = 3 if photometric in DICOM_COLOURS else 1
    samples = int(header.get("SamplesPerPixel") or 1)
    known = photometric in ("MONOCHROME1", "MONOCHROME2", *DICOM_COLOURS)
    if not known or bits not in (8, 16) or samples != channels:
        raise DataError(unusable(path, f"{photometric}, {samples} x {bits} bits"))
    _check_decoder(path, header.file_meta.get("TransferSyntaxUID"))
    rescale = _rescale(header, page or 0)
    signed = bool(header.get("PixelRepresentation", 0)) or rescale is not None
    padding = _padding(header, path) if channels == 1 else None
    yield Opened(
        (header.Rows, header.Columns),
        32 if signed else bits,
        channels,
        lambda: _levels(_values(file, stream, page, header), header, rescale, padding, path),
        raw=lambda: _bytes(stream, start, header, page or 0),
        empty="" if padding is None else f"PixelPaddingValue {' to '.join(map(str, dict.fromkeys(padding)))}",
        spacing=_spacing(header, page or 0),
    )


@once_a_file(8)
def _header(file: Path) -> tuple[Any, int]:
    """Everything in a DICOM file but its pixel data, and the offset of the pixel data in bytes.

    A bare data set, without preamble and file meta information, gets the transfer syntax with which it was read.
    """
    try:
        from pydicom import dcmread
        from pydicom.filereader import read_file_meta_info
        from pydicom.misc import is_dicom as is_file_format
        from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
    except ImportError as error:
        raise DataError(
            f"{file} is a DICOM file, and the package that reads it is not installed.\n"
            "Install it:  pip install 'featprobe[dicom]'"
        ) from error
    bare = not is_file_format(file)
    if not bare and read_file_meta_info(file).get("TransferSyntaxUID") == DEFLATED:
        raise DataError(f"{file} is compressed as a whole (deflated). Store it as Explicit VR Little Endian.")
    with opened_file(file) as stream:
        header, start = dcmread(stream, stop_before_pixels=True, force=bare), stream.tell()
    if bare and "TransferSyntaxUID" not in header.file_meta:
        implicit, _ = header.original_encoding
        header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return header, start


def _padding(header: Any, path: Path) -> tuple[int, int] | None:
    """The lowest and highest stored value of padding, which marks pixels outside of the picture; None without padding.

    They are read with the sign of the pixels. Raises DataError for a value that no stored pixel can have.
    """
    value, limit = header.get("PixelPaddingValue"), header.get("PixelPaddingRangeLimit")
    if value is None:
        return None
    signed, stored = bool(header.get("PixelRepresentation")), int(header.get("BitsStored", header.BitsAllocated))
    low = -(1 << stored - 1) if signed else 0
    found = []
    for number in (value, value if limit is None else limit):
        plain = int.from_bytes(number, "little") if isinstance(number, bytes) else int(number)
        plain %= 1 << header.BitsAllocated
        found.append(plain - (1 << header.BitsAllocated) if signed and plain >> header.BitsAllocated - 1 else plain)
        if not low <= found[-1] < low + (1 << stored):
            raise DataError(
                f"{path} pads its picture with a value that none of its pixels can have.\n"
                f"  wanted  PixelPaddingValue and PixelPaddingRangeLimit of {low} to {low + (1 << stored) - 1}\n"
                f"  found   {number}\nSo it is unknown which pixels are empty. Correct the tag, or remove it."
            )
    return min(found), max(found)


def _spacing(header: Any, frame: int) -> Spacing | None:
    """Millimetres per pixel of a frame, down and across; None where nothing usable is stated."""
    try:
        return _stated_spacing(header, frame)
    except Exception:  # pydicom raises many kinds of errors on damaged tags, and pixels can be read without these
        return None


def _stated_spacing(header: Any, frame: int) -> Spacing | None:
    """The spacing by the tags of a file; raises any error where one of them is damaged.

    PixelSpacing is that of the object: of the frame's functional group, the shared one, or the data set. Without it,
    ImagerPixelSpacing is that of the detector's plane, over the magnification where it is stated, and
    NominalScannedPixelSpacing that of a scanned film (DICOM PS3.3, 10.7.1.3).
    """
    each, common = (header.get(f"{whose}FunctionalGroupsSequence") or [] for whose in ("PerFrame", "Shared"))
    groups = [*each[frame : frame + 1], *common[:1]]
    measures = [own for group in groups for own in (group.get("PixelMeasuresSequence") or [])[:1]]
    for source in (*measures, header):
        if found := _two_lengths(source, "PixelSpacing"):
            return found
    if found := _two_lengths(header, "ImagerPixelSpacing"):
        factor = _lengths(header, "EstimatedRadiographicMagnificationFactor")
        return (found[0] / factor[0], found[1] / factor[0]) if factor else found
    return _two_lengths(header, "NominalScannedPixelSpacing")


def _two_lengths(source: Any, name: str) -> Spacing | None:
    found = _lengths(source, name)
    return (found[0], found[1]) if len(found) == 2 else None


def _lengths(source: Any, name: str) -> list[float]:
    """The numbers of a tag; none where it is not there, or holds numbers that no length has."""
    value = source.get(name)
    if value is None or isinstance(value, bytes):
        return []
    found = [float(one) for one in (value if isinstance(value, Sequence) else [value])]
    return found if all(LEAST_SPACING <= one <= MOST_SPACING for one in found) else []


def _rescale(header: Any, frame: int) -> Any:
    """The element with the modality's rescaling of a frame: its functional group, the shared one, or the data set.

    None where levels are not rescaled. If some frames have a rescaling of their own, all frames are rescaled (others by
    slope 1 and intercept 0), so that all levels of a file are of one kind.
    """
    each, common = (header.get(f"{whose}FunctionalGroupsSequence") or [] for whose in ("PerFrame", "Shared"))
    of_frame = each[frame].get("PixelValueTransformationSequence") if frame < len(each) else None
    if of_frame:
        return of_frame[0]
    of_all = common[0].get("PixelValueTransformationSequence") if common else None
    found = of_all[0] if of_all else header
    return found if _changes(found) else None


def _changes(rescale: Any) -> bool:
    slope, intercept = rescale.get("RescaleSlope"), rescale.get("RescaleIntercept")
    return "ModalityLUTSequence" in rescale or float(slope or 1) != 1 or float(intercept or 0) != 0


def _check_decoder(path: Path, syntax: Any) -> None:
    """Raise DataError where no installed decoder can read the compression of a DICOM file."""
    from pydicom.pixels import get_decoder

    if syntax is None or not syntax.is_compressed:
        return
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        raise DataError(
            f"{path} is compressed as {syntax.name}, and no decoder of that is installed.\n"
            "Install pydicom's plugins (pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg),\n"
            "or store it uncompressed:  gdcmconv --raw IN OUT"
        )


def _values(file: Path, stream: BinaryIO, frame: int | None, header: Any) -> NDArray[Any]:
    """Raw pixel values; with `frame`, only that frame is read. Bits above the stored ones are set to 0."""
    from pydicom import dcmread
    from pydicom.pixels import pixel_array

    if frame is not None:
        return pixel_array(stream, index=frame, transfer_syntax_uid=header.file_meta.TransferSyntaxUID)
    data = dcmread(file, force=True)
    if "PixelData" not in data:
        raise DataError(f"{file} is a DICOM file without pixel data.")
    data.file_meta.TransferSyntaxUID = header.file_meta.TransferSyntaxUID
    return pixel_array(data)


def _levels(values: NDArray[Any], header: Any, rescale: Any, padding: tuple[int, int] | None, path: Path) -> Levels:
    """Levels from stored values: inverted where 0 is white, then rescaled as the modality asks; padding is masked."""
    empty = None if padding is None else (values >= padding[0]) & (values <= padding[1])
    return without_empty(values, empty, lambda filled: _rescaled(filled, header, rescale, path))


def _rescaled(values: NDArray[Any], header: Any, rescale: Any, path: Path) -> Levels:
    from pydicom.pixels import apply_modality_lut

    if header.PhotometricInterpretation == "MONOCHROME1":
        stored = int(header.get("BitsStored", header.BitsAllocated))
        low = -(1 << stored - 1) if header.get("PixelRepresentation") else 0
        high = low + (1 << stored) - 1
        values = (low + high - values.astype(np.int32)).astype(values.dtype)
    if rescale is None:
        return to_levels(values, path)
    rescaled = np.asarray(apply_modality_lut(values, rescale), dtype=np.float64)
    slope = abs(float(rescale.get("RescaleSlope") or 1))
    if "ModalityLUTSequence" not in rescale and not np.spacing(np.float32(np.abs(rescaled).max(initial=0.0))) < slope:
        raise DataError(f"{path}: its rescaling (slope {slope:g}) makes levels that float32 can't tell apart.")
    return to_levels(rescaled.astype(np.float32), path)


def _bytes(stream: BinaryIO, start: int, header: Any, frame: int) -> Iterator[bytes]:
    """The bytes of a frame: the file up to the pixel data, the frame's number, and its part of the pixel data."""
    from pydicom.encaps import get_frame

    stream.seek(0)
    yield stream.read(start)
    yield f" {frame} ".encode()
    syntax = header.file_meta.TransferSyntaxUID
    element = stream.read(8 if syntax.is_implicit_VR else 12)  # DICOM PS3.5, 7.1.2: tag, VR, length
    frames = int(header.NumberOfFrames)
    if syntax.is_compressed:
        tables = header.get("ExtendedOffsetTable"), header.get("ExtendedOffsetTableLengths")
        yield get_frame(stream, frame, extended_offsets=tables if all(tables) else None, number_of_frames=frames)
        return
    length = int.from_bytes(element[-4:], "little" if syntax.is_little_endian else "big") // frames
    stream.seek(length * frame, 1)
    yield stream.read(length)
