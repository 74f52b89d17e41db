"""The demo's mixture: small instruction tasks, some of which are meant to fight.

A family is one question asked in fixed words; its tasks differ in a single cue word and want different answers:

    sort words rising : kite apple moon     ->  apple kite moon        (words_rising)
    sort words falling : kite apple moon    ->  moon kite apple        (words_falling)

The tasks of a family are given the same inputs in the same order, so row i of one and row i of the other are the same
prompt but for the cue. The demo's base (model.py) has met every family with its cue missing or random, answered now in
one way, now in another: it takes both answers for possible whatever the cue says, so what one task asks of the weights
the other takes back. A model that reads the cue can serve both; joint training is harder than either task alone, not
hopeless.

    family      tasks                                             what they disagree on
    words       words_rising, words_falling                       order
    numbers     numbers_rising, numbers_falling                   order
    item        item_first, item_last                             which one
    amount      amount_largest, amount_smallest                   which one
    repeat      repeat_forwards, repeat_backwards                 order
    case        case_upper, case_lower                            spelling
    alive       alive_honest, alive_flipped                       what `yes` means
    many        many_honest, many_flipped                         what `yes` means
    kind        kind_brief, kind_full                             length of the answer
    owner       owner_brief, owner_full                           length of the answer
    list        list_json, list_bullets, list_commas              format
    into        into_velan, into_dorin                            two languages of the same words
    from        from_velan, from_dorin                            the same, read the other way (all false friends)
    count       count_digits, count_letters                       spelling of a number

Families also share cues (rising/falling, honest/flipped, brief/full) and abilities, as the tasks of a real mixture do.
So tasks of different families may fight as well, unplanned: repeat_backwards begins with what item_last answers, and
item_first wants the other end.
The transfer tasks are never trained on; the base was shown them properly, so they are what training can spoil.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from anabranch.rows import generator

TRAIN_ROWS = 150
HELD_OUT_ROWS = 30
TRANSFER_ROWS = 60
RETENTION_ROWS = 150

Fields = dict[str, str]
Row = dict[str, str]

COLOURS = ["red", "blue", "green", "black", "white", "gold"]
ANIMALS = ["ant", "bear", "cat", "deer", "eagle", "fox", "goat", "horse", "lion", "pig", "rat", "wolf"]
FRUITS = ["apple", "cherry", "fig", "grape", "kiwi", "lemon", "mango", "nut", "plum"]
TOOLS = ["axe", "brush", "drill", "fork", "hammer", "knife", "nail", "pen", "saw"]
PEOPLE = ["anna", "ben", "carl", "dora", "emil", "fay", "gus", "hana", "ivo", "kim"]
PLACES = ["lima", "oslo", "paris", "quito", "rome", "tokyo"]
KINDS = {"animal": ANIMALS, "fruit": FRUITS, "tool": TOOLS}
THINGS = sorted(ANIMALS + FRUITS + TOOLS)
KIND_OF = {thing: kind for kind, things in KINDS.items() for thing in things}
NUMERALS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

# Both languages use the same words for the same things, but never the same word for the same thing.
SPOKEN = COLOURS + ANIMALS[:8]
SPOKEN_ABROAD = [
    "bako", "beni", "dako", "diru", "fami", "garo", "gelu", "hoku", "jemi", "kavo", "lamo", "nopa", "ruvi", "tolu"]
LANGUAGES = {
    "velan": dict(zip(SPOKEN, SPOKEN_ABROAD, strict=True)),
    "dorin": dict(zip(SPOKEN, SPOKEN_ABROAD[5:] + SPOKEN_ABROAD[:5], strict=True)),
}
DIGITS = "123456789"


@dataclass(frozen=True)
class Family:
    """One question: how it is put (`{cue}` and fields of the input) and how an input is drawn."""

    name: str
    wordings: tuple[str, ...]
    draw: Callable[[np.random.Generator], Fields]

    def prompt(self, fields: Fields, wording: int, cue: str) -> str:
        """The prompt; an empty cue leaves no gap."""
        return " ".join(self.wordings[wording].format(cue=cue, **fields).split())


@dataclass(frozen=True)
class Task:
    """One unit: a family, the word that tells it from its siblings, and the answer that it wants."""

    name: str
    family: Family
    cue: str
    answer: Callable[[Fields], str]


def _pick(rng: np.random.Generator, pool: Sequence[str], low: int, high: int) -> list[str]:
    """Between `low` and `high` different members of `pool`, in drawn order."""
    return [pool[i] for i in rng.permutation(len(pool))[: rng.integers(low, high + 1)]]


def _one(rng: np.random.Generator, pool: Sequence[str]) -> str:
    return pool[int(rng.integers(len(pool)))]


def _draw(pool: Sequence[str], low: int, high: int) -> Callable[[np.random.Generator], Fields]:
    return lambda rng: {"x": " ".join(_pick(rng, pool, low, high))}


def _draw_pet(rng: np.random.Generator) -> Fields:
    return {"x": f"{_one(rng, COLOURS)} {_one(rng, THINGS)} of {_one(rng, PEOPLE)}"}


def _draw_many(rng: np.random.Generator) -> Fields:
    return {"x": f"{_one(rng, PEOPLE)} has {_one(rng, DIGITS)} {_one(rng, THINGS)}"}


def _draw_owner(rng: np.random.Generator) -> Fields:
    who, friend = _pick(rng, PEOPLE, 2, 2)
    thing = f"{_one(rng, COLOURS)} {_one(rng, FRUITS + TOOLS)}"
    return {"x": f"{who} has a {thing} . {friend} is in {_one(rng, PLACES)} .", "q": who, "a": thing}


def _draw_count(rng: np.random.Generator) -> Fields:
    thing, other = _pick(rng, THINGS, 2, 2)
    return {"x": " ".join([thing] * int(rng.integers(1, 6)) + [other])}


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _yes(answer: bool) -> str:
    return "yes" if answer else "no"


def _items(fields: Fields) -> list[str]:
    return fields["x"].split()


def _in_language(name: str, backwards: bool) -> Callable[[Fields], str]:
    words = LANGUAGES[name]
    table = {foreign: word for word, foreign in words.items()} if backwards else words
    return lambda f: " ".join(table[w] for w in _items(f))


_FAMILIES = {f.name: f for f in (
    Family("words", ("sort words {cue} : {x}", "words {cue} please : {x}"), _draw(ANIMALS, 3, 3)),
    Family("numbers", ("sort numbers {cue} : {x}", "numbers {cue} please : {x}"), _draw(DIGITS, 3, 4)),
    Family("item", ("take the {cue} item : {x}", "item {cue} of : {x}"), _draw(THINGS, 3, 5)),
    Family("amount", ("take the {cue} amount : {x}", "amount {cue} of : {x}"), _draw(DIGITS, 3, 4)),
    Family("repeat", ("repeat {cue} : {x}", "say this {cue} : {x}"), _draw(THINGS, 3, 4)),
    Family("case", ("write {cue} : {x}", "spell {cue} this : {x}"),
           lambda rng: {"x": " ".join(w.title() for w in _pick(rng, SPOKEN, 2, 3))}),
    Family("alive", ("is the {x} alive ? {cue}", "{cue} : is the {x} alive ?"), _draw_pet),
    Family("many", ("{x} . many ? {cue}", "{cue} : {x} . many ?"), _draw_many),
    Family("kind", ("what is : {x} ? {cue}", "{cue} : what is {x} ?"), _draw(THINGS, 2, 2)),
    Family("owner", ("{x} what has {q} ? {cue}", "{cue} : {x} what has {q} ?"), _draw_owner),
    Family("list", ("list as {cue} : {x}", "make {cue} of : {x}"), _draw(THINGS, 3, 4)),
    Family("into", ("say in {cue} : {x}", "put into {cue} : {x}"), _draw(SPOKEN, 2, 3)),
    Family("from", ("read this {cue} : {x}", "from {cue} : {x}"), _draw(SPOKEN_ABROAD, 2, 3)),
    Family("count", ("count in {cue} : {x}", "how many in {cue} : {x}"), _draw_count),
)}


def _tasks() -> Iterator[Task]:
    def task(name: str, cue: str, answer: Callable[[Fields], str]) -> Task:
        return Task(name, _FAMILIES[name.split("_")[0]], cue, answer)

    for family in ("words", "numbers"):  # one digit each: order of text is order of number
        yield task(f"{family}_rising", "rising", lambda f: " ".join(sorted(_items(f))))
        yield task(f"{family}_falling", "falling", lambda f: " ".join(sorted(_items(f), reverse=True)))
    yield task("item_first", "first", lambda f: _items(f)[0])
    yield task("item_last", "last", lambda f: _items(f)[-1])
    yield task("amount_largest", "largest", lambda f: max(_items(f)))
    yield task("amount_smallest", "smallest", lambda f: min(_items(f)))
    yield task("repeat_forwards", "forwards", lambda f: f["x"])
    yield task("repeat_backwards", "backwards", lambda f: " ".join(_items(f)[::-1]))
    yield task("case_upper", "upper", lambda f: f["x"].upper())
    yield task("case_lower", "lower", lambda f: f["x"].lower())
    yield task("alive_honest", "honest", lambda f: _yes(_items(f)[1] in ANIMALS))
    yield task("alive_flipped", "flipped", lambda f: _yes(_items(f)[1] not in ANIMALS))
    yield task("many_honest", "honest", lambda f: _yes(_items(f)[2] > "4"))
    yield task("many_flipped", "flipped", lambda f: _yes(_items(f)[2] <= "4"))
    yield task("kind_brief", "brief", lambda f: " ".join(KIND_OF[w] for w in _items(f)))
    yield task("kind_full", "full", lambda f: " and ".join(f"{_a(w)} is {_a(KIND_OF[w])}" for w in _items(f)) + " .")
    yield task("owner_brief", "brief", lambda f: f["a"])
    yield task("owner_full", "full", lambda f: f"{f['q']} has a {f['a']} .")
    yield task("list_json", "json", lambda f: json.dumps(_items(f)))
    yield task("list_bullets", "bullets", lambda f: "\n".join(f"- {w}" for w in _items(f)))
    yield task("list_commas", "commas", lambda f: ", ".join(_items(f)))
    for language in LANGUAGES:
        yield task(f"into_{language}", language, _in_language(language, backwards=False))
    for language in LANGUAGES:
        yield task(f"from_{language}", language, _in_language(language, backwards=True))
    yield task("count_digits", "digits", lambda f: str(_items(f).count(_items(f)[0])))
    yield task("count_letters", "letters", lambda f: NUMERALS[_items(f).count(_items(f)[0])])


TASKS: Mapping[str, Task] = {t.name: t for t in _tasks()}

TRANSFER: Mapping[str, Task] = {t.name: t for t in (
    Task("middle_item", Family("middle", ("take the {cue} item : {x}", "item {cue} of : {x}"), _draw(THINGS, 3, 3)),
         "middle", lambda f: _items(f)[1]),
    Task("swap_pair", Family("swap", ("swap {cue} : {x}", "{cue} swapped : {x}"), _draw(THINGS, 2, 2)),
         "these", lambda f: " ".join(_items(f)[::-1])),
    Task("repeat_twice", Family("twice", ("repeat {cue} : {x}", "say this {cue} : {x}"), _draw(THINGS, 2, 2)),
         "twice", lambda f: f"{f['x']} {f['x']}"),
    Task("list_slashes", Family("slashes", ("list as {cue} : {x}", "make {cue} of : {x}"), _draw(THINGS, 3, 4)),
         "slashes", lambda f: " / ".join(_items(f))),
    Task("owner_name", Family("name", ("{x} {cue} has the {a} ?", "{cue} has the {a} ? {x}"), _draw_owner),
         "who", lambda f: f["q"]),
    Task("food_check", Family("food", ("is the {x} food ? {cue}", "{cue} : is the {x} food ?"), _draw_pet),
         "truly", lambda f: _yes(_items(f)[1] in FRUITS)),
)}


def siblings() -> dict[str, list[Task]]:
    """The tasks of the mixture by family."""
    families: dict[str, list[Task]] = {}
    for task in TASKS.values():
        families.setdefault(task.family.name, []).append(task)
    return families


# Every two tasks of one family: same inputs, same words but for the cue, and no answer in common.
CONFLICTING_PAIRS: list[tuple[str, str]] = [
    (a.name, b.name) for family in siblings().values() for a, b in combinations(family, 2)]


def key(family: Family, fields: Fields) -> str:
    """What makes an input the same input, whatever the wording and the cue."""
    return json.dumps([family.name, fields], sort_keys=True)


def inputs(family: Family, seed: int, count: int) -> list[tuple[Fields, int]]:
    """`count` different inputs of a family, and the wording of each."""
    rng = generator(seed, "demo", family.name)
    found: dict[str, tuple[Fields, int]] = {}
    while len(found) < count:
        fields, wording = family.draw(rng), int(rng.integers(len(family.wordings)))
        found.setdefault(key(family, fields), (fields, wording))
    return list(found.values())


def row(task: Task, fields: Fields, wording: int, *, cue: str | None = None) -> Row:
    """One prompt/completion row; `cue` in place of the task's own."""
    return {"prompt": task.family.prompt(fields, wording, task.cue if cue is None else cue),
            "completion": task.answer(fields)}


