"""One raw row, whatever its format -> messages, and the images that it shows.

Prompt/completion, instruction/output, `messages`, ShareGPT or LLaVA `conversations`, plain text. An image stands in a
message as one character, IMAGE; where it comes from is told beside the messages, in the order of these characters:

    {"type": "image"}                      the next of the row's `images` (or `image`) column
    {"type": "image", "path": ..}          this one (`image`, `url`, `bytes` likewise, and `image_url: {url: ..}`)
    <image> in the text                    the next of the column, where no content of the row is given in such parts
    a column, and none of these            all of them, before the text of the first user turn (as TRL does)

For a language model `<image>` is text like any other; for one that sees, a row with it and without images is malformed.
Nothing is trimmed, mended or guessed. A row that shows no image, and has what looks like one in a column that no format knows,
is malformed for a model that sees: the column's name goes under `columns`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from anabranch.errors import MixtureError

Messages = list[dict[str, str]]
IMAGE = "\ufffc"  # where an image stands in a message
MARKER = "<image>"
ON_A_LINE = re.compile(f"{MARKER}\\n|\\n{MARKER}(?!\\n)|{MARKER}")  # one line break is the marker's: templates write their own
NEXT = object()  # the next image of the column
# format -> the columns it needs, in the order of detection; `text` is never guessed
FORMATS = {"messages": ("messages",), "sharegpt": ("conversations",), "alpaca": ("instruction", "output"),
           "prompt_completion": ("prompt", "completion"), "text": ("text",)}
IMAGE_COLUMNS = ("images", "image")
COLUMNS = ("prompt", "completion", "instruction", "input", "output", "messages", "conversations", "text", *IMAGE_COLUMNS)
ACCEPTED = ("prompt + completion (or response), instruction + output (+ input), messages, conversations; or text "
            "with `format: text`")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
IMAGE_MAGIC = re.compile(rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|II\*\0|MM\0\*|BM....\0\0\0\0|P[36]\s", re.DOTALL)
PATH_CHARACTERS = 1024  # a longer text that ends as an image's name does is a text
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
         "model": "assistant", "system": "system", "tool": "tool", "function": "tool", "observation": "tool"}


class Malformed(ValueError):
    """A row that says nothing usable, and why."""


def detect_format(columns: set[str], mapped: Mapping[str, str], wanted: str) -> str:
    """The format of rows with these columns (already under our names).

    Args:
        mapped: the recipe's `columns`; a format that uses one of them goes first.
        wanted: the recipe's `format`.
    Raises:
        MixtureError: what was found and what would do.
    """
    have = columns | ({"completion"} if "response" in columns else set())
    found = ", ".join(sorted(columns)) or "none"
    if wanted != "auto":
        missing = [c for c in FORMATS[wanted] if c not in have]
        if missing:
            raise MixtureError(f"format {wanted} needs {' and '.join(f'`{c}`' for c in missing)}; columns found: "
                               f"{found}. Map under `columns`, as in columns: {{{missing[0]}: its name in the file}}.")
        return wanted
    fitting = [f for f, needs in FORMATS.items() if f != "text" and set(needs) <= have]
    fitting.sort(key=lambda f: not set(mapped) & set(FORMATS[f]))  # stable: else the order of FORMATS
    if not fitting:
        raise MixtureError(f"no format fits the columns found: {found}. Accepted: {ACCEPTED}. Name them under "
                           "`columns`, as in columns: {prompt: question, completion: answer}.")
    return fitting[0]


def to_messages(row: Mapping[str, Any], form: str, *, images: bool = True) -> tuple[Messages, list[Any]]:
    """A raw row, its columns under our names, as messages, and its images as the row gives them.

    Args:
        images: whether the model takes images.
    Raises:
        Malformed: it says nothing usable; as many places for images as images are not in it.
    """
    column = column_images(row)
    shown = _Shown()
    messages = _messages(row, form, shown)
    if not images and not column and all(p is NEXT for p in shown.places) and shown.bare:
        raise Malformed(f"holds a part that is no text ({shown.bare[:60]})")
    if images and shown.strange and form != "text":
        raise Malformed("its text holds the character U+FFFC, which stands for an image here")
    marked = sum(m["content"].count(MARKER) for m in messages)
    if images and marked and form != "text" and not (column or shown.places):
        raise Malformed(f"{marked} {MARKER} in its text, and no image in the row. Its images are looked for in `images` or "
                        "`image`; another name goes under `columns`, as in columns: {image: its name in the file}")
    return messages, _images(messages, column, shown)


def _images(messages: Messages, images: list[Any], shown: _Shown) -> list[Any]:
    """The row's images by their places in its messages; <image> in the text becomes such a place. Raises Malformed."""
    if images and not shown.places:
        _place_in_text(messages, len(images), shown)
    if not (images or shown.places):
        return []
    if any(IMAGE in m["content"] for m in messages if m["role"] == "assistant"):
        raise Malformed("an image in an assistant turn: models write text here")
    places = sum(p is NEXT or isinstance(p, int) for p in shown.places)
    if places != len(images):
        raise Malformed(f"{places} {'place' if places == 1 else 'places'} for images in its messages, and {len(images)} "
                        f"{'image' if len(images) == 1 else 'images'}")
    column = iter(images)
    return [next(column) if p is NEXT else _numbered(images, p) if isinstance(p, int) else p for p in shown.places]


