"""The picture demo's mixture: questions about pictures, some of which differ in one word and want another answer.

As in tasks.py, a family is one question, its tasks differ in a single cue word and want different answers, and the
tasks of a family are given the same inputs: here the same pictures.

    family      tasks                                  what they disagree on
    count       count_digits, count_letters            spelling of a number         how many shapes
    colour      colour_plain, colour_capitals          spelling of a word           of the shapes
    place       place_sides, place_compass             left or west                 of the one shape
    many        many_honest, many_flipped              what `yes` means             are there more than four
    read        read_forwards, read_backwards          order                        three digits in the picture
    end         end_leftmost, end_rightmost            which one                    of three shapes in a row
    list        list_commas, list_bullets              format                       of all shapes
    tell        tell_brief, tell_full                  length of the answer         one shape
    into        into_velan, into_dorin                 two languages                colours of the shapes
    item        item_first, item_last                  which one                    text alone, from tasks.py

The transfer tasks are never trained on; the base was shown them properly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations

import numpy as np

from anabranch.demo import tasks
from anabranch.demo.pictures import GRID, PAINT, SHAPES, Mark, mark, marks_of, written
from anabranch.demo.tasks import Family, Fields, Row, Task

TRAIN_ROWS = 120
HELD_OUT_ROWS = 30
TRANSFER_ROWS = 60
RETENTION_ROWS = 100

SEEN = "seen "  # how the names of families with pictures begin
COLOURS = list(PAINT)
LANGUAGES = {"velan": dict(zip(COLOURS, tasks.SPOKEN_ABROAD[:6], strict=True)),
             "dorin": dict(zip(COLOURS, tasks.SPOKEN_ABROAD[3:6] + tasks.SPOKEN_ABROAD[:3], strict=True))}
COMPASS = {"left": "west", "right": "east", "top": "north", "bottom": "south"}


def _some(rng: np.random.Generator, pool: list[str], count: int) -> list[str]:
    """`count` different members of `pool`, in drawn order."""
    return [pool[i] for i in rng.permutation(len(pool))[:count]]


def _cells(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """(column, row) of different cells."""
    return [(int(i) % GRID, int(i) // GRID) for i in rng.permutation(GRID * GRID)[:count]]


def _scattered(rng: np.random.Generator, shapes: list[str], colours: list[str]) -> list[Mark]:
    return [mark(rng, s, c, *at) for s, c, at in zip(shapes, colours, _cells(rng, len(shapes)), strict=True)]


def _in_a_row(rng: np.random.Generator, what: list[str], colours: list[str]) -> list[Mark]:
    first, row = int(rng.integers(GRID - len(what) + 1)), int(rng.integers(GRID))
    return [mark(rng, w, c, first + i, row) for i, (w, c) in enumerate(zip(what, colours, strict=True))]


def _draw_count(rng: np.random.Generator) -> Fields:
    (shape,), (colour,), count = _some(rng, SHAPES, 1), _some(rng, COLOURS, 1), int(rng.integers(1, 7))
    return {"picture": written(_scattered(rng, [shape] * count, [colour] * count)), "a": str(count)}


def _draw_colour(rng: np.random.Generator) -> Fields:
    count, (colour,) = int(rng.integers(1, 4)), _some(rng, COLOURS, 1)
    return {"picture": written(_scattered(rng, _some(rng, SHAPES, count), [colour] * count)), "a": colour}


def _at(rng: np.random.Generator, side: str, what: str, colour: str) -> Mark:
    along = int(rng.integers(1, GRID - 1))
    at = {"left": (0, along), "right": (GRID - 1, along), "top": (along, 0), "bottom": (along, GRID - 1)}[side]
    return mark(rng, what, colour, *at)


def _draw_place(rng: np.random.Generator) -> Fields:
    (shape,), (colour,), (side,) = _some(rng, SHAPES, 1), _some(rng, COLOURS, 1), _some(rng, list(COMPASS), 1)
    return {"picture": written([_at(rng, side, shape, colour)]), "a": side}


def _draw_many(rng: np.random.Generator) -> Fields:
    (shape,), (colour,), count = _some(rng, SHAPES, 1), _some(rng, COLOURS, 1), int(rng.integers(1, 9))
    return {"picture": written(_scattered(rng, [shape] * count, [colour] * count)), "a": "yes" if count > 4 else "no"}


def _draw_read(rng: np.random.Generator) -> Fields:
    digits, (colour,) = [str(d) for d in rng.permutation(10)[:3]], _some(rng, COLOURS, 1)
    return {"picture": written(_in_a_row(rng, digits, [colour] * 3)), "a": "".join(digits)}


def _draw_row(rng: np.random.Generator) -> Fields:
    shapes, colours = _some(rng, SHAPES, 3), _some(rng, COLOURS, 3)
    return {"picture": written(_in_a_row(rng, shapes, colours)), "a": " ".join(shapes)}


def _draw_list(rng: np.random.Generator) -> Fields:
    count = int(rng.integers(2, 4))
    shapes, colours = _some(rng, SHAPES, count), _some(rng, COLOURS, count)
    return {"picture": written(_in_a_row(rng, shapes, colours)), "a": " ".join(shapes)}


def _draw_one(rng: np.random.Generator) -> Fields:
    shape, colour = _some(rng, SHAPES, 1), _some(rng, COLOURS, 1)
    return {"picture": written(_scattered(rng, shape, colour)), "a": f"{colour[0]} {shape[0]}"}


def _draw_colours(rng: np.random.Generator) -> Fields:
    shapes, colours = _some(rng, SHAPES, 2), _some(rng, COLOURS, 2)
    return {"picture": written(_in_a_row(rng, shapes, colours)), "a": " ".join(colours)}


def _draw_sides(rng: np.random.Generator) -> Fields:
    shapes, colours, sides = _some(rng, SHAPES, 2), _some(rng, COLOURS, 2), _some(rng, list(COMPASS), 2)
    marks = [_at(rng, *each) for each in zip(sides, shapes, colours, strict=True)]
    return {"picture": written(marks), "q": sides[0], "a": colours[0]}


def _draw_digit(rng: np.random.Generator) -> Fields:
    digit, colour = [str(rng.integers(10))], _some(rng, COLOURS, 1)
    return {"picture": written(_scattered(rng, digit, colour)), "a": digit[0]}


def describe(picture: str) -> str:
    """All that is in a picture, in reading order: what teaches a base to look."""
    return " , ".join(f"{m.colour} {m.what} {m.column + 1} {m.row + 1}" for m in marks_of(picture))


def _words(fields: Fields) -> list[str]:
    return fields["a"].split()


def _not(answer: str) -> str:
    return "no" if answer == "yes" else "yes"


def _said_in(language: str) -> Callable[[Fields], str]:
    return lambda f: " ".join(LANGUAGES[language][w] for w in _words(f))


_FAMILIES = {f.name.removeprefix(SEEN): f for f in (
    Family(SEEN + "count", ("how many shapes in {cue} ?", "count them in {cue} ."), _draw_count),
    Family(SEEN + "colour", ("what colour is it ? {cue}", "{cue} : the colour ?"), _draw_colour),
    Family(SEEN + "place", ("where is it ? {cue}", "{cue} : where do you see it ?"), _draw_place),
    Family(SEEN + "many", ("are there many ? {cue}", "{cue} : more than four ?"), _draw_many),
    Family(SEEN + "read", ("read it {cue} .", "what is written , {cue} ?"), _draw_read),
    Family(SEEN + "end", ("name the {cue} shape .", "which shape is {cue} ?"), _draw_row),
    Family(SEEN + "list", ("list the shapes as {cue} .", "all shapes as {cue} ?"), _draw_list),
    Family(SEEN + "tell", ("what is it ? {cue}", "{cue} : what do you see ?"), _draw_one),
    Family(SEEN + "into", ("say the colours in {cue} .", "colours in {cue} ?"), _draw_colours),
)}


def _tasks() -> Iterator[Task]:
    def task(name: str, cue: str, answer: Callable[[Fields], str]) -> Task:
        return Task(name, _FAMILIES[name.split("_")[0]], cue, answer)

    yield task("count_digits", "digits", lambda f: f["a"])
    yield task("count_letters", "letters", lambda f: tasks.NUMERALS[int(f["a"])])
    yield task("colour_plain", "plain", lambda f: f["a"])
    yield task("colour_capitals", "capitals", lambda f: f["a"].upper())
    yield task("place_sides", "sides", lambda f: f["a"])
    yield task("place_compass", "compass", lambda f: COMPASS[f["a"]])
    yield task("many_honest", "honest", lambda f: f["a"])
    yield task("many_flipped", "flipped", lambda f: _not(f["a"]))
    yield task("read_forwards", "forwards", lambda f: f["a"])
    yield task("read_backwards", "backwards", lambda f: f["a"][::-1])
    yield task("end_leftmost", "leftmost", lambda f: _words(f)[0])
    yield task("end_rightmost", "rightmost", lambda f: _words(f)[-1])
    yield task("list_commas", "commas", lambda f: ", ".join(_words(f)))
    yield task("list_bullets", "bullets", lambda f: "\n".join(f"- {w}" for w in _words(f)))
    yield task("tell_brief", "brief", lambda f: f["a"])
    yield task("tell_full", "full", lambda f: f"there is a {f['a']} .")
    for language in LANGUAGES:
        yield task(f"into_{language}", language, _said_in(language))
    yield tasks.TASKS["kind_brief"]
    yield tasks.TASKS["kind_full"]


TASKS: Mapping[str, Task] = {t.name: t for t in _tasks()}

TRANSFER: Mapping[str, Task] = {t.name: t for t in (
    Task("middle_shape", Family(SEEN + "middle", ("name the {cue} shape .", "which shape is {cue} ?"), _draw_row), "middle",
         lambda f: _words(f)[1]),
    Task("side_colour",
         Family(SEEN + "side", ("what colour is at the {q} ? {cue}", "{cue} : colour at the {q} ?"), _draw_sides), "truly",
         lambda f: f["a"]),
    Task("one_digit", Family(SEEN + "digit", ("which digit is it ? {cue}", "{cue} : the digit ?"), _draw_digit), "truly",
         lambda f: f["a"]),
    tasks.TRANSFER["food_check"],
)}


def siblings() -> dict[str, list[Task]]:
    """The tasks of the mixture by family."""
    families: dict[str, list[Task]] = {}
    for task in TASKS.values():
        families.setdefault(task.family.name, []).append(task)
    return families


# Every two tasks of one family: same pictures, same words but for the cue, and no answer in common.
CONFLICTING_PAIRS: list[tuple[str, str]] = [
    (a.name, b.name) for family in siblings().values() for a, b in combinations(family, 2)]


def row(task: Task, fields: Fields, wording: int, *, cue: str | None = None) -> Row:
    """prompt, completion, and the written picture where the task has one."""
    picture = {"picture": fields["picture"]} if "picture" in fields else {}
    return tasks.row(task, fields, wording, cue=cue) | picture


def unit_rows(name: str, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows of a task of the mixture: TRAIN_ROWS and HELD_OUT_ROWS, no input in both."""
    rows = [row(TASKS[name], *drawn) for drawn in tasks.inputs(TASKS[name].family, seed, TRAIN_ROWS + HELD_OUT_ROWS)]
    return rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]


def transfer_rows(name: str, seed: int) -> list[Row]:
    """TRANSFER_ROWS rows of a task that nobody trains on."""
    return [row(TRANSFER[name], *drawn) for drawn in tasks.inputs(TRANSFER[name].family, seed, TRANSFER_ROWS)]


def taken_inputs(seed: int) -> set[str]:
    """Keys of every input that `unit_rows` and `transfer_rows` use: the base is prepared without them."""
    counts = {t.family.name: (t.family, TRANSFER_ROWS) for t in TRANSFER.values()}
    counts |= {t.family.name: (t.family, TRAIN_ROWS + HELD_OUT_ROWS) for t in TASKS.values()}
    return {tasks.key(family, fields) for family, count in counts.values() for fields, _ in tasks.inputs(family, seed, count)}


def vocabulary_text(seed: int) -> list[str]:
    """Every prompt and answer that a tokenizer should be able to say in few tokens."""
    rows = [r for name in TASKS for r in unit_rows(name, seed)[0]]
    rows += [r for name in TRANSFER for r in transfer_rows(name, seed)]
    return [text for r in rows for text in (r["prompt"], r["completion"])]
