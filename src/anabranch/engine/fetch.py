"""Where a model or an adapter lies: a folder here, or a repository of the Hugging Face Hub; and what is refused there.

Downloads are weights in safetensors, and text. Pickled weights (*.bin) can run any program when they are loaded; they are
fetched and read only when the caller names a folder for their conversion, and then by torch's restricted unpickler, which
builds tensors and nothing else. They are written anew as safetensors, once, one tensor at a time, so that all else reads
one format: by offset, without a copy of the model in memory, and with the hash of a file that stays.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anabranch.artifacts import digest
from anabranch.engine.checkpoint import INDEX, WEIGHTS, Checkpoint
from anabranch.errors import CorruptedError, ModelError, OutputError

# What a model folder may bring: weights as safetensors, the rest as text. Never pickles.
DOWNLOADED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
# The same weights once more, in another layout or for another runtime.
NOT_DOWNLOADED = ["consolidated*.safetensors", "*/*.safetensors"]
PICKLED = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
# What goes along when the weights are written anew: the text above, further chat templates, and a model's own code
# (copied, never run: only the `trust_remote_code` of whoever loads the result does that).
BESIDE = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "additional_chat_templates/*.jinja")
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
# What the Hub client says, and what to do about it.
REMEDIES = {
    "GatedRepoError": "It asks for consent: agree to its terms on its page, and log in (`hf auth login`).",
    "RepositoryNotFoundError": "There is none of that name, or it is private: check the name, or log in (`hf auth login`).",
    "RevisionNotFoundError": "It has no such revision: check the branch, tag or commit.",
    "LocalEntryNotFoundError": "It is not in the cache here, and the Hub cannot be reached: go online, or download it first "
                               "(`hf download`) and give the folder.",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set and it is not in the cache here: unset it, or give a folder.",
}


def resolve(
    reference: str | Path, revision: str | None = None, cache: Path | None = None, *, converted: Path | None = None
) -> Path:
    """The folder of a model or an adapter.

    Args:
        reference: a folder, or a Hub id such as Qwen/Qwen2.5-0.5B. A folder that exists wins.
        revision: branch, tag or commit of the repository.
        cache: the Hub client's cache; None: where it keeps it.
        converted: where to write pickled weights anew as safetensors; None refuses them.

    Raises:
        ModelError: neither a folder nor to be had from the Hub; pickled weights that are refused or need code to load.
        OutputError: the conversion cannot be written.
    """
    folder = Path(reference)
    if os.path.isdir(folder):
        if revision is not None:
            raise ModelError(f"model {reference}: is a folder here, and a folder has no revision ({revision!r}). Leave the "
                             "revision out, or give the Hub id.")
    elif folder.is_absolute() or not HUB_ID.match(str(reference)):
        raise ModelError(f"model {reference}: no such folder. Give a folder that holds config.json and {WEIGHTS} (or its "
                         "shards and their index), or a Hub id such as Qwen/Qwen2.5-0.5B.")
    else:
        folder = _download(str(reference), revision, cache, converted is not None)
    if any(folder.glob("*.safetensors")) or not any(folder.glob("*.bin")):
        return folder
    if converted is not None and any(folder.glob("pytorch_model*.bin")):
        return convert(folder, converted)
    return folder  # opening it says what is there, and what to do


def _download(repository: str, revision: str | None, cache: Path | None, pickles: bool) -> Path:
    folder = _snapshot(repository, revision, cache, DOWNLOADED)
    if any(folder.glob("*.safetensors")):
        return folder
    if pickles:
        return _snapshot(repository, revision, cache, DOWNLOADED + PICKLED)
    raise ModelError(f"model {repository}: the repository has no weights in safetensors. If it has pickled ones (*.bin), "
                     "allow those (--allow-pickle) if you trust it, or name a revision that has safetensors.")


def _snapshot(repository: str, revision: str | None, cache: Path | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, cache_dir=cache, allow_patterns=patterns,
                                      ignore_patterns=NOT_DOWNLOADED))
    except Exception as error:  # the Hub client raises a dozen types for "cannot"; the message is what helps
        kinds = [kind.__name__ for kind in type(error).__mro__]
        remedy = next((REMEDIES[kind] for kind in kinds if kind in REMEDIES),
                      "Check the name and the network, or download it first (`hf download`) and give the folder.")
        said = (str(error).strip().splitlines() or ["no message"])[0][:200]
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(f"model {repository!r}{at}: neither a folder here nor to be had from the Hub ({kinds[0]}: {said}). "
                         f"{remedy}") from error


# ------------------------------------------------------------------------------------------------------ pickled weights


def convert(folder: Path, into: Path) -> Path:
    """A folder below `into` with the weights of `folder` as safetensors and its text files. Made once, then found again,
    as long as no file of `folder` changes.

    One .bin file gives one .safetensors file. Tensors that share memory (tied weights) are each written out. Any number of
    processes may convert a folder at once: each writes to a folder of its own, the first that is done gives it its name,
    and the others take that.

    Raises:
        ModelError: a file that holds more than tensors, or needs code to load.
        CorruptedError: a file that cannot be read.
        OutputError: the folder cannot be written.
    """
    pickles = _pickles(folder)
    beside = _beside(folder)
    facts = [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in pickles]
    facts += [[name, str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for name, p in beside.items()]
    done = into / f"{folder.name}-{digest(facts)[:16]}"
    if done.is_dir():
        return done
    # Not by the process's number alone: those repeat, between the machines that share a disk and after a kill.
    partial = into / f".{done.name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        weight_map: dict[str, str] = {}
        for path in pickles:
            file = path.name.replace("pytorch_model", "model", 1).removesuffix(".bin") + ".safetensors"
            tensors = _unpickle(path)
            _write(partial / file, tensors)
            weight_map |= dict.fromkeys(tensors, file)
            del tensors
        if len(pickles) > 1:
            index = {"metadata": {}, "weight_map": dict(sorted(weight_map.items()))}
            (partial / INDEX).write_text(json.dumps(index, indent=2))
        for name, path in beside.items():
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, partial / name)
        os.replace(partial, done)  # fails where `done` has files in it
    except OSError as error:
        if done.is_dir():  # another process was faster
            return done
        raise OutputError(f"cannot write {done}, the safetensors of {folder}: {error.strerror or error}. Free space or give "
                          "another folder, then run the same command again.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return done


def convert_file(path: Path, into: Path) -> Path:
    """A pickled file of tensors as a safetensors file below `into`, made once, as `convert` does for a folder. Raises as it."""
    facts = [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
    done = into / f"{path.stem}-{digest(facts)[:16]}.safetensors"
    if done.is_file():
        return done
    partial = into / f".{done.name}.{os.getpid()}-{secrets.token_hex(4)}.partial"
    try:
        into.mkdir(parents=True, exist_ok=True)
        _write(partial, _unpickle(path))
        os.replace(partial, done)
    except OSError as error:
        raise OutputError(f"cannot write {done}, the safetensors of {path}: {error.strerror or error}. Free space, then run "
                          "the same command again.") from error
    finally:
        partial.unlink(missing_ok=True)
    return done


def _beside(folder: Path) -> dict[str, Path]:
    """The files that go along, by name."""
    found = {path.relative_to(folder).as_posix(): path for pattern in BESIDE for path in folder.glob(pattern) if path.is_file()}
    return {name: found[name] for name in sorted(found) if not name.endswith(".bin.index.json")}


def _pickles(folder: Path) -> list[Path]:
    """The .bin files that make up the model."""
    index = folder / "pytorch_model.bin.index.json"
    if not index.is_file():
        return sorted(folder.glob("pytorch_model*.bin"))
    try:
        files = sorted({str(file) for file in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CorruptedError(f"{index}: cannot be read, or has no `weight_map` ({error}). Fetch this file again.") from error
    missing = [file for file in files if Path(file).name != file or not (folder / file).is_file()]
    if missing:
        raise CorruptedError.of(f"model folder {folder}: {index.name} names files that are not there. Fetch them again:",
                                missing)
    return [folder / file for file in files]


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Name -> tensor, mapped from the file where its format allows it."""
    try:
        try:
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            value = torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except OSError as error:
        raise CorruptedError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except Exception as error:  # UnpicklingError for what is refused, RuntimeError for a damaged archive
        said = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ModelError(f"{path}: is damaged, or holds more than tensors and would run code when loaded, which is refused "
                         f"({type(error).__name__}: {said}). Fetch it again, or convert it where you trust it.") from error
    odd = [str(k) for k, v in value.items() if not isinstance(v, Tensor)] if isinstance(value, dict) else ["(top level)"]
    if odd:
        raise ModelError(f"{path}: wanted a table of names and tensors; these are none: {', '.join(odd[:5])}"
                         f"{' ..' if len(odd) > 5 else ''}. Save the model's state_dict alone.")
    return value


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, widest dtypes first, one tensor in memory at a time."""
    strange = sorted({str(t.dtype) for t in tensors.values() if t.dtype not in DTYPES})
    if strange:
        raise ModelError(f"{path.name}: tensors of {', '.join(strange)} cannot be merged; save the model in float32, "
                         "bfloat16 or float16")
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        size = tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            if tensors[name].numel():
                tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tofile(file)
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------------- quantised weights


def quantisation(checkpoint: Checkpoint) -> str | None:
    """How the weights are quantised, in words for a message; None for plain weights.

    Told by config.json's `quantization_config`, by 8-bit and smaller floats, and by integers with the companions that
    packed weights have (scales, zero points, absmax).
    """
    said = checkpoint.config.get("quantization_config")
    names = [name for name, info in checkpoint.tensors.items() if _packed(name, info.dtype, checkpoint)]
    small = sorted({checkpoint.tensors[name].dtype for name in names})
    seen = f"{len(names)} tensors of {', '.join(small)}, such as '{names[0]}'" if names else ""
    if isinstance(said, dict) and said:
        return f"{_method(said)} by config.json's `quantization_config`" + (f"; {seen}" if seen else "")
    return seen or None


def _method(config: Mapping[str, Any]) -> str:
    """'bitsandbytes 4-bit nf4', 'gptq 4-bit', 'fp8 e4m3', .."""
    bits = config.get("bits") or (4 if config.get("load_in_4bit") else 8 if config.get("load_in_8bit") else None)
    kind = config.get("bnb_4bit_quant_type") if config.get("load_in_4bit") else config.get("fmt") or config.get("format")
    words = [str(config.get("quant_method") or "quantised"), f"{bits}-bit" if bits else "", str(kind or "")]
    return " ".join(word for word in words if word)


def _packed(name: str, dtype: str, checkpoint: Checkpoint) -> bool:
    if re.match(r"F[468]_|F4$|E8M0", dtype):
        return True
    if dtype not in ("U8", "I8", "I32", "U32"):
        return False
    return any(companion in checkpoint.tensors for companion in _companions(name))


def _companions(name: str) -> Iterator[str]:
    """Names that stand beside a packed weight: bitsandbytes, GPTQ and AWQ, mxfp4, compressed-tensors."""
    stem = name.rpartition(".")[0]
    yield from (f"{name}.absmax", f"{name}_scale", f"{name}_scale_inv", f"{name}_scales", f"{stem}.SCB", f"{stem}.weight_scale")
    if name.endswith((".qweight", ".qzeros", ".g_idx")):
        yield f"{stem}.scales"
    if name.endswith("_packed"):
        yield f"{name.removesuffix('_packed')}_scale"
    if name.endswith(("_blocks", "_scales")):
        yield re.sub(r"_(blocks|scales)$", lambda m: "_scales" if m[1] == "blocks" else "_blocks", name)
