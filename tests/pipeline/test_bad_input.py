"""What a person gets wrong: one message, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from anabranch import cli
from anabranch.errors import AnabranchError
from anabranch.recipe import load_recipe


def changed(recipe: Path, **sections: object) -> Path:
    text = yaml.safe_load(recipe.read_text())
    for name, value in sections.items():
        text[name] = {**text[name], **value} if isinstance(value, dict) and name in text else value
    recipe.write_text(yaml.safe_dump(text, sort_keys=False))
    return recipe


def refused(*arguments: object) -> str:
    """The message; asserts exit code 2 and no traceback, through the very function that the command calls."""
    import contextlib
    import io
    import sys
    from unittest import mock

    from rich.console import Console

    stream = io.StringIO()
    with mock.patch.object(cli, "err", Console(file=stream, soft_wrap=True, highlight=False)), \
            mock.patch.object(sys, "argv", ["anabranch", *map(str, arguments)]), \
            contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    message = stream.getvalue()
    assert message and "Traceback" not in message
    return message


def test_missing_recipe(tmp_path):
    assert "anabranch init" in refused("run", tmp_path / "none.yaml")


def test_misspelt_keys_are_all_named_with_the_closest(recipe_file):
    text = yaml.safe_load(recipe_file.read_text())
    text["splitt"] = {}
    text["mixture"]["sources"][0]["unit_colum"] = "x"
    text["split"]["groops"] = 3
    recipe_file.write_text(yaml.safe_dump(text))
    message = refused("run", recipe_file)
    for name in ("split", "unit_column", "groups"):
        assert f"Did you mean `{name}`?" in message


def test_misspelt_trainer_argument(recipe_file):
    message = refused("run", changed(recipe_file, train={"learning_rat": 1e-3}), "--dry-run")
    assert "Did you mean `learning_rate`?" in message


def test_trainer_arguments_of_the_pipeline_are_refused(recipe_file):
    assert "max_steps" in refused("run", changed(recipe_file, train={"max_steps": 3}))


def test_key_twice(recipe_file):
    recipe_file.write_text(recipe_file.read_text() + "seed: 4\n")
    assert "stands twice" in refused("run", recipe_file)


def test_missing_data(recipe_file):
    message = refused("run", changed(recipe_file, mixture={"sources": [{"path": "./data/none.jsonl"}]}))
    assert "none.jsonl" in message


def test_no_usable_row(recipe_file):
    (recipe_file.parent / "empty.jsonl").write_text('{"prompt": "a", "completion": ""}\n' * 5)
    message = refused("run", changed(recipe_file, mixture={"sources": [{"path": "empty.jsonl"}]}))
    assert "empty_response" in message or "empty response" in message


def test_two_units_of_one_name(recipe_file):
    sources = [{"path": "data/copy.jsonl", "unit": "same"}, {"path": "data/first.jsonl", "unit": "same"}]
    message = refused("run", changed(recipe_file, mixture={"sources": sources}))
    assert "same" in message and "copy.jsonl" in message and "first.jsonl" in message


def test_model_folder_without_weights(recipe_file, tiny_base, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_base / name, folder)
    assert "no weights" in refused("run", changed(recipe_file, model={"path": str(folder)}))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "refused" in refused("run", recipe_file)


def test_model_that_is_nowhere(recipe_file):
    assert "no-such-owner/no-such-model" in refused("run", changed(recipe_file, model={"path": "no-such-owner/no-such-model"}))


def test_pattern_that_matches_nothing(recipe_file):
    assert "vision.*" in refused("run", changed(recipe_file, model={"trainable": ["vision.*"]}))


def test_more_groups_than_units(recipe_file):
    assert "split.groups" in refused("run", changed(recipe_file, split={"groups": 50}))


def test_stage_names(recipe_file):
    assert "Did you mean `train`?" in refused("run", recipe_file, "--until", "trian")
    assert "comes after" in refused("run", recipe_file, "--from", "merge", "--until", "split")


@pytest.mark.parametrize("methods", ["jiont,merit:2", "merit", "merit:2,merit:2", "base,joint_matched", "random:x"])
def test_arms(recipe_file, methods):
    assert "--methods" in refused("compare", recipe_file, "--methods", methods)


def test_shard_and_set(recipe_file):
    assert "--shard" in refused("gradients", recipe_file, "--shard", "2/2")
    assert "--set" in refused("run", recipe_file, "--set", "split.groups")


def test_init_writes_a_recipe_that_validates_and_never_overwrites(tmp_path):
    path = tmp_path / "recipe.yaml"
    assert CliRunner().invoke(cli.app, ["init", str(path)]).exit_code == 0
    recipe = load_recipe(path)
    assert recipe.split.method == "merit" and recipe.train["learning_rate"] == 2e-5
    with pytest.raises(AnabranchError):
        cli.init(path)


def test_every_key_that_the_template_comments_out_is_real(tmp_path):
    """Uncommented, the template's examples are still a valid recipe: none of them has drifted."""
    from importlib import resources

    lines = []
    for line in resources.files("anabranch").joinpath("recipe_template.yaml").read_text().splitlines():
        bare = line.lstrip()
        if bare.startswith("# ") and ":" in bare and not bare.startswith(("# An ", "# Paths")):
            line = line.replace("# ", "", 1)
        lines.append(line)
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(lines).replace("      unit: my-unit", "      # unit: my-unit"))
    recipe = load_recipe(path)
    assert recipe.evaluate.transfer and recipe.launch.max_parallel == 1 and recipe.model.lora


