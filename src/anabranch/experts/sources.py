"""The models that a mixture is made of: opened, their adapters ready to be folded, their feed-forward matrices found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from anabranch.engine.adapter import CONFIG, WEIGHTS, Adapter
from anabranch.engine.checkpoint import Checkpoint, TensorInfo
from anabranch.engine.fetch import quantisation, resolve
from anabranch.engine.prepare import converted_weights
from anabranch.engine.reference import Reference
from anabranch.errors import AnabranchError, ModelError

MATRICES = ("gate", "up", "down")
MLP = ".mlp."
NOTHING = TensorInfo((), "F32", "")


@dataclass(frozen=True)
class Source:
    """An opened model. `label`: what the config says."""

    label: str
    checkpoint: Checkpoint
    adapter: Adapter | None = None

    def read(self, name: str) -> Tensor:
        """A tensor: as it is stored; where an adapter changes it, folded, float32."""
        if self.adapter is not None and self.adapter.touches(name):
            return self.adapter.folded(name)
        return self.checkpoint.read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.tensors[name].shape

    @property
    def model_type(self) -> str:
        return str(self.checkpoint.config.get("model_type"))

    @property
    def layers(self) -> int:
        said = self.checkpoint.config.get("num_hidden_layers")
        return said if isinstance(said, int) and not isinstance(said, bool) else 0

    @property
    def companions(self) -> list[Path]:
        """The adapter's files: they decide the weights too."""
        return [self.adapter.folder / CONFIG, self.adapter.folder / WEIGHTS] if self.adapter is not None else []


def matrix(layer: int, which: str) -> str:
    """The name of a feed-forward matrix: `gate` and `up` are [I, H], `down` is [H, I]."""
    return f"model.layers.{layer}.mlp.{which}_proj.weight"


def open_sources(references: Sequence[Reference], *, allow_pickle: bool = False) -> tuple[dict[Reference, Source], list[str]]:
    """Open each model once; and what its adapter's user should know.

    Raises:
        ModelError: models that are not there, are quantised, or have no plain feed-forward; all problems in one message.
        CorruptedError: a single file that is damaged.
    """
    found: dict[Reference, Source] = {}
    errors: list[AnabranchError] = []
    warnings: list[str] = []
    for reference in references:
        try:
            found[reference] = _open(reference, allow_pickle)
            adapter = found[reference].adapter
            warnings += [f"{reference}: {text}" for text in (adapter.warnings if adapter is not None else ())]
        except AnabranchError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ModelError.of("these models cannot be used:", [str(error) for error in errors])
    return found, warnings


def _open(reference: Reference, allow_pickle: bool) -> Source:
    if reference.problems:
        raise ModelError("; ".join(reference.problems))
    folder = resolve(reference.path, reference.revision, converted=converted_weights() if allow_pickle else None)
    checkpoint = Checkpoint.open(folder)
    if (packed := quantisation(checkpoint)) is not None:
        raise ModelError(f"model {reference}: its weights are quantised ({packed}). Give the model as it was before.")
    adapter = None
    if reference.adapter is not None:
        adapter = Adapter.open(resolve(reference.adapter, reference.adapter_revision), checkpoint)
    source = Source(str(reference), checkpoint, adapter)
    lacking = next((name for layer in range(max(1, source.layers)) for which in MATRICES
                    if len(checkpoint.tensors.get(name := matrix(layer, which), NOTHING).shape) != 2), None)
    if lacking is not None or source.layers < 1:
        raise ModelError(f"model {reference}: a `{source.model_type}` without the dense feed-forward of llama, mistral, qwen2 "
                         f"and qwen3 (no '{lacking or matrix(source.layers, 'gate')}'), so it cannot become an expert.")
    biases = [name for name in checkpoint.tensors if MLP in name and name.endswith(".bias")]
    if biases:
        raise ModelError(f"model {reference}: its feed-forward has biases ('{biases[0]}'), and no layout of experts here has "
                         "room for them.")
    return source
