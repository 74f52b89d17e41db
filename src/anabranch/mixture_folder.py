"""Whether a mixture's folder is what its mixture.json says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from anabranch.artifacts import Mixture, Unit, file_digest
from anabranch.errors import CorruptedError
from anabranch.material import PLACES
from anabranch.pictures import Pictures
from anabranch.rows import images_file
from anabranch.unit_images import whole


def finished(out: Path, made_from: dict[str, str], pictures: Pictures | None) -> Mixture | None:
    """The mixture as it lies there, if it was made from just this and every file is whole."""
    try:
        mixture = Mixture.load(out / "mixture.json")
        good = mixture.made_from == made_from and all(
            whole_unit(out, u, pictures) for u in (*mixture.units, *mixture.transfer, *mixture.retention))
    except (CorruptedError, OSError):  # not yet, or damaged: made again
        return None
    return mixture if good else None


def whole_unit(out: Path, unit: Unit, pictures: Pictures | None) -> bool:
    """Whether a unit's files are those that were written. Raises OSError."""
    file = out / unit.file
    if file_digest(file) != unit.sha256:
        return False
    return unit.images_file is None or pictures is None or pictures.whole(
        f"{unit.images_file} {unit.sha256}", images_file(file), lambda: whole(file))


def sweep(out: Path, units: Sequence[Unit], stems: set[str]) -> None:
    """Remove files of units that the mixture no longer has, so that the folder is what mixture.json says."""
    wanted = {f"{stem}{suffix}" for stem in stems for suffix in (".safetensors", ".json")}
    wanted |= {u.images_file for u in units if u.images_file}
    for place in PLACES:
        for path in (*(out / place).glob("*.safetensors"), *(out / place).glob("*.json")):
            if f"{place}/{path.name}" not in wanted:
                path.unlink(missing_ok=True)
