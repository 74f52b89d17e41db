"""`anabranch vocabulary`: a model with another tokenizer, from folder to folder."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from typer.testing import CliRunner

from anabranch.cli_vocabulary import vocabulary
from anabranch.errors import AnabranchError, CorruptedError, MixtureError, ModelError, OutputError, RecipeError
from anabranch.surgery.vocabulary import read_vocabulary
from anabranch.transplant import matching
from anabranch.transplant.matrix import METHODS, Settings, task_for
from anabranch.transplant.moving import (
    compare_methods,
    forecast_transplant,
    losses,
    opened,
    transplant_vocabulary,
    variants,
)
from anabranch.transplant.pieces import bare_tokenizer, whole_tokenizer
from anabranch.transplant.text_loss import read_texts, windows

WIDTH, DONOR_WIDTH = 16, 12
CORPUS = ["the red house stands on the green hill above the old town", "one river runs under the stone bridge and the mill",
          "she said: « où est le café ? », and he did not answer",
          "Tables (12, 34, 56) hold numbers; code holds x = y + 1\n"] * 20
OTHER = ["the old town hall and the market house on the hill", "rivers, bridges, stones, mills and houses — naïve café",
         "answers to the questions of the numbers 12 34", "tables hold; red green stands above under"] * 20
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def byte_level(sample, size, special=("<|pad|>", "<|eos|>")):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(sample, trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def sentencepiece(sample, size):
    """As Llama 2's: word marks, byte fallback, a word mark put in front of a text."""
    special = ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{b:02X}>" for b in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    tokenizer.train_from_iterator(sample, trainers.BpeTrainer(vocab_size=size, special_tokens=special + fallback,
                                                              show_progress=False))
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in special]
    return Tokenizer.from_str(json.dumps(content))


def write_tokenizer(folder, tokenizer, template=None, **roles):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **roles, **({"chat_template": template} if template else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_model(folder, tokenizer, *, tied, width=WIDTH, dtype=torch.float32, padding=0, shard="5GB", seed=0, template=None,
                kind="llama", **roles):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    ids = {f"{role.removesuffix('_token')}_token_id": tokenizer.token_to_id(token) for role, token in roles.items()}
    config = AutoConfig.for_model(
        kind, vocab_size=tokenizer.get_vocab_size() + padding, hidden_size=width, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=tied,
        **({"bos_token_id": None, "eos_token_id": None} | ids))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3 + (parameter.ndim == 1))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return write_tokenizer(folder, tokenizer, template, **roles)