def column_images(row: Mapping[str, Any]) -> list[Any]:
    """The images of the row's `images` or `image` column; none where it is absent, null or empty. Raises Malformed."""
    given = {}
    for name in IMAGE_COLUMNS:
        value = row.get(name)
        images = value if isinstance(value, list) else [value]
        if not all(_absent(image) for image in images):
            given[name] = images
    if len(given) > 1:
        raise Malformed("images in `image` and in `images`: give them in one of the two")
    for name, images in given.items():
        empty = [str(i) for i, image in enumerate(images, 1) if _absent(image)]
        if empty:
            raise Malformed(f"`{name}` holds nothing in place {', '.join(empty[:5])} of {len(images)}")
        return images
    return []


def _absent(image: Any) -> bool:
    if isinstance(image, dict):
        return all(v in (None, "") for v in image.values())
    return image is None or image == "" or image == []


class _Shown:
    """What stands for images in the messages of a row, met in their order."""

    def __init__(self) -> None:
        self.places: list[Any] = []
        self.strange = False
        self.bare = ""  # the first part that names no image


def _place_in_text(messages: Messages, images: int, shown: _Shown) -> None:
    """Where no part of a message is an image: at each <image> of the text, or all before the first user turn."""
    markers = sum(m["content"].count(MARKER) for m in messages)
    first = next((m for m in messages if m["role"] == "user"), None)
    if messages[0]["role"] == "text" or (not markers and first is None):
        raise Malformed("an image, and no user turn to show it in")
    if not markers and first is not None:
        first["content"] = IMAGE * images + first["content"]
    for message in messages:
        message["content"] = ON_A_LINE.sub(IMAGE, message["content"])
    shown.places = [NEXT] * (markers or images)


def _numbered(images: list[Any], number: int) -> Any:
    if not 0 <= number < len(images):
        raise Malformed(f"a message shows image {number} (from 0), and the row has {len(images)}")
    return images[number]


def _messages(row: Mapping[str, Any], form: str, shown: _Shown) -> Messages:
    if form == "text":
        return [{"role": "text", "content": _string(row.get("text"), "text", shown)}]
    if form in ("messages", "sharegpt"):
        return _conversation(row.get(FORMATS[form][0]), FORMATS[form][0], shown)
    if form == "alpaca":
        parts = [_string(row.get(c), c, shown) for c in ("instruction", "input")]
        return [{"role": "user", "content": "\n\n".join(p for p in parts if p)},
                {"role": "assistant", "content": _string(row.get("output"), "output", shown)}]
    answer = "completion" if "completion" in row else "response"
    return _side(row.get("prompt"), "prompt", "user", shown) + _side(row.get(answer), answer, "assistant", shown)


def _side(value: Any, column: str, role: str, shown: _Shown) -> Messages:
    """A prompt or a completion: text, or messages of its own."""
    if isinstance(value, list):
        return _conversation(value, column, shown)
    return [{"role": role, "content": _string(value, column, shown)}]


def _conversation(value: Any, column: str, shown: _Shown) -> Messages:
    if not isinstance(value, list) or not value:
        raise Malformed(f"`{column}` is {'empty' if value in (None, []) else type(value).__name__}, wanted messages")
    messages = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise Malformed(f"message {number} is {type(turn).__name__}, wanted an object")
        role = turn["role"] if turn.get("role") is not None else turn.get("from")
        if role not in ROLES:
            raise Malformed(f"message {number} has the role {role!r}; known: {', '.join(ROLES)}")
        if turn.get("tool_calls"):
            raise Malformed(f"message {number} has tool_calls, which are not trained on here")
        content = turn["content"] if turn.get("content") is not None else turn.get("value")
        where = f"message {number}"
        text = "".join(_part(p, where, shown) for p in content) if isinstance(content, list) else _string(content, where, shown)
        messages.append({"role": ROLES[role], "content": text})
    return messages


