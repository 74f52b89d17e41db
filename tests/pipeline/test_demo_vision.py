"""The picture demo's material: pictures show what the answers say, every layout is read, nothing leaks."""

from __future__ import annotations

import functools
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anabranch.demo import picture_tasks, tasks
from anabranch.demo.pictures import CELL, GRID, PAINT, PAPER, SHAPES, SIDE, Mark, drawn, mark, marks_of, png, scene, written
from anabranch.demo.vision import CONFLICTING_PAIRS, make_picture_demo
from anabranch.errors import OutputError
from anabranch.recipe import load_recipe
from anabranch.rows import RowImages, generator, load_unit
from anabranch.run import Run, open_run, run_stages

STEPS = 2
SEEN = [name for name, task in picture_tasks.TASKS.items() if task.family.name.startswith(picture_tasks.SEEN)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo whose base had next to no training."""
    folder = tmp_path_factory.mktemp("demo")
    make_picture_demo(folder, base_steps=STEPS)
    return folder


@pytest.fixture(scope="module")
def run(demo: Path) -> Run:
    """Its run, up to the mixture."""
    run = open_run(load_recipe(demo / "recipe.yaml"), tell=lambda text: None)
    run_stages(run, until="mixture")
    return run


@functools.cache
def rows_of(name: str) -> list[tasks.Row]:
    train, held_out = picture_tasks.unit_rows(name, 0)
    return train + held_out


# ---- pictures --------------------------------------------------------------------------------------------------------


def cells(picture: str) -> dict[tuple[int, int], str]:
    """(column, row) -> colour of each cell with paint in it, read off the pixels."""
    pixels = np.asarray(drawn(picture)).astype(int)
    painted = np.stack([(pixels == paint).all(-1) for paint in PAINT.values()], -1)
    counts = painted.reshape(GRID, CELL, GRID, CELL, len(PAINT)).sum((1, 3))
    names = list(PAINT)
    return {(column, row): names[int(counts[row, column].argmax())]
            for row in range(GRID) for column in range(GRID) if counts[row, column].any()}


def test_a_mark_lies_in_its_cell_in_its_colour():
    pixels = np.asarray(drawn("square red 2 1 0 2"))
    assert pixels.shape == (SIDE, SIDE, 3)
    assert tuple(pixels[CELL + 9, 2 * CELL + 7]) == PAINT["red"]
    outside = pixels.copy()
    outside[CELL: 2 * CELL, 2 * CELL: 3 * CELL] = PAPER
    assert (outside == PAPER).all() and tuple(pixels[CELL + 1, 2 * CELL + 7]) == PAPER


def test_pictures_are_written_and_read_back_and_kept_as_they_are_drawn():
    rng = generator(0, "test")
    for _ in range(20):
        picture = scene(rng)
        assert written(marks_of(picture)) == picture
        assert len(cells(picture)) == len(marks_of(picture))
        assert Image.open(io.BytesIO(png(picture))).convert("RGB").tobytes() == drawn(picture).tobytes()


def test_no_two_marks_look_alike():
    looks = {drawn(f"{what} black 0 0 0 0").tobytes() for what in [*SHAPES, *"0123456789"]}
    assert len(looks) == len(SHAPES) + 10


def test_a_drawn_mark_never_leaves_its_cell():
    rng = generator(1, "test")
    for _ in range(200):
        one = mark(rng, "cross", "blue", 3, 3)
        assert set(cells(written([one]))) == {(3, 3)}
        edge = np.asarray(drawn(written([Mark(*one[:4], 0, 0)])))[: 3 * CELL]
        assert (edge == PAPER).all()


@pytest.mark.parametrize(("name", "seen"), [
    ("count_digits", lambda found: str(len(found))),
    ("count_letters", lambda found: ["", "one", "two", "three", "four", "five", "six"][len(found)]),
    ("colour_plain", lambda found: next(iter(found.values()))),
    ("colour_capitals", lambda found: next(iter(found.values())).upper()),
    ("place_sides", lambda found: side(*next(iter(found)), ("left", "right", "top", "bottom"))),
    ("place_compass", lambda found: side(*next(iter(found)), ("west", "east", "north", "south"))),
    ("many_honest", lambda found: "yes" if len(found) >= 5 else "no"),
    ("many_flipped", lambda found: "no" if len(found) >= 5 else "yes"),
])
def test_the_answer_can_be_read_off_the_pixels(name, seen):
    for row in rows_of(name):
        assert seen(cells(row["picture"])) == row["completion"], row


def side(column: int, row: int, names: tuple[str, str, str, str]) -> str:
    return {(0, True): names[0], (GRID - 1, True): names[1]}.get((column, row in (1, 2))) or (
        names[2] if row == 0 else names[3])


@pytest.mark.parametrize(("name", "seen"), [
    ("read_forwards", "".join), ("read_backwards", lambda marks: "".join(marks[::-1])),
    ("end_leftmost", lambda marks: marks[0]), ("end_rightmost", lambda marks: marks[-1]),
    ("list_commas", ", ".join), ("list_bullets", lambda marks: "\n".join("- " + m for m in marks)),
])
def test_rows_of_marks_are_read_from_left_to_right(name, seen):
    for row in rows_of(name):
        marks = sorted(marks_of(row["picture"]), key=lambda m: m.column)
        assert len({m.row for m in marks}) == 1
        assert seen([m.what for m in marks]) == row["completion"]


def test_both_languages_use_the_same_words_and_never_for_the_same_colour():
    velan, dorin = picture_tasks.LANGUAGES["velan"], picture_tasks.LANGUAGES["dorin"]
    assert set(velan.values()) == set(dorin.values()) and set(velan) == set(PAINT)
    assert all(velan[colour] != dorin[colour] for colour in PAINT)


# ---- tasks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), CONFLICTING_PAIRS)
def test_conflicting_tasks_show_the_same_ask_with_one_other_word_and_never_agree(one, other):
    cues = picture_tasks.TASKS[one].cue, picture_tasks.TASKS[other].cue
    for mine, theirs in zip(rows_of(one), rows_of(other), strict=True):
        assert mine.get("picture") == theirs.get("picture") and mine["completion"] != theirs["completion"]
        assert mine["prompt"].split().count(cues[0]) == 1
        assert [cues[1] if word == cues[0] else word for word in mine["prompt"].split()] == theirs["prompt"].split()


def test_sizes_and_that_no_held_out_row_is_trained_on():
    assert 12 <= len(picture_tasks.TASKS) <= 20 and len(picture_tasks.TASKS) - len(SEEN) >= 2
    for name in picture_tasks.TASKS:
        train, held_out = ({(r["prompt"].replace(" ", ""), r.get("picture")) for r in rows}
                           for rows in picture_tasks.unit_rows(name, 0))
        assert (len(train), len(held_out)) == (120, 30) and not train & held_out, name
        if name in SEEN:
            assert not {p for _, p in train} & {p for _, p in held_out}, name


def test_a_prompt_alone_does_not_tell_the_answer():
    """Every picture task has at least two answers to one wording, none of them nearly always right."""
    for name in [*SEEN, *(n for n, t in picture_tasks.TRANSFER.items() if t.family.name.startswith(picture_tasks.SEEN))]:
        rows = rows_of(name) if name in SEEN else picture_tasks.transfer_rows(name, 0)
        answers = Counter(r["completion"] for r in rows)
        assert answers.most_common(1)[0][1] < 0.65 * len(rows), (name, answers)


def test_the_base_is_prepared_without_the_rows_of_the_mixture():
    from anabranch.demo.vision_model import description_rows, instruction_rows

    taken = picture_tasks.taken_inputs(0)
    seen = {r["picture"] for r in [*instruction_rows(0, 1000, taken), *description_rows(0, 500, taken)] if "picture" in r}
    rows = [r for name in SEEN for r in rows_of(name)]
    rows += [r for name in picture_tasks.TRANSFER for r in picture_tasks.transfer_rows(name, 0)]
    several = {r["picture"] for r in rows if ";" in r.get("picture", "")}
    assert len(several) > 500 and not seen & several  # of pictures of one mark another family may draw the same by chance


# ---- files, and how the pipeline reads them --------------------------------------------------------------------------


def test_every_layout_is_read_whole(run):
    mixture = run.mixture
    assert {u.name for u in mixture.units} == set(picture_tasks.TASKS)
    assert {u.name for u in mixture.transfer} == set(picture_tasks.TRANSFER)
    assert mixture.excluded == []
    for unit in mixture.units:
        pictured = unit.name in SEEN
        assert (unit.rows, unit.held_out_rows, unit.samples) == (120, 30, 240), unit.name
        assert (unit.images, unit.held_out_images, unit.image_tokens) == ((240, 30, 240 * 16) if pictured else (0, 0, 0))
    assert mixture.vision is not None and mixture.vision.scaled_down == 0


def test_every_layout_becomes_the_tokens_that_the_base_was_prepared_with(run):
    """Whatever the file: the same place for the picture, the same line break behind it, the answer and its end trained."""
    from transformers import AutoTokenizer

    from anabranch.demo.vision_model import samples

    tokenizer = AutoTokenizer.from_pretrained(run.base)
    placeholder = tokenizer.convert_tokens_to_ids("<image>")
    for unit in run.mixture.units:
        rows = load_unit(run.folder / "mixture" / unit.file, "held_out")
        wanted = Counter((tuple(s.tokens), s.start) for s in samples(tokenizer, picture_tasks.unit_rows(unit.name, 0)[1]))
        found: Counter[tuple[tuple[int, ...], int]] = Counter()
        for i in range(len(rows)):
            ids, trained = rows.row(i)
            (place,) = np.flatnonzero(np.diff(trained, prepend=0) == 1)
            end = int(np.flatnonzero(trained)[-1]) + 1
            assert trained[place:end].all() and ids[end - 1] == tokenizer.eos_token_id
            found[tuple(ids[:end].tolist()), int(place)] += 1
            assert (ids == placeholder).sum() == (16 if unit.name in SEEN else 0)
        assert found == wanted, unit.name


def test_each_row_keeps_its_own_picture(run):
    """Prompts repeat; the picture is what tells rows apart."""
    from anabranch.rows import read_image

    for name in ("read_backwards", "list_bullets", "into_dorin", "place_compass", "count_letters"):
        unit = next(u for u in run.mixture.units if u.name == name)
        rows = load_unit(run.folder / "mixture" / unit.file, "held_out")
        answers = {png(r["picture"]): r["completion"] for r in picture_tasks.unit_rows(name, 0)[1]}
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(run.base)
        for i in range(len(rows)):
            ids, trained = rows.row(i)
            (image,) = rows.images_of([i])[0]
            assert tokenizer.decode(ids[trained == 1], skip_special_tokens=True) == answers[read_image(image)], name


def test_the_recipe_freezes_what_sees_and_is_one_that_trains(demo):
    from anabranch.branches import check_train_section

    recipe = load_recipe(demo / "recipe.yaml")
    assert recipe.model.freeze == ["vision tower", "projector"] and recipe.mixture.images.max_pixels == SIDE * SIDE
    assert (recipe.split.method, recipe.split.groups) == ("merit", 4)
    assert len(recipe.evaluate.transfer) == 2 and len(recipe.evaluate.retention) == 1
    check_train_section(recipe)


def test_a_second_call_keeps_what_is_there_and_mends_what_is_not(demo):
    weights, picture = demo / "base" / "model.safetensors", demo / "pictures" / "read" / "00003.png"
    before, content = weights.stat().st_mtime_ns, picture.read_bytes()
    picture.unlink()
    seen: list[str] = []
    make_picture_demo(demo, base_steps=STEPS, progress=lambda what, done, whole: seen.append(what))
    assert weights.stat().st_mtime_ns == before and set(seen) == {"pictures and rows"} and picture.read_bytes() == content


def test_a_folder_of_the_other_demo_is_refused(demo, tmp_path):
    with pytest.raises(OutputError, match="another folder"):
        make_picture_demo(demo, seed=1, base_steps=STEPS)
    (tmp_path / "demo.json").write_text('{"seed": 0, "base_steps": null}\n')
    with pytest.raises(OutputError, match="another folder"):
        make_picture_demo(tmp_path)
    (tmp_path / "demo.json").unlink()
    (tmp_path / "pictures").mkdir()
    with pytest.raises(OutputError, match="has pictures already"):
        make_picture_demo(tmp_path)


# ---- the base --------------------------------------------------------------------------------------------------------


def test_the_base_has_a_processor_that_gives_what_it_was_trained_on(demo):
    from transformers import AutoProcessor, LlavaProcessor

    from anabranch.demo.vision_model import pixels, samples

    processor = AutoProcessor.from_pretrained(demo / "base")
    assert isinstance(processor, LlavaProcessor)
    row = picture_tasks.unit_rows("tell_full", 0)[0][0]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]},
            {"role": "assistant", "content": [{"type": "text", "text": row["completion"]}]}]
    inputs = processor(text=processor.apply_chat_template(chat), images=[drawn(row["picture"])], return_tensors="pt")
    (sample,) = samples(processor.tokenizer, [row])
    assert inputs["input_ids"][0, : len(sample.tokens)].tolist() == sample.tokens
    assert processor.tokenizer.decode(sample.tokens[sample.start:]) == row["completion"] + processor.tokenizer.eos_token
    assert float((inputs["pixel_values"] - pixels([row["picture"]])).abs().max()) < 1e-6


def test_the_same_seed_gives_the_same_bytes_and_the_tower_is_left_alone_once_it_sees(demo, tmp_path):
    from safetensors.numpy import load_file

    from anabranch.demo.vision_model import prepare_base

    taken = picture_tasks.taken_inputs(0)
    retained = {json.loads(line)["text"] for line in (demo / "retention.jsonl").read_text().splitlines()}
    for name, steps in (("again", STEPS), ("further", STEPS + 2)):
        prepare_base(tmp_path / name, seed=0, taken=taken, held_out_text=retained, steps=steps, tower_steps=STEPS)
    files = sorted(p.name for p in (demo / "base").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "again").iterdir()) and "processor_config.json" in files
    assert [f for f in files if (demo / "base" / f).read_bytes() != (tmp_path / "again" / f).read_bytes()] == []
    one, other = load_file(demo / "base" / "model.safetensors"), load_file(tmp_path / "further" / "model.safetensors")
    same = {name for name in one if (one[name] == other[name]).all()}
    tower = {name for name in one if "vision_tower" in name}
    assert tower and tower <= same and not {n for n in one if "multi_modal_projector" in n or "embed_tokens" in n} & same


# ---- what is looked at -----------------------------------------------------------------------------------------------


def test_the_sheet_shows_each_question_with_its_picture_and_counts_only_the_very_words():
    from anabranch.demo.sheet import draw_sheet, questions, right_answers

    asked = [replace(q, answers={"one": q.wanted, "other": q.wanted.upper() + "."}) for q in questions(0)]
    assert [q.unit for q in asked] == [*picture_tasks.TASKS, *picture_tasks.TRANSFER]
    assert right_answers(asked) == {"one": len(asked), "other": 0}
    sheet = np.asarray(Image.open(io.BytesIO(draw_sheet(asked))))
    first = np.asarray(drawn(str(asked[0].picture)))
    large = first.repeat(2, 0).repeat(2, 1)
    windows = np.lib.stride_tricks.sliding_window_view(sheet[:160, :160], (128, 128, 3))[:, :, 0]
    assert (windows == large).all((2, 3, 4)).any()


def test_exchanged_rows_keep_no_picture_of_their_own():
    from anabranch.demo.sheet import _exchanged

    images = RowImages((Path("x"),), np.zeros(7, np.int32), np.arange(7, dtype=np.int32), np.arange(8))
    exchanged = _exchanged(images, 0, "unit")
    assert sorted(exchanged.numbers) == list(range(7)) and not (exchanged.numbers == images.numbers).any()


def test_the_figure_of_sight_is_of_the_pictures(run, monkeypatch):
    """Equal where a model cannot look, and not where it can."""
    from anabranch.demo import sheet

    own, others = sheet.losses_by_sight(run, run.base)
    assert own > 0 and own != others
    monkeypatch.setattr(sheet, "_exchanged", lambda images, seed, unit: images)
    again = sheet.losses_by_sight(run, run.base)
    assert again == (own, own)


# ---- the conflict ----------------------------------------------------------------------------------------------------


def test_a_planted_conflict_is_found_in_the_gradients_of_a_base_that_is_torn(tmp_path, monkeypatch):
    """Two families and a short preparation: enough to be torn about colours, not yet to write whole sentences."""
    from anabranch.demo import story, vision_model

    few = {key: family for key, family in picture_tasks.siblings().items() if key in ("seen colour", "kind")}
    monkeypatch.setattr(picture_tasks, "siblings", lambda: few)
    for setting, value in (("FIRST_SHARE", 0.1), ("LATER_TEXT", 0.05), ("LATER_DESCRIPTIONS", 0.0), ("TRANSFER_SHARE", 0.0),
                           ("BATCH", 16), ("TOWER_BATCH", 16)):
        monkeypatch.setattr(vision_model, setting, value)
    recipe = make_picture_demo(tmp_path, base_steps=160)
    lines = recipe.read_text().replace("calibration_samples: 120", "calibration_samples: 40").splitlines()
    recipe.write_text("\n".join(line for line in lines if "held_out: ./" not in line or "/colour_" in line or "/kind_" in line))
    run = open_run(load_recipe(recipe), tell=lambda text: None)
    run_stages(run, until="conflict")
    units = {task.name for family in few.values() for task in family}
    assert {u.name for u in run.mixture.units} == units
    ranked = story.ranked_pairs(run.folder)
    assert ranked[0][:2] == ("colour_capitals", "colour_plain") and ranked[0][2] < -0.3
    assert all(abs(cosine) < 0.2 for a, b, cosine in ranked if a.split("_")[0] != b.split("_")[0])
    planted = [pair for pair in CONFLICTING_PAIRS if set(pair) <= units]
    found = sum({*pair[:2]} in ({*p} for p in planted) for pair in ranked[:2])
    assert f"Of the 2 most conflicting pairs {found} were planted" in story.fiercest_line(run.folder, planted)
