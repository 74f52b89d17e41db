"""Files and datasets in, tokenised units out: every container and format, every rule, nothing silent, the same bytes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from anabranch import mixture as stage
from anabranch.artifacts import Mixture, Unit
from anabranch.errors import MixtureError
from anabranch.mixture import build_mixture
from anabranch.mixture_summary import exclusion_lines, unwanted_lines
from anabranch.recipe import Recipe, load_recipe
from anabranch.rows import budget_indices, load_unit

SHARED = Path(__file__).parents[2].parent / "shared"
Raw = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE with no chat template: `plain` writes prompt, newline, completion, <eos>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(["question answer number red green"] * 3, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>",
                                   clean_up_tokenization_spaces=False)


def rows(count: int, name: str = "q") -> Raw:
    return [{"prompt": f"{name} question {i}", "completion": f"answer {i}"} for i in range(count)]


def write(path: Path, data: Raw) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in data))
    return path


def recipe(tmp_path: Path, sources: list[dict[str, Any]], *, evaluate: dict[str, Any] | None = None, seed: int = 0,
           **mixture: Any) -> Recipe:
    sources = [s | {"path": str(s["path"])} for s in sources]
    return Recipe.model_validate({
        "model": {"path": "m"}, "mixture": {"sources": sources, "held_out": 0.0, **mixture}, "seed": seed,
        "evaluate": {"retention": "none"} | (evaluate or {}), "output": str(tmp_path / "run")})


def texts(tokenizer: Any, out: Path, unit: Unit, split: str = "train") -> list[str]:
    found = load_unit(out / unit.file, split)
    return [tokenizer.decode(found.row(i)[0].tolist()) for i in range(len(found))]


def answers(tokenizer: Any, out: Path, unit: Unit, split: str = "train") -> list[str]:
    found = load_unit(out / unit.file, split)
    return [tokenizer.decode(ids[mask == 1].tolist()) for ids, mask in (found.row(i) for i in range(len(found)))]


def excluded(mixture: Mixture) -> dict[tuple[str, str, str], int]:
    return {(e.unit, e.rule, e.split): e.rows for e in mixture.excluded}


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- containers and formats ------------------------------------------------------------------------------------------


def as_csv(data: Raw) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(data[0]))
    writer.writeheader()
    writer.writerows(data)
    return stream.getvalue().encode()


def as_parquet(data: Raw) -> bytes:
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(data), stream)
    return stream.getvalue()


def as_jsonl(data: Raw) -> bytes:
    return "\n\n".join(json.dumps(r, ensure_ascii=False) for r in data).encode()


WAYS: dict[str, Any] = {
    ".json": lambda d: json.dumps(d, indent=1).encode(), ".data.json": lambda d: json.dumps({"data": d, "v": 1}).encode(),
    ".jsonl": as_jsonl, ".bom.jsonl": lambda d: b"\xef\xbb\xbf" + as_jsonl(d), ".csv": as_csv, ".parquet": as_parquet,
    ".jsonl.gz": lambda d: gzip.compress(as_jsonl(d)), ".jsonl.zst": lambda d: zstandard.compress(as_jsonl(d)),
    ".json.gz": lambda d: gzip.compress(json.dumps(d).encode()), ".csv.zst": lambda d: zstandard.compress(as_csv(d)),
    # two frames, as `cat a.zst b.zst` leaves them
    ".frames.jsonl.zst": lambda d: zstandard.compress(as_jsonl(d[:2]) + b"\n") + zstandard.compress(as_jsonl(d[2:]))}


@pytest.mark.parametrize("suffix", WAYS)
def test_every_container_gives_the_same_rows(tmp_path, tokenizer, suffix):
    data = [{"prompt": 'say "hé",\nplease ' + "x" * 200, "completion": "naïve 🙂"}, *rows(4)]
    path = tmp_path / f"unit{suffix}"
    path.write_bytes(WAYS[suffix](data))
    mixture = build_mixture(recipe(tmp_path, [{"path": path, "unit": "u"}]), tokenizer, tmp_path / "out", base_hash="b")
    assert texts(tokenizer, tmp_path / "out", mixture.units[0]) == [
        f"{r['prompt']}\n{r['completion']}<eos>" for r in data]
    assert answers(tokenizer, tmp_path / "out", mixture.units[0]) == [f"{r['completion']}<eos>" for r in data]
    assert mixture.excluded == []


def test_a_csv_field_longer_than_the_csv_module_takes_by_default(tmp_path, tokenizer):
    path = tmp_path / "u.csv"
    path.write_bytes(as_csv([{"prompt": "a " * 100_000, "completion": "b"}, *rows(2)]))
    mixture = build_mixture(recipe(tmp_path, [{"path": path}]), tokenizer, tmp_path / "out", base_hash="b")
    assert excluded(mixture) == {("u", "over_long", "train"): 1}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


FORMATS: dict[str, tuple[dict[str, Any], str, str]] = {
    # row -> detected format, text
    "prompt_completion": ({"prompt": "p", "completion": "c"}, "prompt_completion", "p\nc<eos>"),
    "response": ({"prompt": "p", "response": "c"}, "prompt_completion", "p\nc<eos>"),
    "trl": ({"prompt": [user("p"), assistant("c"), user("q")], "completion": [assistant("d")]}, "prompt_completion",
            "p\nc<eos>q\nd<eos>"),
    "alpaca": ({"instruction": "i", "input": "n", "output": "o"}, "alpaca", "i\n\nn\no<eos>"),
    "alpaca, no input": ({"instruction": "i", "output": "o"}, "alpaca", "i\no<eos>"),
    "alpaca, empty input": ({"instruction": "i", "input": "", "output": "o"}, "alpaca", "i\no<eos>"),
    "messages": ({"messages": [{"role": "system", "content": "s"}, user("p"), assistant("c")], "extra": [1]}, "messages",
                 "s\np\nc<eos>"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "p"}]}, assistant("c")]}, "messages",
              "p\nc<eos>"),
    "sharegpt": ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "p"},
                                    {"from": "gpt", "value": "c"}, {"from": "observation", "value": "t"},
                                    {"from": "bot", "value": "d"}]}, "sharegpt", "s\np\nc<eos>t\nd<eos>"),
    "the richer of two": ({"prompt": "p", "completion": "c", "messages": [user("p"), assistant("c")]}, "messages",
                          "p\nc<eos>"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_detected(tmp_path, tokenizer, name):
    row, form, text = FORMATS[name]
    path = write(tmp_path / "u.jsonl", [row] * 3)
    mixture = build_mixture(recipe(tmp_path, [{"path": path}]), tokenizer, tmp_path / "out", base_hash="b")
    assert mixture.units[0].format == form
    assert texts(tokenizer, tmp_path / "out", mixture.units[0]) == [text] * 3


def test_columns_are_mapped_and_a_mapped_column_decides_the_format(tmp_path, tokenizer):
    data = [{"question": "p", "answer": "c", "prompt": "not this", "messages": None, "output": "o"}] * 3
    source = {"path": write(tmp_path / "u.jsonl", data), "columns": {"prompt": "question", "completion": "answer"}}
    mixture = build_mixture(recipe(tmp_path, [source]), tokenizer, tmp_path / "out", base_hash="b")
    assert texts(tokenizer, tmp_path / "out", mixture.units[0]) == ["p\nc<eos>"] * 3


def test_plain_text_counts_every_token_but_the_first(tmp_path, tokenizer):
    path = write(tmp_path / "u.jsonl", [{"text": "red green"}, {"text": "green red"}, {"text": "!"}, {"text": " "}])
    mixture = build_mixture(recipe(tmp_path, [{"path": path, "format": "text"}]), tokenizer, tmp_path / "out", base_hash="b")
    found = load_unit(tmp_path / "out" / mixture.units[0].file, "train")
    assert texts(tokenizer, tmp_path / "out", mixture.units[0]) == ["red green", "green red"]
    assert all(mask.tolist() == [0] + [1] * (len(ids) - 1) for ids, mask in (found.row(0), found.row(1)))
    # `!` is one token: there is nothing to predict in it
    assert excluded(mixture) == {("u", "empty_response", "train"): 2}


def test_hub_datasets_by_name_config_split_and_revision(tmp_path, tokenizer, monkeypatch):
    import datasets

    asked = []

    def load(path: str, config: str | None, *, split: str, revision: str | None) -> Any:
        asked.append((path, config, split, revision))
        return datasets.Dataset.from_list(rows(6, split))

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = {"path": "org/questions", "config": "en", "revision": "abc", "held_out": "test"}
    mixture = build_mixture(recipe(tmp_path, [source]), tokenizer, tmp_path / "out", base_hash="b")
    assert asked == [("org/questions", "en", "train", "abc"), ("org/questions", "en", "test", "abc")]
    [unit] = mixture.units
    assert (unit.name, unit.source, unit.rows, unit.held_out_rows) == ("questions", "org/questions", 6, 6)
    assert texts(tokenizer, tmp_path / "out", unit, "held_out")[0] == "test question 0\nanswer 0<eos>"


# ---- units -----------------------------------------------------------------------------------------------------------


def test_names_come_from_files_folders_or_a_column(tmp_path, tokenizer):
    for name in ("a", "b"):
        write(tmp_path / "flat" / f"{name}.jsonl", rows(3, name))
        write(tmp_path / "deep" / f"folder-{name}" / "train.jsonl", rows(3, name))
        write(tmp_path / "tasks" / f"{name}.jsonl", [r | {"task": t} for t in ("x", "y") for r in rows(2, name + t)])
    sources = [{"path": tmp_path / "flat"}, {"path": tmp_path / "deep" / "*" / "train.jsonl"},
               {"path": tmp_path / "tasks" / "*.jsonl", "unit_column": "task"},
               {"path": tmp_path / "flat" / "*.jsonl", "unit": "all of them"}]
    mixture = build_mixture(recipe(tmp_path, sources), tokenizer, tmp_path / "out", base_hash="b")
    assert {u.name: u.rows for u in mixture.units} == {
        "a": 3, "b": 3, "folder-a": 3, "folder-b": 3, "x": 4, "y": 4, "all of them": 6}
    assert [u.name for u in mixture.units] == sorted(u.name for u in mixture.units)
    assert texts(tokenizer, tmp_path / "out", mixture.unit("x"))[2] == "bx question 0\nanswer 0<eos>"
    assert mixture.unit("a").source == "flat" and str(tmp_path) not in (tmp_path / "out" / "mixture.json").read_text()


def test_a_row_that_names_no_unit_is_malformed(tmp_path, tokenizer):
    data = [r | {"task": t} for r, t in zip(rows(7), ["x", "", None, "x", 7, 7, True], strict=True)]
    source = {"path": write(tmp_path / "u.jsonl", data), "unit_column": "task"}
    mixture = build_mixture(recipe(tmp_path, [source]), tokenizer, tmp_path / "out", base_hash="b")
    assert {u.name: u.rows for u in mixture.units} == {"x": 2, "7": 2}
    [line] = mixture.excluded
    assert (line.unit, line.rule, line.rows) == ("u.jsonl", "malformed", 3) and "u.jsonl:2: " in line.example


def test_units_whose_names_differ_only_in_odd_characters_keep_their_files_apart(tmp_path, tokenizer):
    data = [r | {"task": t} for t in ("a/b", "a b", "a?b", "A/b") for r in rows(2, t)]
    source = {"path": write(tmp_path / "u.jsonl", data), "unit_column": "task"}
    mixture = build_mixture(recipe(tmp_path, [source]), tokenizer, tmp_path / "out", base_hash="b")
    assert len({u.file.lower() for u in mixture.units}) == 4 == len(list((tmp_path / "out/units").glob("*.safetensors")))


# ---- sides -----------------------------------------------------------------------------------------------------------


def test_held_out_by_fraction_is_by_prompt_whatever_the_order_and_the_seed(tmp_path, tokenizer):
    data = [r | {"completion": f"{r['completion']} {twice}"} for r in rows(300) for twice in (1, 2)]
    sides = []
    for seed in (0, 1):
        random.Random(seed).shuffle(data)
        path = write(tmp_path / str(seed) / "u.jsonl", data)
        out = tmp_path / f"out{seed}"
        [unit] = build_mixture(recipe(tmp_path, [{"path": path}], held_out=0.2, seed=seed), tokenizer, out,
                               base_hash="b").units
        train, held_out = ({t.split("\n")[0] for t in texts(tokenizer, out, unit, s)} for s in ("train", "held_out"))
        assert not train & held_out and len(train | held_out) == 300
        assert unit.rows == 2 * len(train) and unit.held_out_rows == 2 * len(held_out)
        assert 0.13 < len(held_out) / 300 < 0.27  # 0.2 plus or minus three standard deviations
        sides.append(held_out)
    assert sides[0] == sides[1]


def test_held_out_by_path_joins_units_by_column_folder_or_alone(tmp_path, tokenizer):
    for name in ("a", "b"):
        for split in ("train", "test"):
            write(tmp_path / name / f"{split}.jsonl", [r | {"task": name} for r in rows(3, f"{name} {split}")])
    by_folder = {"path": tmp_path / "*" / "train.jsonl", "held_out": str(tmp_path / "*" / "test.jsonl")}
    alone = {"path": tmp_path / "a" / "train.jsonl", "held_out": str(tmp_path / "a" / "test.jsonl")}
    for source, names in ((by_folder, ["a", "b"]), (by_folder | {"unit_column": "task"}, ["a", "b"]), (alone, ["train"])):
        out = tmp_path / "out"
        mixture = build_mixture(recipe(tmp_path, [source]), tokenizer, out, base_hash="b")
        assert [(u.name, u.rows, u.held_out_rows) for u in mixture.units] == [(n, 3, 3) for n in names]
        assert texts(tokenizer, out, mixture.units[0], "held_out")[0].startswith("a test question 0")


def test_rows_on_both_sides_are_left_out_of_held_out_and_repeats_in_training_are_kept(tmp_path, tokenizer):
    a, b, transfer = rows(6, "a"), rows(6, "b"), rows(4, "t")
    sources = [{"path": write(tmp_path / "a.jsonl", a + a[:2]), "held_out": str(write(tmp_path / "ha.jsonl", rows(3, "h")
                                                                                       + b[:2]))},
               {"path": write(tmp_path / "b.jsonl", b), "max_samples": 3}]
    evaluate = {"transfer": [{"path": str(write(tmp_path / "t.jsonl", [*transfer, b[0]]))}]}
    mixture = build_mixture(recipe(tmp_path, sources, evaluate=evaluate), tokenizer, tmp_path / "out", base_hash="b")
    # also those of b that were not drawn: the caps decide nothing about held-out rows
    assert excluded(mixture) == {("a", "duplicate_held_out", "held_out"): 2, ("b", "max_samples", "train"): 3,
                                 ("t", "duplicate_held_out", "held_out"): 1}
    assert (mixture.duplicates_across, mixture.duplicates_in_train) == (3, 2)
    assert mixture.unit("a").held_out_rows == 3 and mixture.unit("a").rows == 8
    assert [(u.name, u.rows, u.samples, u.tokens, u.held_out_rows) for u in mixture.transfer] == [("t", 0, 0, 0, 4)]


def test_retention_is_prompts_or_plain_text_or_none(tmp_path, tokenizer):
    data = [{"messages": [{"role": "system", "content": "be kind"}, user(f"question {i}"), assistant("red"), user("more"),
                          assistant("green")]} for i in range(6)]
    source = {"path": write(tmp_path / "u.jsonl", data[:4]), "held_out": str(write(tmp_path / "h.jsonl", data[4:]))}
    out = tmp_path / "out"
    mixture = build_mixture(recipe(tmp_path, [source], evaluate={"retention": "held_out_prompts"}), tokenizer, out,
                            base_hash="b")
    [unit] = mixture.retention
    assert (unit.name, unit.format, unit.rows, unit.held_out_rows) == ("u", "text", 0, 2)
    assert texts(tokenizer, out, unit, "held_out") == ["be kind\nquestion 4", "be kind\nquestion 5"]
    assert unit.held_out_response_tokens == unit.held_out_tokens - 2
    plain = [{"path": str(write(tmp_path / "plain.jsonl", [{"text": "red green question"}, {"text": ""}]))}]
    mixture = build_mixture(recipe(tmp_path, [source], evaluate={"retention": plain}), tokenizer, out, base_hash="b")
    assert [(u.name, u.held_out_rows) for u in mixture.retention] == [("plain", 1)]
    assert excluded(mixture) == {("plain (retention)", "empty_response", "held_out"): 1}
    assert len(list((out / "retention").glob("*.safetensors"))) == 1  # the earlier unit's file went
    assert build_mixture(recipe(tmp_path, [source]), tokenizer, out, base_hash="b").retention == []


# ---- rules -----------------------------------------------------------------------------------------------------------


def test_each_rule_counts_its_rows_and_shows_one(tmp_path, tokenizer):
    data: Raw = [
        *rows(5), {"prompt": 3, "completion": "c"}, {"prompt": "p", "completion": ["not a message"]},
        {"prompt": "\ud800", "completion": "c"}, {"prompt": " \n", "completion": "c"}, {"prompt": None, "completion": ""},
        {"prompt": "p", "completion": " \t"}, {"prompt": "p", "completion": None}, {"prompt": "long " * 200, "completion": "c"}]
    few = write(tmp_path / "few.jsonl", rows(1, "few"))
    path = write(tmp_path / "u.jsonl", data)
    mixture = build_mixture(recipe(tmp_path, [{"path": path}, {"path": few}], max_length=64), tokenizer, tmp_path / "out",
                            base_hash="b")
    assert excluded(mixture) == {
        ("u", "malformed", "train"): 3, ("u", "empty_prompt", "train"): 2, ("u", "empty_response", "train"): 2,
        ("u", "over_long", "train"): 1, ("few", "too_few_samples", "train"): 1}
    assert [u.name for u in mixture.units] == ["u"] and mixture.units[0].rows == 5
    examples = {e.rule: e.example for e in mixture.excluded}
    assert examples["malformed"] == "u.jsonl:6: `prompt` is int, wanted text"
    assert examples["over_long"].startswith("u.jsonl:13: ") and examples["over_long"].endswith("max_length is 64")
    assert examples["too_few_samples"] == "1 training rows, min_samples is 2"
    assert [(u.name, u.rows) for u in mixture.units][:1] == [("u", 5)]


@pytest.mark.parametrize(("turns", "rule", "word"), [
    ([user("p"), {"role": "narrator", "content": "c"}], "malformed", "message 2 has the role 'narrator'"),
    ([user("p"), {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}], "malformed", "tool_calls"),
    ([{"role": "user", "content": [{"type": "image"}]}, assistant("c")], "malformed", "no text"),
    ([], "malformed", "empty"), ("text", "malformed", "str"), ([user("p")], "empty_response", "no assistant turn"),
    ([user("p"), assistant("c"), user("q"), assistant(" ")], "empty_response", "an assistant turn is empty"),
    ([{"role": "system", "content": "s"}, assistant("c")], "empty_prompt", "no user turn"),
])
def test_conversations_that_cannot_be_used(tmp_path, tokenizer, turns, rule, word):
    good = {"messages": [user("p"), assistant("c")]}
    path = write(tmp_path / "u.jsonl", [good, {"messages": turns}, good])
    mixture = build_mixture(recipe(tmp_path, [{"path": path, "format": "messages"}]), tokenizer, tmp_path / "out",
                            base_hash="b")
    [line] = mixture.excluded
    assert (line.rule, line.rows, mixture.units[0].rows) == (rule, 1, 2)
    assert "u.jsonl:2: " in line.example and word in line.example


def test_an_answer_may_begin_the_conversation(tmp_path, tokenizer):
    turns = [assistant("hello"), user("p"), assistant("c")]
    path = write(tmp_path / "u.jsonl", [{"messages": turns}] * 2)
    source = {"path": path, "held_out": str(write(tmp_path / "h.jsonl", [{"messages": [*turns, user("q"), assistant("d")]}]))}
    mixture = build_mixture(recipe(tmp_path, [source], evaluate={"retention": "held_out_prompts"}), tokenizer,
                            tmp_path / "out", base_hash="b")
    assert answers(tokenizer, tmp_path / "out", mixture.units[0])[0] == "hello<eos>c<eos>"
    # its prompt is what stands before the first answer to a user, so such rows do not all share the prompt ''
    assert texts(tokenizer, tmp_path / "out", mixture.retention[0], "held_out") == ["hello\np"]


def test_caps_draw_by_seed_from_usable_rows(tmp_path, tokenizer):
    data = [r if i % 3 else {"prompt": "long " * 200, "completion": str(i)} for i, r in enumerate(rows(90))]
    path = write(tmp_path / "u.jsonl", data)

    def kept(seed: int, **caps: Any) -> tuple[list[str], dict, Unit]:
        out = tmp_path / f"out{seed}{caps}"
        mixture = build_mixture(recipe(tmp_path, [{"path": path, **caps}], max_length=100, seed=seed), tokenizer, out,
                                base_hash="b")
        return texts(tokenizer, out, mixture.units[0]), excluded(mixture), mixture.units[0]

    first, lost, unit = kept(0, max_samples=20)
    assert len(first) == unit.rows == 20
    assert lost["u", "max_samples", "train"] + lost["u", "over_long", "train"] == 70
    numbers = [int(t.split("\n")[0].split()[-1]) for t in first]
    assert numbers == sorted(numbers)  # rows stand in the order of the source
    assert max(numbers) > 60  # and are not its first ones
    other, _, _ = kept(1, max_samples=20)
    assert first != other
    more, _, _ = kept(0, max_samples=30)
    assert set(first) < set(more)
    everything, lost, _ = kept(0, max_samples=60)
    assert len(everything) == 60 and lost == {("u", "over_long", "train"): 30}
    _, lost, unit = kept(0, max_tokens=300)
    assert 300 - 30 < unit.tokens <= 300 and lost["u", "max_tokens", "train"] == 90 - unit.rows - lost[
        "u", "over_long", "train"]


def test_the_batch_size_has_no_say(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "u.jsonl", rows(90))
    made = []
    for batch in (1, 7, 1000):
        monkeypatch.setattr(stage, "BATCH", batch)
        wanted = recipe(tmp_path, [{"path": path, "max_samples": 33, "held_out": 0.3}], max_held_out=5)
        build_mixture(wanted, tokenizer, tmp_path / f"out{batch}", base_hash="b")
        made.append(folder_bytes(tmp_path / f"out{batch}"))
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize("epochs", [0.25, 1.0, 2.5])
def test_samples_and_tokens_are_those_of_the_budget(tmp_path, tokenizer, epochs):
    path = write(tmp_path / "u.jsonl", [r | {"completion": "red " * (i + 1)} for i, r in enumerate(rows(10))])
    out = tmp_path / "out"
    [unit] = build_mixture(recipe(tmp_path, [{"path": path, "epochs": epochs}], seed=4), tokenizer, out, base_hash="b").units
    found = load_unit(out / unit.file, "train")
    chosen = budget_indices(10, epochs, 4, "u")
    lengths = np.array([len(found.row(i)[0]) for i in range(10)])
    targets = np.array([found.row(i)[1].sum() for i in range(10)])
    assert (unit.rows, unit.samples, unit.epochs) == (10, round(10 * epochs), epochs)
    assert (unit.tokens, unit.response_tokens) == (lengths[chosen].sum(), targets[chosen].sum())


def test_a_budget_of_less_than_a_sample_leaves_the_unit_out(tmp_path, tokenizer):
    sources = [{"path": write(tmp_path / "a.jsonl", rows(10)), "epochs": 0.01}, {"path": write(tmp_path / "b.jsonl", rows(3))}]
    mixture = build_mixture(recipe(tmp_path, sources), tokenizer, tmp_path / "out", base_hash="b")
    assert [u.name for u in mixture.units] == ["b"] and excluded(mixture) == {("a", "too_few_samples", "train"): 10}


def test_examples_show_what_the_loss_sees(tmp_path, tokenizer):
    data = [r | {"task": f"t{t:02}", "prompt": "word " * 300} for t in range(20) for r in rows(2)]
    source = {"path": write(tmp_path / "u.jsonl", data), "unit_column": "task"}
    mixture = build_mixture(recipe(tmp_path, [source], max_length=4000), tokenizer, tmp_path / "out", base_hash="b")
    assert [e["unit"] for e in mixture.examples] == [f"t{t:02}" for t in (0, 3, 5, 8, 11, 14, 16, 19)]
    assert all(e["response"] == "answer 0<eos>" and len(e["prompt"]) <= 300 for e in mixture.examples)
    assert mixture.examples[0]["prompt"].endswith("word \n")


# ---- resume and determinism ------------------------------------------------------------------------------------------


def big_recipe(tmp_path: Path, **options: Any) -> Recipe:
    for name in "abcd":
        write(tmp_path / "data" / f"{name}.jsonl", rows(12, name))
    write(tmp_path / "data" / "tiny.jsonl", rows(1, "tiny"))
    write(tmp_path / "t.jsonl", rows(4, "t"))
    return recipe(tmp_path, [{"path": tmp_path / "data" / "*.jsonl"}], held_out=0.3, max_samples=6,
                  evaluate={"transfer": [{"path": str(tmp_path / "t.jsonl")}], "retention": "held_out_prompts"}, **options)


def test_killed_and_run_again_gives_the_same_bytes_and_tokenises_no_unit_twice(tmp_path, tokenizer, monkeypatch):
    wanted = big_recipe(tmp_path)
    whole = build_mixture(wanted, tokenizer, tmp_path / "whole", base_hash="b")
    tokenised: Counter[str] = Counter()
    encode = stage._Making.encode
    monkeypatch.setattr(stage._Making, "encode",
                        lambda self, batch, unit: (tokenised.update([unit]), encode(self, batch, unit))[1])

    def stop(unit: str, done: int, total: int) -> None:
        if unit == "c":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_mixture(wanted, tokenizer, tmp_path / "out", base_hash="b", progress=stop)
    assert not (tmp_path / "out" / "mixture.json").exists()
    before = Counter(tokenised)
    assert set(before) == {"a", "b"}
    told: list[tuple[str, int, int]] = []
    again = build_mixture(wanted, tokenizer, tmp_path / "out", base_hash="b", progress=lambda *a: told.append(a))
    assert again == whole and folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert all(tokenised[u] == before[u] for u in "ab") and tokenised["c"]
    total = told[-1][2]
    assert told[-1] == ("", total, total) and [d for _, d, _ in told] == sorted(d for _, d, _ in told)
    after = Counter(tokenised)
    assert build_mixture(wanted, tokenizer, tmp_path / "out", base_hash="b") == whole and tokenised == after


def test_only_what_changed_is_made_again(tmp_path, tokenizer, monkeypatch):
    out = tmp_path / "out"
    first = build_mixture(big_recipe(tmp_path), tokenizer, out, base_hash="b")
    tokenised: set[str] = set()
    encode = stage._Making.encode
    monkeypatch.setattr(stage._Making, "encode", lambda self, batch, unit: (tokenised.add(unit), encode(self, batch, unit))[1])
    wanted = big_recipe(tmp_path)
    write(tmp_path / "data" / "b.jsonl", rows(13, "b"))
    second = build_mixture(wanted, tokenizer, out, base_hash="b")
    assert tokenised == {"b"} and second.made_from["sources"] != first.made_from["sources"]
    tokenised.clear()
    victim = out / second.unit("c").file
    victim.write_bytes(victim.read_bytes()[:-1])
    assert build_mixture(wanted, tokenizer, out, base_hash="b") == second and tokenised == {"c"}
    tokenised.clear()
    (tmp_path / "data" / "d.jsonl").unlink()
    third = build_mixture(wanted, tokenizer, out, base_hash="b")
    assert not tokenised and [u.name for u in third.units] == ["a", "b", "c"]
    assert not list((out / "units").glob("d-*"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    try:
        fourth = build_mixture(wanted, tokenizer, out, base_hash="b")
    finally:
        tokenizer.chat_template = None
    assert {"a", "b", "c", "t"} <= tokenised and fourth.chat_template == "tokenizer"
    assert {k for k in third.made_from if third.made_from[k] != fourth.made_from[k]} == {"chat_template"}


@pytest.mark.parametrize("change", [
    {"seed": 1}, {"max_samples": 7}, {"max_tokens": 40}, {"epochs": 2.0}, {"max_length": 13}, {"min_samples": 6},
    {"max_held_out": 1}, {"held_out": 0.5}, {"own": {"epochs": 0.5}}, {"own": {"max_samples": 3}},
    {"own": {"columns": {"prompt": "completion", "completion": "prompt"}}}])
def test_a_changed_setting_is_never_answered_from_the_cache(tmp_path, tokenizer, change):
    path = write(tmp_path / "u.jsonl", rows(30))

    def build(out: str, own: dict[str, Any] | None = None, **options: Any) -> Mixture:
        wanted = recipe(tmp_path, [{"path": path, **(own or {})}], **{"max_samples": 9, "held_out": 0.3} | options)
        return build_mixture(wanted, tokenizer, tmp_path / out, base_hash="b")

    first = build("out")
    assert build("out", **change) == build("fresh", **change) != first
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "fresh")


def test_same_inputs_same_bytes_wherever_the_folder_lies(tmp_path, tokenizer):
    made = []
    for place in ("here", "there"):
        home = tmp_path / place
        build_mixture(big_recipe(home), tokenizer, home / "run" / "mixture", base_hash="b")
        made.append(folder_bytes(home / "run" / "mixture"))
    assert made[0] == made[1]


# ---- errors ----------------------------------------------------------------------------------------------------------


def refusal(tmp_path: Path, tokenizer: Any, sources: list[dict[str, Any]], **options: Any) -> str:
    with pytest.raises(MixtureError) as caught:
        build_mixture(recipe(tmp_path, sources, **options), tokenizer, tmp_path / "out", base_hash="b")
    assert not (tmp_path / "out" / "mixture.json").exists()
    return str(caught.value)


def test_all_problems_come_in_one_message(tmp_path, tokenizer):
    write(tmp_path / "data" / "questions.jsonl", rows(3))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "completion": "c"}\n\n{"prompt": "p", \n')
    (tmp_path / "more.json").write_text('{"rows": []}')
    write(tmp_path / "odd.jsonl", [{"headline": "h", "body": "b"}])
    here = [{"path": tmp_path / "data" / n} for n in ("qestions.jsonl", "*.csv", "readme.txt")]
    text = refusal(tmp_path, tokenizer, here, evaluate={"transfer": [{"path": str(tmp_path / "gone" / "x.json")}]})
    assert "mixture.sources[0]" in text and "no such file" in text and "holds questions.jsonl" in text
    assert "mixture.sources[1]" in text and "no file matches" in text
    assert "mixture.sources[2]" in text and "evaluate.transfer[0]" in text
    text = refusal(tmp_path, tokenizer, [{"path": tmp_path / n} for n in ("bad.jsonl", "more.json", "odd.jsonl")])
    assert "bad.jsonl, line 3: not JSON" in text
    assert "more.json: holds an object with rows; wanted a list" in text
    assert "no format fits the columns found: body, headline" in text and "instruction + output" in text


def test_what_is_not_there_does_not_hide_what_is_damaged(tmp_path, tokenizer):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", ')
    write(tmp_path / "numbers.jsonl", [{"prompt": i, "completion": "c"} for i in range(4)])
    text = refusal(tmp_path, tokenizer, [{"path": tmp_path / n} for n in ("gone.jsonl", "bad.jsonl", "numbers.jsonl")])
    assert "mixture.sources[0]" in text and "gone.jsonl: no such file" in text and "bad.jsonl, line 1: not JSON" in text
    assert ("mixture.sources[2] (numbers.jsonl): none of its 4 rows is usable, 4 malformed: numbers.jsonl:1: `prompt` is int, "
            "wanted text. Look at its `format` and `columns`.") in text


def test_of_several_files_one_may_be_unusable(tmp_path, tokenizer):
    write(tmp_path / "data" / "a.jsonl", [{"prompt": i, "completion": "c"} for i in range(4)])
    write(tmp_path / "data" / "b.jsonl", rows(3))
    mixture = build_mixture(recipe(tmp_path, [{"path": tmp_path / "data"}]), tokenizer, tmp_path / "out", base_hash="b")
    assert [u.name for u in mixture.units] == ["b"]
    [line] = unwanted_lines(mixture)
    assert line == "unit a, whole: 4 of 4 rows malformed, such as data/a.jsonl:1: `prompt` is int, wanted text"
    lines = exclusion_lines(mixture.excluded)
    assert lines[-1] == "a (train): the whole unit, too_few_samples: no row is usable"


def test_rows_that_name_no_unit_at_all_are_a_source_that_is_wrong(tmp_path, tokenizer):
    write(tmp_path / "b.jsonl", rows(3))
    write(tmp_path / "a.jsonl", [r | {"task": None} for r in rows(4, "a")])
    text = refusal(tmp_path, tokenizer, [{"path": tmp_path / "b.jsonl"}, {"path": tmp_path / "a.jsonl", "unit_column": "task"}])
    assert "mixture.sources[1] (a.jsonl): none of its 4 rows is usable, 4 malformed: a.jsonl:1: `task` names no unit" in text


@pytest.mark.parametrize("several", [False, True])
def test_a_folder_of_save_to_disk_is_told_for_what_it_is(tmp_path, tokenizer, several):
    import datasets

    made = datasets.Dataset.from_list(rows(4))
    (datasets.DatasetDict({"train": made}) if several else made).save_to_disk(tmp_path / "saved")
    text = refusal(tmp_path, tokenizer, [{"path": tmp_path / "saved"}])
    assert "save_to_disk" in text and "to_parquet('rows.parquet')" in text
    code = re.search(r"datasets\.(load_from_disk.*)\.to_parquet", text)
    assert code is not None
    eval("datasets." + code[1].replace("[SPLIT]", "['train']")).to_parquet(tmp_path / "rows.parquet")  # as it is told
    mixture = build_mixture(recipe(tmp_path, [{"path": tmp_path / "rows.parquet"}]), tokenizer, tmp_path / "out", base_hash="b")
    assert mixture.units[0].rows == 4


@pytest.mark.parametrize(("name", "content", "word"), [
    ("u.json", b'{"prompt": "p"}\n{"prompt": "p"}', r"line 2: not JSON.*name it \.jsonl"),
    ("u.jsonl", b'["p", "c"]\n', "line 1: holds list"), ("u.jsonl", b"\xff\xfe{", "not UTF-8"),
    ("u.jsonl", b"\n", "no row in it"), ("u.csv", b"prompt,completion\np,c,d\n", "line 2: another number of fields"),
    ("u.csv", b"prompt,completion\np\n", "line 2: another number of fields"),
    ("u.csv", b"prompt,prompt\np,c\n", "more than once"),
    ("u.csv", b'prompt,completion\n"p,c\n', "damaged or cut short"),
    ("u.jsonl.gz", gzip.compress(as_jsonl(rows(50)))[:-20], "damaged or cut short"), ("u.jsonl.gz", b"no gzip", "damaged"),
    ("u.jsonl.zst", b"no zstandard", "damaged"),
    ("u.jsonl.zst", zstandard.compress(as_jsonl(rows(5000)))[:-5], "damaged or cut short"),
    ("u.jsonl.zst", zstandard.compress(as_jsonl(rows(5)) + b"\n") + zstandard.compress(b"{}")[:6], "damaged or cut short"),
    ("u.parquet", b"PAR1 no parquet", "not a readable Parquet file"),
    ("u.txt", b"text", "not a kind of file"), ("u.jsonl", b'{"text": "t"}\n', "format: text"),
])
def test_unreadable_files_are_refused_with_their_place(tmp_path, tokenizer, name, content, word):
    path = tmp_path / name
    path.write_bytes(content)
    text = refusal(tmp_path, tokenizer, [{"path": path}])
    assert name in text and re.search(word, text), text


@pytest.mark.parametrize(("options", "word"), [
    ({"unit_column": "tsk"}, "no column 'tsk'. Did you mean `task`?"),
    ({"columns": {"promt": "prompt"}}, "columns.promt: not one of ours. Did you mean `prompt`?"),
    ({"columns": {"prompt": "promt"}}, "columns.prompt: the data has no column 'promt'. Did you mean `prompt`?"),
    ({"format": "messages"}, "format messages needs `messages`; columns found: completion, prompt, task"),
])
def test_columns_that_are_not_there(tmp_path, tokenizer, options, word):
    path = write(tmp_path / "u.jsonl", [r | {"task": "t"} for r in rows(2)])
    assert word in refusal(tmp_path, tokenizer, [{"path": path, **options}])


def test_two_units_of_one_name(tmp_path, tokenizer):
    for place in ("x", "y", "z"):
        write(tmp_path / place / "same.jsonl", rows(3, place))
    text = refusal(tmp_path, tokenizer, [{"path": tmp_path / "x" / "same.jsonl"}, {"path": tmp_path / "y" / "same.jsonl"}],
                   evaluate={"transfer": [{"path": str(tmp_path / "z" / "same.jsonl")}]})
    assert "unit named 'same': mixture.sources[0] (x/same.jsonl) and mixture.sources[1] (y/same.jsonl)" in text
    assert "evaluate.transfer[0] (z/same.jsonl)" in text


def test_no_usable_row_shows_the_table(tmp_path, tokenizer):
    path = write(tmp_path / "u.jsonl", [{"prompt": "p", "completion": ""}] * 4)
    text = refusal(tmp_path, tokenizer, [{"path": path}])
    assert "no usable row" in text and "u (train): 4 rows, empty_response: " in text and "u.jsonl:1" in text


def test_a_dataset_that_cannot_be_had(tmp_path, tokenizer, monkeypatch):
    import datasets

    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("offline\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load)
    text = refusal(tmp_path, tokenizer, [{"path": "org/questions", "config": "en"}])
    assert "org/questions" in text and "config 'en'" in text and "ConnectionError: offline)" in text and "network" in text


# ---- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "data" / "p3").is_dir(), reason="the P3 sample is not beside the repository")
def test_p3_as_its_readme_says(tmp_path):
    from transformers import AutoTokenizer

    data, base = SHARED / "data" / "p3", SHARED / "models" / "p3-base"
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    names = ("ag_news", "commonsense_qa", "glue_mrpc", "paws")
    sources = [{"path": data / n / "train.parquet", "held_out": str(data / n / "test.parquet"), "unit_column": "task"}
               for n in names]
    evaluate = {"transfer": [{"path": str(data / n / "test.parquet"), "unit_column": "task"} for n in ("glue_qqp", "trec")],
                "retention": "held_out_prompts"}
    out = tmp_path / "out"
    mixture = build_mixture(recipe(tmp_path, sources, evaluate=evaluate, max_samples=10, max_held_out=4, max_length=512),
                            tokenizer, out, base_hash="b")
    column = {n: pyarrow.parquet.read_table(data / n / "train.parquet").column("task").to_pylist() for n in names}
    tasks = Counter(t for n in names for t in column[n])
    lost = {e.unit for e in mixture.excluded if e.rule == "too_few_samples"}
    assert {u.name for u in mixture.units} | lost >= set(tasks) and len(mixture.units) > 0.8 * len(tasks)
    by_unit: Counter[str] = Counter()
    for e in mixture.excluded:
        by_unit[e.unit] += e.rows * (e.split == "train")
    for unit in mixture.units:
        assert unit.rows + by_unit[unit.name] == tasks[unit.name] and unit.rows <= 10 and unit.held_out_rows <= 4
    assert {u.name for u in mixture.retention} == {u.name for u in mixture.units if u.held_out_rows}
    assert mixture.transfer and not {u.name for u in mixture.transfer} & set(tasks)
    for example in mixture.examples:
        assert example["response"].endswith("<|eos|>") and example["prompt"].endswith("<|assistant|>\n")
    shutil.rmtree(out)


def test_files_of_one_glob_may_have_formats_of_their_own(tmp_path, tokenizer, recipe_file):
    """A folder of datasets as people have them: none is lost because another was read first."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    made = {
        "alpaca": [{"instruction": f"say {i}", "output": f"word {i}"} for i in range(12)],
        "chat": [{"messages": [user(f"say {i}"), assistant(f"word {i}")]} for i in range(12)],
        "plain": [{"prompt": f"say {i}", "completion": f"word {i}"} for i in range(12)],
        "share": [{"conversations": [{"from": "human", "value": f"say {i}"}, {"from": "gpt", "value": f"word {i}"}]}
                  for i in range(12)]}
    for name, data in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    loaded = load_recipe(recipe_file, {"mixture.sources": [{"path": str(folder / "*.jsonl")}], "mixture.held_out": 0.0,
                                       "evaluate.transfer": [], "evaluate.retention": "none"})
    mixture = build_mixture(loaded, tokenizer, tmp_path / "out", base_hash="x")
    assert {u.name: (u.rows, u.format) for u in mixture.units} == {
        "alpaca": (12, "alpaca"), "chat": (12, "messages"), "plain": (12, "prompt_completion"), "share": (12, "sharegpt")}
    (folder / "empty.jsonl").write_text("")
    (folder / "strange.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(MixtureError) as caught:
        build_mixture(loaded, tokenizer, tmp_path / "again", base_hash="x")
    assert "empty.jsonl: no row in it" in str(caught.value)
    (folder / "empty.jsonl").unlink()
    with pytest.raises(MixtureError, match=r"strange\.jsonl"):
        build_mixture(loaded, tokenizer, tmp_path / "again", base_hash="x")
