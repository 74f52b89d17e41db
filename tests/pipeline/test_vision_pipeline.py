"""Vision-language checkpoints through every stage: sharded, in bfloat16, with tied and untied heads, text-only units mixed in.

What is checked is read from the files with safetensors and transformers alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open

from anabranch.compare import parse_arms, run_comparison
from anabranch.diagnose.artifacts import Displacement, LinearModeConnectivity
from anabranch.diagnose.run import run_diagnostics, subject_of_run
from anabranch.diagnose.subject import Settings
from anabranch.evaluate import _answer
from anabranch.model import load_model, load_tokenizer
from anabranch.recipe import load_recipe
from anabranch.rows import Rows, load_unit, read_image
from anabranch.run import open_run, reopen_run, run_stages
from anabranch.search.run import prepare_search, search
from jobs_here import jobs_done_here
from vision_models import (
    KNOWN,
    picture,
    questions,
    read_processor,
    write_llava,
    write_picture_units,
    write_vision_model,
    write_words,
)

FROZEN = {"llava": ("vision_tower.", "multi_modal_projector."), "qwen2_5_vl": ("visual.",)}
CAP = 112 * 112
UNITS = ["colour", "compare", "not_colour", "place", "words"]


class Finished(NamedTuple):
    family: str
    recipe: Path
    base: Path
    run: Path
    told: list[str]

    def json(self, name: str) -> Any:
        return json.loads((self.run / name).read_text())


def write_recipe(folder: Path, base: Path) -> Path:
    """Four units with images and one without, one transfer unit of each kind, frozen eyes, two groups, a few steps."""
    recipe = {
        "model": {"path": str(base), "freeze": ["vision tower", "projector"]},
        "mixture": {"sources": write_picture_units(folder, rows=14), "held_out": 0.25, "max_length": 400,
                    "images": {"max_pixels": CAP}},
        "gradients": {"calibration_samples": 8, "size": 512},
        "split": {"method": "merit", "groups": 2},
        "train": {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 100},
        "evaluate": {"transfer": [{"path": "transfer/*.json"}, {"path": "transfer/*.jsonl"}], "generate_samples": 2,
                     "max_samples": 4, "retention": "none"},
        "launch": {"max_parallel": 2, "threads": 1}, "output": "run", "seed": 3}
    write_llava(folder / "transfer", "unseen", questions("colour", 3, seed=9))
    write_words(folder / "transfer", "unseen_words", questions("words", 3, seed=9))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(scope="session", params=["llava", "qwen2_5_vl"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """One run of each family: LLaVA's head tied, Qwen2.5-VL's not; both in bfloat16 and in several files."""
    family, folder = request.param, tmp_path_factory.mktemp(f"{request.param}_run")
    base = write_vision_model(folder / "base", family, tied=family == "llava", shards=3, dtype="bfloat16", seed=5)
    told: list[str] = []
    recipe = write_recipe(folder, base)
    with jobs_done_here():
        run_stages(open_run(load_recipe(recipe), tell=told.append))
    return Finished(family, recipe, base, folder / "run", told)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file, not a dict
    return found


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def frozen(run: Finished, names: dict[str, torch.Tensor]) -> list[str]:
    return [n for n in names if n.startswith(FROZEN[run.family])]


# ---- mixture -----------------------------------------------------------------------------------------------------------


def test_the_mixture_counts_images_and_their_tokens(finished):
    """Against the rows on disk, and against the family's processor on the stored images."""
    mixture, processor = finished.json("mixture/mixture.json"), read_processor(finished.base)
    placeholder = processor.tokenizer.convert_tokens_to_ids(KNOWN[finished.family].placeholder)
    assert [u["name"] for u in mixture["units"]] == UNITS
    for unit in mixture["units"]:
        rows = load_unit(finished.run / "mixture" / unit["file"], "train")
        shown = rows.images_of(range(len(rows)))
        assert [len(images) for images in shown] == [{"words": 0, "compare": 2}.get(unit["name"], 1)] * len(rows)
        assert unit.get("images", 0) == sum(map(len, shown))
        assert ("images_file" in unit) == (unit["name"] != "words")
        for i, images in enumerate(shown):
            ids, response = rows.row(i)
            assert not response[ids == placeholder].any() and response.any()
            pictures = [open_stored(read_image(image)) for image in images]
            if pictures:
                text = KNOWN[finished.family].placeholder * len(pictures)
                wanted = processor(text=[text], images=[pictures], add_special_tokens=False)["input_ids"][0]
                assert int((ids == placeholder).sum()) == list(wanted).count(placeholder)
    assert sum(u.get("image_tokens", 0) for u in mixture["units"]) == mixture["vision"]["image_tokens"] > 0


