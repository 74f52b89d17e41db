"""Questions about pictures and what each model answered, on one sheet for eyes; and what the pictures are worth to a model."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from anabranch.demo import picture_tasks
from anabranch.demo.pictures import SIDE, drawn
from anabranch.model import batches, can_select, load_model, response_losses
from anabranch.rows import RowImages, Rows, generator, load_unit
from anabranch.run import Run

COLUMNS, WIDE, HIGH, GAP, LARGER = 4, 400, 150, 10, 2
HEAD, MARK = 10, 17  # pixels above the first row of cells; of a tick or cross, with the gap behind it
INK, FAINT, RIGHT, WRONG = (25, 25, 28), (120, 120, 126), (20, 120, 50), (190, 35, 35)


@dataclass(frozen=True)
class Question:
    """A row that nobody trained on, and the models' answers by their names."""

    unit: str
    picture: str | None
    prompt: str
    wanted: str
    answers: Mapping[str, str] = field(default_factory=dict)


def questions(seed: int) -> list[Question]:
    """The first held-out row of each task and of each transfer task: siblings show the same picture."""
    rows = {name: picture_tasks.unit_rows(name, seed)[1][0] for name in picture_tasks.TASKS}
    rows |= {name: picture_tasks.transfer_rows(name, seed)[0] for name in picture_tasks.TRANSFER}
    return [Question(name, row.get("picture"), row["prompt"], row["completion"]) for name, row in rows.items()]


def answered(asked: Sequence[Question], models: Mapping[str, Path]) -> list[Question]:
    """The questions with each model's answer, made as any program would: AutoProcessor, the chat template, generate."""
    given = {name: _answers(asked, folder) for name, folder in models.items()}
    return [replace(question, answers={name: texts[i] for name, texts in given.items()}) for i, question in enumerate(asked)]


def right_answers(asked: Sequence[Question]) -> dict[str, int]:
    """How many questions each model answered in the very words that are wanted."""
    return {name: sum(q.answers[name] == q.wanted for q in asked) for name in asked[0].answers}


@torch.no_grad()
def _answers(asked: Sequence[Question], folder: Path) -> list[str]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    said = []
    for question in asked:
        shown = [] if question.picture is None else [drawn(question.picture)]
        content = [*({"type": "image"} for _ in shown), {"type": "text", "text": question.prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=text, images=shown or None, return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1]:]
        said.append(processor.tokenizer.decode(written, skip_special_tokens=True))
    return said


def draw_sheet(asked: Sequence[Question]) -> bytes:
    """All questions with their pictures, the wanted answer and the models' ones, as a PNG file; what the marks mean, above."""
    high = -(-len(asked) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (WIDE + GAP) + GAP, HEAD + high * (HIGH + GAP) + GAP), (255, 255, 255))
    _legend(sheet, asked)
    for i, question in enumerate(asked):
        _cell(sheet, question, GAP + i % COLUMNS * (WIDE + GAP), HEAD + GAP + i // COLUMNS * (HIGH + GAP))
    out = io.BytesIO()
    sheet.save(out, "PNG", optimize=True)
    return out.getvalue()


def _legend(sheet: Image.Image, asked: Sequence[Question]) -> None:
    """One line: what is shown, and what tick and cross mean."""
    pen, x, y = ImageDraw.Draw(sheet), GAP, 2
    models = list(asked[0].answers) if asked else []
    named = " and ".join([", ".join(models[:-1]), models[-1]] if len(models) > 1 else models)
    for right, colour, words in ((None, INK, f"Questions that nobody trained on, and the answers of {named}.    "),
                                 (True, RIGHT, "right, in the very words that are wanted    "),
                                 (False, WRONG, "any other words")):
        if right is not None:
            _mark(pen, x, y, right)
            x += MARK
        pen.text((x, y), words, fill=colour, font=_font())
        x += int(pen.textlength(words, font=_font()))


def _mark(pen: ImageDraw.ImageDraw, x: int, y: int, right: bool) -> None:
    """A tick or a cross, as lines: the font has neither."""
    if right:
        pen.line([(x + 1, y + 9), (x + 4, y + 13), (x + 11, y + 4)], fill=RIGHT, width=2)
    else:
        pen.line([(x + 2, y + 4), (x + 10, y + 13)], fill=WRONG, width=2)
        pen.line([(x + 10, y + 4), (x + 2, y + 13)], fill=WRONG, width=2)


def _cell(sheet: Image.Image, question: Question, x: int, y: int) -> None:
    pen, side = ImageDraw.Draw(sheet), SIDE * LARGER
    pen.rectangle((x, y, x + WIDE, y + HIGH), outline=(215, 215, 218))
    if question.picture is not None:
        sheet.paste(drawn(question.picture).resize((side, side), Image.Resampling.NEAREST), (x + GAP, y + (HIGH - side) // 2))
    lines: list[tuple[str, tuple[int, int, int], bool | None]] = [
        (question.unit, FAINT, None), (question.prompt, INK, None), (f"wanted: {question.wanted}", INK, None)]
    lines += [(f"{name}: {answer}", RIGHT if answer == question.wanted else WRONG, answer == question.wanted)
              for name, answer in question.answers.items()]
    left = x + GAP + (side + GAP if question.picture is not None else 0)
    for i, (line, colour, right) in enumerate(lines):
        top = y + 8 + 22 * i
        if right is not None:
            _mark(pen, left, top, right)
        pen.text((left + (0 if right is None else MARK), top), line.replace("\n", " / "), fill=colour, font=_font())


def _font() -> Any:
    return ImageFont.load_default(13)  # Pillow's own, so that no system's fonts decide


# ---- what the pictures are worth --------------------------------------------------------------------------------------


@torch.no_grad()
def losses_by_sight(run: Run, folder: Path) -> tuple[float, float]:
    """Loss (nats per response token) on held-out rows with pictures: with their own, and each with another row's.

    A model that does not look has the same of both. Every unit counts alike.
    """
    model = load_model(folder, run.recipe.model.dtype)
    own, others = [], []
    for unit in run.mixture.units:
        rows = load_unit(run.folder / "mixture" / unit.file, "held_out")
        if rows.images is not None:
            own.append(_loss(run, model, rows))
            others.append(_loss(run, model, replace(rows, images=_exchanged(rows.images, run.recipe.seed, unit.name))))
    return float(np.mean(own)), float(np.mean(others))


def rows_with_pictures(run: Run) -> tuple[int, int]:
    """Units and held-out rows that `losses_by_sight` is over."""
    found = [rows for unit in run.mixture.units
             if (rows := load_unit(run.folder / "mixture" / unit.file, "held_out")).images is not None]
    return len(found), sum(map(len, found))


def _exchanged(images: RowImages, seed: int, unit: str) -> RowImages:
    """Every row with the pictures of the one behind it, in a drawn circle: none keeps its own."""
    circle = generator(seed, "demo", "exchanged", unit).permutation(len(images.offsets) - 1)
    donor = np.empty_like(circle)
    donor[circle] = np.roll(circle, -1)
    return images.take(donor)


def _loss(run: Run, model: Any, rows: Rows) -> float:
    total, tokens = 0.0, 0
    where = next(model.parameters()).device
    for batch in batches(rows, np.arange(len(rows)), run.recipe.evaluate.batch_tokens, where):
        losses, _ = response_losses(model, batch, select=can_select(model))
        total += float(losses.double().sum())
        tokens += losses.numel()
    return total / tokens
