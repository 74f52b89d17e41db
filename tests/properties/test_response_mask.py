"""The loss sees assistant text and its end-of-turn token, all of it; and of the rest only what shares a token with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from anabranch.errors import MixtureError
from anabranch.templates import Encoded, choose_template, encode_rows

MARKED = ("{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' }}{% generation %}"
          "{{ m['content'] + eos_token }}{% endgeneration %}{{ '\n' }}{% else %}{{ '<|' + m['role'] + '|>\n' + "
          "m['content'] + '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}")
BARE = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# As Qwen2.5 writes it: a default system turn, no markers, a newline behind the end of turn.
CHATML = ("{%- if messages[0]['role'] != 'system' %}{{- '<|system|>\nBe kind.<eos>\n' }}{%- endif %}"
          "{%- for m in messages %}{{- '<|' + m.role + '|>\n' + m.content + '<eos>\n' }}{%- endfor %}"
          "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}")
SPECIAL = ["<pad>", "<eos>", "<bos>", "<|system|>", "<|user|>", "<|assistant|>"]


def make_tokenizer(template: str | None, *, trim: bool = False, bos: bool = False) -> Any:
    """Byte-level BPE trained on the spot; `trim` shortens the places of space tokens, as some tokenizers do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = ["what is the colour of the sky\n\n\nblue  and grey\n\n", "Yes. No. ä ö 🙂 the end\n\n\n the"] * 5
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>",
                                   clean_up_tokenization_spaces=False)
    fast.chat_template = template
    return fast


TOKENIZERS = {name: make_tokenizer(t) for name, t in (("marked", MARKED), ("bare", BARE), ("chatml", CHATML))}
TOKENIZERS["trimmed"] = make_tokenizer(MARKED, trim=True)
PIECES = st.sampled_from(["the", " sky", "\n", "\n\n", " ", "  ", "🙂", "ä", "<eos>", "<|user|>", "blue.", "\t", "1"])
TEXTS = st.lists(PIECES | st.text(st.characters(codec="utf-8"), max_size=4), min_size=1, max_size=6).map("".join)
ANSWERS = TEXTS.filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    system = draw(st.lists(TEXTS, max_size=1))
    turns = draw(st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=3))
    return [{"role": "system", "content": t} for t in system] + [
        {"role": role, "content": text} for pair in turns
        for role, text in zip(("user", "assistant"), pair, strict=True)]


def encode(tokenizer: Any, messages: list[dict[str, str]], setting: str = "auto") -> Encoded:
    [row] = encode_rows(choose_template(setting, tokenizer), tokenizer, [messages])
    assert isinstance(row, Encoded)
    return row