def open_stored(data: bytes) -> Any:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def test_the_pixel_cap_is_kept(finished):
    mixture = finished.json("mixture/mixture.json")
    vision = mixture["vision"]
    sizes = [open_stored(read_image(image)).size for unit in mixture["units"] if "images_file" in unit
             for images in load_unit(finished.run / "mixture" / unit["file"], "train").images_of(range(unit["rows"]))
             for image in images]
    factor = 28 if finished.family == "qwen2_5_vl" else 1
    assert all(max(factor, round(w / factor) * factor) * max(factor, round(h / factor) * factor) <= CAP for w, h in sizes)
    assert vision["max_pixels"] == CAP and vision["scaled_down"] > 0
    if finished.family == "qwen2_5_vl":
        assert vision["image_tokens_uncapped"] > vision["image_tokens"] and vision["largest"] <= CAP // 28 // 28
    else:
        assert vision["smallest"] == vision["largest"] == 16


# ---- gradients, branches, merge ----------------------------------------------------------------------------------------


def test_what_is_frozen_is_said_before_it_is_used(finished):
    lines = [line for line in finished.told if line.startswith("freeze:")]
    assert any("vision tower" in line for line in lines) and any("projector" in line for line in lines)
    assert finished.told.index(lines[0]) < next(i for i, line in enumerate(finished.told) if line.startswith("gradients:"))


def test_only_what_trains_is_sketched(finished):
    base = tensors(finished.base)
    held = sum(base[n].numel() for n in frozen(finished, base))
    assert finished.json("gradients/gradients.json")["parameters"] == sum(t.numel() for t in base.values()) - held
    assert 0 < held < sum(t.numel() for t in base.values())


def test_branches_have_the_bases_keys_and_its_frozen_tensors_bit_for_bit(finished):
    base = tensors(finished.base)
    assert ("lm_head" in " ".join(base)) == (finished.family == "qwen2_5_vl")
    for k in range(2):
        branch = tensors(finished.run / "branches" / str(k) / "model")
        assert branch.keys() == base.keys()
        assert {n: t.shape for n, t in branch.items()} == {n: t.shape for n, t in base.items()}
        for name in frozen(finished, base):
            assert torch.equal(branch[name].double(), base[name].double()), name
        moved = [n for n in base if not torch.equal(branch[n].double(), base[n].double())]
        assert not set(moved) & set(frozen(finished, base))
        assert {n.rsplit(".", 1)[0].rsplit(".", 1)[-1] for n in moved} >= {"q_proj", "down_proj", "embed_tokens"}
        assert branch_manifest_losses(finished, k)


def branch_manifest_losses(run: Finished, k: int) -> bool:
    losses = [loss for _, loss in run.json(f"branches/{k}/branch.json")["losses"]]
    return len(losses) > 2 and all(torch.isfinite(torch.tensor(losses)))


def test_the_merge_is_the_weighted_mean_and_carries_frozen_tensors_byte_for_byte(finished):
    base, merged = tensors(finished.base), tensors(finished.run / "merged")
    branches = [tensors(finished.run / "branches" / str(k) / "model") for k in range(2)]
    tokens = [g["tokens"] for g in finished.json("plan.json")["groups"]]
    assert merged.keys() == base.keys()
    for name in base:
        if name in frozen(finished, base):
            assert merged[name].dtype == base[name].dtype and raw(merged[name]) == raw(base[name]), name
        else:
            mean = sum(t / sum(tokens) * b[name].double() for t, b in zip(tokens, branches, strict=True))
            exact = torch.finfo(merged[name].dtype).eps
            torch.testing.assert_close(merged[name].double(), mean, rtol=exact, atol=exact / 100)
    assert any(raw(merged[n]) != raw(base[n]) for n in base)


