"""Do branches serve better as experts of one mixture than as one merge? And do the four layouts load and run?

    python benchmarks/experts.py --run RUN [--prompts 32] [--steps 60] [--work DIR]
    python benchmarks/experts.py --layouts                                              only the second question

RUN: a finished run whose base is a llama, mistral or qwen2 (branches/K/model, merged, mixture, plan.json). Its branches
become the experts of a Qwen MoE; everything else comes from the base, or from the run's token-weighted merge. Prompts are
training rows of each branch's own units; routers are calibrated on training rows of all units without labels (plain text,
prompt and answer as one). Held-out loss: mean over units of the mean negative log-likelihood of response tokens (nats), rows
that neither branches nor routers have seen. Active: parameters that one token passes; experts that differ in the feed-forward
alone. Own: share of tokens of a branch's prompts that its expert is chosen for.

Writes results/experts.json and .md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anabranch.artifacts import Mixture, Plan
from anabranch.experts.build import Options, build_experts
from anabranch.model import batches, can_select, load_model, load_tokenizer, response_losses
from anabranch.rows import Rows, generator, load_unit
from machine import RESULTS, machine

KINDS = {"Mixtral": ("llama", {}), "DeepSeek MoE": ("llama", {"architecture": "deepseek"}), "Qwen MoE": ("qwen2", {}),
         "Qwen3 MoE": ("qwen3", {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--layouts", action="store_true")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=4, help="held-out rows per unit, most")
    parser.add_argument("--longest", type=int, default=512, help="tokens of a row, most")
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    if not (args.layouts or args.run):
        parser.error("give --run RUN, or --layouts")
    torch.set_num_threads(1)
    path = RESULTS / "experts.json"
    result = json.loads(path.read_text()) if path.is_file() else {"benchmark": "experts"}
    result["machine"] = machine()
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        result["layouts"] = layouts(work)
        if args.run:
            result["p3"] = experiment(args, work)
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "experts.md").write_text(as_markdown(result))
    print(as_markdown(result))


# --- the four layouts ---


def layouts(work: Path) -> list[dict[str, Any]]:
    """Small models of random weights: made, loaded by transformers without code of the repository, asked for a few tokens."""
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config

    rows = []
    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="<eos>", pad_token="<pad>")
    for title, (kind, extra) in KINDS.items():
        folders = []
        for number in range(5):
            torch.manual_seed(number)
            config = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[kind](
                **shape, **({"head_dim": 16} if kind == "qwen3" else {}))
            folders.append(work / f"{title}-{number}")
            AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folders[-1])
            tokenizer.save_pretrained(folders[-1])
        texts = [["1 + 1 = 2", "3 * 7 = 21"], ["the red fish", "a blue bird"], ["def f(x):", "return x"], ["NO!", "YES!"]]
        config = {"base_model": str(folders[0]), **extra, "experts": [
            {"source_model": str(f), "positive_prompts": t} for f, t in zip(folders[1:], texts, strict=True)]}
        begun = time.perf_counter()
        manifest = build_experts(config, work / f"{title}-moe")
        seconds = time.perf_counter() - begun
        model, info = AutoModelForCausalLM.from_pretrained(work / f"{title}-moe", output_loading_info=True,
                                                           trust_remote_code=False)
        ids = torch.tensor([tokenizer("2 + 2 =")["input_ids"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        written = model.generate(ids, max_new_tokens=8, do_sample=False)
        rows.append({"layout": title, "class": type(model).__name__, "of": kind,
                     "missing_or_unexpected": sum(len(info[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")),
                     "finite": bool(torch.isfinite(logits).all()), "generated": written.shape[1] - ids.shape[1],
                     "seconds": round(seconds, 2), "router": manifest.report["router"]["before"]["mean"]})
    return rows


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1, **{c: i + 2 for i, c in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# --- branches as experts ---


def experiment(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    run, steps = args.run, args.steps
    mixture, plan = Mixture.load(run / "mixture" / "mixture.json"), Plan.load(run / "plan.json")
    base = Path(json.loads((run / "recipe.json").read_text())["base"])
    branches = [run / "branches" / str(g.group) / "model" for g in plan.groups]
    tokenizer = load_tokenizer(base)
    own = {u.unit: u.group for u in plan.units}
    rows = {u.name: tuple(short(load_unit(run / "mixture" / u.file, split), args.longest) for split in ("train", "held_out"))
            for u in mixture.units}
    rows = {name: (train, held.take(np.arange(min(args.rows, len(held))))) for name, (train, held) in rows.items()
            if len(train) and len(held)}
    own = {unit: group for unit, group in own.items() if unit in rows}
    chosen = prompts_of(rows, own, len(branches), args.prompts, tokenizer)
    calibration = work / "calibration.jsonl"
    unlabelled = drawn(rows, list(rows), args.texts, tokenizer, "text")
    calibration.write_text("".join(json.dumps({"text": t}) + "\n" for t in unlabelled))
    arms = [arm(label, folder, rows) for label, folder in
            [("base", base), *((f"branch {k}", b) for k, b in enumerate(branches)), ("token-weighted merge", run / "merged")]]
    by_owner = {u: arms[1 + own[u]]["by_unit"][u] for u in own if u in arms[0]["by_unit"]}
    arms.append({"arm": "each unit by its own branch (an oracle)", "loss": round(float(np.mean(list(by_owner.values()))), 4),
                 "by_unit": by_owner, "all": sum(a["all"] for a in arms[1 : 1 + len(branches)]), "active": arms[0]["active"]})
    for around, folder in (("base", base), ("merge", run / "merged")):
        for mode in ("random", "cheap_embed", "hidden", "hidden_avg", "mlp_input"):
            for k in (1, 2):
                for calibrated in ((False, True) if mode in ("hidden", "mlp_input") else (False,)):
                    config = {"base_model": str(folder), "gate_mode": mode, "experts_per_token": k, "experts": [
                        {"source_model": str(b), "positive_prompts": p} for b, p in zip(branches, chosen, strict=True)]}
                    name = f"{around}-{mode}-{k}-{calibrated}"
                    begun = time.perf_counter()
                    manifest = build_experts(config, work / name, Options(
                        calibration=calibration if calibrated else None, steps=steps))
                    seconds = time.perf_counter() - begun
                    one = arm(f"experts in the {around}, {mode}, top {k}" + (", calibrated" if calibrated else ""),
                              work / name, rows)
                    routing = manifest.report["router"]["after" if calibrated else "before"]
                    arms.append(one | {**manifest.report["parameters"], "router": routing["mean"], "layers": routing["layers"],
                                       "calibration": manifest.report.get("calibration"), "build_seconds": round(seconds, 1)})
                    print(arms[-1]["arm"], arms[-1]["loss"], arms[-1]["router"], flush=True)
    merge = next(a for a in arms if a["arm"] == "token-weighted merge")
    for one in arms:
        one["against_merge"] = paired(one["by_unit"], merge["by_unit"])
    return {"units": len(rows), "rows": sum(len(held) for _, held in rows.values()), "longest": args.longest,
            "prompts_per_expert": args.prompts, "texts": args.texts, "steps": steps, "arms": arms}


def short(rows: Rows, longest: int) -> Rows:
    return rows.take(np.flatnonzero(rows.lengths <= longest))


def prompts_of(rows: dict[str, Any], own: dict[str, int], count: int, wanted: int, tokenizer: Any) -> list[list[str]]:
    return [drawn(rows, [u for u, g in own.items() if g == k], wanted, tokenizer, "prompt") for k in range(count)]


def drawn(rows: dict[str, Any], units: list[str], wanted: int, tokenizer: Any, kind: str) -> list[str]:
    """Training rows as text, spread over the units; a prompt is all before the response."""
    stream, found = generator(0, "experts", kind, *units), []
    while len(found) < wanted:
        unit = units[int(stream.integers(len(units)))]
        train = rows[unit][0]
        ids, response = train.row(int(stream.integers(len(train))))
        stop = int(np.flatnonzero(response)[0]) if kind == "prompt" else len(ids)
        text = tokenizer.decode(ids[:stop].tolist(), skip_special_tokens=True)
        if text.strip():
            found.append(text)
    return found


@torch.no_grad()
def arm(label: str, folder: Path, rows: dict[str, Any]) -> dict[str, Any]:
    model = load_model(folder)
    select, losses = can_select(model), {}
    for unit, (_, held_out) in rows.items():
        total, count = 0.0, 0
        for batch in batches(held_out, np.arange(len(held_out)), 4096, torch.device("cpu")):
            found, _ = response_losses(model, batch, select=select)
            total, count = total + float(found.double().sum()), count + found.numel()
        losses[unit] = round(total / max(count, 1), 4)
    size = sum(p.numel() for p in model.parameters())
    mean = round(float(np.mean(list(losses.values()))), 4)
    return {"arm": label, "loss": mean, "by_unit": losses, "all": size, "active": size}


def paired(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Mean difference over units, and 1.96 standard errors of it."""
    differences = np.array([one[u] - other[u] for u in other])
    return {"mean": round(float(differences.mean()), 4),
            "interval": round(1.96 * float(differences.std(ddof=1)) / len(differences) ** 0.5, 4)}


