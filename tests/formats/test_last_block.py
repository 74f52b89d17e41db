"""The last residual block of real architectures: what stands behind it is the final norm, and nothing else."""

from __future__ import annotations

import pytest
import torch
from test_layout_of import MODELS

from anabranch.diagnose.subject import NotApplicable
from anabranch.mergeability.data import last_block, token_mean
from anabranch.mergeability.observation import activation_mean
from anabranch.model import Batch, padded
from anabranch.rows import Rows

transformers = pytest.importorskip("transformers")

GEMMA = ("GemmaForCausalLM", "GemmaConfig", MODELS["llama"][2] | {"head_dim": 8}, {})
FAMILIES = {name: MODELS[name] for name in ("llama", "qwen2", "gpt2", "neox", "opt", "mamba", "mixtral", "lfm2", "gemma3")}
# The final norm, as each family calls it.
NORMS = {"llama": "model.norm", "qwen2": "model.norm", "gemma": "model.norm", "gemma3": "model.norm", "mixtral": "model.norm",
         "gpt2": "transformer.ln_f", "neox": "gpt_neox.final_layer_norm", "opt": "model.decoder.final_layer_norm",
         "mamba": "backbone.norm_f", "lfm2": "model.embedding_norm"}


def batch_of(lengths: list[int]) -> Batch:
    rows = Rows.of([([1 + (3 * i + j) % 37 for j in range(n)], [0] + [1] * (n - 1)) for i, n in enumerate(lengths)])
    return padded(rows, torch.arange(len(lengths)).numpy(), torch.device("cpu"))


@pytest.mark.parametrize("name", [*FAMILIES, "gemma"])
def test_final_norm_of_what_the_block_puts_out_is_the_last_hidden_state(name):
    kind, config, arguments, _ = FAMILIES.get(name, GEMMA)
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**arguments)).eval()
    batch, seen = batch_of([7, 4]), []
    handle = last_block(model).register_forward_hook(
        lambda _m, _i, output: seen.append(output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        hidden = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        handle.remove()
        assert torch.allclose(model.get_submodule(NORMS[name])(seen[0]), hidden, atol=1e-5)
        assert not torch.allclose(seen[0], hidden, atol=1e-3)

        def run(b: Batch) -> None:
            model(input_ids=b.input_ids, attention_mask=b.attention_mask)

        mean = activation_mean(model, last_block(model), [batch], run=run, pool=token_mean)
        byrow = torch.stack([seen[0][0].double().mean(0), seen[0][1, :4].double().mean(0)]).mean(0)
    assert torch.allclose(torch.from_numpy(mean), byrow, atol=1e-6)


def test_a_model_without_a_list_of_blocks_is_refused_with_the_reason():
    with pytest.raises(NotApplicable, match="no list of blocks"):
        last_block(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_a_block_that_gives_no_vector_per_token_is_refused():
    with pytest.raises(NotApplicable, match="one vector per token"):
        token_mean(torch.zeros(2, 5), batch_of([5, 3]))