def test_the_merged_folder_answers_about_an_image_in_transformers(finished):
    from transformers import AutoModelForImageTextToText

    folder = finished.run / "merged"
    processor, model = read_processor(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
    for name in ("preprocessor_config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).read_bytes() == (finished.base / name).read_bytes(), name
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is this?"}]}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True)
    logits = []
    for image in (picture("red"), picture("blue", "right")):
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        with torch.no_grad():
            written = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            logits.append(model(**inputs).logits[0, -1].float())
        assert written.shape[1] > inputs["input_ids"].shape[1]
    assert torch.isfinite(logits[0]).all() and not torch.equal(*logits)


# ---- evaluation and report ---------------------------------------------------------------------------------------------


def test_evaluation_reads_images_and_training_helped(finished):
    scores = {m: finished.json(f"evaluation/{m}.json") for m in ("base", "merged")}
    for evaluation in scores.values():
        assert sorted(evaluation["held_out"]) == UNITS and sorted(evaluation["transfer"]) == ["unseen", "unseen_words"]
        assert all(s["loss"] > 0 for s in evaluation["held_out"].values())
        assert evaluation["held_out"]["colour"]["answers"] > 0
    means = {m: sum(s["loss"] for s in e["held_out"].values()) / len(UNITS) for m, e in scores.items()}
    assert means["merged"] < means["base"] - 0.1


def test_evaluation_is_what_the_plain_model_gives_row_by_row(finished):
    """Held-out loss of one unit, by transformers on the processor's own tensors of the stored image."""
    from transformers import AutoModelForImageTextToText

    processor = read_processor(finished.base)
    model = AutoModelForImageTextToText.from_pretrained(finished.base, dtype=torch.float32).eval()
    unit = next(u for u in finished.json("mixture/mixture.json")["units"] if u["name"] == "colour")
    rows = load_unit(finished.run / "mixture" / unit["file"], "held_out")
    if len(rows) > 4:
        pytest.skip("more held-out rows than are scored")
    total, count = 0.0, 0
    for i, (image,) in enumerate(rows.images_of(range(len(rows)))):
        ids, response = rows.row(i)
        picture = open_stored(read_image(image))
        made = processor(text=[KNOWN[finished.family].placeholder], images=[picture], return_tensors="pt")
        inputs = {k: v for k, v in made.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
        tokens = torch.tensor(ids, dtype=torch.int64)[None]
        if "mm_token_type_ids" in made:
            inputs["mm_token_type_ids"] = (tokens == processor.image_token_id).long()
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), **inputs).logits[0].float()
        where = torch.tensor(response).nonzero()[:, 0]
        total += float(torch.nn.functional.cross_entropy(logits[where - 1], tokens[0, where], reduction="sum"))
        count += len(where)
    scored = finished.json("evaluation/base.json")["held_out"]["colour"]
    assert scored["tokens"] == count and scored["loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("finished", ["qwen2_5_vl"], indirect=True)  # positions of two kinds; its head says more than one thing
def test_answers_of_mixed_rows_in_one_batch_are_those_one_by_one(finished):
    """Prompts are padded on the left; rows with no, one and two images stand in one batch."""
    recipe, model = load_recipe(finished.recipe), load_model(finished.base)
    for parameter in model.parameters():  # random weights, large enough to be told apart by what they say
        parameter.data *= 3.0 if parameter.dim() > 1 else 1.0
    written, generate = [], model.generate
    model.generate = lambda **asked: written.append(generate(**asked)[:, asked["input_ids"].shape[1]:]) or torch.cat(
        [asked["input_ids"], written[-1]], 1)
    rows = Rows.joined([load_unit(finished.run / "mixture" / unit["file"], "train").take(np.arange(2))
                        for unit in finished.json("mixture/mixture.json")["units"]])
    assert {len(images) for images in rows.images_of(range(len(rows)))} == {0, 1, 2}
    answers, tokenizer = recipe.evaluate.model_copy(update={"generate_samples": 20}), load_tokenizer(finished.base)
    scores = _answer(model, tokenizer, rows, np.arange(len(rows)), answers)
    together = written.pop().tolist()
    single = [_answer(model, tokenizer, rows, np.array([i]), answers) for i in range(len(rows))]
    assert [one for found in single for one in found] == scores and len(scores) == len(rows)
    alone = [one[0].tolist() for one in written]
    assert [row[: len(one)] for row, one in zip(together, alone, strict=True)] == alone and len(set(map(tuple, alone))) > 3


def test_the_report_shows_a_picture_of_every_unit_with_images(finished):
    source, text = (finished.run / "report.html").read_text(), (finished.run / "report.md").read_text()
    assert len(re.findall(r"<article>", source)) == 4 and len(re.findall(r'<img src="data:image/', source)) == 5
    marked = re.findall(r"<mark title=[^>]*>(.*?)</mark>", source, re.S)
    assert len(marked) == 4 and all(m.rstrip().endswith("&lt;|im_end|&gt;") for m in marked)
    assert not any(KNOWN[finished.family].placeholder in m for m in marked)
    assert "image tokens" in text and len(source) < 1_000_000


def test_the_same_again_trains_and_merges_nothing_anew(finished):
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns if p.suffix == ".safetensors" else 0)
              for part in ("mixture", "gradients", "branches", "merged", "evaluation")
              for p in (finished.run / part).rglob("*") if p.is_file() and not p.name.startswith(".")}
    run_stages(open_run(load_recipe(finished.recipe), tell=lambda text: None))
    for path, (data, changed) in before.items():
        assert path.read_bytes() == data and (not changed or path.stat().st_mtime_ns == changed), path