PAD, EOS = {"pad_token": "<|pad|>", "eos_token": "<|eos|>"}, {"pad_token": "[PAD]", "eos_token": "[END]"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Models of both kinds of tokenizer, tied and untied; their special tokens have other texts and other places."""
    root = tmp_path_factory.mktemp("models")
    ours = byte_level(CORPUS, 360)
    theirs = byte_level(OTHER, 340, ("<|user|>", "[END]", "[PAD]"))
    write_model(root / "tied", ours, tied=True, template=TEMPLATE, **PAD)
    write_model(root / "untied", ours, tied=False, dtype=torch.bfloat16, shard="12KB", seed=1, **PAD)
    write_model(root / "donor-tied", theirs, tied=True, width=DONOR_WIDTH, seed=2, template="donor: " + TEMPLATE, **EOS)
    write_model(root / "donor-untied", theirs, tied=False, width=DONOR_WIDTH, padding=9, seed=3, dtype=torch.float16, **EOS)
    write_model(root / "spm", sentencepiece(OTHER, 420), tied=False, width=DONOR_WIDTH, seed=4, bos_token="<s>",
                eos_token="</s>", unk_token="<unk>")
    write_tokenizer(root / "alone", theirs, **EOS)
    return root


def tensors(folder):
    found = {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    return found["model.embed_tokens.weight"], found.get("lm_head.weight"), found


def ids_of(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def slow_omp(v, x, y, k):
    chosen, residual = [], v
    for _ in range(k):
        scores = np.abs(x @ residual)
        scores[chosen] = -1
        chosen.append(int(scores.argmax()))
        weights = np.linalg.lstsq(x[chosen].T, v, rcond=None)[0]
        residual = v - weights @ x[chosen]
    return weights @ y[chosen]


SAME = {"[END]": "<|eos|>", "[PAD]": "<|pad|>"}  # by role


@pytest.mark.parametrize("donor", ["donor-tied", "donor-untied"])
@pytest.mark.parametrize("model", ["tied", "untied"])
def test_shared_rows_are_copied_and_others_pursued(made, tmp_path, model, donor):
    """C77, with every mixture of tied and untied heads; float32, and bfloat16 in shards."""
    manifest, _ = transplant_vocabulary(str(made / model), str(made / donor), tmp_path / "out", Settings(method="omp", k=8))
    old, new = ids_of(made / model), ids_of(made / donor)
    (embedding, head, before), (d_embedding, d_head, _) = tensors(made / model), tensors(made / donor)
    out_embedding, out_head, after = tensors(tmp_path / "out")
    shared = {i: old[SAME.get(t, t)] for t, i in sorted(new.items(), key=lambda p: p[1]) if SAME.get(t, t) in old}
    assert 260 < len(shared) < len(new) - 20
    assert (out_head is None) == (head is None)
    for matrix, source, result in ((embedding, d_embedding, out_embedding),
                                   *([(head, d_embedding if d_head is None else d_head, out_head)] if out_head is not None
                                     else [])):
        assert result.shape == (len(source), WIDTH)
        assert result.dtype == matrix.dtype
        rows, places = torch.tensor(list(shared.values())), torch.tensor(list(shared))
        assert torch.equal(result[places], matrix[rows])
        x, y = source[places].float().numpy().astype(np.float64), matrix[rows].float().numpy().astype(np.float64)
        for i in sorted(set(new.values()) - set(shared)):
            wanted = torch.tensor(slow_omp(source[i].float().numpy().astype(np.float64), x, y, 8))
            tolerance = 1e-2 if matrix.dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(result[i].double(), wanted, rtol=tolerance, atol=tolerance)
        assert not result[len(new):].any()  # the donor's padding
    others = before.keys() - {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(torch.equal(before[name], after[name]) for name in others)
    counts = manifest.report["embed"]
    assert (counts["exact"], counts["anchors"]) == (len(shared), len(shared))
    assert counts["approximated"] == len(new) - len(shared)


@pytest.mark.parametrize(("model", "donor"), [("tied", "donor-untied"), ("untied", "donor-tied"), ("spm", "donor-tied"),
                                              ("tied", "spm")])
def test_the_result_loads_and_round_trips_text(made, tmp_path, model, donor):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    transplant_vocabulary(str(made / model), str(made / donor), out, Settings(method="omp", k=8))
    tokenizer = AutoTokenizer.from_pretrained(out)
    reference = AutoTokenizer.from_pretrained(made / donor)
    for text in ("the old café — naïve 12", "où est-ce? \n\tx = y"):
        ids = tokenizer(text)["input_ids"]
        assert ids == reference(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.strip()
    loaded, information = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(information[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tied = model == "tied"
    assert loaded.config.tie_word_embeddings == tied
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert loaded.config.vocab_size == len(loaded.get_input_embeddings().weight)
    logits = loaded(torch.tensor([ids])).logits
    assert logits.shape[-1] == loaded.config.vocab_size
    assert torch.isfinite(logits).all()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (made / donor / name).read_bytes()


def test_a_folder_whose_tokenizer_transformers_loads_as_another_is_told(made, tmp_path):
    """transformers 5 takes the tokenizer of any qwen2 for Qwen's, whatever the folder says."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    model = write_model(tmp_path / "qwen", byte_level(CORPUS, 360), tied=True, kind="qwen2", **PAD)
    told = []
    transplant_vocabulary(str(model), str(made / "spm"), tmp_path / "out", Settings(method="omp", k=4), warn=told.append)
    text = "the old café — naïve 12"
    ids = AutoTokenizer.from_pretrained(made / "spm")(text)["input_ids"]
    otherwise = AutoTokenizer.from_pretrained(tmp_path / "out")(text)["input_ids"] != ids
    assert otherwise == any("AutoTokenizer loads it as Qwen2Tokenizer" in line for line in told)
    remedy = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert remedy(text)["input_ids"] == ids
    assert remedy.decode(ids) == text
    told.clear()
    transplant_vocabulary(str(made / "tied"), str(made / "spm"), tmp_path / "llama",
                          Settings(method="omp", k=4), warn=told.append)
    assert not any("AutoTokenizer" in line for line in told)


def test_special_tokens_of_both_configs_are_the_donors(made, tmp_path):
    model = shutil.copytree(made / "tied", tmp_path / "model")
    old, new = ids_of(model), ids_of(made / "donor-tied")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"image_token_id": old["Ġthe"], "unk_token_id": 3}))
    (model / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": [old["<|eos|>"], old["Ġthe"]], "pad_token_id": old["<|pad|>"], "temperature": 0.7,
         "suppress_tokens": [old["Ġthe"]]}))
    out = tmp_path / "out"
    transplant_vocabulary(str(model), str(made / "donor-tied"), out, Settings(method="omp", k=4))
    written = json.loads((out / "config.json").read_text())
    assert (written["eos_token_id"], written["pad_token_id"], written["bos_token_id"]) == (new["[END]"], new["[PAD]"], None)
    assert written["image_token_id"] == new["Ġthe"]
    assert written["unk_token_id"] is None  # the donor has none
    assert written["vocab_size"] == len(new)
    generation = json.loads((out / "generation_config.json").read_text())
    donors = json.loads((made / "donor-tied" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == donors.get("eos_token_id", new["[END]"])
    assert (generation["pad_token_id"], generation["temperature"], generation["suppress_tokens"]) == (
        new["[PAD]"], 0.7, [new["Ġthe"]])


def test_what_config_json_lacks_or_says_wrongly_is_mended(made, tmp_path):
    """A head that is there and differs is used, whatever the config says of ties; special ids that no key had are the donor's;
    what turns images into inputs stays the model's."""
    model, donor = (shutil.copytree(made / name, tmp_path / name) for name in ("untied", "donor-untied"))
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": True}
    for key in ("pad_token_id", "eos_token_id"):
        config.pop(key, None)
    (model / "config.json").write_text(json.dumps(config))
    for folder, name in ((donor, "preprocessor_config.json"), (model, "processor_config.json")):
        (folder / name).write_text("{}")
    told = []
    transplant_vocabulary(str(model), str(donor), tmp_path / "out", Settings(method="omp", k=4), warn=told.append)
    made_config = json.loads((tmp_path / "out" / "config.json").read_text())
    ids = ids_of(donor)
    assert (made_config["tie_word_embeddings"], made_config["pad_token_id"], made_config["eos_token_id"]) == (
        False, ids["[PAD]"], ids["[END]"])
    assert len(tensors(tmp_path / "out")[1]) == made_config["vocab_size"] and any("taken as untied" in line for line in told)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "processor_config.json" in names and "preprocessor_config.json" not in names


def test_zeroed_tokens_are_no_anchors():
    matches = matching.Matches(np.array([matching.EXACT, matching.EXACT, matching.APPROXIMATED], dtype=np.uint8),
                               np.array([4, 5, -1]))
    task = task_for(matches, np.array([True, False, False]), 3, "omp", False)
    assert task.anchors.tolist() == [1] and task.wanted.tolist() == [2]


def test_chat_template_comes_from_the_donor(made, tmp_path):
    from transformers import AutoTokenizer

    transplant_vocabulary(str(made / "tied"), str(made / "donor-tied"), tmp_path / "out", Settings(method="omp", k=4))
    chat = [{"role": "user", "content": "hill"}]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(chat, tokenize=False) == "donor: hill"
    told = []
    transplant_vocabulary(str(made / "tied"), str(made / "donor-untied"), tmp_path / "none",
                          Settings(method="omp", k=4), warn=told.append)
    assert any("chat template" in line for line in told)
    assert AutoTokenizer.from_pretrained(tmp_path / "none").chat_template is None


# ------------------------------------------------------------------------------------------------------------------- matching


def keys(made, name):
    return matching.keys_of(read_vocabulary(made / name, name))


@pytest.mark.parametrize(("model", "donor"), [("tied", "spm"), ("spm", "tied")])
def test_word_marks_and_letters_match_between_kinds_of_tokenizer(made, model, donor):
    ours, theirs = keys(made, model), keys(made, donor)
    old, new = ids_of(made / model), ids_of(made / donor)
    assert {ours.spelling, theirs.spelling} == {"byte-level", "sentencepiece"}
    matches = matching.match(ours, theirs, matching.usable_keys(ours, len(old)), len(new))
    spell = {"tied": {"the": "Ġthe", "é": "Ã©", "hous": "hous"}, "spm": {"the": "▁the", "é": "é", "hous": "hous"}}
    for word in ("the", "é"):
        there, here = spell[donor][word], spell[model][word]
        if there in new and here in old:
            assert matches.row[new[there]] == old[here], word
    assert spell[donor]["the"] in new
    assert spell[model]["the"] in old
    eos = {"tied": "<|eos|>", "spm": "</s>"}
    assert matches.row[new[eos[donor]]] == old[eos[model]]
    assert matches.kind[new[eos[donor]]] == matching.EXACT


def test_a_byte_is_not_the_letter_that_writes_it(made):
    """Byte-level 'é' is the byte 0xE9; sentencepiece 'é' is a letter of two bytes. The peer takes them for one."""
    ours, theirs = keys(made, "spm"), keys(made, "tied")
    old, new = ids_of(made / "spm"), ids_of(made / "tied")
    usable = matching.usable_keys(ours, len(old))
    assert "é" in old
    for byte in (False, True):
        matches = matching.match(ours, theirs, usable, len(new), byte=byte)
        assert matches.row[new["é"]] == (old["<0xE9>"] if byte else -1)
        assert matches.row[new["Ċ"]] == (old["<0x0A>"] if byte else -1)
        assert matches.kind[new["Ċ"]] == (matching.BYTE if byte else matching.APPROXIMATED)
        assert matches.row[new["h"]] == old["h"]  # text, not a byte token


def test_an_added_token_is_the_text_that_it_says(made, tmp_path):
    """Added tokens are written in plain letters, also in a byte-level tokenizer, whose 'é' is a byte."""
    tokenizer = Tokenizer.from_file(str(made / "tied" / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("née", normalized=False)])
    of = matching.keys_of(read_vocabulary(write_tokenizer(tmp_path / "added", tokenizer, **PAD), "here"))
    assert of.text(tokenizer.token_to_id("née")) == "née".encode()


def test_a_token_without_a_row_is_no_match(made, tmp_path):
    """An added token that the model's matrices were never enlarged for; here and in the pieces of others."""
    model = shutil.copytree(made / "untied", tmp_path / "model")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<|user|>", special=True)])
    tokenizer.save(str(model / "tokenizer.json"))
    for method in ("omp", "subword", "composed"):
        transplant_vocabulary(str(model), str(made / "donor-tied"), tmp_path / method, Settings(method=method, k=4))
        assert tensors(tmp_path / method)[0].isfinite().all()


def test_a_bare_tokenizer_puts_nothing_in_front(made):
    """Llama 2's puts a word mark before every text: a piece from within a word would become one from its beginning."""
    vocabulary = read_vocabulary(made / "spm", "here")
    assert whole_tokenizer(vocabulary).encode("ouse").tokens[0].startswith("\u2581")
    assert "".join(bare_tokenizer(vocabulary).encode("ouse", add_special_tokens=False).tokens) == "ouse"


def toy(*texts, **extra):
    return matching.Keys({i: extra.get(f"t{i}", (("text", t.encode()),)) for i, t in enumerate(texts)}, "byte-level")


def test_prefixes():
    model = toy(" h", "h", " ", "ho", "caf", "caf\u00e9s", "ab")
    donor = toy(" house", "  x", "house", "h", "caf\u00e9", "zz", "abc", t6=(("special", "eos"), ("text", b"abc")))
    usable = matching.usable_keys(model, 7)
    matches = matching.match(model, donor, usable, 8, prefix=True)
    # white space alone is no prefix; a special token has none; a prefix of one letter will do
    assert matches.row.tolist() == [0, -1, 3, 1, 4, -1, -1, -1]
    names = ["PREFIX", "APPROXIMATED", "PREFIX", "EXACT", "PREFIX", "APPROXIMATED", "APPROXIMATED", "NOTHING"]
    assert matches.kind.tolist() == [getattr(matching, name) for name in names]
    assert matching.match(model, donor, usable, 8).row.tolist() == [-1, -1, -1, 1, -1, -1, -1, -1]


def test_roles_match_before_texts_and_the_last_of_several_counts():
    model = matching.Keys({0: (("special", "bos"), ("text", b"<s>")),
                           1: (("special", "eos"), ("special", "pad"), ("text", b"<e>")), 2: (("text", b"x"),),
                           3: (("text", b"x"),)}, "byte-level")
    donor = matching.Keys({0: (("special", "eos"), ("text", b"<s>")), 1: (("special", "pad"), ("text", b"[P]")),
                           2: (("special", "unk"), ("text", b"<e>")), 3: (("text", b"x"),)}, "byte-level")
    assert matching.match(model, donor, matching.usable_keys(model, 4), 4).row.tolist() == [1, 1, 1, 3]


@pytest.mark.parametrize("flag", ["prefix_match", "byte_match"])
@pytest.mark.parametrize(("where", "matched"), [("no", ()), ("embed", ("embed",)), ("lm_head", ("lm_head",)),
                                                ("yes", ("embed", "lm_head"))])
def test_embed_and_lm_head_are_not_swapped(made, flag, where, matched):
    """The peer applies each of the two to the other matrix."""
    plan = opened(str(made / "untied"), str(made / "spm"), Settings(method="omp", k=4, **{flag: where}))
    kind = matching.PREFIX if flag == "prefix_match" else matching.BYTE
    assert {name for name, task in plan.tasks.items() if len(task.matches.of(kind))} == set(matched)
    counted = "prefix" if flag == "prefix_match" else "byte"
    assert {name for name in plan.tasks if plan.report[name][counted]} == set(matched)


def test_greedy_pieces():
    usable = {("text", b"ab"): 1, ("text", b"abc"): 2, ("text", b"c"): 3, ("byte", 100): 4}
    assert matching.greedy_pieces(b"abcd", usable) == [2, 4]
    assert matching.greedy_pieces(b"abcd", usable, without=2) == [1, 3, 4]
    assert matching.greedy_pieces(b"zab", usable) == [1]


# ------------------------------------------------------------------------------------------------------------- other rows


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_writes_finite_rows_and_the_same_bytes_twice(made, tmp_path, method):
    settings = Settings(method=method, k=6, batch_size=7)
    for out in ("one", "two"):
        manifest, _ = transplant_vocabulary(str(made / "untied"), str(made / "donor-untied"), tmp_path / out, settings,
                                            threads=2)
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()} == {p.name: p.read_bytes()
                                                                            for p in (tmp_path / "two").iterdir()}
    embedding, _, _ = tensors(tmp_path / "one")
    assert torch.isfinite(embedding).all()
    made_rows = [i for t, i in ids_of(made / "donor-untied").items() if SAME.get(t, t) not in ids_of(made / "untied")]
    assert embedding[made_rows].any() == (method != "zero")
    assert manifest.report["lm_head"]["approximated"] == len(made_rows)


def test_subword_pools_the_models_own_pieces(made, tmp_path):
    transplant_vocabulary(str(made / "untied"), str(made / "donor-tied"), tmp_path / "out",
                          Settings(method="subword", subword_method="weighted_mean"))
    tokenizer = Tokenizer.from_file(str(made / "untied" / "tokenizer.json"))
    embedding, head, _ = tensors(made / "untied")
    out_embedding, out_head, _ = tensors(tmp_path / "out")
    new, old = ids_of(made / "donor-tied"), ids_of(made / "untied")
    several = 0
    for token, i in new.items():
        if SAME.get(token, token) in old or token == "<|user|>":
            continue
        text = decoders.ByteLevel().decode([token])
        if "\ufffd" in text:  # a part of a letter
            continue
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        several += len(ids) > 2
        up = torch.arange(1, len(ids) + 1, dtype=torch.float64)
        for matrix, result, weights in ((embedding, out_embedding, up), (head, out_head, up.flip(0))):
            wanted = (matrix[ids].double() * weights[:, None]).sum(0) / weights.sum()
            torch.testing.assert_close(result[i].double(), wanted, rtol=1e-2, atol=1e-2)
    assert several > 5


def test_noise_and_scale_change_made_rows_only(made):
    plain, changed = (opened(str(made / "tied"), str(made / "donor-tied"), Settings(method="omp", k=4, **extra))
                      for extra in ({}, {"noise": 0.5, "scale": 3.0}))
    from anabranch.transplant.moving import matrix_of

    one, two = matrix_of(plain, "embed"), matrix_of(changed, "embed")
    wanted = plain.tasks["embed"].wanted
    kept = np.setdiff1d(np.arange(len(one)), wanted)
    assert torch.equal(one[kept], two[kept])
    drawn = (two[wanted] / 3 - one[wanted]) / 0.5
    assert 0.9 < float(drawn.std()) < 1.1
    assert abs(float(drawn.mean())) < 0.1


def test_badly_trained_tokens_are_no_matches_and_are_zeroed(made, tmp_path):
    """The model's `Ġthe` and one of the donor's look like rows that nothing was trained on."""
    from safetensors.torch import save_file

    from anabranch.transplant.moving import matrix_of

    old, new = ids_of(made / "tied"), ids_of(made / "donor-tied")
    ours, theirs = byte_level(CORPUS, 360), byte_level(OTHER, 340, ("<|user|>", "[END]", "[PAD]"))
    junk = next(t for t in new if t.startswith("Ġ") and len(t) > 2 and t != "Ġthe")
    folders = {}
    for name, tokenizer, token, roles in (("model", ours, "Ġthe", PAD), ("donor", theirs, junk, EOS)):
        folder = folders[name] = write_model(tmp_path / name, tokenizer, tied=True, padding=6, **roles)
        state = load_file(folder / "model.safetensors")
        weight = state["model.embed_tokens.weight"]
        weight[-6:] = weight[-1] + 0.01
        weight[tokenizer.token_to_id(token)] = weight[-1]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for magikarp in (False, True):
        plan = opened(str(folders["model"]), str(folders["donor"]), Settings(method="omp", k=4, magikarp=magikarp))
        row, matrix = plan.tasks["embed"].matches.row, matrix_of(plan, "embed")
        assert row[new["Ġthe"]] == (-1 if magikarp else old["Ġthe"])
        assert bool(matrix[new[junk]].any()) == (not magikarp)
        assert bool(plan.report["embed"]["zeroed_badly_trained"]) == magikarp
        assert new[junk] not in plan.tasks["embed"].anchors or not magikarp
        assert plan.report.get("model_badly_trained", 0) >= (7 if magikarp else 0)


def test_a_tokenizer_alone_will_do_where_no_donor_rows_are_needed(made, tmp_path):
    for method in ("subword", "composed", "mean", "john_hewitt"):
        transplant_vocabulary(str(made / "tied"), str(made / "alone"), tmp_path / method, Settings(method=method))
        assert len(tensors(tmp_path / method)[0]) == len(ids_of(made / "alone"))
    with pytest.raises(ModelError, match=r"no weights there.*subword"):
        transplant_vocabulary(str(made / "tied"), str(made / "alone"), tmp_path / "no", Settings(method="omp"))
    assert not (tmp_path / "no").exists()


def test_donor_tokens_without_a_donor_row(made, tmp_path):
    donor = shutil.copytree(made / "donor-tied", tmp_path / "donor")
    tokenizer = Tokenizer.from_file(str(donor / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|new|>", special=True)])
    tokenizer.save(str(donor / "tokenizer.json"))
    told = []
    transplant_vocabulary(str(made / "tied"), str(donor), tmp_path / "out", Settings(method="omp", k=4), warn=told.append)
    embedding, _, _ = tensors(tmp_path / "out")
    assert len(embedding) == tokenizer.get_vocab_size()
    assert not embedding[-1].any()
    assert any("1 tokens of the donor's tokenizer have no row" in line for line in told)


def test_a_heads_bias_is_carried(made, tmp_path):
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(made / "untied" / "tokenizer.json"))
    model = write_model(tmp_path / "phi", tokenizer, tied=False, kind="phi", **PAD)
    transplant_vocabulary(str(model), str(made / "donor-tied"), tmp_path / "out", Settings(method="omp", k=4))
    before, after = (tensors(folder)[2]["lm_head.bias"] for folder in (model, tmp_path / "out"))
    old, new = ids_of(model), ids_of(made / "donor-tied")
    shared = {i: old[SAME.get(t, t)] for t, i in new.items() if SAME.get(t, t) in old}
    assert torch.equal(after[list(shared)], before[list(shared.values())])
    others = sorted(set(new.values()) - set(shared))
    torch.testing.assert_close(after[others], before[list(shared.values())].mean().expand(len(others)))
    _, information = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not information["mismatched_keys"]
    texts = OTHER[:4]
    assert losses(str(model), str(made / "donor-tied"), texts, Settings(method="omp", k=4))[1].nats_per_byte == pytest.approx(
        slow_loss(tmp_path / "out", texts), rel=1e-5)


def test_a_head_padded_as_the_embedding_is_found(made, tmp_path):
    """config.json may say fewer tokens than both matrices have rows."""
    model = shutil.copytree(made / "untied", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 3}))
    plan = opened(str(model), str(made / "donor-tied"), Settings(method="omp", k=4))
    assert plan.matrix_names() == {"embed": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}


