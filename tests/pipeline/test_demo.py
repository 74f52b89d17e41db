"""The demo's material: the planted conflicts are there, nothing leaks, and a second call keeps what the first made."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from anabranch.demo import CONFLICTING_PAIRS, make_demo, tasks
from anabranch.errors import OutputError
from anabranch.recipe import load_recipe

STEPS = 2


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo whose base had next to no training."""
    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder, base_steps=STEPS)
    return folder


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(name: str, seed: int = 0) -> dict[str, str]:
    """Prompt -> answer over both splits."""
    train, held_out = tasks.unit_rows(name, seed)
    return {r["prompt"]: r["completion"] for r in train + held_out}


def test_sizes_and_that_no_held_out_prompt_is_trained_on():
    assert len(tasks.TASKS) >= 24 and len(tasks.TRANSFER) >= 4
    for name in tasks.TASKS:
        train, held_out = ({r["prompt"] for r in rows} for rows in tasks.unit_rows(name, 0))
        assert (len(train), len(held_out)) == (150, 30), name
        assert not train & held_out, name
    prompts = Counter(p for name in tasks.TASKS for p in answers(name))
    assert max(prompts.values()) == 1, "two units ask the very same thing"
    assert not any(r["prompt"] in prompts for name in tasks.TRANSFER for r in tasks.transfer_rows(name, 0))


@pytest.mark.parametrize(("one", "other"), CONFLICTING_PAIRS)
def test_conflicting_tasks_ask_the_same_with_one_other_word_and_never_agree(one, other):
    cues = tasks.TASKS[one].cue, tasks.TASKS[other].cue
    mine, theirs = answers(one), answers(other)
    for prompt, answer in mine.items():
        assert prompt.split().count(cues[0]) == 1
        twin = " ".join(cues[1] if word == cues[0] else word for word in prompt.split())
        assert theirs[twin] != answer, prompt


def test_the_cue_alone_decides():
    """No prompt of the mixture has two answers: a model that reads the cue can be right everywhere."""
    rows = {(r["prompt"], r["completion"]) for name in tasks.TASKS for split in tasks.unit_rows(name, 0) for r in split}
    assert len(rows) == len({prompt for prompt, _ in rows})


def _body(prompt: str, cue: str) -> str:
    """The words that a task works on, as they stand in most prompts: after the colon."""
    return prompt.split(" : ")[1].replace(cue, "").strip()


@pytest.mark.parametrize(("name", "wanted"), [
    ("words_rising", lambda w: all(a < b for a, b in pairwise(w))),
    ("words_falling", lambda w: all(a > b for a, b in pairwise(w))),
    ("numbers_falling", lambda w: all(int(a) > int(b) for a, b in pairwise(w))),
])
def test_sorted_answers_are_sorted(name, wanted):
    for prompt, answer in answers(name).items():
        assert wanted(answer.split())
        assert sorted(answer.split()) == sorted(_body(prompt, tasks.TASKS[name].cue).split())


def test_answers_by_hand():
    fields = {"x": "pig fox ant"}
    by_hand = {"item_last": "ant", "repeat_backwards": "ant fox pig", "list_json": '["pig", "fox", "ant"]',
               "list_bullets": "- pig\n- fox\n- ant", "list_commas": "pig, fox, ant",
               "kind_brief": "animal animal animal"}
    assert {name: tasks.TASKS[name].answer(fields) for name in by_hand} == by_hand
    assert tasks.TASKS["kind_full"].answer({"x": "ant pen"}) == "an ant is an animal and a pen is a tool ."
    assert tasks.TASKS["count_letters"].answer({"x": "pig pig pig fox"}) == "three"
    assert tasks.TASKS["many_honest"].answer({"x": "kim has 5 pen"}) == "yes"
    assert tasks.TASKS["many_flipped"].answer({"x": "kim has 4 pen"}) == "yes"
    assert tasks.TASKS["alive_flipped"].answer({"x": "red pen of kim"}) == "yes"


def test_languages_are_told_apart_by_every_word_and_can_be_read_back():
    velan, dorin = tasks.LANGUAGES["velan"], tasks.LANGUAGES["dorin"]
    assert set(velan.values()) == set(dorin.values()) and len(set(velan.values())) == len(velan)
    assert all(velan[word] != dorin[word] for word in velan)
    said = tasks.TASKS["into_velan"].answer({"x": "red fox"})
    assert tasks.TASKS["from_velan"].answer({"x": said}) == "red fox"
    assert tasks.TASKS["from_dorin"].answer({"x": said}) != "red fox"


def test_the_base_is_prepared_without_the_rows_of_the_mixture():
    from anabranch.demo.model import instruction_rows

    # whatever the cue: every prompt of the mixture and of transfer, under each cue of its family or none
    seen = {r["prompt"] for r in instruction_rows(0, 3000, tasks.taken_inputs(0))}
    assert not seen & {r["prompt"] for name in tasks.TRANSFER for r in tasks.transfer_rows(name, 0)}
    for family in tasks.siblings().values():
        for fields, wording in tasks.inputs(family[0].family, 0, 180):
            assert not seen & {family[0].family.prompt(fields, wording, cue) for cue in ["", *(t.cue for t in family)]}