# ---- diagnostics and comparison ----------------------------------------------------------------------------------------


def test_diagnostics_of_a_run_with_images(finished, tmp_path):
    """Displacements are those of the files; along the line between branches the mixture's rows cost less than at the base."""
    settings = Settings(points=3, rows=16, grid=3, draws=1, steps=3, top=2, sigmas_isotropic=(0.05,), sigmas_filter=(0.3,),
                        sizes=(2, 4))
    kinds = ["displacement", "lmc"]
    done = run_diagnostics(subject_of_run(reopen_run(finished.run), settings), tmp_path, settings, only=kinds,
                           tell=lambda _: None)
    displacement, lmc = (d.found for d in done)
    assert isinstance(displacement, Displacement) and isinstance(lmc, LinearModeConnectivity)
    base, branch = tensors(finished.base), tensors(finished.run / "branches" / "0" / "model")
    moved = sum(float((branch[n].double() - base[n].double()).square().sum()) for n in base) ** 0.5
    assert {m.model: m.norm for m in displacement.models}["branch-0"] == pytest.approx(moved, rel=1e-4)
    held_out = finished.json("evaluation/base.json")["held_out"].values()
    at_base = sum(s["loss"] for s in held_out) / len(held_out)
    between = next(s for s in lmc.segments if (s.start, s.end, s.rows) == ("branch-0", "branch-1", "mixture"))
    assert all(0 < loss < at_base for loss in between.losses)


@pytest.mark.parametrize("finished", ["llava"], indirect=True)  # its names in files are not those in memory
def test_a_search_looks_at_the_images_of_a_run(finished, tmp_path):
    """Its models lie in folders that are gone once they are loaded; candidates go into the loaded model, not through files."""
    models = [{"model": str(finished.run / f"branches/{k}/model"), "parameters": {"weight": w}}
              for k, w in ((0, "$a"), (1, 0.5))]
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({
        "parameters": {"a": {"low": 0.0, "high": 1.0}},
        "data": {"mixture": str(finished.run), "units": ["colour", "words"]},
        "merge": {"merge_method": "task_arithmetic", "base_model": str(finished.base), "dtype": "float32", "models": models}}))
    search(tmp_path / "space.yaml", tmp_path / "best", overrides={"sampler": "random", "budget": 2})
    with prepare_search(tmp_path / "space.yaml").loaded(tmp_path) as first:
        assert first.direct
    assert (tmp_path / "best" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("finished", ["qwen2_5_vl"], indirect=True)  # one family is enough
def test_arms_are_compared_on_the_same_tokens(finished):
    """One more arm, joint training, on the run's own mixture: last, as it writes into the run's folder."""
    run = open_run(load_recipe(finished.recipe), tell=lambda text: None)
    with jobs_done_here():
        comparison = run_comparison(run, parse_arms("base,joint"), [0])
    tokens = {r.arm: r.tokens for r in comparison.runs}
    whole = sum(u["tokens"] for u in finished.json("mixture/mixture.json")["units"])
    assert tokens == {"base": 0, "joint": whole}
    assert {(s.arm, s.place) for s in comparison.summary} == {(a, p) for a in tokens for p in ("held_out", "transfer")}
    base, joint = tensors(finished.base), next((finished.run / "compare" / "joint").rglob("merged"), None)
    assert joint is not None
    assert all(raw(tensors(joint)[n]) == raw(base[n]) for n in frozen(finished, base))
