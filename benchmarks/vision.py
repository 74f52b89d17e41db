"""What images cost: decoding and preprocessing beside forward and backward, by family and size; and the pixel cap's effect.

    python benchmarks/vision.py

The models are small ones of each family's shape, made on the spot (text and vision parts of --hidden by --layers), vision tower
and projector frozen as in MERIT. Preprocessing costs the same whatever the model: beside a larger model its share is smaller,
so its milliseconds are what carries over, and its share here is an upper end.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from anabranch.images import scaled_down
from anabranch.model import (
    Batch,
    can_select,
    device,
    keep_buffers,
    load_model,
    padded,
    response_losses,
    select_trainable,
    vision_of,
)
from anabranch.recipe import Model
from anabranch.rows import RowImages, Rows, images_file, load_unit, save_images, save_unit
from anabranch.sources import IMAGE
from anabranch.templates import choose_template, encode_rows
from machine import RESULTS, peak_mb, record

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from vision_models import Size, write_vision_model

FAMILIES = {"llava": 336, "llava_next": 336, "qwen2_vl": 56, "qwen2_5_vl": 56, "idefics3": 364}  # side of an image or a tile
SIDES = (112, 224, 392, 560, 784, 1120, 1568)
CAP = 784 * 784
TURN = [{"role": "user", "content": IMAGE + "What colour is this?"}, {"role": "assistant", "content": "red"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256, help="width; a multiple of 32")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES))
    args = parser.parse_args()
    keep_buffers()
    families, cap = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for family, side in FAMILIES.items():
            model = read(Path(scratch) / family, family, Size(args.hidden, args.layers, side))
            for pixels in (s for s in args.sides if s in (224, 784)):
                families.append({"family": family, "side": pixels} | step(model, Path(scratch), photo(pixels), args.rounds))
            if family == "qwen2_5_vl":
                cap = [row for s in args.sides for row in capped(model, Path(scratch), s, args.rounds)]
    figures = {"hidden": args.hidden, "layers": args.layers, "rounds": args.rounds, "cap_pixels": CAP, "families": families,
               "cap": cap, "peak_mb": peak_mb()}
    record("vision", figures)
    (RESULTS / "vision.md").write_text(markdown(figures))


def read(folder: Path, family: str, size: Size) -> Any:
    """A model of this family with frozen eyes."""
    model = load_model(write_vision_model(folder, family, size=size))
    select_trainable(model, Model(path=str(folder), freeze=["vision tower", "projector"]))
    return model


def photo(side: int) -> bytes:
    """A JPEG of soft clouds and some grain: it decodes at a photograph's pace."""
    draw = np.random.default_rng(side)
    clouds = Image.fromarray(draw.integers(0, 255, (12, 12, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    grain = np.asarray(clouds, np.int16) + draw.integers(-12, 12, (side, side, 3))
    out = io.BytesIO()
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def row_of(model: Any, folder: Path, image: bytes) -> Batch:
    """One row with this image, as the mixture stage leaves it, as a batch."""
    vision = vision_of(model)
    assert vision is not None
    width, height = Image.open(io.BytesIO(image)).size
    (made,) = encode_rows(choose_template("auto", vision.tokenizer, vision), vision.tokenizer, [TURN],
                          [[vision.text_of(width, height)]])
    assert not isinstance(made, str), made
    path = folder / f"{len(list(folder.iterdir()))}.safetensors"
    hashes = save_images(images_file(path), [len(image)], lambda _: image)
    rows = Rows.of([(made.input_ids.tolist(), made.response.tolist())])
    shown = RowImages((images_file(path),), np.zeros(1, np.int32), np.zeros(1, np.int32), np.array([0, 1]))
    save_unit(path, Rows(rows.input_ids, rows.response, rows.offsets, shown), Rows.of([]), hashes)
    return padded(load_unit(path, "train"), np.array([0]), device())


def step(model: Any, folder: Path, image: bytes, rounds: int) -> dict[str, Any]:
    """Median seconds of a row's preprocessing (reading, decoding, processor), forward and backward pass."""
    vision, batch, select = vision_of(model), row_of(model, folder, image), can_select(model)
    assert vision is not None
    taken: dict[str, list[float]] = {"preprocess": [], "forward": [], "backward": []}
    for round_ in range(rounds + 1):  # the first warms up
        vision._pixels.clear()
        losses: list[torch.Tensor] = []
        parts: list[tuple[str, Callable[[], object]]] = [
            ("preprocess", lambda: vision.stored_inputs(batch.images)),
            ("forward", lambda into=losses: into.append(response_losses(model, batch, select=select)[0].mean())),
            ("backward", lambda of=losses: of[0].backward())]
        for name, work in parts:
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                taken[name].append(time.perf_counter() - start)
        model.zero_grad(set_to_none=True)
    median = {name: float(np.median(values)) for name, values in taken.items()}
    share = median["preprocess"] / sum(median.values())
    return {"tokens": batch.tokens, "bytes": len(image), **median, "preprocess_share": share, "raw": taken}


def capped(model: Any, folder: Path, side: int, rounds: int) -> list[dict[str, Any]]:
    """A square image of this side as it is, and under the cap where that scales it."""
    vision, image = vision_of(model), photo(side)
    assert vision is not None
    rows = [{"side": side, "capped": False} | step(model, folder, image, rounds)]
    if (small := vision.capped(side, side, CAP)) is not None:
        start = time.perf_counter()
        image = scaled_down(image, *small)
        once = time.perf_counter() - start
        rows.append({"side": side, "capped": True, "scaling_once": once} | step(model, folder, image, rounds))
    return rows


def markdown(figures: dict[str, Any]) -> str:
    """Both tables."""
    def cells(r: dict[str, Any]) -> str:
        parts = [1000 * r[name] for name in ("preprocess", "forward", "backward")]
        return (f"{r['tokens']:,} | {r['bytes'] / 1000:,.0f} | {parts[0]:.1f} | {parts[1]:.0f} | {parts[2]:.0f} | "
                f"{sum(parts):.0f} | {r['preprocess_share']:.1%}")

    head = "tokens of the row | kB stored | preprocessing ms | forward ms | backward ms | step ms | preprocessing's share |"
    lines = [f"One row with one square image and a one-word answer; text and vision parts of {figures['layers']} layers, "
             f"{figures['hidden']} wide, vision tower and projector frozen; medians of {figures['rounds']}.", "",
             "### By family", "", f"| family | side | {head}", "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
             *(f"| {r['family']} | {r['side']} | {cells(r)} |" for r in figures["families"]), "",
             f"### The pixel cap of {figures['cap_pixels']:,} pixels (784 x 784), Qwen2.5-VL's shape", "",
             f"| side | cap | {head}", "|--:|---|--:|--:|--:|--:|--:|--:|--:|",
             *(f"| {r['side']} | {'yes' if r['capped'] else 'no'} | {cells(r)} |" for r in figures["cap"])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
