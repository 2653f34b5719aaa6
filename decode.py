"""How do a file's bytes become an RGB image? Everything that can be wrong with them has one name here."""
import contextlib
import ctypes
import logging
import lzma
import os
import stat
import struct
import tarfile
import warnings
import zlib
from io import BytesIO

import numpy as np
from PIL import Image, UnidentifiedImageError, features
from PIL import __version__ as PILLOW

from utils import shown

# What a reader may be handed of PIL's: never EPS, which starts Ghostscript, nor formats that are told by next to nothing.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "MPO", "JPEG2000", "ICO")
EXTENSIONS = frozenset((".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm",
                        ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k"))
# All that PIL, tarfile and the decompressors raise on damaged bytes: mutated files met each of them.
READ_ERRORS = (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
               SyntaxError, MemoryError, struct.error, zlib.error, lzma.LZMAError, tarfile.TarError, Image.DecompressionBombError)

Image.init()
FORMATS = tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF came with Pillow 11.3


def silence():
    """PIL and its libtiff speak of each odd EXIF block, palette and strip, in every worker and epoch, without the file's name.

    A file that cannot be read is said by its error.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with contextlib.suppress(OSError, AttributeError, ValueError):  # where there is no /proc it goes on speaking
        with open("/proc/self/maps") as maps:
            libraries = {line.split(maxsplit=5)[5].strip() for line in maps if "libtiff" in line}
        for path in libraries:
            ctypes.CDLL(path).TIFFSetErrorHandler(None)
            ctypes.CDLL(path).TIFFSetWarningHandler(None)


silence()


class DataError(ValueError):
    """Something wrong with the data that shows only when they are read, perhaps in a loader's worker."""


class UnreadableImage(DataError):
    """An image that cannot be read; the message has its path. why: the reason alone, where a loader's worker has not handed it on."""

    def __init__(self, message, why=None):
        super().__init__(message)
        self.why = message if why is None else why


UNREADABLE = -1  # the class of an evaluated image that cannot be read: no answer is right


def reason(error):
    """What an error of READ_ERRORS says, in one line and without the path."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a known format"
    if isinstance(error, MemoryError):
        return "it does not fit into the memory"
    text = getattr(error, "strerror", None) or ("" if isinstance(error, LookupError) else str(error).strip())
    return shown(text.splitlines()[0]) if text else repr(error)


def open_file(path):
    """A regular file, to read. A FIFO would wait for ever, and opening a device may do more than read it."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("not a regular file")
    return open(path, "rb")


def load_rgb(source, name=None):
    """A path or bytes -> an RGB image, the first where the file has several. name: what messages call it, else the path.

    Eight bits a channel: as PIL's convert("RGB"), so as torchvision's ImageFolder: alpha is dropped, EXIF's orientation is not
    applied. More bits: see `narrow`. Raises UnreadableImage, whatever is wrong.
    """
    try:
        with BytesIO(source) if isinstance(source, bytes) else open_file(source) as file:
            image = Image.open(file, formats=FORMATS)
            return (narrow(image) if image.mode.startswith(("I", "F")) else image).convert("RGB")
    except READ_ERRORS as error:
        why = reason(error)
        name = str(source if name is None else name)
        if isinstance(error, UnidentifiedImageError) and name.lower().endswith(".avif") and not features.check("avif"):
            why = f"Pillow {PILLOW} reads no AVIF, Pillow 12 does"
        raise UnreadableImage(f"cannot read the image {shown(name)} ({why}): replace it or remove it", why) from error


def narrow(image):
    """Grey values of 16 or 32 bits -> 8 bits, where their range is clear; PIL's own conversion clips them to white.

    16-bit files: the high byte, as PIL reads 16-bit RGB. Floats from 0 to 1: times 255. Values within 0 and 255 stay. Raises
    ValueError for the others, such as 12 bits in a 16-bit file, which would come out almost black.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    kind = "float" if image.mode == "F" else "32-bit" if image.mode == "I" and image.format == "TIFF" else "16-bit"
    if kind == "float" and low >= 0 and high <= 1:
        values = (values * 255).round()
    elif kind == "16-bit" and low >= 0 and 4096 <= high <= 65535:
        values = values >> 8
    elif not (low >= 0 and high <= 255):
        raise ValueError(f"{kind} values from {low:g} to {high:g}, whose range cannot be told: store them with 8 bits")
    narrowed = Image.fromarray(values.astype(np.uint8))
    narrowed.info["narrowed"] = kind  # for who counts them
    return narrowed


def is_image(path):
    """Whether a file's first bytes are those of an image that load_rgb knows."""
    try:
        with open_file(path) as file:
            return bool(Image.open(file, formats=FORMATS).format)
    except READ_ERRORS:
        return False