def resized(model, out, **rows):
    """A copy whose embedding or head has other rows than config.json says."""
    shutil.copytree(model, out)
    for path in out.glob("*.safetensors"):
        found = load_file(path)
        for name, count in rows.items():
            for full in [n for n in found if n.split(".")[-2] == name]:
                matrix = found[full]
                found[full] = torch.cat([matrix, matrix[: max(count - len(matrix), 0)]])[:count].contiguous()
        save_file(found, path, metadata={"format": "pt"})
    return out


def test_rows_of_head_and_embedding_that_differ(made, tmp_path):
    """A padded embedding is no trouble; a head whose rows cannot be told is refused, not copied as it stands."""
    padded = resized(made / "untied", tmp_path / "padded", embed_tokens=368)
    for magikarp in (False, True):
        settings = Settings(method="omp", k=4, magikarp=magikarp)
        assert opened(str(padded), str(made / "donor-tied"), settings).matrix_names()["lm_head"] == "lm_head.weight"
        opened(str(made / "tied"), str(padded), settings)
    for rows in (350, 368):
        odd = resized(made / "untied", tmp_path / f"odd-{rows}", lm_head=rows)
        for pair in ((odd, made / "donor-tied"), (made / "tied", odd)):
            with pytest.raises(ModelError, match=f"lm_head.weight has {rows} rows"):
                opened(*map(str, pair), Settings(method="omp", k=4))


