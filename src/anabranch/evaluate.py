"""A model at three places: held-out rows of the mixture, units nobody trained on, and what the base could do before.

Loss is the mean negative log-likelihood (nats) over a unit's response tokens; for plain text (retention) over all
tokens but each row's first. Short answers are also generated greedily and scored by exact match and token F1 of the
normalised text (lower case, no punctuation, no articles: the SQuAD convention, arXiv:1606.05250). No stage before
this one reads these rows.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anabranch.artifacts import Evaluation, Mixture, Unit, UnitScore, digest
from anabranch.model import batches, can_select, image_inputs, load_model, load_tokenizer, response_losses
from anabranch.recipe import EvaluateSection, Recipe
from anabranch.rows import Rows, generator, load_unit

Progress = Callable[[str, int, int], None]


def evaluation_inputs(recipe: Recipe, mixture: Mixture, weights_hash: str) -> dict[str, str]:
    """What an evaluation depends on."""
    section = recipe.evaluate
    settings = {"max_samples": section.max_samples, "short": section.short_answer_tokens,
                "generate": section.generate_samples, "seed": recipe.seed, "dtype": recipe.model.dtype}
    return {"weights": weights_hash, "units": mixture.scored_rows, "settings": digest(settings)}


def evaluate_model(recipe: Recipe, mixture: Mixture, mixture_folder: Path, model_folder: Path, label: str,
                   weights_hash: str, out: Path, *, progress: Progress | None = None) -> Evaluation:
    """Score one model folder; writes `out` (JSON) at the end.

    Raises:
        ModelError: the folder does not load.
    """
    model = load_model(model_folder, recipe.model.dtype, trust_remote_code=recipe.model.trust_remote_code)
    tokenizer = load_tokenizer(model_folder, trust_remote_code=recipe.model.trust_remote_code)
    places = {"held_out": mixture.units, "transfer": mixture.transfer, "retention": mixture.retention}
    total, done = sum(len(units) for units in places.values()), 0
    select = can_select(model)
    scores: dict[str, dict[str, UnitScore]] = {}
    for place, units in places.items():
        scores[place] = {}
        for unit in units:
            if progress:
                progress(f"{label}: {unit.name}", done, total)
            done += 1
            rows = load_unit(mixture_folder / unit.file, "held_out")
            if len(rows):
                chosen = _sample(rows, unit, recipe)
                answers = recipe.evaluate if place != "retention" else None
                scores[place][unit.name] = score_unit(model, tokenizer, rows, chosen, recipe.evaluate.batch_tokens,
                                                      select=select, answers=answers)
    if progress:
        progress("", total, total)
    evaluation = Evaluation(model=label, held_out=scores["held_out"], transfer=scores["transfer"],
                            retention=scores["retention"],
                            made_from=evaluation_inputs(recipe, mixture, weights_hash))
    evaluation.save(out)
    return evaluation


def _sample(rows: Rows, unit: Unit, recipe: Recipe) -> np.ndarray:
    drawn = generator(recipe.seed, "evaluate", unit.name).permutation(len(rows))[: recipe.evaluate.max_samples]
    return np.sort(drawn)


@torch.no_grad()
def score_unit(model: Any, tokenizer: Any, rows: Rows, chosen: np.ndarray, batch_tokens: int, *, select: bool,
               answers: EvaluateSection | None) -> UnitScore:
    """Loss over the chosen rows; short answers as `answers` asks."""
    loss, tokens = 0.0, 0
    for batch in batches(rows, chosen, batch_tokens, next(model.parameters()).device):
        losses, _ = response_losses(model, batch, select=select)
        loss += float(losses.double().sum())
        tokens += losses.numel()
    matches = []
    if answers is not None and answers.generate_samples and answers.short_answer_tokens:
        matches = _answer(model, tokenizer, rows, chosen, answers)
    return UnitScore(
        loss=loss / max(tokens, 1), tokens=tokens, rows=len(chosen), answers=len(matches),
        exact_match=float(np.mean([m for m, _ in matches])) if matches else None,
        f1=float(np.mean([f for _, f in matches])) if matches else None)


def _answer(model: Any, tokenizer: Any, rows: Rows, chosen: np.ndarray,
            answers: EvaluateSection) -> list[tuple[float, float]]:
    """(exact match, F1) of greedy answers to rows whose one response is short."""
    prompts, references, asked = [], [], []
    ends = _ends(model)
    for i in chosen:
        ids, mask = rows.row(int(i))
        where = np.flatnonzero(mask)
        one_span = len(where) > 0 and where[-1] - where[0] + 1 == len(where)
        if one_span and len(where) <= answers.short_answer_tokens and where[0] > 0:
            prompts.append([int(t) for t in ids[: where[0]]])
            references.append(tokenizer.decode(ids[where].tolist(), skip_special_tokens=True))
            asked.append(int(i))
            ends.add(int(ids[where[-1]]))  # a base often stops at another token than its chat template's turns
        if len(prompts) == answers.generate_samples:
            break
    if not prompts:
        return []
    width, pad = max(map(len, prompts)), tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    where_to = next(model.parameters()).device
    input_ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=where_to)
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=where_to)
    images = image_inputs(model, input_ids, rows.images_of(asked))
    written = model.generate(input_ids=input_ids, attention_mask=attention, **images, do_sample=False, num_beams=1,
                             pad_token_id=pad, eos_token_id=sorted(ends),
                             max_new_tokens=answers.short_answer_tokens + 4, temperature=None, top_p=None, top_k=None)
    texts = [tokenizer.decode(_until(row, ends), skip_special_tokens=True) for row in written[:, width:].tolist()]
    return [(float(normalise(t) == normalise(r)), token_f1(t, r)) for t, r in zip(texts, references, strict=True)]


def _ends(model: Any) -> set[int]:
    """Tokens at which generation stops by the model's own configuration."""
    found = model.generation_config.eos_token_id
    return set(found if isinstance(found, list) else [] if found is None else [found])


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """Up to the first end, without it."""
    return tokens[: next((i for i, t in enumerate(tokens) if t in ends), len(tokens))]


def normalise(text: str) -> list[str]:
    """Words of an answer, lower case, without punctuation and articles. An answer that is an article (option A) or
    punctuation alone is kept."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split() or plain.split() or text.lower().split()


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of word precision and recall, in [0, 1]."""
    a, r = Counter(normalise(answer)), Counter(normalise(reference))
    common = sum((a & r).values())
    if not common:
        return float(not a and not r)
    return 2 * common / (sum(a.values()) + sum(r.values()))
