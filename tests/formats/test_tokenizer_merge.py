"""Merged tokenizers, the rows of their embeddings, chat templates, and the files that carry them."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from anabranch.errors import CorruptedError, ModelError, PlanError, RecipeError
from anabranch.surgery.chat_templates import BUNDLED, choose_chat_template, missing_tokens, template_warnings
from anabranch.surgery.embedding_rows import CHUNK, MEAN, PADDING, ZERO, Chosen, row_maps
from anabranch.surgery.tokenizer import (
    TokenizerPlan,
    TokenizerRequest,
    TokenRow,
    TokenRule,
    ZeroRow,
    carry_tokenizer,
    padding_row,
    plan_tokenizer,
    rows,
    tokenizer_differences,
)
from anabranch.surgery.vocabulary import read_vocabulary

GOLDEN = Path(__file__).parents[2].parent / "shared" / "data" / "merge_golden"
golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the reference merges (shared/data/merge_golden) are not here")
SENTENCES = ["the quick brown fox jumps over the lazy dog", "merging models is like mixing rivers", "rows of an embedding",
             "a token has a row and a row has a token", "naïve café, 123 + 456 = 579", "print('hello world')"]
MORE = ["def function(argument): return argument", "for index in range(length): total += values[index]",
        "import numpy as np", "class Tokenizer: pass", "while True: break", "lambda x: x ** 2"]


# ---- folders ---------------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, value: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), encoding="utf-8")


def model_folder(folder: Path, tokenizer: Tokenizer, settings: dict[str, Any] | None = None,
                 config: dict[str, Any] | None = None) -> Path:
    write(folder, "tokenizer.json", tokenizer.to_str())
    write(folder, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **(settings or {})})
    write(folder, "config.json", {"model_type": "llama", **(config or {})})
    return folder


def words(folder: Path, tokens: Sequence[str], special: Sequence[str] = (), **more: Any) -> Path:
    """A tokenizer of whole words: the vocabulary, then further special tokens."""
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    return model_folder(folder, tokenizer, **more)


def bpe(texts: Sequence[str], size: int, special: Sequence[str] = ("<s>", "</s>")) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False, initial_alphabet=alphabet))
    bos = special[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return tokenizer


def sentencepiece_bpe(texts: Sequence[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False))
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # the byte pieces are pieces, no added tokens
    return Tokenizer.from_str(json.dumps(content))


def unigram(texts: Sequence[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(texts, trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>", "<pad>", "</s>"], unk_token="<unk>", show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tokenizer


def wordpiece(texts: Sequence[str], size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=special,
                                                                   show_progress=False))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


KINDS: dict[str, tuple[Callable[[Sequence[str], int], Tokenizer], dict[str, str]]] = {
    "byte-level BPE": (bpe, {"bos_token": "<s>", "eos_token": "</s>"}),
    "sentencepiece BPE": (lambda t, n: sentencepiece_bpe(t, n + 60), {"unk_token": "<unk>", "eos_token": "</s>"}),
    "Unigram": (lambda t, n: unigram(t, n // 5), {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}),
    "WordPiece": (lambda t, n: wordpiece(t, n // 3), {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}),
}


def save(plan: TokenizerPlan | dict[str, bytes | Path], folder: Path, config: dict[str, Any] | None = None) -> Path:
    """The planned files as the engine writes them."""
    for name, content in (plan if isinstance(plan, dict) else plan.files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    if config is not None:
        write(folder, "config.json", config)
    return folder


def load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def reader(matrices: Sequence[Tensor | None]) -> Callable[[int, np.ndarray], Tensor]:
    def read(number: int, which: np.ndarray) -> Tensor:
        matrix = matrices[number]
        assert matrix is not None
        return matrix.float().index_select(0, torch.from_numpy(which))

    return read


def rebuilt(plan: TokenizerPlan, matrices: Sequence[Tensor]) -> list[Tensor]:
    return [rows(m, 0, m.size, reader(matrices)) for m in plan.rows_of.values()]


# ---- what the peer writes --------------------------------------------------------------------------------------------


def golden_plan(case: str) -> tuple[TokenizerPlan, list[str], dict[str, Any], dict[str, Tensor], dict[str, int]]:
    folder = GOLDEN / "cases" / case
    config = yaml.safe_load((folder / "config.yaml").read_text())
    names = [m["model"] for m in config["models"]]
    if config["base_model"] not in names:
        names.append(config["base_model"])
    folders = [GOLDEN / "models" / n for n in names]
    block = config["tokenizer"]
    rules = {}
    for token, rule in block.get("tokens", {}).items():
        source = rule["source"]
        row = (TokenRow(names.index(source)) if isinstance(source, str)
               else TokenRow(names.index(source["model"]), token=source["token"]))
        rules[token] = TokenRule(row, rule.get("force", False))
    source = block["source"] if block["source"] in ("union", "base") else names.index(block["source"])
    sizes = [json.loads((f / "config.json").read_text())["vocab_size"] for f in folders]
    plan = plan_tokenizer(TokenizerRequest(source, rules, block.get("pad_to_multiple_of")), folders, sizes,
                          names.index(config["base_model"]), names)
    theirs = json.loads((folder / "expected_tokenizer.json").read_text())
    ids = {**theirs["model"]["vocab"], **{t["content"]: t["id"] for t in theirs["added_tokens"]}}
    return plan, names, config, load_file(folder / "expected.safetensors"), ids


def matrices_of(name: str, names: Sequence[str]) -> list[Tensor]:
    out = []
    for model in names:
        index = json.loads((GOLDEN / "models" / model / "model.safetensors.index.json").read_text())["weight_map"]
        out.append(load_file(GOLDEN / "models" / model / index[name])[name].float())
    return out


def ties(deltas: Tensor, weights: Tensor, density: float) -> tuple[Tensor, Tensor]:
    """Section 4.7 of the merge specification, written out for two dimensions; and the entries that stand exactly at the
    cut of one input, of which the specification does not say which survive."""
    pruned, at_cut = torch.zeros_like(deltas), torch.zeros_like(deltas[0], dtype=torch.bool)
    keep = int(density * deltas[0].numel())
    for i, d in enumerate(deltas):
        top = d.flatten().abs().sort(descending=True, stable=True).indices[:keep]
        pruned[i].view(-1)[top] = d.flatten()[top]
        cut = d.abs() == d.flatten()[top[-1]].abs()
        at_cut |= cut & (cut.sum() > 1)
    weighted = pruned * weights[:, None, None]
    agrees = weighted.sign() == torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    divisor = (weights[:, None, None] * agrees).sum(0)
    return (weighted * agrees).sum(0) / torch.where(divisor == 0, 1.0, divisor), at_cut


@golden
@pytest.mark.parametrize("case", ["tokenizer-union", "tokenizer-base", "tokenizer-model-pad", "tokenizer-tokens"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_the_peers_embeddings(case: str, name: str) -> None:
    plan, names, config, expected, theirs = golden_plan(case)
    inputs = matrices_of(name, names)
    made = rebuilt(plan, inputs)
    base = names.index(config["base_model"])
    weights = torch.tensor([m["parameters"]["weight"] for m in config["models"]])
    stack = torch.stack([made[i] for i in range(len(config["models"]))])
    if config["merge_method"] == "linear":
        merged = (stack * weights[:, None, None]).sum(0) / weights.sum()
    elif config["merge_method"] == "task_arithmetic":
        merged = made[base] + ((stack - made[base]) * weights[:, None, None]).sum(0)
    else:
        delta, open_ = ties(stack - made[base], weights, 0.5)
        merged = made[base] + delta
        assert int(open_.sum()) < 0.01 * open_.numel()
        merged = torch.where(open_, expected[name], merged)  # source base: the ids are the peer's
    assert merged.shape == expected[name].shape
    ids = planned_ids(plan)
    assert ids.keys() == theirs.keys()
    for token, theirs_id in theirs.items():
        torch.testing.assert_close(merged[ids[token]], expected[name][theirs_id], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(merged[plan.tokens:], expected[name][plan.tokens:], atol=1e-6, rtol=1e-5)


def planned_ids(plan: TokenizerPlan) -> dict[str, int]:
    content = plan.files["tokenizer.json"]
    return Tokenizer.from_str((content if isinstance(content, bytes) else content.read_bytes()).decode()).get_vocab()


@golden
def test_new_ids_follow_the_listing_and_the_old_ids() -> None:
    ids = planned_ids(golden_plan("tokenizer-union")[0])
    assert [ids[t] for t in ("<|im_start|>", "<|im_end|>", "<tool>", "<think>")] == [288, 289, 290, 291]
    assert all(ids[t] == i for t, i in planned_ids(golden_plan("tokenizer-base")[0]).items())


@golden
def test_the_same_bytes_under_any_hash_seed() -> None:
    program = (
        "import hashlib, sys, pathlib; sys.path.insert(0, 'src')\n"
        "from anabranch.surgery.tokenizer import *\n"
        f"m = pathlib.Path({str(GOLDEN)!r}) / 'models'; n = ['llama-tok-y', 'llama-tok-x', 'llama-base']\n"
        "p = plan_tokenizer(TokenizerRequest(), [m / x for x in n], [291, 290, 288], None, n)\n"
        "h = hashlib.sha256(p.files['tokenizer.json'])\n"
        "[h.update(a.tobytes()) for r in p.rows_of.values() for a in (r.input, r.row, r.mean_inputs, r.mean_rows)]\n"
        "said = (h.hexdigest(), list(p.files), p.warnings)\n")
    here: dict[str, Any] = {}
    exec(program, here)
    other = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    done = subprocess.run([sys.executable, "-c", program + "print(said)"], cwd=Path(__file__).parents[2], check=True,
                          capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": other})
    assert done.stdout.strip() == str(here["said"])


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_the_example_of_the_specification(tmp_path: Path) -> None:
    """5.3: x, y, z; A has x and y, B has y and z, no base, padded to 4."""
    a = words(tmp_path / "a", ["x", "y"])
    b = words(tmp_path / "b", ["y", "z"])
    plan = plan_tokenizer(TokenizerRequest(pad_to_multiple_of=4), [a, b], [2, 2], None, ["A", "B"])
    assert (plan.size, plan.tokens) == (4, 3)
    made = rebuilt(plan, [torch.tensor([[1.0, 1], [2, 2]]), torch.tensor([[20.0, 20], [30, 30]])])
    assert made[0].tolist() == [[1, 1], [2, 2], [30, 30], [11, 11]]
    assert made[1].tolist() == [[1, 1], [20, 20], [30, 30], [17, 17]]
    assert plan.owned.tolist() == [True, False, True, False]


def naive(own: dict[int, np.ndarray], base: int | None, chosen: dict[int, tuple[int, int]], forced: np.ndarray,
          matrices: Sequence[Tensor]) -> dict[int, Tensor]:
    """Section 5.3, one token at a time, in float64."""
    out = {}
    for i in own:
        made: list[Tensor | None] = []
        for token in range(len(forced)):
            holders = [j for j in own if own[j][token] >= 0]
            if own[i][token] >= 0 and not forced[token]:
                made.append(matrices[i][own[i][token]].double())
            elif token in chosen:
                of, row = chosen[token]
                made.append(torch.zeros(matrices[i].shape[1]).double() if of == ZERO else matrices[of][row].double())
            elif not holders:
                made.append(None)
            elif len(holders) > 1 and base in holders:
                made.append(matrices[base][own[base][token]].double())  # type: ignore[index]
            else:
                made.append(torch.stack([matrices[j][own[j][token]].double() for j in holders]).mean(0))
        real = [m for m in made if m is not None]
        mean = torch.stack(real).mean(0)
        out[i] = torch.stack([mean if m is None else m for m in made]).float()
    return out


@pytest.mark.parametrize("seed", range(12))
def test_rows_by_index_are_those_one_at_a_time(seed: int) -> None:
    random = np.random.default_rng(seed)
    inputs, size, width = int(random.integers(1, 5)), int(random.integers(1, 60)), 3
    heights = [int(random.integers(1, size + 1)) for _ in range(inputs)]
    matrices = [torch.from_numpy(random.normal(size=(h, width)).astype(np.float32)) for h in heights]
    own = {i: np.where(random.random(size) < 0.6, random.integers(0, heights[i], size), -1) for i in range(inputs)}
    own[0][random.integers(0, size)] = 0
    base = None if seed % 3 == 0 else int(random.integers(0, inputs))
    forced = random.random(size) < 0.2
    chosen = {int(t): ((ZERO, 0) if random.random() < 0.3 else (0, int(random.integers(0, heights[0]))))
              for t in np.unique(random.integers(0, size, 4))}
    record = Chosen(np.array(sorted(chosen)), *(np.array([chosen[t][k] for t in sorted(chosen)]) for k in (0, 1)))
    made = row_maps(own, base=base, chosen=record, forced=forced)
    expected = naive(own, base, chosen, forced, matrices)
    read = reader(matrices)
    for i, row_map in made.maps.items():
        whole = rows(row_map, 0, size, read)
        torch.testing.assert_close(whole, expected[i], atol=1e-6, rtol=1e-6)
        cuts = sorted({0, size, *map(int, random.integers(0, size + 1, 3))})
        pieces = [rows(row_map, a, b, read) for a, b in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(pieces), whole)
    same = torch.stack([(expected[i] == expected[0]).all(1) for i in expected]).all(0).numpy()
    assert not (made.owned & ~same).any()


class Pairs(np.ndarray):
    """Pairs that may be looked up, and not be gone through."""

    def __array_ufunc__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("all pairs are gone through")

    __array_function__ = __array_ufunc__

    def __getitem__(self, which: Any) -> Any:
        return np.asarray(self).view(np.ndarray)[which]


def test_rows_look_at_no_more_means_than_are_asked_for() -> None:
    size = 1000
    own = {i: np.arange(size) for i in range(3)}
    none = Chosen(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
    matrices = [torch.randn(size, 2, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    forced = np.ones(size, dtype=bool)
    row_map = row_maps(own, base=None, chosen=none, forced=forced).maps[1]
    guarded = replace(row_map, mean_inputs=row_map.mean_inputs.view(Pairs), mean_rows=row_map.mean_rows.view(Pairs))
    with pytest.raises(AssertionError, match="gone through"):
        np.unique(guarded.mean_inputs)
    asked: list[int] = []

    def read(number: int, which: np.ndarray) -> Tensor:
        asked.append(len(which))
        return matrices[number][torch.from_numpy(which)]

    got = rows(guarded, 500, 516, read)
    total = matrices[0].double()
    for matrix in matrices[1:]:
        total = total + matrix.double()
    assert got.equal((total / 3).float()[500:516]) and max(asked) == 16


def test_the_padding_row_is_one_sum_for_all_ranges() -> None:
    """A float64 sum over more rows than a chunk, with rows of very different size, and the same for any range."""
    size = 2 * CHUNK + 37
    matrix = torch.randn(size, 5, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 4, size)[:, None]
    own = {0: np.concatenate([np.arange(size), np.full(9, -1)])}
    none = Chosen(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
    row_map = row_maps(own, base=None, chosen=none, forced=np.zeros(size + 9, dtype=bool)).maps[0]
    assert row_map.is_padded and row_map.reads == [0]
    asked: list[int] = []

    def read(number: int, which: np.ndarray) -> Tensor:
        asked.append(len(which))
        return matrix[torch.from_numpy(which)]

    mean = padding_row(row_map, read)
    assert max(asked) <= CHUNK  # never the whole matrix
    torch.testing.assert_close(mean, matrix.double().mean(0).float(), rtol=1e-7, atol=0)
    tail = rows(row_map, size - 3, size + 9, read)
    assert torch.equal(tail[3:], mean.expand(9, 5)) and torch.equal(tail[:3], matrix[-3:])
    assert torch.equal(rows(row_map, size + 1, size + 2, read, mean)[0], mean)


def test_a_bias_has_rows_too() -> None:
    none = Chosen(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
    own = {0: np.array([0, 1, -1, -1]), 1: np.array([-1, 0, 1, -1]), 2: np.array([-1, -1, -1, -1])}
    maps = row_maps(own, base=None, chosen=none, forced=np.zeros(4, dtype=bool)).maps
    read = reader([torch.tensor([1.0, 2]), torch.tensor([6.0, 9]), torch.tensor([0.0])])
    assert rows(maps[2], 0, 4, read).tolist() == [1, 4, 9, pytest.approx(14 / 3)]
    assert maps[2].input.tolist() == [0, MEAN, 1, PADDING] and maps[2].reads == [0, 1, 2]


# ---- rules for single tokens -----------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path: Path) -> tuple[list[Path], list[int], list[Tensor]]:
    """base: u a b; one: u a b c; two: u b a d (a and b the other way round)."""
    folders = [words(tmp_path / "base", ["u", "a", "b"]), words(tmp_path / "one", ["u", "a", "b", "c"]),
               words(tmp_path / "two", ["u", "b", "a", "d"])]
    sizes = [3, 4, 4]
    return folders, sizes, [torch.arange(n * 2.0).reshape(n, 2) + 100 * (i + 1) for i, n in enumerate(sizes)]


def test_a_token_of_the_base_defaults_to_the_bases_row(three: Any) -> None:
    folders, sizes, matrices = three
    made = rebuilt(plan_tokenizer(TokenizerRequest(), folders, sizes, 0, ["base", "one", "two"]), matrices)
    assert made[0].tolist() == [*matrices[0].tolist(), matrices[1][3].tolist(), matrices[2][3].tolist()]
    assert made[2].tolist()[1:3] == [matrices[2][2].tolist(), matrices[2][1].tolist()]  # permuted


def test_force_makes_all_inputs_the_same(three: Any) -> None:
    folders, sizes, matrices = three
    request = TokenizerRequest(tokens={"a": TokenRule(TokenRow(2), force=True), "b": TokenRule(force=True)})
    plan = plan_tokenizer(request, folders, sizes, 0, ["base", "one", "two"])
    made = rebuilt(plan, matrices)
    assert all(m[1].equal(matrices[2][2]) and m[2].equal(matrices[0][2]) for m in made)
    assert plan.owned.tolist() == [False, True, True, True, True]
    without_base = rebuilt(plan_tokenizer(TokenizerRequest(tokens={"b": TokenRule(force=True)}), folders, sizes, None,
                                          ["base", "one", "two"]), matrices)
    mean = (matrices[0][2] + matrices[1][2] + matrices[2][1]) / 3
    assert all(torch.allclose(m[2], mean) for m in without_base)


def test_a_chosen_row_is_only_a_default(three: Any) -> None:
    folders, sizes, matrices = three
    request = TokenizerRequest(tokens={"c": TokenRule(TokenRow(2, token="b")), "n": TokenRule(TokenRow(1, token_id=3))})
    made = rebuilt(plan_tokenizer(request, folders, sizes, 0, ["base", "one", "two"]), matrices)
    assert made[1][3].equal(matrices[1][3]) and made[0][3].equal(matrices[2][1]) and made[2][3].equal(matrices[2][1])
    assert all(m[5].equal(matrices[1][3]) for m in made)  # `n`, that no model has, after c and d


def test_zero_rows_and_tokens_that_nobody_has(three: Any) -> None:
    folders, sizes, matrices = three
    request = TokenizerRequest(tokens={"c": TokenRule(ZeroRow()), "n": TokenRule(), "z": TokenRule(ZeroRow(), force=True)})
    plan = plan_tokenizer(request, folders, sizes, 0, ["base", "one", "two"])
    made = rebuilt(plan, matrices)
    assert made[0][3].tolist() == [0, 0] and made[1][3].equal(matrices[1][3])
    rest = [0, 1, 2, 3, 4, 6]
    assert all(torch.allclose(m[5], m[rest].mean(0)) and m[6].tolist() == [0, 0] for m in made)
    assert any("1 token(s) of the merged tokenizer have a row in no input (n)" in w for w in plan.warnings)


def test_a_token_beyond_the_rows_of_its_model_is_absent(three: Any) -> None:
    """The peer drops such a token from the map and fails with a KeyError (mergekit#342)."""
    folders, _, matrices = three
    plan = plan_tokenizer(TokenizerRequest(1), folders, [3, 3, 4], 0, ["base", "one", "two"])
    assert plan.size == 4 and any("one: 1 token(s)" in w and "(c)" in w for w in plan.warnings)
    assert all(torch.allclose(m[3], m[:3].mean(0)) for m in rebuilt(plan, matrices))
    union = plan_tokenizer(TokenizerRequest(), folders, [3, 3, 4], 0, ["base", "one", "two"])
    assert planned_ids(union) == {"u": 0, "a": 1, "b": 2, "d": 3}


def test_default_rows_come_from_the_inputs_that_hold_the_tensor(three: Any) -> None:
    folders, sizes, matrices = three
    plan = plan_tokenizer(TokenizerRequest(tokens={"d": TokenRule(TokenRow(2))}), folders, sizes, 0, ["base", "one", "two"])
    with pytest.raises(PlanError, match=r"taken from two, which has no such tensor .* Name one of base, one"):
        plan.row_maps([0, 1])
    held = plan.row_maps([1, 2]).maps
    read = reader([None, *matrices[1:]])
    assert rows(held[1], 0, 5, read)[4].equal(matrices[2][3])


def test_what_cannot_be_met_is_refused_in_one_message(three: Any) -> None:
    folders, sizes, _ = three
    rules = {"d": TokenRule(TokenRow(1)), "x": TokenRule(TokenRow(0, token="nothing")), "y": TokenRule(TokenRow(0, token_id=3))}
    with pytest.raises(PlanError) as caught:
        plan_tokenizer(TokenizerRequest(tokens=rules), folders, sizes, 0, ["base", "one", "two"])
    message = str(caught.value)
    assert "d: its row is to be that of 'd' in one" in message and "'nothing' in base" in message
    assert "number 3 of base, which has 3 rows" in message and "kind: zero" in message
    with pytest.raises(PlanError, match="pad_to_multiple_of: got 0"):
        plan_tokenizer(TokenizerRequest(pad_to_multiple_of=0), folders, sizes, 0, ["base", "one", "two"])
    with pytest.raises(PlanError, match="both `token` and `token_id`"):
        plan_tokenizer(TokenizerRequest(tokens={"a": TokenRule(TokenRow(0, "a", 1))}), folders, sizes, 0, ["b", "o", "t"])


# ---- tokenizers of every kind ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_union_loads_and_reads_as_before(kind: str, tmp_path: Path) -> None:
    make, settings = KINDS[kind]
    first, second = make(SENTENCES, 320), make(MORE + SENTENCES[:2], 330)
    chat = [AddedToken("<|turn|>", special=True, normalized=False), AddedToken("<tool>", lstrip=True, normalized=False)]
    second.add_tokens(chat)
    a, b = model_folder(tmp_path / "a", first, settings), model_folder(tmp_path / "b", second, settings)
    sizes = [first.get_vocab_size(), second.get_vocab_size()]
    plan = plan_tokenizer(TokenizerRequest(), [a, b], sizes, 0, ["first", "second"])
    folder = save(plan, tmp_path / "merged", {"model_type": "llama"})
    loaded, before = load(folder), load(a)
    assert loaded.is_fast and len(loaded) == plan.tokens
    ids = loaded.get_vocab()
    assert {t: ids[t] for t in first.get_vocab()} == first.get_vocab()
    new = [t for t, _ in sorted(second.get_vocab().items(), key=lambda x: x[1]) if t not in first.get_vocab()]
    assert [ids[t] for t in new] == list(range(sizes[0], plan.tokens))
    assert loaded.added_tokens_decoder[ids["<|turn|>"]].special
    assert loaded.added_tokens_decoder[ids["<tool>"]].lstrip and not loaded.added_tokens_decoder[ids["<tool>"]].special
    assert loaded(SENTENCES[0] + "<|turn|>", add_special_tokens=False).input_ids[-1] == ids["<|turn|>"]
    untouched = [w for s in SENTENCES for w in s.split() if not any(t in w for t in new)]
    assert len(untouched) > 5  # words in which no new token is spelled are read as by the base
    assert all(loaded(w).input_ids == before(w).input_ids for w in untouched)
    assert any(f"{len(new) - 2} entries of other vocabularies" in w for w in plan.warnings)
    # Every row is where its token is.
    matrices = [torch.arange(float(n))[:, None] + 1000 * i for i, n in enumerate(sizes)]
    made = rebuilt(plan, matrices)
    for token, number in second.get_vocab().items():
        assert made[1][ids[token], 0] == 1000 + number


@pytest.mark.parametrize(("kind", "name", "more"), [
    ("byte-level BPE", "Qwen2Tokenizer", {"unk_token": "<s>", "pad_token": "</s>"}),
    ("sentencepiece BPE", "LlamaTokenizer", {}), ("Unigram", "T5Tokenizer", {"extra_ids": 0}),
    ("WordPiece", "BertTokenizer", {})])
def test_classes_that_rebuild_the_tokenizer_give_the_planned_ids(kind: str, name: str, more: dict[str, Any],
                                                                 tmp_path: Path) -> None:
    """transformers 5 makes these anew from vocabulary and merges, and adds tokens from what the files list."""
    make, settings = KINDS[kind]
    first = make(SENTENCES, 320)
    second = Tokenizer.from_str(first.to_str())
    second.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    settings = {**settings, **more, "tokenizer_class": name}
    a, b = model_folder(tmp_path / "a", first, settings), model_folder(tmp_path / "b", second, settings)
    n = first.get_vocab_size()
    plan = plan_tokenizer(TokenizerRequest(tokens={"<new>": TokenRule(ZeroRow())}), [a, b], [n, n + 2], 0, ["a", "b"])
    loaded, before = load(save(plan, tmp_path / "merged", {})), load(a)
    assert type(loaded).__name__ == name
    assert loaded.get_vocab() == {**before.get_vocab(), "<|im_start|>": n, "<|im_end|>": n + 1, "<new>": n + 2}
    assert all(loaded(s).input_ids == before(s).input_ids for s in SENTENCES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_chat_tokens_leave_the_rest_untouched(kind: str, tmp_path: Path) -> None:
    """What a union is for: the merges, scores, normaliser and post-processor of the base are as they were."""
    make, settings = KINDS[kind]
    first = make(SENTENCES, 320)
    second = Tokenizer.from_str(first.to_str())
    second.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    decoder = {str(i): {f: getattr(t, f) for f in ("content", "lstrip", "normalized", "rstrip", "single_word", "special")}
               for i, t in first.get_added_tokens_decoder().items()}
    a = model_folder(tmp_path / "a", first, {**settings, "added_tokens_decoder": decoder})
    b = model_folder(tmp_path / "b", second, settings)
    write(a, "special_tokens_map.json", settings)
    write(a, "added_tokens.json", {})
    write(a, "tokenizer.model", "of old")
    plan = plan_tokenizer(TokenizerRequest(), [a, b], [first.get_vocab_size(), second.get_vocab_size()], 0, ["first", "second"])
    assert list(plan.warnings) == ["tokenizer.model: not written, since they no longer say the same as the merged "
                                   "tokenizer.json."]
    loaded, before = load(save(plan, tmp_path / "merged", {})), load(a)
    for text in SENTENCES:
        assert loaded(text).input_ids == before(text).input_ids
    n = first.get_vocab_size()
    assert loaded.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [n, n + 1]
    assert loaded.decode([n, *before("a row", add_special_tokens=False).input_ids], skip_special_tokens=True).strip() == "a row"
    written = {k: json.loads(v) for k, v in plan.files.items() if isinstance(v, bytes)}
    assert written["added_tokens.json"] == {"<|im_start|>": n, "<|im_end|>": n + 1}
    listed = written["tokenizer_config.json"]["added_tokens_decoder"]
    assert {i: t["content"] for i, t in listed.items()} == {
        **{str(i): t.content for i, t in first.get_added_tokens_decoder().items()}, str(n): "<|im_start|>",
        str(n + 1): "<|im_end|>"}
    old, new = json.loads(first.to_str()), written["tokenizer.json"]
    assert {k: new[k] for k in old if k != "added_tokens"} == {k: old[k] for k in old if k != "added_tokens"}


def test_what_transformers_adds_on_loading_counts(tmp_path: Path) -> None:
    """Tokens that only tokenizer_config.json names have ids, and rows, in the model that was trained with them."""
    tokenizer = bpe(SENTENCES, 280)
    n = tokenizer.get_vocab_size()
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    modern = model_folder(tmp_path / "modern", tokenizer, {
        "pad_token": "<pad>", "extra_special_tokens": ["<x>"], "added_tokens_decoder": {str(n): {"content": "<t>", **flags}}})
    old = model_folder(tmp_path / "old", tokenizer, {"image_token": "<image>"})
    write(old, "special_tokens_map.json", {"pad_token": {"content": "<pad>", **flags}, "eos_token": "</s>"})
    write(old, "added_tokens.json", {"<b>": n + 1, "<a>": n})
    for folder, wanted in ((modern, ["<t>", "<pad>", "<x>"]), (old, ["<a>", "<b>", "<pad>", "<image>"])):
        v = read_vocabulary(folder, "it")
        assert v is not None and list(v.ids)[n:] == wanted
        loaded = load(folder)
        assert loaded.get_vocab() == v.ids
        request = TokenizerRequest(tokens={"<new>": TokenRule(TokenRow(0, token_id=0))})
        plan = plan_tokenizer(request, [folder], [n + 4], 0, ["it"])
        again = load(save(plan, tmp_path / f"again-{folder.name}", {}))
        assert again.get_vocab() == {**v.ids, "<new>": len(v.ids)}


def test_tokens_without_a_row_are_stripped_from_the_base(tmp_path: Path) -> None:
    """The peer's fixture: a tokenizer with more ids than its model has rows. Also with subwords and their merges."""
    tokenizer = bpe(SENTENCES, 300)
    tokenizer.add_tokens([f"<UNUSED_{i}>" for i in range(4)])
    a = model_folder(tmp_path / "a", tokenizer, {"bos_token": "<s>", "pad_token": "<UNUSED_3>",
                                                 "extra_special_tokens": ["<UNUSED_1>"]}, {"pad_token_id": 303})
    other = bpe(SENTENCES, 300)  # the same once more: ties are broken by spelling
    other.add_special_tokens(["<|im_start|>"])
    b = model_folder(tmp_path / "b", other, {"bos_token": "<s>"})
    plan = plan_tokenizer(TokenizerRequest(), [a, b], [300, 301], 0, ["base", "chat"])
    loaded = load(save(plan, tmp_path / "union", {}))
    assert len(loaded) == 301 and "<UNUSED_3>" not in loaded.get_vocab() and loaded.pad_token is None
    assert any("<UNUSED_1>, <UNUSED_3> named as special tokens" in w for w in plan.warnings)
    assert plan.with_new_ids({"pad_token_id": 303}) == {"pad_token_id": None}

    short = plan_tokenizer(TokenizerRequest("base"), [a], [290], 0, ["base"])
    small = load(save(short, tmp_path / "short", {}))
    assert len(small) == 290
    for text in SENTENCES:
        assert small.decode(small(text, add_special_tokens=False).input_ids) == text
    model = json.loads(short.files["tokenizer.json"])["model"]  # type: ignore[arg-type]
    assert all(a + b in model["vocab"] for a, b in model["merges"]) and len(model["merges"]) == 290 - 2 - 256


def test_unigram_and_wordpiece_are_stripped_too(tmp_path: Path) -> None:
    for kind in ("Unigram", "WordPiece"):
        make, settings = KINDS[kind]
        tokenizer = make(SENTENCES, 330)
        n = tokenizer.get_vocab_size() - 3
        folder = model_folder(tmp_path / kind, tokenizer, settings)
        plan = plan_tokenizer(TokenizerRequest("base"), [folder], [n], 0, [kind])
        assert len(load(save(plan, tmp_path / f"{kind}-short", {}))) == n
    with pytest.raises(PlanError, match=r"puts </s> into every text, and the model has only 2 rows"):
        plan_tokenizer(TokenizerRequest("base"), [tmp_path / "Unigram"], [2], 0, ["it"])


def test_ids_with_gaps_stay_and_nothing_takes_them_twice(tmp_path: Path) -> None:
    """The library counts added tokens from the vocabulary's size on, which with gaps hands out ids that are taken."""
    content = json.loads(bpe(SENTENCES, 262).to_str())
    content["model"]["vocab"] = {t: i if i < 262 - 2 else i + 5 for t, i in content["model"]["vocab"].items()}
    a = model_folder(tmp_path / "a", Tokenizer.from_str(json.dumps(content)))
    other = bpe(SENTENCES, 262)
    other.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    b = model_folder(tmp_path / "b", other)
    plan = plan_tokenizer(TokenizerRequest(), [a, b], [270, 264], 0, ["gaps", "chat"])
    loaded = load(save(plan, tmp_path / "merged", {}))
    assert plan.tokens == 269
    assert loaded.get_vocab() == {**content["model"]["vocab"], "<|im_start|>": 267, "<|im_end|>": 268}
    assert loaded("<|im_end|>", add_special_tokens=False).input_ids == [268]
    made = rebuilt(plan, [torch.arange(270.0)[:, None], torch.arange(264.0)[:, None]])
    real = [i for i in range(269) if not 260 <= i < 265]
    assert torch.allclose(made[0][260:265], made[0][real].mean())  # ids that are no token's


def test_many_subwords_are_warned_of(tmp_path: Path) -> None:
    """mergekit#47: a union of two vocabularies gives garbled text."""
    a, b = model_folder(tmp_path / "a", bpe(SENTENCES, 300)), model_folder(tmp_path / "b", bpe(MORE, 400))
    first, second = (json.loads((f / "tokenizer.json").read_text())["model"]["vocab"] for f in (a, b))
    count = len(second.keys() - first.keys())
    assert count > 64
    plan = plan_tokenizer(TokenizerRequest(), [a, b], [300, len(second)], 0, ["first", "second"])
    assert any(f"{count} entries of other vocabularies" in w and "source: base" in w for w in plan.warnings)
    mixed = model_folder(tmp_path / "c", wordpiece(SENTENCES, 100))
    plan = plan_tokenizer(TokenizerRequest("base"), [a, mixed], [300, 100], 0, ["first", "bert"])
    assert any("bert: its tokenizer is WordPiece, that of first BPE, byte-level" in w for w in plan.warnings)


def test_settings_that_differ_are_told_and_the_first_holds(tmp_path: Path) -> None:
    a = words(tmp_path / "a", ["u", "<t>"], ["<t>"])
    b = words(tmp_path / "b", ["u", "<t>"])
    content = json.loads((b / "tokenizer.json").read_text())
    content["added_tokens"] = [{"id": 1, "content": "<t>", "single_word": False, "lstrip": True, "rstrip": False,
                                "normalized": False, "special": True}]
    write(b, "tokenizer.json", content)
    c = words(tmp_path / "c", ["u", "<t>"])
    plan = plan_tokenizer(TokenizerRequest(), [c, b, a], [2, 2, 2], 0, ["c", "b", "a"])
    assert any("a and b do not agree on the settings (special, normalized, strip) of <t>" in w for w in plan.warnings)
    assert load(save(plan, tmp_path / "merged", {})).added_tokens_decoder[1].lstrip


def test_a_smaller_vocabulary_is_told_with_the_multiple_that_keeps_it(tmp_path: Path) -> None:
    """mergekit#425: Qwen's 152,064 rows became 151,665."""
    folder = words(tmp_path / "a", [f"w{i}" for i in range(200)])
    plan = plan_tokenizer(TokenizerRequest("base"), [folder], [256], 0, ["big"])
    assert plan.size == 200 and any("big has 256 embedding rows and the merged tokenizer 200 tokens" in w
                                    and "`pad_to_multiple_of: 256` keeps" in w for w in plan.warnings)
    padded = plan_tokenizer(TokenizerRequest("base", pad_to_multiple_of=256), [folder], [256], 0, ["big"])
    assert padded.size == 256 and not padded.warnings


def test_an_unchanged_tokenizer_is_carried_byte_for_byte(tmp_path: Path) -> None:
    folder = words(tmp_path / "a", ["u", "a"], ["<t>"])
    write(folder, "vocab.txt", "u\na\n")
    write(folder, "chat_template.jinja", "{{ messages }}")
    plan = plan_tokenizer(TokenizerRequest("base"), [folder], [3], 0, ["it"])
    assert {n: p for n, p in plan.files.items() if isinstance(p, Path)} == plan.files
    assert set(plan.files) == {"tokenizer.json", "tokenizer_config.json", "vocab.txt", "chat_template.jinja"}


def test_another_models_tokenizer_comes_without_its_processor(tmp_path: Path) -> None:
    base, other = words(tmp_path / "a", ["u", "a"]), words(tmp_path / "b", ["a", "u"])
    for folder in (base, other):
        write(folder, "preprocessor_config.json", {})
        write(folder, "chat_template.jinja", "{{ messages }}")
    files = plan_tokenizer(TokenizerRequest(1), [base, other], [2, 2], 0, ["base", "other"]).files
    assert files["tokenizer.json"] == other / "tokenizer.json"
    assert files["chat_template.jinja"] == other / "chat_template.jinja"
    assert files["preprocessor_config.json"] == base / "preprocessor_config.json"


# ---- tokenizers that are missing, old or damaged ---------------------------------------------------------------------


def test_an_input_without_a_tokenizer_is_taken_to_share_the_bases(tmp_path: Path) -> None:
    a = words(tmp_path / "a", ["u", "a"])
    write(tmp_path / "b", "config.json", {})
    plan = plan_tokenizer(TokenizerRequest(), [a, tmp_path / "b"], [2, 2], 0, ["one", "bare"])
    assert any("bare: no tokenizer in the folder" in w for w in plan.warnings)
    assert plan.own[1].tolist() == [0, 1]
    for request, base in ((TokenizerRequest(), 1), (TokenizerRequest(1), 0)):
        with pytest.raises(ModelError, match="bare: no tokenizer"):
            plan_tokenizer(request, [a, tmp_path / "b"], [2, 2], base, ["one", "bare"])


def test_damaged_tokenizers_are_named(tmp_path: Path) -> None:
    for name, content, message in (
            ("tokenizer.json", "{", "cannot be read as JSON"), ("tokenizer.json", "[]", "holds list, wanted an object"),
            ("tokenizer.json", "{}", "cannot be loaded"), ("tokenizer_config.json", "nope", "cannot be read as JSON")):
        folder = words(tmp_path / "a", ["u", "a"])
        write(folder, name, content)
        with pytest.raises(CorruptedError, match=message) as caught:
            plan_tokenizer(TokenizerRequest(), [folder], [2], 0, ["it"])
        assert name in str(caught.value) or "tokenizer.json" in str(caught.value)


def test_a_word_list_is_converted_and_a_foreign_model_refused(tmp_path: Path) -> None:
    bert = tmp_path / "bert"
    write(bert, "vocab.txt", "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "row", "##s"]) + "\n")
    write(bert, "tokenizer_config.json", {"tokenizer_class": "BertTokenizer"})
    write(bert, "config.json", {"model_type": "bert"})
    plan = plan_tokenizer(TokenizerRequest(tokens={"<t>": TokenRule(ZeroRow())}), [bert], [7], 0, ["bert"])
    loaded = load(save(plan, tmp_path / "merged", {"model_type": "bert"}))
    assert loaded("rows<t>", add_special_tokens=False).input_ids == [5, 6, 7]
    spm = tmp_path / "spm"
    write(spm, "tokenizer.model", "nothing of the kind")
    write(spm, "config.json", {"model_type": "llama"})
    with pytest.raises(ModelError, match=r"old: its tokenizer has no tokenizer.json, only tokenizer.model.*save_pretrained"):
        plan_tokenizer(TokenizerRequest(), [spm], [7], 0, ["old"])


# ---- special ids -----------------------------------------------------------------------------------------------------


def test_special_ids_follow_their_tokens(tmp_path: Path) -> None:
    """The config is the base's, the tokenizer another's: ids are those of the same tokens, not the same numbers."""
    config = {"bos_token_id": 1, "eos_token_id": [2, 4], "pad_token_id": -1, "vocab_size": 5,
              "text_config": {"eos_token_id": 2, "image_token_index": 3, "sep_token_id": None},
              "layers": [{"pad_token_id": 1}], "hidden_size": 2}
    base = words(tmp_path / "base", ["u", "<s>", "</s>", "<img>"], ["<gone>"], config=config)
    write(base, "generation_config.json", {"eos_token_id": [2, 4], "suppress_tokens": [1, 3], "temperature": 0.7,
                                           "bad_words_ids": [[1, 2], [4, 2]]})
    other = words(tmp_path / "other", ["u", "<img>", "</s>", "x", "<s>"], ["<end>"], settings={"eos_token": "<end>"})
    plan = plan_tokenizer(TokenizerRequest(1), [base, other], [5, 6], 0, ["base", "other"])
    assert plan.special_ids == {1: 4, 2: 2, 3: 1}
    assert plan.with_new_ids(config) == {
        "bos_token_id": 4, "eos_token_id": [2, 5], "pad_token_id": -1, "vocab_size": 5,
        "text_config": {"eos_token_id": 2, "image_token_index": 1, "sep_token_id": None},
        "layers": [{"pad_token_id": 4}], "hidden_size": 2}
    assert json.loads(plan.files["generation_config.json"]) == {  # type: ignore[arg-type]
        "eos_token_id": [2, 5], "suppress_tokens": [4, 1], "temperature": 0.7, "bad_words_ids": [[4, 2]]}
    assert any("eos_token_id 4: now 5" in w and "bad_words_ids 4: now none" in w for w in plan.warnings)
    union = plan_tokenizer(TokenizerRequest(), [base, other], [5, 6], 0, ["base", "other"])
    assert union.with_new_ids(config) == config
    assert union.files["generation_config.json"] == base / "generation_config.json"


# ---- chat templates --------------------------------------------------------------------------------------------------

TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"}]
WRITTEN = {
    "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n### Instruction:\nBye\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
              "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be kind.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
              "Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be kind.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
}


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_bundled_templates_as_transformers_renders_them(name: str, tmp_path: Path) -> None:
    assert set(WRITTEN) == set(BUNDLED)
    folder = words(tmp_path / "a", ["u", "<s>", "</s>"], settings={"bos_token": "<s>", "eos_token": "</s>",
                                                                   "chat_template": "{{ 'another' }}"})
    (folder / "additional_chat_templates").mkdir()
    write(folder, "additional_chat_templates/tool_use.jinja", "{{ 'tools' }}")
    chosen = choose_chat_template(name, [folder], ["it"])
    assert chosen is not None
    loaded = load(save(carry_tokenizer(folder, chosen.text), tmp_path / "out", {}))
    assert loaded.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == WRITTEN[name]
    first = loaded.apply_chat_template(TALK[1:2], tokenize=False)
    assert "Hi" in first and "Be kind" not in first
    assert not (tmp_path / "out" / "additional_chat_templates").exists()
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())


def test_a_literal_template_is_kept_to_the_letter(tmp_path: Path) -> None:
    folder = words(tmp_path / "a", ["u", "<s>"])
    text = ("{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}{% generation %}{{ m.content }}"
            "{% endgeneration %}\n{% endfor %}\n")
    chosen = choose_chat_template(text, [folder], ["it"])
    assert chosen is not None and chosen.text == text
    merged = plan_tokenizer(TokenizerRequest(tokens={"<t>": TokenRule(ZeroRow())}), [folder], [2], 0, ["it"],
                            chat_template=chosen.text)
    for files in (carry_tokenizer(folder, text), merged.files):
        assert files["chat_template.jinja"] == text.encode()
    assert load(save(merged, tmp_path / "out", {})).chat_template == text


@pytest.mark.parametrize(("setting", "message"), [
    ("chatmll", r"'chatmll' is neither `auto`, a bundled name .* Did you mean `chatml`"),
    ("", "neither"),
    ("{{ messages }}", "20 characters or more"),
    ("no jinja in this text at all", "neither `auto`"),
    ("{% for m in messages %}\n{{ m.content }\n{% endfor %}", r"line 2: unexpected '}'.*Nothing has been merged"),
    ("{% for m in messages %}{{ m.content }}", "line 1: Unexpected end of template"),
    ("{{ messages | no_such_filter_at_all }}", "No filter named 'no_such_filter_at_all'"),
])
def test_bad_templates_are_refused_before_the_merge(setting: str, message: str) -> None:
    """The peer finds out after the last byte is written."""
    with pytest.raises(RecipeError, match=message):
        choose_chat_template(setting, [], [])


def test_auto_takes_the_most_frequent_and_of_equals_the_first(tmp_path: Path) -> None:
    def folder(name: str, template: str | None, where: str = "jinja") -> Path:
        path = words(tmp_path / name, ["u"])
        if template and where == "jinja":
            write(path, "chat_template.jinja", template)
        elif template:
            listed = [{"name": "tool_use", "template": "{{ 1 }}"}, {"name": "default", "template": template}]
            write(path, "tokenizer_config.json", {"chat_template": template if where == "text" else listed})
        return path

    a, b, c = folder("a", "{{ 'A' }}"), folder("b", "{{ 'B' }}\n", "list"), folder("c", " {{ 'B' }}", "text")
    d, e = folder("d", None), folder("e", None)

    def auto(*paths: Path) -> str | None:
        chosen = choose_chat_template("auto", paths, [p.name for p in paths])
        return None if chosen is None else chosen.text

    assert auto(a, b, c) == "{{ 'B' }}" and auto(d, a, b) == "{{ 'A' }}" and auto(b, a, e) == "{{ 'B' }}"
    assert auto(d, e) is None and choose_chat_template(None, [a], ["a"]) is None
    bad = folder("f", "{% if %}")
    with pytest.raises(RecipeError, match="chat template of f: does not compile"):
        auto(bad)


def test_a_template_that_the_donor_has_already_changes_no_file(tmp_path: Path) -> None:
    folder = words(tmp_path / "a", ["u"])
    write(folder, "chat_template.jinja", "{{ messages | length }}\n")
    (folder / "additional_chat_templates").mkdir()
    write(folder, "additional_chat_templates/tool_use.jinja", "{{ 'tools' }}")
    chosen = choose_chat_template("auto", [folder], ["it"])
    assert chosen is not None and carry_tokenizer(folder, chosen.text) == carry_tokenizer(folder)
    assert load(save(carry_tokenizer(folder), tmp_path / "out", {})).chat_template == {
        "default": "{{ messages | length }}\n", "tool_use": "{{ 'tools' }}"}


def test_control_tokens_that_the_tokenizer_lacks_are_told(tmp_path: Path) -> None:
    folder = words(tmp_path / "a", ["u"], ["<|im_start|>"])
    (warning,) = missing_tokens(BUNDLED["chatml"], {"u", "<|im_start|>"}, "it")
    assert "it writes <|im_end|>, which the tokenizer of it" in warning
    plan = plan_tokenizer(TokenizerRequest("base"), [folder], [2], 0, ["it"], chat_template=BUNDLED["chatml"])
    assert warning in plan.warnings
    both = TokenizerRequest(tokens={"<|im_end|>": TokenRule(ZeroRow())})
    assert not plan_tokenizer(both, [folder], [2], 0, ["it"], chat_template=BUNDLED["chatml"]).warnings
    assert not missing_tokens(BUNDLED["mistral"], [], "it")
    assert template_warnings(BUNDLED["chatml"], folder, "it") == [warning]
    assert template_warnings(BUNDLED["chatml"], tmp_path, "it") == []


# ---- merges that leave tokenizers alone ------------------------------------------------------------------------------


def test_everything_that_belongs_to_a_tokenizer_is_carried(tmp_path: Path) -> None:
    folder = words(tmp_path / "a", ["u"])
    (folder / "additional_chat_templates").mkdir()
    carried = ["special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
               "chat_template.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
               "video_preprocessor_config.json", "additional_chat_templates/rag.jinja", "tokenization_own.py"]
    for name in carried:
        write(folder, name, {})
    for name in ("README.md", "model.safetensors", "optimizer.pt", "modeling_own.py", "trainer_state.json"):
        write(folder, name, "other")
    files = carry_tokenizer(folder)
    assert set(files) == {*carried, "tokenizer.json", "tokenizer_config.json"}
    assert list(files) == sorted(files) and all(files[n] == folder / n for n in files)
    write(tmp_path / "vision", "config.json", {})
    assert carry_tokenizer(tmp_path / "vision") == {}


def test_tokenizers_that_disagree_are_told_of(tmp_path: Path) -> None:
    base = words(tmp_path / "base", ["u", "a", "b", "c"])
    same = words(tmp_path / "same", ["u", "a", "b", "c"], settings={"model_max_length": 7})
    swapped = words(tmp_path / "swapped", ["u", "b", "a", "c"])
    words(tmp_path / "other", ["u", "a", "b", "x"])
    words(tmp_path / "more", ["u", "a", "b", "c", "d"])
    write(tmp_path / "bare", "config.json", {})
    names = ["base", "same", "swapped", "other", "more", "bare"]
    told = tokenizer_differences([tmp_path / n for n in names], names, 0)
    assert [t.split(":")[0] for t in told] == ["swapped", "other", "more"]
    assert "2 tokens with other ids ('b' is 2 there and 1 here, 'a' is 1 there and 2 here)" in told[0]
    assert "1 ids with other tokens (3 is 'c' there and 'x' here)" in told[1]
    assert "1 tokens more (d)" in told[2] and "mix" not in told[2]
    assert tokenizer_differences([base, same], ["base", "same"]) == []
    assert tokenizer_differences([tmp_path / "bare", swapped], ["bare", "swapped"]) == []