@pytest.mark.parametrize("method", ["omp", "stb", "focus", "ridge", "common_interpolation"])
def test_numbers_that_are_none_are_refused_by_whose_they_are(made, tmp_path, method):
    broken = shutil.copytree(made / "donor-tied", tmp_path / "broken")
    found = load_file(broken / "model.safetensors")
    found["model.embed_tokens.weight"][100] = float("nan")
    save_file(found, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptedError, match="the donor's embedding holds NaN"):
        transplant_vocabulary(str(made / "tied"), str(broken), tmp_path / "out", Settings(method=method, k=4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]


def test_changed_configs_and_a_models_own_code(made, tmp_path):
    """Config files of both decide the result too; a model's code comes along, and is not run."""
    model, donor = (shutil.copytree(made / name, tmp_path / name) for name in ("untied", "donor-untied"))
    (model / "modeling_own.py").write_text("raise SystemExit\n")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}))
    settings = Settings(method="omp", k=4)
    transplant_vocabulary(str(model), str(donor), tmp_path / "out", settings)
    assert (tmp_path / "out" / "modeling_own.py").read_text() == "raise SystemExit\n"
    transplant_vocabulary(str(model), str(donor), tmp_path / "out", settings)
    config = json.loads((donor / "config.json").read_text())
    (donor / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    with pytest.raises(OutputError, match=r"(?s)of other inputs.*config.json"):
        transplant_vocabulary(str(model), str(donor), tmp_path / "out", settings)


def test_there_and_back_is_the_same_model_where_both_have_the_same_tokens(made, tmp_path):
    """Only the numbers of the tokens differ: a permutation, and its inverse."""
    content = json.loads((made / "tied" / "tokenizer.json").read_text())
    size = len(content["model"]["vocab"])
    content["model"]["vocab"] = {t: size - 1 - i for t, i in content["model"]["vocab"].items()}
    content["added_tokens"] = [t | {"id": size - 1 - t["id"]} for t in content["added_tokens"]]
    other = write_tokenizer(tmp_path / "other", Tokenizer.from_str(json.dumps(content)), **PAD)
    transplant_vocabulary(str(made / "tied"), str(other), tmp_path / "there", Settings(method="mean"))
    transplant_vocabulary(str(tmp_path / "there"), str(made / "tied"), tmp_path / "back", Settings(method="mean"))
    there, back, before = (tensors(folder)[2] for folder in (tmp_path / "there", tmp_path / "back", made / "tied"))
    assert torch.equal(there["model.embed_tokens.weight"], before["model.embed_tokens.weight"].flip(0))
    assert all(torch.equal(back[name], before[name]) for name in before)


# ----------------------------------------------------------------------------------------------------------------------- loss


def slow_loss(folder, texts):
    """Each window token by token, by transformers."""
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total = size = 0
    for window in windows(texts, 128, 10**9):
        given, scored = (tokenizer.encode(t, add_special_tokens=False).ids for t in (window.given, window.scored))
        with torch.no_grad():
            logits = model(torch.tensor([given + scored])).logits[0].double()
        for place, token in enumerate(scored, len(given)):
            total -= float(torch.log_softmax(logits[place - 1], -1)[token])
        size += len(window.scored.encode())
    return total / size


@pytest.mark.parametrize(("model", "donor"), [("tied", "donor-untied"), ("untied", "donor-tied")])
def test_loss_in_memory_is_that_of_the_model_as_written(made, tmp_path, model, donor):
    texts = [*OTHER[:4], " ".join(CORPUS[:6])]
    settings = Settings(method="omp", k=6)
    before, after = losses(str(made / model), str(made / donor), texts, settings)
    transplant_vocabulary(str(made / model), str(made / donor), tmp_path / "out", settings)
    assert before.nats_per_byte == pytest.approx(slow_loss(made / model, texts), rel=1e-5)
    assert after.nats_per_byte == pytest.approx(slow_loss(tmp_path / "out", texts), rel=1e-5)
    assert before.bytes == after.bytes == sum(len(w.scored.encode()) for w in windows(texts, 128, 10**9))
    assert before.tokens != after.tokens
    assert before.changed == after.changed == 0


def test_the_same_tokenizer_costs_nothing(made):
    before, after = losses(str(made / "tied"), str(made / "tied"), OTHER[:4], Settings())
    assert before == after


def test_windows_cover_the_text_between_words():
    text = "one two  three four\nfive " + "six " * 30
    found = windows([text, "alone", "Q" * 500 + " y z"], 24, 10**6)
    assert "".join(w.given + w.scored for w in found).startswith(text[:100])
    for w in found:
        assert len((w.given + w.scored).encode()) <= 24
        assert w.scored.startswith(" ")
        assert " " not in w.given.strip()
    assert [w for w in found if "Q" in w.given] == []
    assert len(windows([text], 24, 40)) < len(windows([text], 24, 10**6))


def test_compare_ranks_every_method_and_writes_nothing(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, ranked = compare_methods(str(made / "tied"), str(made / "donor-tied"), OTHER[:4], Settings(method="omp", k=6))
    assert {one.name for one in ranked} == {name for name, _ in variants(Settings())}
    assert {name.split()[0] for name, _ in variants(Settings())} == set(METHODS)
    values = [one.loss.nats_per_byte for one in ranked]
    assert values == sorted(values)
    alone = losses(str(made / "tied"), str(made / "donor-tied"), OTHER[:4], Settings(method="omp", k=6))
    assert next(one.loss for one in ranked if one.name == "omp") == alone[1]  # whatever was tried before it
    assert before == alone[0]
    assert not list(tmp_path.iterdir())
    _, ranked = compare_methods(str(made / "tied"), str(made / "donor-tied"), OTHER[:4], Settings(method="omp", k=10**4))
    assert {one.name for one in ranked if one.loss is None} >= {"omp", "stb", "common_interpolation cosine"}
    assert "is more than the" in ranked[-1].skipped


def test_texts(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    (tmp_path / "a.txt").write_text("plain words")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    parquet.write_table(pa.table({"prompt": ["p"], "completion": ["c"], "n": [1]}), tmp_path / "c.parquet")
    assert read_texts(tmp_path / "a.txt") == ["plain words"]
    assert read_texts(tmp_path / "b.jsonl") == ["one", "two"]
    assert read_texts(tmp_path / "c.parquet") == ["p c"]
    assert read_texts(tmp_path / "c.parquet", "completion") == ["c"]
    (tmp_path / "d.jsonl").write_text("[1]\n")
    (tmp_path / "e.jsonl").write_text("{")
    (tmp_path / "f.txt").write_text("  \n")
    for name, column, words in (("c.parquet", "tex", "no column `tex`"), ("d.jsonl", None, "one object per line"),
                                ("e.jsonl", None, "cannot be read"), ("f.txt", None, "holds no text"),
                                ("none.txt", None, "cannot be read"), ("g.csv", None, "wanted a .txt")):
        with pytest.raises(MixtureError, match=words):
            read_texts(tmp_path / name, column)


# -------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("settings", "words"), [
    ({"method": "mp_rope"}, "no position.*Use omp"), ({"method": "om"}, "there is no `om`. Did you mean `omp`"),
    ({"k": 0}, "-k: got 0"),
    ({"k": 5000, "method": "omp"}, "-k 5000 is more than the 2.. tokens that the two share"),
    ({"k": 5000, "method": "common_interpolation"}, "-k 5000 is more"), ({"k": 5000, "method": "stb"}, "-k 5000 is more"),
    ({"weight_scheme": "bary", "scale": float("nan")}, r"(?s)--weight-scheme: got 'bary'.*--new-vocab-scale"),
    ({"byte_match": "head", "prefix_match": "all"}, r"(?s)--prefix-match.*--byte-match"),
    ({"noise": -1.0}, "--new-vocab-noise")])
def test_settings_that_cannot_be(made, tmp_path, settings, words):
    with pytest.raises(RecipeError, match=words):
        transplant_vocabulary(str(made / "tied"), str(made / "donor-tied"), tmp_path / "out", Settings(**settings))
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be(made, tmp_path):
    for model, words in ((str(tmp_path / "none" / "x" / "y"), "no such folder"),
                         (f"{made / 'tied'}+{made / 'tied'}", "lora apply")):
        with pytest.raises(AnabranchError, match=words):
            opened(model, str(made / "donor-tied"), Settings(method="omp", k=4))
    packed = shutil.copytree(made / "tied", tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ModelError, match="gptq 4-bit"):
        opened(str(packed), str(made / "donor-tied"), Settings(method="omp", k=4))
    bare = shutil.copytree(made / "tied", tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        opened(str(made / "tied"), str(bare), Settings(method="omp", k=4))


def test_few_shared_tokens_are_told(made, tmp_path):
    words = ["<unk>", *(f"w{n}" for n in range(40)), "h"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    told = []
    donor = write_tokenizer(tmp_path / "words", tokenizer, unk_token="<unk>")
    transplant_vocabulary(str(made / "tied"), str(donor), tmp_path / "out", Settings(method="subword"), warn=told.append)
    assert any("only 0 of the donor's 42 tokens" in line for line in told)
    assert any("matched as they are spelled" in line for line in told)
    assert tensors(tmp_path / "out")[0].any(1).all()


# --------------------------------------------------------------------------------------------------------------------- command


def run(*arguments):
    app = typer.Typer()
    app.command()(vocabulary)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_command(made, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(OTHER[:8]))
    paths = made / "tied", made / "donor-tied", tmp_path / "out"
    options = ["-k", 6, "-a", "omp", "-pm", "lm_head", "-bm", "yes", "-nvn", 0.1, "-nvs", 0.9, "-w", "barycentric", "-s", "sum",
               "--batch-size", -1, "--magikarp", "-c"]
    forecast = run(*paths, *options, "--dry-run")
    assert "the model's own row" in forecast.output
    assert "tensors:" in forecast.output
    assert not paths[2].exists()
    result = run(*paths, *options, "--text", text)
    assert result.exit_code == 0, result.output
    assert "nats/byte before" in result.output
    again = run(*paths, *options, "--json")
    done = [json.loads(line) for line in again.output.splitlines() if line.startswith("{")][-1]
    assert (done["event"], done["report"]["rows"]) == ("done", len(ids_of(made / "donor-tied")))
    ranked = run(*paths[:2], "--method", "all", "-k", 6, "--text", text, "--json")
    done = [json.loads(line) for line in ranked.output.splitlines() if line.startswith("{")][-1]
    assert len(done["methods"]) == len(list(variants(Settings())))
    assert done["methods"][0]["loss"]["nats_per_byte"] <= done["methods"][1]["loss"]["nats_per_byte"]


@pytest.mark.parametrize(("arguments", "words"), [
    ((), "OUT is missing"), (("out", "--compare"), r"(?s)--text.*writes no model"), (("--compare", "--dry-run"), "--dry-run"),
    (("out", "-a", "mp_rope"), "Use omp"), (("out", "--text", "none.txt"), "cannot be read"),
    (("out", "--text", "none.txt", "--dry-run"), "cannot be read"), (("out", "--column", "text"), "give that with --text")])
def test_command_refuses(made, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    result = run(made / "tied", made / "donor-tied", *arguments)
    assert isinstance(result.exception, AnabranchError)
    with pytest.raises(AnabranchError, match=words):
        raise result.exception
    assert not list(tmp_path.iterdir())


def test_forecast_names_what_is_in_the_way(made, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("x")
    lines = forecast_transplant(str(made / "tied"), str(made / "donor-tied"), tmp_path / "out", Settings(method="omp", k=4))
    assert any("holds a result already" in line for line in lines)