def test_dry_run_writes_nothing_and_counts_exactly(recipe_file):
    done = CliRunner().invoke(cli.app, ["run", str(recipe_file), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "5 units" in done.output and "2 branches" in done.output and not (recipe_file.parent / "run").exists()


def test_dry_run_of_a_hub_model_says_what_it_cannot_know(recipe_file):
    done = CliRunner().invoke(cli.app, ["run", str(changed(recipe_file, model={"path": "Qwen/Qwen2.5-0.5B"})), "--dry-run"])
    assert done.exit_code == 0 and "from the Hub" in done.output


def test_token_beyond_the_embeddings(recipe_file, tiny_base, tmp_path):
    """Some tokenizers have entries that their model has no embedding for."""
    from transformers import AutoTokenizer

    folder = tmp_path / "larger-vocabulary"
    shutil.copytree(tiny_base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|strange|>"]})
    tokenizer.save_pretrained(folder)
    path = recipe_file.parent / "data" / "copy.jsonl"
    path.write_text(path.read_text().replace('"copy ', '"<|strange|> copy '))
    assert "has no embedding" in refused("run", changed(recipe_file, model={"path": str(folder)}))


@pytest.mark.parametrize(("train", "word"), [
    ({"learning_rate": "fast"}, "train.learning_rate"), ({"per_device_train_batch_size": 0}, "more than 0"),
    ({"num_train_epochs": -1}, "more than 0"), ({"eval_strategy": "steps"}, "set by the pipeline"),
    ({"optim": "no_such_optimizer"}, "train")])
def test_trainer_values_are_checked_before_anything_is_done(recipe_file, train, word):
    assert word in refused("run", changed(recipe_file, train=train))
    assert not (recipe_file.parent / "run" / "mixture").exists()


def test_merge_settings_are_checked_before_training(recipe_file):
    assert "token_weighted" in refused("run", changed(recipe_file, merge={"method": "token_weigthed"}))
    assert "5 gigs" in refused("run", changed(recipe_file, merge={"method": "token_weighted", "max_shard_size": "5 gigs"}))


def test_a_number_without_a_point_is_a_number(recipe_file):
    text = recipe_file.read_text().replace("learning_rate: 0.001", "learning_rate: 2e-5")
    recipe_file.write_text(text)
    assert "2e-5" in text and load_recipe(recipe_file).train["learning_rate"] == 2e-5


def test_base_whose_tensors_have_other_names_is_refused_before_training(recipe_file, tiny_base, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "renamed"
    shutil.copytree(tiny_base, folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    tensors = {k: v for p in tiny_base.glob("*.safetensors") for k, v in load_file(p).items()}
    save_file({k.removeprefix("model."): v for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    assert "save_pretrained" in refused("run", changed(recipe_file, model={"path": str(folder)}))


@pytest.mark.parametrize("text", ["model.path=[1", "output={"])
def test_set_with_broken_yaml(recipe_file, text):
    assert "not valid YAML" in refused("run", recipe_file, "--dry-run", "--set", text)


def test_dry_run_names_missing_files(recipe_file):
    assert "nowhere.jsonl" in refused("run", recipe_file, "--dry-run", "--set", "mixture.sources=[{path: nowhere.jsonl}]")