def runs(row: Encoded) -> list[np.ndarray]:
    """Token ids of each unbroken run of targets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.response, [0]]).astype(int)))
    return [row.input_ids[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=conversations(), name=st.sampled_from(["marked", "bare", "chatml", "plain"]))
def test_targets_are_the_answers_with_their_end(messages, name):
    tokenizer = TOKENIZERS["marked" if name == "plain" else name]
    row = encode(tokenizer, messages, "plain" if name == "plain" else "tokenizer")
    answers = [m["content"] + "<eos>" for m in messages if m["role"] == "assistant"]
    found = [tokenizer.decode(ids.tolist()) for ids in runs(row)]
    assert len(found) == len(answers)
    for text, answer in zip(found, answers, strict=True):
        # only white space is ever joined to the prompt's last newline
        assert text.endswith(answer) and not text[: len(text) - len(answer)].strip()
    if not any(m["content"][:1].isspace() for m in messages if m["role"] == "assistant"):
        assert found == answers


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=conversations())
def test_markers_and_prefixes_agree(messages):
    by_markers, by_prefix = encode(TOKENIZERS["marked"], messages), encode(TOKENIZERS["bare"], messages)
    assert choose_template("auto", TOKENIZERS["marked"]).marked and not choose_template("auto", TOKENIZERS["bare"]).marked
    assert by_markers.input_ids.tolist() == by_prefix.input_ids.tolist()
    assert by_markers.response.tolist() == by_prefix.response.tolist()


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=conversations(), name=st.sampled_from(["marked", "trimmed"]))
def test_tokens_and_masks_are_transformers_own(messages, name):
    tokenizer = TOKENIZERS[name]
    row = encode(tokenizer, messages)
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert row.input_ids.tolist() == theirs["input_ids"]
    if name == "marked":  # transformers finds no token where the places of spaces are trimmed, and marks nothing
        assert row.response.tolist() == theirs["assistant_masks"]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=conversations())
def test_tokenizers_that_trim_the_places_of_spaces_give_the_same_mask(messages):
    plain, trimmed = encode(TOKENIZERS["marked"], messages), encode(TOKENIZERS["trimmed"], messages)
    assert plain.input_ids.tolist() == trimmed.input_ids.tolist()
    assert plain.response.tolist() == trimmed.response.tolist()


@pytest.mark.parametrize(("answer", "targets"), [
    ("the", [" the", "<eos>"]), ("🙂", [" 🙂", "<eos>"]),  # joined to the space before them
    ("1", ["1", "<eos>"]), (" 1", [" ", "1", "<eos>"]), ("\n1", ["\n", "1", "<eos>"]), ("<eos>", ["<eos>", "<eos>"])])
@pytest.mark.parametrize("trim", [False, True])
def test_a_prompt_that_ends_in_a_space(answer, targets, trim):
    tokenizer = make_tokenizer(MARKED.replace("{{ '<|assistant|>\n' }}", "{{ '<|assistant|>: ' }}"), trim=trim)
    row = encode(tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}])
    assert [tokenizer.decode([i]) for i in row.input_ids[row.response == 1]] == targets


def test_an_end_of_turn_token_that_swallows_the_newline_behind_it_is_a_target():
    tokenizer = make_tokenizer(MARKED)
    tokenizer.add_tokens([AddedToken("<|end|>", rstrip=True, special=True)], special_tokens=True)
    tokenizer.eos_token = "<|end|>"
    row = encode(tokenizer, CHAT)
    assert [tokenizer.decode(r.tolist()) for r in runs(row)] == ["blue<|end|>"] and row.response[-1] == 1


CHAT = [{"role": "user", "content": "the sky"}, {"role": "assistant", "content": "blue"}]


def test_plain_layout_begins_with_the_bos_that_the_tokenizer_puts_once():
    tokenizer = make_tokenizer(None, bos=True)
    row = encode(tokenizer, CHAT)
    assert tokenizer.decode(row.input_ids.tolist()) == "<bos>the sky\nblue<eos>"
    [text] = encode_rows(choose_template("plain", tokenizer), tokenizer, [[{"role": "text", "content": "the sky"}]])
    assert isinstance(text, Encoded)
    assert text.input_ids.tolist() == tokenizer("the sky").input_ids
    assert text.response.tolist() == [0] + [1] * (len(text.input_ids) - 1)


def test_a_doubled_bos_is_refused():
    tokenizer = make_tokenizer("{{ bos_token }}" + MARKED, bos=True)
    assert encode(tokenizer, CHAT).input_ids.tolist().count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + MARKED
    with pytest.raises(MixtureError, match=r"<bos> twice"):
        encode(tokenizer, CHAT)


@pytest.mark.parametrize(("template", "word"), [
    (MARKED.replace("{{ m['content'] + eos_token }}{% endgeneration %}",
                    "{{ m['content'] }}{% endgeneration %}{{ '\n' + eos_token }}"), "endgeneration"),
    (BARE.replace(" + eos_token", ""), "end-of-turn"),
    # the last turn is written otherwise than the same turn in the middle of a conversation
    (BARE.replace("m['content'] + eos_token", "(('<think>' if loop.last else '') + m['content'] + eos_token)"),
     "otherwise"),
])
def test_templates_that_give_no_sound_mask_are_refused(template, word):
    with pytest.raises(MixtureError, match=word):
        encode(make_tokenizer(template), CHAT + CHAT)


def test_markers_that_mark_nothing_are_no_markers():
    tokenizer = make_tokenizer(BARE + "{% generation %}{% endgeneration %}")
    assert not choose_template("auto", tokenizer).marked
    assert [tokenizer.decode(r.tolist()) for r in runs(encode(tokenizer, CHAT))] == ["blue<eos>"]


def test_today_has_no_part_in_the_tokens():
    tokenizer = make_tokenizer("{{ strftime_now('%Y %H:%M:%S') }}" + MARKED)
    assert "26 Jul 2024" in tokenizer.decode(encode(tokenizer, CHAT).input_ids.tolist())


def test_choice_of_template(tmp_path):
    bare, chatty = make_tokenizer(None), TOKENIZERS["marked"]
    assert choose_template("auto", bare).kind == "plain" and choose_template("auto", chatty).kind == "tokenizer"
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML)
    custom = choose_template(str(path), bare)
    assert custom.kind == "custom" and custom.hash == choose_template("auto", TOKENIZERS["chatml"]).hash
    path.write_text("{% for m in messages %}")
    for setting, word in (("tokenizer", "no chat template"), (str(path), "line 1"), ("pretty", "none of auto"),
                          (str(tmp_path / "no.jinja"), "cannot be read")):
        with pytest.raises(MixtureError, match=word):
            choose_template(setting, bare)
    bare.eos_token = None
    with pytest.raises(MixtureError, match="end-of-sequence"):
        choose_template("auto", bare)


def test_a_row_that_the_template_refuses_is_named_not_fatal():
    tokenizer = make_tokenizer("{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
                               + MARKED)
    rows = encode_rows(choose_template("auto", tokenizer), tokenizer, [[{"role": "system", "content": "a"}, *CHAT], CHAT])
    assert isinstance(rows[0], str) and "no system turns" in rows[0]
    assert isinstance(rows[1], Encoded)
