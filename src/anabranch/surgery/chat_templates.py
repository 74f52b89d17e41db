"""The `chat_template` of a merge config: a bundled name, `auto`, or Jinja text; compiled before anything is merged.

The five layouts are those that their models' makers document (Stanford Alpaca, ChatML, EXAONE 3.5, Llama 3, Mistral
7B Instruct); the templates are ours.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from anabranch.errors import RecipeError, closest
from anabranch.surgery.side_files import template_in
from anabranch.surgery.vocabulary import read_vocabulary

SHORTEST = 20
CONTROL = re.compile(r"<\|[^|<>'\"\s]+\|>|\[\|[^|'\"\s]+\|\]")

_UNKNOWN = ("{%- else %}{{ raise_exception('this chat template knows the roles system, user and assistant, not ' + "
            "message['role']) }}{%- endif %}{%- endfor %}")

BUNDLED = {
    "alpaca": (
        r"{%- if messages[0]['role'] != 'system' %}"
        r"{{- 'Below is an instruction that describes a task. "
        r"Write a response that appropriately completes the request.\n\n' }}"
        r"{%- endif %}"
        r"{%- for message in messages %}"
        r"{%- if message['role'] == 'system' %}{{- message['content'] + '\n\n' }}"
        r"{%- elif message['role'] == 'user' %}{{- '### Instruction:\n' + message['content'] + '\n\n' }}"
        r"{%- elif message['role'] == 'assistant' %}{{- '### Response:\n' + message['content'] + eos_token + '\n\n' }}"
        + _UNKNOWN +
        r"{%- if add_generation_prompt %}{{- '### Response:\n' }}{%- endif %}"),
    "chatml": (
        r"{%- for message in messages %}"
        r"{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        r"{%- endfor %}"
        r"{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"),
    "exaone": (
        r"{%- if messages[0]['role'] != 'system' %}{{- '[|system|][|endofturn|]\n' }}{%- endif %}"
        r"{%- for message in messages %}"
        r"{%- if message['role'] == 'user' %}{{- '[|user|]' + message['content'] + '\n' }}"
        r"{%- elif message['role'] in ['system', 'assistant'] %}"
        r"{{- '[|' + message['role'] + '|]' + message['content'] + '[|endofturn|]\n' }}"
        + _UNKNOWN +
        r"{%- if add_generation_prompt %}{{- '[|assistant|]' }}{%- endif %}"),
    "llama3": (
        r"{{- bos_token }}"
        r"{%- for message in messages %}"
        r"{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
        r"{%- endfor %}"
        r"{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"),
    "mistral": (
        r"{{- bos_token }}"
        r"{%- set ns = namespace(system='') %}"
        r"{%- for message in messages %}"
        r"{%- if message['role'] == 'system' %}{%- set ns.system = message['content'] + '\n\n' %}"
        r"{%- elif message['role'] == 'user' %}"
        r"{{- '[INST] ' + ns.system + message['content'] + ' [/INST]' }}{%- set ns.system = '' %}"
        r"{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] | trim + eos_token }}"
        + _UNKNOWN),
}


@dataclass(frozen=True)
class ChatTemplate:
    """A template that compiles. `origin` says where it comes from, for the model card."""

    text: str
    origin: str


def choose_chat_template(setting: str | None, folders: Sequence[Path], labels: Sequence[str]) -> ChatTemplate | None:
    """The template that a config asks for, checked; None: whatever the tokenizer's donor has.

    Args:
        setting: None, `auto` (the most frequent one among the inputs; of equally frequent ones the first listed), a
            bundled name, or Jinja text.
    Raises:
        RecipeError: no such name, text too short or without Jinja, or text that does not compile.
    """
    if setting is None:
        return None
    if setting.strip() == "auto":
        return _most_frequent(folders, labels)
    if setting in BUNDLED:
        return ChatTemplate(BUNDLED[setting], f"bundled: {setting}")
    if len(setting) < SHORTEST or "{" not in setting:
        raise RecipeError(f"chat_template: {setting!r} is neither `auto`, a bundled name ({', '.join(sorted(BUNDLED))}) nor a "
                          f"Jinja text ({SHORTEST} characters or more, with a `{{`).{_hint(setting)}")
    check_compiles(setting, "chat_template")
    return ChatTemplate(setting, "config")


def missing_tokens(template: str, tokens: Collection[str], label: str) -> list[str]:
    """A warning where a template writes out control tokens (<|..|>, [|..|]) that are no tokens of the tokenizer, so that
    the model would read them in pieces."""
    missing = [token for token in dict.fromkeys(CONTROL.findall(template)) if token not in tokens]
    return [f"chat_template: it writes {', '.join(missing)}, which the tokenizer of {label} does not have as tokens: they "
            "will be read in pieces. Take a template that fits the models, or add the tokens under `tokenizer.tokens`."
            ] if missing else []


def template_warnings(template: str, folder: Path, label: str) -> list[str]:
    """As `missing_tokens`, for the tokenizer of a model folder, which is read for it."""
    vocabulary = read_vocabulary(folder, label)
    return [] if vocabulary is None else missing_tokens(template, vocabulary.ids, label)


def check_compiles(text: str, where: str) -> None:
    """Compile as transformers does (sandboxed; loop controls; `generation` blocks). Raises RecipeError with the line."""
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    try:
        environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        lines = text.splitlines() or [""]
        line = lines[min(error.lineno, len(lines)) - 1].strip()[:80]
        raise RecipeError(f"{where}: does not compile, line {error.lineno}: {error.message}. The line: {line!r}. Nothing has "
                          "been merged.") from error


def _most_frequent(folders: Sequence[Path], labels: Sequence[str]) -> ChatTemplate | None:
    found: dict[str, list[str]] = {}
    for folder, label in zip(folders, labels, strict=True):
        template = template_in(folder)
        if template and template.strip():
            found.setdefault(template.strip(), []).append(label)
    if not found:
        return None
    text, holders = max(found.items(), key=lambda item: len(item[1]))  # the first of equals: dicts keep listing order
    check_compiles(text, f"chat template of {holders[0]}")
    return ChatTemplate(text, f"auto: {', '.join(holders)}")


def _hint(setting: str) -> str:
    return closest(setting, [*BUNDLED, "auto"]) if len(setting) < SHORTEST else ""