# --- words ---


def as_markdown(result: dict[str, Any]) -> str:
    where = result["machine"]
    lines = ["# Mixtures of experts", "", f"`benchmarks/experts.py`. {where['cpu']}, {where['cores']} cores, transformers "
             f"{where['packages']['transformers']}, torch {where['packages']['torch']}.", "", "## Four layouts", "",
             "| layout | of | class in transformers | tensors missing or unexpected | finite | tokens generated | seconds |",
             "|---|---|---|---|---|---|---|"]
    lines += [f"| {r['layout']} | {r['of']} | {r['class']} | {r['missing_or_unexpected']} | {r['finite']} | {r['generated']} | "
              f"{r['seconds']} |" for r in result["layouts"]]
    if "p3" in result:
        p3 = result["p3"]
        lines += ["", "## Branches as experts", "",
                  f"Held-out loss over {p3['units']} units, {p3['rows']} rows of up to {p3['longest']} tokens (mean of units, "
                  "nats; difference from the token-weighted merge with 95 % interval over units). "
                  f"{p3['prompts_per_expert']} prompts per expert; calibration {p3['steps']} steps of 8 of {p3['texts']} "
                  "training texts. Entropy 1: all experts used alike. Own: tokens of a branch's prompts that reach its "
                  "expert.", "",
                  "| arm | loss | minus merge | parameters | active | entropy | max load | own |",
                  "|---|---|---|---|---|---|---|---|"]
        for a in p3["arms"]:
            router = a.get("router", {})
            against = a["against_merge"]
            lines.append(f"| {a['arm']} | {a['loss']:.4f} | {against['mean']:+.4f} ± {against['interval']:.4f}"
                         f" | {a['all'] / 1e6:.2f} M | {a['active'] / 1e6:.2f} M | " + " | ".join(
                             f"{router[k]:.2f}" if k in router else "" for k in ("entropy", "max_load", "own")) + " |")
        mixtures = [a for a in p3["arms"] if "router" in a]
        best, trained = min(mixtures, key=lambda a: a["loss"]), [a for a in mixtures if a["calibration"]]
        plain = {a["arm"]: a["loss"] for a in mixtures}
        helped = sum(a["loss"] < plain[a["arm"].removesuffix(", calibrated")] for a in trained)
        single = min((a for a in p3["arms"] if a["arm"].startswith("branch")), key=lambda a: a["loss"])
        lines += ["", f"The best mixture, {best['arm']}, comes to {best['loss']:.4f} with {best['active'] / 1e6:.2f} M "
                  f"parameters active; the best single branch to {single['loss']:.4f} and the merge to "
                  f"{next(a['loss'] for a in p3['arms'] if a['arm'] == 'token-weighted merge'):.4f}, each with "
                  f"{single['active'] / 1e6:.2f} M. Calibration lowered the held-out loss in {helped} of {len(trained)} "
                  "mixtures."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