def _part(part: Any, where: str, shown: _Shown) -> str:
    """A part of a message's content: its text, or IMAGE. Raises Malformed on a part that is neither."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return _string(part["text"], where, shown)
    if kind not in ("image", "image_url"):
        raise Malformed(f"holds a part that is no text ({str(part)[:60]})")
    urls = part.get("image_url")
    given = [urls.get("url")] if isinstance(urls, dict) else [urls]
    given += [part.get(name) for name in ("image", "path", "url")] if not part.get("bytes") else [part["bytes"]]
    given = [image for image in given if not _absent(image)]
    if len(given) > 1:
        raise Malformed(f"{where} names one image {len(given)} times")
    number = part.get("index")
    shown.bare = shown.bare or str(part)
    shown.places += given or [number if isinstance(number, int) and not isinstance(number, bool) else NEXT]
    return IMAGE


def _string(value: Any, column: str, shown: _Shown) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Malformed(f"`{column}` is {type(value).__name__}, wanted text")
    if not encodable(value):
        raise Malformed(f"`{column}` holds half a surrogate pair, which is no text")
    shown.strange = shown.strange or IMAGE in value
    return value


def unused_columns(columns: Iterable[str], form: str, ours: Iterable[str]) -> set[str]:
    """Those that rows of this format say nothing by. `ours`: further ones that the recipe names."""
    used = {*FORMATS[form], *IMAGE_COLUMNS, *ours}
    used |= {"alpaca": {"input"}, "prompt_completion": {"response"}}.get(form, set())
    return set(columns) - used


def refuse_misnamed_image(row: Mapping[str, Any], ours: Iterable[str], start_of: Callable[[Any], bytes]) -> None:
    """Of a row that shows no image: one must not train as text because its column has another name.

    Args:
        ours: columns that the recipe names.
        start_of: the first bytes of an image that was taken out of the row; b'' for anything else.
    Raises:
        Malformed: what looks like an image stands in a column that no format knows.
    """
    known = {*COLUMNS, "response", *ours}
    for name, value in row.items():
        if name not in known and _like_an_image(value, start_of):
            raise Malformed(f"`{name}` holds what looks like an image, and the row shows none. Its images are looked for in "
                            f"`images` or `image`; another name goes under `columns`, as in columns: {{images: {name}}}. If it "
                            "is none, take the column out")


def _like_an_image(value: Any, start_of: Callable[[Any], bytes]) -> bool:
    """A path or URL that ends as an image's does, bytes that begin so, a data URI; Hugging Face's {bytes, path}, or a list."""
    if isinstance(value, list):
        given = [v for v in value if not _absent(v)]
        return bool(given) and all(not isinstance(v, list) and _like_an_image(v, start_of) for v in given)
    if isinstance(value, dict):
        return any(_like_an_image(value.get(key), start_of) for key in ("bytes", "path", "url") if value.get(key))
    if isinstance(value, str):
        path = value[:PATH_CHARACTERS + 1].partition("?")[0].lower() if "://" in value[:16] else value.lower()
        return value.startswith("data:image/") or (len(value) <= PATH_CHARACTERS and "\n" not in value
                                                   and path.endswith(IMAGE_SUFFIXES))
    return bool(IMAGE_MAGIC.match(bytes(value[:16]) if isinstance(value, bytes) else start_of(value)))


def encodable(text: str) -> bool:
    """Whether it is text: JSON may spell lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unusable(messages: Messages) -> tuple[str, str] | None:
    """(rule, why) of a row that has nothing to learn from, or None. Spaces alone are nothing."""
    if messages[0]["role"] == "text":
        return None if messages[0]["content"].strip() else ("empty_response", "the text is empty")
    if not any(m["role"] == "user" and m["content"].strip() for m in messages):
        return "empty_prompt", "no user turn says anything"
    answers = [m["content"].strip() for m in messages if m["role"] == "assistant"]
    if not answers or not all(answers):
        return "empty_response", "an assistant turn is empty" if answers else "no assistant turn"
    return None
