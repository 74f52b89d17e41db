"""Small encoded pictures, and rows that show them, for tests of the mixture's images."""

from __future__ import annotations

import base64
import io
import json
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from anabranch.artifacts import Mixture, Unit
from anabranch.images import open_image
from anabranch.mixture import build_mixture
from anabranch.recipe import Recipe
from anabranch.rows import load_unit, read_image

Raw = list[dict[str, Any]]
COLOURS = {"red": (200, 10, 10), "green": (10, 200, 10), "blue": (10, 10, 200), "white": (250, 250, 250)}


def picture(colour: str, width: int = 56, height: int = 56, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), COLOURS[colour]).save(out, form)
    return out.getvalue()


def noise(width: int, height: int, seed: int = 0, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(out, form)
    return out.getvalue()


def put(folder: Path, **files: bytes) -> None:
    """Pictures by name: `img__red_png` is img/red.png."""
    for name, data in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def put_colours(folder: Path) -> None:
    put(folder, **{f"img__{c}_png": picture(c) for c in COLOURS})


def write(path: Path, data: Raw) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in data))
    return path


def recipe(tmp_path: Path, *sources: dict[str, Any], evaluate: dict[str, Any] | None = None, **mixture: Any) -> Recipe:
    plain = [{k: str(v) if isinstance(v, Path) else v for k, v in s.items()} for s in sources]
    return Recipe.model_validate(
        {
            "model": {"path": "m"},
            "mixture": {"sources": plain, "held_out": 0.0, **mixture},
            "evaluate": {"retention": "none"} | (evaluate or {}),
            "output": str(tmp_path / "run"),
        }
    )


def build(tmp_path: Path, vision: Any, *sources: dict[str, Any], out: str = "out", **options: Any) -> Mixture:
    return build_mixture(recipe(tmp_path, *sources, **options), vision.tokenizer, tmp_path / out, base_hash="b", vision=vision)


def texts(vision: Any, out: Path, unit: Unit, split: str = "train") -> list[str]:
    """Rows as text, one placeholder for each image."""
    found = load_unit(out / unit.file, split)
    rows = []
    for i in range(len(found)):
        ids = found.row(i)[0]
        keep = np.concatenate([[True], (ids[1:] != vision.placeholder_id) | (ids[:-1] != vision.placeholder_id)])
        rows.append(vision.tokenizer.decode(ids[keep].tolist()))
    return rows


def colours(out: Path, unit: Unit, split: str = "train") -> list[list[str]]:
    """Of each row the colours of its images, by their first pixel."""
    found = load_unit(out / unit.file, split)
    names = {rgb: name for name, rgb in COLOURS.items()}
    return [
        [names[open_image(read_image(image)).getpixel((0, 0))] for image in row]  # type: ignore[index]
        for row in found.images_of(range(len(found)))
    ]


def left_out(mixture: Mixture) -> dict[str, str]:
    """Rule -> example; every rule with as many rows as one."""
    assert all(e.rows == 1 for e in mixture.excluded), mixture.excluded
    return {e.rule: e.example for e in mixture.excluded}


BINARY = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def questions(count: int, shown: Any) -> Raw:
    return [{"prompt": f"<image> {i}", "completion": "ok"} | shown(list(COLOURS)[i % 4]) for i in range(count)]


def parquet(rows: Raw, **types: Any) -> bytes:
    names = list(rows[0])
    out = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.table({n: pyarrow.array([r[n] for r in rows], types.get(n, pyarrow.string())) for n in names}), out
    )
    return out.getvalue()


def zip_of(path: Path, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), data)
    return path


def lines(rows: Raw) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def uri(colour: str) -> str:
    return "data:image/png;base64," + base64.b64encode(picture(colour)).decode()


def rules(mixture: Mixture) -> Counter[str]:
    return Counter({e.rule: e.rows for e in mixture.excluded})


# ---- pictures ----


def picture_of_noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    draw = np.random.default_rng(seed)
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = draw.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), values.tobytes())


def encoded_as(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def png(width: int, height: int, *, data: bytes = b"") -> bytes:
    """A PNG of hand-made chunks: a header that claims this size, and whatever pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded_as(picture_of_noise(30, 20), "JPEG", exif=exif, quality=95)


def animation(form: str, frames: int = 3) -> bytes:
    every = [picture_of_noise(20, 20, seed=i) for i in range(frames)]
    return encoded_as(every[0], form, save_all=True, append_images=every[1:])
