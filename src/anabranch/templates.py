"""Messages -> tokens, and which of them the loss is taken on.

Three layouts: the tokenizer's chat template, a .jinja file, or `plain`, in which every turn is its text as it stands:

    [BOS] user text \\n assistant text EOS user text \\n assistant text EOS          (BOS where the tokenizer puts one)

Response spans come from the template's {% generation %} markers. A template without them is rendered once more up to
each assistant turn: what the turn adds behind the generation prompt, up to its end-of-turn token, is the response.
A token that holds any character of a response is a target, as in transformers: a template that ends its prompt in a space
has that space in the response's first token, and without it the loss would miss the first word.

An image stands in a message as one character, IMAGE. A vision-language model's template is given content in parts (image,
text), any other its placeholder in the text; then what the processor makes of each image takes the placeholder's place,
and only then is anything tokenised.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from anabranch.artifacts import digest
from anabranch.errors import MixtureError
from anabranch.sources import IMAGE, Messages
from anabranch.vision import Vision

PLAIN = ("{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}"
         "{% endgeneration %}{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}")
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Some templates print today's date; the same rows must give the same bytes tomorrow.
NO_CLOCK = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"

Span = tuple[int, int]  # first and one past the last character of a response, its end-of-turn token included


@dataclass(frozen=True)
class Template:
    """How conversations of this mixture are written.

    start: the beginning-of-sequence token, put before a conversation that the template does not begin with it: as a
    processor's own `apply_chat_template` makes tokens, unlike a tokenizer's.
    """

    kind: Literal["tokenizer", "plain", "custom"]
    text: str
    marked: bool
    stops: tuple[str, ...]
    placeholder: str = ""
    parts: bool = False
    start: str = ""

    @property
    def hash(self) -> str:
        return digest([self.text, self.start] if self.start else self.text)


@dataclass(frozen=True)
class Encoded:
    """One row as tokens: `input_ids` int32 [n], `response` uint8 [n], 1 where token i is a target; `shown`: the tokens (from,
    to) of each image, none of them a target."""

    input_ids: np.ndarray
    response: np.ndarray
    shown: tuple[Span, ...] = ()


def choose_template(setting: str, tokenizer: Any, vision: Vision | None = None) -> Template:
    """The template of a recipe.

    Args:
        setting: 'auto' (the tokenizer's, or plain where it has none), 'tokenizer', 'plain', or a .jinja file.
        vision: of a vision-language model, whose processor's template goes first.
    Raises:
        MixtureError: no such template, one that does not parse, or a tokenizer that cannot tell where its tokens stand.
    """
    import jinja2

    if not getattr(tokenizer, "is_fast", False):
        raise MixtureError(f"tokenizer {type(tokenizer).__name__}: not a fast one (tokenizer.json), so the place of "
                           "its tokens in the text is unknown and responses cannot be told from prompts. Convert it "
                           "first.")
    own = vision.chat_template if vision else tokenizer.chat_template
    if setting == "plain" or (setting == "auto" and not own):
        if not tokenizer.eos_token:
            raise MixtureError("chat_template plain: the tokenizer has no end-of-sequence token, so a model could "
                               "never learn to stop. Set `eos_token` in its tokenizer_config.json, or give a .jinja "
                               "file.")
        return Template("plain", bos_prefix(tokenizer) + PLAIN, True, (tokenizer.eos_token,), _placeholder(vision))
    if setting in ("auto", "tokenizer"):
        if not own:
            raise MixtureError("mixture.chat_template: the tokenizer has no chat template. Use `plain`, or a .jinja "
                               "file.")
        kind: Literal["tokenizer", "custom"] = "tokenizer"
        text = own if isinstance(own, str) else tokenizer.get_chat_template()
    else:
        kind, text = "custom", _read(setting)
    if "strftime_now" in text:
        text = NO_CLOCK + text
    stops = tuple(sorted(t for t in tokenizer.added_tokens_encoder if not t.isspace()))
    try:
        parts = vision is not None and _takes_parts(text, tokenizer, vision.placeholder)
        marked = _marks(text, tokenizer, parts)
    except jinja2.TemplateSyntaxError as error:
        raise MixtureError(f"chat template ({setting}): line {error.lineno}: {error.message}.") from error
    return Template(kind, text, marked, stops, _placeholder(vision), parts, bos_prefix(tokenizer) if vision is not None else "")


def _placeholder(vision: Vision | None) -> str:
    return vision.placeholder if vision else ""


def _takes_parts(text: str, tokenizer: Any, placeholder: str) -> bool:
    """Whether a template writes the placeholder for an image, and the text beside it."""
    import jinja2

    smallest = [{"role": "user", "content": IMAGE + "seen"}, {"role": "assistant", "content": "said"}]
    try:
        rendered, _ = _jinja(text, tokenizer, _in_parts(smallest))
    except jinja2.TemplateSyntaxError:
        raise
    except (jinja2.TemplateError, TypeError, KeyError):  # it wants strings
        return False
    return rendered.count(placeholder) == 1 and "seen" in rendered and "said" in rendered and "'type'" not in rendered


def _in_parts(messages: Messages) -> list[dict[str, Any]]:
    """Content as lists of parts, which vision-language templates take of every role."""
    out = []
    for message in messages:
        parts: list[dict[str, str]] = []
        for number, text in enumerate(message["content"].split(IMAGE)):
            parts += [{"type": "image"}] * (number > 0) + [{"type": "text", "text": text}] * bool(text)
        out.append({**message, "content": parts})
    return out


def _read(setting: str) -> str:
    if not setting.endswith(".jinja"):
        raise MixtureError(f"mixture.chat_template: {setting!r} is none of auto, tokenizer, plain, or a .jinja file.")
    try:
        return Path(setting).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MixtureError(f"mixture.chat_template: {setting} cannot be read ({error}).") from error


def _in_strings(messages: Messages, placeholder: str) -> list[dict[str, Any]]:
    """Content as text, an image as its placeholder on a line of its own; as it stands for a language model."""
    if not placeholder:
        return list(messages)
    return [{**m, "content": m["content"].replace(IMAGE, placeholder + "\n")} for m in messages]


def _marks(text: str, tokenizer: Any, parts: bool) -> bool:
    """Whether a smallest conversation gets a response span: markers that mark nothing are no markers."""
    import jinja2

    has = bool(MARKERS.search(text))

    try:
        smallest = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rendered, spans = _jinja(text, tokenizer, _in_parts(smallest) if parts else smallest, tracked=has)
    except jinja2.TemplateSyntaxError:
        raise
    except (jinja2.TemplateError, TypeError, KeyError):
        return has  # it wants other conversations than this one; the rows themselves will tell
    return any(rendered[a:b].strip() for a, b in spans)


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 (hex) of what decides how text becomes tokens (padding and truncation are a caller's passing wish)."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    return digest([{k: v for k, v in content.items() if k not in ("padding", "truncation")}, special])


def bos_prefix(tokenizer: Any) -> str:
    """The beginning-of-sequence token as text where the tokenizer puts one before plain text, else ''."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else ""


# ---- text and spans --------------------------------------------------------------------------------------------------


def _jinja(text: str, tokenizer: Any, messages: Sequence[dict[str, Any]], *, tracked: bool = False,
           prompt: bool = False) -> tuple[str, list[Span]]:
    """transformers' own renderer (sandboxed, compiled once per template)."""
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, spans = render_jinja_template([messages], chat_template=text, return_assistant_tokens_mask=tracked,
                                            add_generation_prompt=prompt, **tokenizer.special_tokens_map)
    return rendered[0], [tuple(s) for s in spans[0]] if tracked else []


def render(template: Template, tokenizer: Any, messages: Messages) -> tuple[str, list[Span]] | str:
    """A conversation as text with its response spans; or, as one string, why the template refuses it.

    Raises:
        MixtureError: a template that marks no response, leaves out the end of turn, or writes a conversation's
            beginning otherwise once the conversation goes on.
    """
    import jinja2

    written = _in_parts(messages) if template.parts else _in_strings(messages, template.placeholder)
    try:
        text, spans = (_jinja(template.text, tokenizer, written, tracked=True) if template.marked
                       else _by_prefix(template, tokenizer, written))
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        return f"the chat template refuses it: {str(error)[:120]}"
    if not text.startswith(template.start):
        text, ahead = template.start + text, len(template.start)
        spans = [(start + ahead, stop + ahead) for start, stop in spans]
    ended = _with_ends(text, spans, [m["content"] for m in messages if m["role"] == "assistant"], template.stops)
    if ended is None:
        tail = text[spans[-1][0]:][-60:] if spans else text[-60:]
        remedy = ("put {% endgeneration %} behind the end-of-turn token" if template.marked
                  else "write the end-of-turn token behind each assistant turn")
        mend = (f"In the template, {remedy}, or use" if any(stop in text for stop in template.stops)
                else "It writes none at all: give a .jinja copy that does, or use")
        raise MixtureError(f"chat template ({template.kind}): an assistant turn's loss ends without an end-of-turn "
                           f"token (a turn ends in {tail!r}), so a model would never learn to stop. {mend} "
                           "`chat_template: plain`.")
    return text, ended


def _with_ends(text: str, spans: list[Span], answers: list[str], stops: tuple[str, ...]) -> list[Span] | None:
    """The responses with their end-of-turn tokens; None: not all have one.

    Markers may leave out the token right behind (LLaVA's published templates). It is the end of the turn only if it stands
    behind the last response too: a special token may as well begin the next turn. An answer that ends in a special token of
    its own has not ended its turn by that.
    """
    ended, behind = [], []
    longest = sorted(stops, key=len, reverse=True)
    said = answers if len(answers) == len(spans) else [None] * len(spans)
    for (start, stop), answer in zip(spans, said, strict=True):
        response = text[start:stop].strip()
        if response.endswith(stops) and (answer is None or response != answer.strip()):
            ended.append((start, stop))
            continue
        end = next((end for end in longest if text.startswith(end, stop)), "")
        ended.append((start, stop + len(end)))
        behind.append(end)
    last = [end for end in longest if spans and text[: ended[-1][1]].rstrip().endswith(end)]
    return ended if spans and all(end and end in last for end in behind) else None


def _by_prefix(template: Template, tokenizer: Any, messages: Sequence[dict[str, Any]]) -> tuple[str, list[Span]]:
    """Spans by rendering the conversation up to each assistant turn. Raises MixtureError."""
    full, _ = _jinja(template.text, tokenizer, messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _jinja(template.text, tokenizer, messages[:i], prompt=True)[0]
        through = full if i + 1 == len(messages) else _jinja(template.text, tokenizer, messages[: i + 1])[0]
        through = through.rstrip() if through.rstrip().endswith(template.stops) else through
        if not (full.startswith(through) and through.startswith(before) and len(through) > len(before)):
            raise MixtureError(
                f"chat template ({template.kind}): it has no {{% generation %}} markers, and it writes the beginning "
                f"of a conversation otherwise once it goes on (turn {i + 1} of {len(messages)}), so responses cannot "
                "be told from prompts. Add the markers in a .jinja copy, or use `chat_template: plain`.")
        spans.append((len(before), len(through)))
    return full, spans


# ---- tokens ----------------------------------------------------------------------------------------------------------


def encode_rows(template: Template, tokenizer: Any, rows: Sequence[Messages],
                shown: Sequence[Sequence[str]] | None = None) -> list[Encoded | str]:
    """Each conversation or text as tokens, or why it cannot be: the template refuses it, or it writes what stands for images.

    Text rows (one message of role 'text') take no template: every token but the first is a target.

    Args:
        shown: what each image of each row becomes (`Vision.text_of`), as many as the row has IMAGE characters; None: no row
            has any.
    Raises:
        MixtureError: as `render`; a doubled beginning-of-sequence token.
    """
    out: list[Encoded | str] = []
    texts, spans_of, images_of, places = [], [], [], []
    start = bos_prefix(tokenizer)
    for place, messages in enumerate(rows):
        if template.placeholder and any(template.placeholder in m["content"] for m in messages):
            out.append(f"its text holds {template.placeholder}, which stands for an image in this model")
            continue
        if messages[0]["role"] == "text":
            rendered: tuple[str, list[Span] | None] | str = start + messages[0]["content"], None
        else:
            rendered = render(template, tokenizer, messages)
        whole = rendered if isinstance(rendered, str) else _with_images(template, *rendered, shown[place] if shown else [])
        out.append(whole if isinstance(whole, str) else "")
        if not isinstance(whole, str):
            texts.append(whole[0])
            spans_of.append(whole[1])
            images_of.append(whole[2])
            places.append(place)
    if texts:
        encodings = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False).encodings
        for place, spans, images, encoding in zip(places, spans_of, images_of, encodings, strict=True):
            out[place] = _encoded(encoding, spans, images, tokenizer)
    return out


def _with_images(template: Template, text: str, spans: list[Span] | None,
                 shown: Sequence[str]) -> tuple[str, list[Span] | None, list[Span]] | str:
    """(text, response spans, image spans) once each placeholder is what its image becomes; or why that cannot be."""
    pieces = text.split(template.placeholder) if template.placeholder else [text]
    if len(pieces) - 1 != len(shown):
        return f"the chat template writes {len(pieces) - 1} of its {len(shown)} images"
    if not shown:
        return text, spans, []
    grown, images, moves, at = pieces[0], [], [], len(pieces[0])
    for piece, image in zip(pieces[1:], shown, strict=True):
        images.append((len(grown), len(grown) + len(image)))
        moves.append((at, len(image) - len(template.placeholder)))
        at += len(template.placeholder) + len(piece)
        grown += image + piece

    def moved(place: int) -> int:
        return place + sum(by for where, by in moves if where < place)

    return grown, [(moved(a), moved(b)) for a, b in spans] if spans is not None else None, images


def _encoded(encoding: Any, spans: list[Span] | None, images: list[Span], tokenizer: Any) -> Encoded:
    ids = np.array(encoding.ids, dtype=np.int32)
    if tokenizer.bos_token_id is not None and len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        raise MixtureError(f"a row begins with {tokenizer.bos_token} twice ({tokenizer.decode(ids[:20].tolist())!r}): "
                           "the template writes it, and it or the row's own text writes it again. Take one out.")
    mask = np.zeros(len(ids), dtype=np.uint8)
    if spans is None:
        mask[1:] = 1
        return Encoded(ids, mask)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    for a, b in spans:
        mask[(offsets[:, 1] > a) & (offsets[:, 0] < b)] = 1
    shown = []
    for a, b in images:
        held = np.flatnonzero((offsets[:, 1] > a) & (offsets[:, 0] < b))
        mask[held] = 0
        shown.append((int(held[0]), int(held[-1]) + 1))
    return Encoded(ids, mask, tuple(shown))