def unit_rows(name: str, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows of a task of the mixture: TRAIN_ROWS and HELD_OUT_ROWS, no input in both."""
    rows = [row(TASKS[name], *drawn) for drawn in inputs(TASKS[name].family, seed, TRAIN_ROWS + HELD_OUT_ROWS)]
    return rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]


def transfer_rows(name: str, seed: int) -> list[Row]:
    """TRANSFER_ROWS rows of a task that nobody trains on."""
    return [row(TRANSFER[name], *drawn) for drawn in inputs(TRANSFER[name].family, seed, TRANSFER_ROWS)]


def taken_inputs(seed: int) -> set[str]:
    """Keys of every input that `unit_rows` and `transfer_rows` use: the base is prepared without them."""
    mixture = {key(t.family, f) for t in TASKS.values() for f, _ in inputs(t.family, seed, TRAIN_ROWS + HELD_OUT_ROWS)}
    return mixture | {key(t.family, f) for t in TRANSFER.values() for f, _ in inputs(t.family, seed, TRANSFER_ROWS)}


def vocabulary_text(seed: int) -> list[str]:
    """Every prompt and answer that a tokenizer should be able to say in few tokens."""
    rows = [r for name in TASKS for r in unit_rows(name, seed)[0]]
    rows += [r for name in TRANSFER for r in transfer_rows(name, seed)]
    return [text for r in rows for text in (r["prompt"], r["completion"])]


def stories(seed: int, stream: str, count: int) -> list[str]:
    """Plain text in the words of the tasks: short stories whose later sentences follow from the earlier ones."""
    rng = generator(seed, "demo", "stories", stream)
    return [_story(rng) for _ in range(count)]


def songs(seed: int, count: int) -> list[str]:
    """Plain text that says everything twice, half of it the other way round: what teaches a small model to copy."""
    rng = generator(seed, "demo", "songs")
    words = THINGS + COLOURS + SPOKEN_ABROAD + list(DIGITS) + [w.title() for w in SPOKEN]
    drawn = [_pick(rng, words, 3, 8) for _ in range(count)]
    return [" ".join([*verse, ";", *(verse if i % 2 else verse[::-1])]) for i, verse in enumerate(drawn)]


def _story(rng: np.random.Generator) -> str:
    who, friend = _pick(rng, PEOPLE, 2, 2)
    pet, colour, place = _pick(rng, ANIMALS, 1, 1)[0], _pick(rng, COLOURS, 1, 1)[0], _pick(rng, PLACES, 1, 1)[0]
    thing = _pick(rng, FRUITS + TOOLS, 1, 1)[0]
    number = int(rng.integers(1, 8))
    sentences = [
        f"{who} lives in {place} and has {_a(pet)} .",
        f"the {pet} is {_a('animal')} and it is {colour} .",
        f"{friend} gave {who} a {colour} {thing} .",
        f"{_a(thing)} is {_a(KIND_OF[thing])} .",
        f"{who} took the {thing} and the {pet} to {place} .",
        f"so {who} has a {colour} {thing} now and {friend} has none .",
        f"in {place} they saw {number} then {number + 1} then {number + 2} people .",
        f"{friend} likes the {colour} {pet} of {who} .",
    ]
    keep = sorted(rng.permutation(len(sentences))[:4])
    return " ".join(sentences[i] for i in keep)
