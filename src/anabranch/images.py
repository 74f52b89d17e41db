"""Encoded images -> pixels, and what is wrong with those that cannot be used.

An image's header is read first: its format, its size and whether it has several frames are known before any pixel is
decoded, so a file of some kilobytes that claims gigabytes of pixels costs nothing. Decoding then tells whether the file is
whole. Pixels come out as transformers' `load_image` gives them: turned as EXIF says, then RGB by Pillow's own conversion
(transparency is dropped, 16-bit grey is cut off at 255), so that the trained model sees what it will see in use.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MOST_PIXELS = 89_478_485  # where Pillow begins to warn of a decompression bomb: 256 MiB as RGB, which each thread may take
MOST_BYTES = 2**28  # of an encoded image
MOST_STRETCHED = 200  # long side over short side: Qwen's limit. Processors that scale the short side up would need gigabytes
STILLS = ("JPEG", "MPO")  # MPO: Pillow's word for a JPEG of a camera that keeps a preview behind the picture


class BadImage(ValueError):
    """An image that no row can be trained with, by which rule, and why."""

    def __init__(self, rule: str, why: str) -> None:
        super().__init__(why)
        self.rule, self.why = rule, why


class _Quiet:
    """Pillow's warnings of odd files are kept back until the last thread is through: what matters in a file, a rule tells.
    Filters of warnings are of the whole process: the first thread changes them, and the last one changes them back."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if not self.inside:
                self.before.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if not self.inside:
                    self.before.close()


_quiet = _Quiet()


def open_image(data: bytes, *, max_pixels: int = MOST_PIXELS) -> Image:
    """The pixels of an encoded image, RGB, turned as its EXIF data says.

    Args:
        data: JPEG, PNG, WebP, BMP, GIF, TIFF or PPM.
        max_pixels: width x height of more than this is not decoded.
    Raises:
        BadImage: `broken_image` (no image, of another format, cut short), `huge_image`, `animated_image` (several frames).
    """
    from PIL import ImageOps

    if len(data) > MOST_BYTES:
        raise BadImage("huge_image", f"{len(data):,} bytes, at most {MOST_BYTES:,} are read")
    with _quiet():
        image = _header(data, max_pixels)
        try:
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:  # each of Pillow's decoders raises what it likes on damaged data
            raise BadImage("broken_image", f"damaged or cut short ({_short(error)})") from error


def _header(data: bytes, max_pixels: int) -> Any:
    """The image before its pixels are decoded. Raises BadImage."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise BadImage("broken_image", "no bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        several = image.format not in STILLS and bool(getattr(image, "is_animated", False))
    except Image.DecompressionBombError as error:
        raise BadImage("huge_image", f"more than {max_pixels:,} pixels ({_short(error)})") from error
    except UnidentifiedImageError as error:
        raise BadImage("broken_image", f"no image of a format that is read here ({', '.join(FORMATS)}); begins with "
                                       f"{data[:8]!r}") from error
    except Exception as error:  # as above, on a damaged header
        raise BadImage("broken_image", f"damaged ({_short(error)})") from error
    if width * height > max_pixels:
        raise BadImage("huge_image", f"{width:,} x {height:,} pixels, at most {max_pixels:,} are decoded")
    if several:
        raise BadImage("animated_image", f"{image.format} with more than one frame")
    return image


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:160] or type(error).__name__


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) as `open_image` gives it, once the whole image is known to decode. Raises BadImage."""
    return open_image(data).size


def scaled_down(data: bytes, width: int, height: int) -> bytes:
    """The image at this size (bicubic, as the processors that round sides scale), as PNG. Same bytes in, same bytes out.

    Raises:
        BadImage: as `open_image`.
    """
    from PIL import Image

    image = open_image(data).resize((width, height), Image.Resampling.BICUBIC)
    image.info = {}  # a colour profile would be written along, and then be of no use: pixels are taken as they stand
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=3)  # a third of level 6's time for a tenth more bytes
    return out.getvalue()