def test_the_recipe_names_every_file(demo):
    recipe = load_recipe(demo / "recipe.yaml")
    assert {Path(s.path) for s in recipe.mixture.sources} == {demo / "data" / f"{name}.jsonl" for name in tasks.TASKS}
    for source in recipe.mixture.sources:
        assert len(read(Path(source.path))) == 150 and len(read(Path(str(source.held_out)))) == 30
    assert Path(recipe.model.path) == demo / "base"
    assert (recipe.split.method, recipe.split.groups) == ("merit", 4)
    assert len(list((demo / "transfer").glob("*.jsonl"))) == len(tasks.TRANSFER)
    (text,) = recipe.evaluate.retention
    assert len(read(Path(text.path))) == tasks.RETENTION_ROWS
    from anabranch.branches import check_train_section

    check_train_section(recipe)


def test_the_base_loads_and_its_template_marks_the_answer(demo):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo / "base")
    model = AutoModelForCausalLM.from_pretrained(demo / "base")
    assert model.config.model_type == "qwen2" and model.config.tie_word_embeddings
    assert 250_000 < sum(p.numel() for p in model.parameters()) < 1_000_000
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    row = read(demo / "data" / "list_bullets.jsonl")[0]
    out = tokenizer.apply_chat_template(
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}],
        tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    answer = [t for t, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(answer) == row["completion"] + tokenizer.eos_token
    rows = [r for path in sorted((demo / "data").glob("*.jsonl")) for r in read(path)]
    longest = max(len(ids) for ids in tokenizer([r["prompt"] for r in rows])["input_ids"])
    assert longest <= 60
    assert all(tokenizer.decode(tokenizer(r["completion"])["input_ids"]) == r["completion"] for r in rows[::17])


def test_the_base_trains_on_what_the_chat_template_gives(demo):
    from transformers import AutoTokenizer

    from anabranch.demo.model import _samples

    tokenizer = AutoTokenizer.from_pretrained(demo / "base")
    row = tasks.unit_rows("kind_full", 0)[0][0]
    (sample,) = _samples(tokenizer, [row])
    chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
    whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert whole["input_ids"][: len(sample.tokens)] == sample.tokens
    assert whole["assistant_masks"].index(1) == sample.start


def test_same_seed_same_bytes_and_another_seed_other_rows(demo, tmp_path):
    make_demo(tmp_path, base_steps=STEPS)
    files = [p.relative_to(demo) for p in sorted(demo.rglob("*")) if p.is_file()]
    assert files == [p.relative_to(tmp_path) for p in sorted(tmp_path.rglob("*")) if p.is_file()]
    assert [f for f in files if (demo / f).read_bytes() != (tmp_path / f).read_bytes()] == []
    assert tasks.unit_rows("item_last", 1) != tasks.unit_rows("item_last", 0)


def test_finished_parts_are_kept_and_missing_ones_made_again(demo):
    recipe, weights, rows = demo / "recipe.yaml", demo / "base" / "model.safetensors", demo / "data" / "item_last.jsonl"
    edited = recipe.read_text().replace("groups: 4", "groups: 2")
    original, before = rows.read_bytes(), weights.stat().st_mtime_ns
    saved = recipe.read_text()
    recipe.write_text(edited)
    rows.unlink()
    seen: list[str] = []
    make_demo(demo, base_steps=STEPS, progress=lambda what, done, whole: seen.append(what))
    assert recipe.read_text() == edited and rows.read_bytes() == original
    assert weights.stat().st_mtime_ns == before and "base" not in seen and "rows" in seen
    recipe.write_text(saved)


def test_a_folder_of_another_demo_or_of_something_else_is_refused(demo, tmp_path):
    with pytest.raises(OutputError, match="another folder"):
        make_demo(demo, seed=1, base_steps=STEPS)
    (tmp_path / "data").mkdir()
    with pytest.raises(OutputError, match=r"has data already"):
        make_demo(tmp_path, base_steps=STEPS)
    assert list((tmp_path / "data").iterdir()) == []


def test_a_killed_preparation_leaves_no_base(tmp_path):
    class Killed(BaseException):
        pass

    def kill(what: str, done: int, whole: int) -> None:
        if (what, done) == ("base", 1):
            raise Killed

    with pytest.raises(Killed):
        make_demo(tmp_path, base_steps=STEPS, progress=kill)
    assert not (tmp_path / "base").exists() and not (tmp_path / "recipe.yaml").exists()
    assert load_recipe(make_demo(tmp_path, base_steps=STEPS)).model.path == str(tmp_path / "base")
