"""Merge configs: the grammar, what a method asks of one, and the tensors that a plan makes of it.

`configs/` holds configs in the manner of published ones. Their first comments say what is to become of them:
`# expect:` accepted or refused; `# warns:` one warning each, all of them; `# says:` one problem each, all of them.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from anabranch.engine.assemble import assemble
from anabranch.engine.checkpoint import Checkpoint
from anabranch.engine.config import MergeConfig, TokenRow, TokenSetting
from anabranch.engine.dialect import load_config, read_config
from anabranch.engine.layout import layout_of
from anabranch.engine.parameters import interpolated, place_of, read_setting
from anabranch.engine.wanted import COPY, Source
from anabranch.errors import ModelError, RecipeError, ShapeMismatch

CONFIGS = sorted((Path(__file__).parent / "configs").glob("*.yaml"))
GOLDEN = Path(__file__).parents[2].parent / "shared" / "data" / "merge_golden"


# ------------------------------------------------------------------------------------------------------- the corpus


def expected(text: str, key: str) -> list[str]:
    return re.findall(rf"^# {key}: (.+)$", text, flags=re.MULTILINE)


def lines_of(error: RecipeError) -> list[str]:
    return [line.removeprefix("  - ") for line in str(error).split("\n  - ")[1:]] or [str(error)]


def assert_one_each(found: list[str], wanted: list[str]) -> None:
    left = list(found)
    for piece in wanted:
        fitting = [line for line in left if piece in line]
        assert fitting, f"nothing says {piece!r} in {left}"
        left.remove(fitting[0])
    assert not left


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_corpus(path):
    text = path.read_text()
    (outcome,) = expected(text, "expect")
    if outcome == "accepted":
        assert_one_each(list(load_config(path).warnings), expected(text, "warns"))
        return
    with pytest.raises(RecipeError) as caught:
        load_config(path)
    assert_one_each(lines_of(caught.value), expected(text, "says"))


def test_corpus_is_large_and_of_both_kinds():
    outcomes = [expected(path.read_text(), "expect") for path in CONFIGS]
    assert len(outcomes) >= 50 and outcomes.count(["refused"]) >= 20


# --------------------------------------------------------------------------------------------------- numbers and levels


def setting(value, **kwargs):
    problems: list[str] = []
    found = read_setting(value, "weight", problems, [], **kwargs)
    assert not problems and found is not None
    return found


def test_gradient_is_linear_between_its_points():  # C01
    assert [setting([0, 1, 5]).at("x", t) for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 3, 5]
    assert interpolated((7.0,), 0.4) == 7


def test_place_of_a_layer():  # C02
    assert [place_of(i, 5) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert place_of(0, 1) == 1


def test_filters_are_pieces_of_names_and_the_first_that_fits_wins():  # C04
    choices = setting([{"filter": "mlp", "value": 1}, {"filter": "up_proj", "value": 2}, {"filter": "q.*", "value": 3}])
    assert choices.at("model.layers.0.mlp.up_proj.weight", 0) == 1
    assert choices.at("model.layers.0.self_attn.q_proj.weight", 0) is None
    assert setting([{"filter": "*", "value": 4}]).at("", 0) == 4
    assert setting({"filter": "mlp", "value": [0, 1]}).at("mlp", 0.5) == 0.5  # a map is a list of one


@pytest.mark.parametrize(("said", "read"), [(True, 1.0), (5, 5.0), ("0.5", 0.5), (False, 0.0), ("1e-5", 1e-5)])
def test_numbers_in_other_clothes(said, read):  # C08
    assert setting(said).at("x", 0) == read


@pytest.mark.parametrize("said", ["half", None, [], [[1]], [1, None], {}, {"filter": 3, "value": 1}, float("inf"), 10**400,
                                  "nan", {"value": {"value": 1}}, [{"value": 1}, 2], b"1", "true"])
def test_what_is_no_number(said):  # C08
    problems: list[str] = []
    assert read_setting(said, "weight", problems, []) is None
    assert problems and all(p.startswith("weight") for p in problems)


# ------------------------------------------------------------------------------------------------------- tiny models


def tensors_of(layers: int = 2, hidden: int = 4, rows: int = 8, tied: bool = False) -> dict[str, torch.Tensor]:
    shapes = {"model.embed_tokens.weight": (rows, hidden), "model.norm.weight": (hidden,)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.self_attn.q_proj.weight": (hidden, hidden),
                   f"model.layers.{i}.mlp.up_proj.weight": (2 * hidden, hidden),
                   f"model.layers.{i}.input_layernorm.weight": (hidden,)}
    if not tied:
        shapes["lm_head.weight"] = (rows, hidden)
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


def write(folder: Path, name: str, tensors: dict[str, torch.Tensor] | None = None, *, tied: bool = False, layers: int = 2,
          rows: int = 8, **config) -> None:
    (folder / name).mkdir()
    tensors = tensors_of(layers, rows=rows, tied=tied) if tensors is None else tensors
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name / "model.safetensors")
    (folder / name / "config.json").write_text(json.dumps(
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, "vocab_size": rows,
         "tie_word_embeddings": tied} | config))


@pytest.fixture
def models(tmp_path):
    """A folder with base, a, b and c, all alike; 2 layers."""
    for name in ("base", "a", "b", "c"):
        write(tmp_path, name)
    return tmp_path


def read(folder: Path, text: str, **kwargs) -> MergeConfig:
    return read_config(text, folders=(folder,), **kwargs)


def plan(folder: Path, text: str, **kwargs):
    config = read(folder, text)
    inputs = [Checkpoint.open(Path(m.path)) for m in config.models]
    return assemble(config, inputs, [layout_of(i) for i in inputs], **kwargs)


def by_name(assembly):
    return {w.name: w for w in assembly.wanted}


def weighted(**weights: object) -> str:
    return json.dumps([{"model": m, "parameters": {"weight": w}} for m, w in weights.items()])


UP = "model.layers.{}.mlp.up_proj.weight"
Q = "model.layers.{}.self_attn.q_proj.weight"


def test_every_tensor_of_a_linear_merge(models):
    result = plan(models, f"merge_method: linear\nmodels: {weighted(a=0.6, b=0.4)}")
    assert by_name(result).keys() == tensors_of().keys()
    up = by_name(result)[UP.format(1)]
    assert (up.method, up.branches, up.base, up.weights) == ("linear", (Source(0, UP.format(1)), Source(1, UP.format(1))),
                                                             None, (0.6, 0.4))
    assert dict(up.arguments) == {"normalize": True}
    assert (up.shape, up.dtype, up.depth, up.embedding) == ((8, 4), "F32", 1.0, False)
    assert by_name(result)["model.embed_tokens.weight"].embedding and by_name(result)["lm_head.weight"].embedding
    assert (result.donor, result.layers, result.untied, result.warnings) == (0, {}, False, ())


def test_gradients_run_over_layers_and_loose_tensors_take_an_end(models):  # C02, C03
    text = f"merge_method: linear\nmodels: {weighted(a=[1, 0], b=[0, 1])}"
    found = by_name(plan(models, text))
    assert [found[UP.format(i)].weights for i in (0, 1)] == [(1, 0), (0, 1)]
    assert found["model.embed_tokens.weight"].weights == found["lm_head.weight"].weights == (1, 0)
    assert any("final norm and output head take the first value" in w for w in plan(models, text).warnings)
    native = by_name(plan(models, "dialect: native\n" + text))
    assert native["model.embed_tokens.weight"].weights == (1, 0)
    assert native["lm_head.weight"].weights == native["model.norm.weight"].weights == (0, 1)


def test_nearer_levels_win_and_a_filter_falls_through(models):  # C04, C05
    found = by_name(plan(models, """
merge_method: linear
parameters: {weight: 5}
slices:
  - sources:
      - {model: a, layer_range: [0, 1], parameters: {weight: [{filter: mlp, value: 1}]}}
      - {model: b, layer_range: [0, 1]}
    parameters: {weight: 2}
  - sources:
      - {model: a, layer_range: [1, 2]}
      - {model: b, layer_range: [1, 2], parameters: {weight: 3}}
"""))
    assert found[UP.format(0)].weights == (1, 2) and found[Q.format(0)].weights == (2, 2)
    assert found[UP.format(1)].weights == (5, 3)


def test_module_level_stands_between_slice_and_top(models):  # C05
    found = by_name(plan(models, """
merge_method: ties
base_model: base
parameters: {density: 0.1, weight: 1, lambda: 2}
modules:
  default:
    models: [{model: a}, {model: b, parameters: {density: 0.3}}]
    parameters: {density: 0.2}
"""))
    assert dict(found[UP.format(0)].arguments) == {"density": (0.2, 0.3), "normalize": True, "rescale": False, "scale": 2.0}


def test_a_global_parameter_beside_a_model_has_no_effect(models):  # C06
    text = """
merge_method: linear
models: [{model: a, parameters: {weight: 1, normalize: false}}, {model: b, parameters: {weight: 1}}]
"""
    result = plan(models, text)
    assert {dict(w.arguments)["normalize"] for w in result.wanted} == {True}
    assert any("models[0].parameters.normalize" in w for w in result.warnings)


def test_a_required_parameter_that_a_filter_leaves_out_is_named_with_model_and_tensor(models):  # C07
    with pytest.raises(RecipeError, match=r"models\[0\] \(a\): `weight` is required") as caught:
        plan(models, f"""
merge_method: ties
base_model: base
models: {json.dumps([{"model": "a", "parameters": {"weight": {"filter": "mlp", "value": 1}}},
                     {"model": "base"}, {"model": "b", "parameters": {"weight": 1}}])}
""")
    assert Q.format(0) in str(caught.value) and "base" not in str(caught.value).split("(a)")[1]


@pytest.mark.parametrize(("said", "parts"), [
    ("x/y", ("x/y", None, None, None)), ("x@r", ("x", "r", None, None)), ("x+l", ("x", None, "l", None)),
    ("x@r+l@s", ("x", "r", "l", "s")), ("C:\\models\\x@r", ("C:\\models\\x", "r", None, None))])
def test_references(tmp_path, said, parts):  # C09
    (model,) = read(tmp_path, f"merge_method: linear\nmodels: [{{model: '{said}', parameters: {{weight: 1}}}}]").models
    assert (model.path, model.revision, model.adapter, model.adapter_revision) == parts
    assert str(model) == said


def test_an_existing_folder_is_not_taken_apart(tmp_path):
    (tmp_path / "x+y@z").mkdir()
    (tmp_path / "m@1").mkdir()
    config = read(tmp_path, f"merge_method: linear\nmodels: {weighted(**{'x+y@z': 1, 'm@1+org/l': 1})}")
    whole, part = config.models
    assert whole.path == os.path.realpath(tmp_path / "x+y@z") and whole.adapter is None
    assert part.path == os.path.realpath(tmp_path / "m@1") and part.adapter == "org/l"
    assert "taken as a whole" in config.warnings[0]


def test_spellings_of_one_folder_are_one_model(models):
    config = read(models, f"merge_method: ties\nbase_model: ./base\nmodels: {weighted(**{'base': 1, 'a/../a': 1})}")
    assert [str(m) for m in config.models] == ["base", "a/../a"]
    with pytest.raises(RecipeError, match=r"models\[1\]: ./a is already models\[0\].*sum of the weights"):  # C13
        read(models, f"merge_method: linear\nmodels: {weighted(**{'a': 1, './a': 1})}")


def test_a_path_that_is_nothing_is_said(tmp_path):
    (model,) = read(tmp_path, "merge_method: linear\nmodels: [{model: ./gone, parameters: {weight: 1}}]").models
    assert "'./gone': there is no such folder" in model.problems[0]
    (model,) = read(tmp_path, "merge_method: linear\nmodels: [{model: org/name, parameters: {weight: 1}}]").models
    assert model.problems == []


@pytest.mark.parametrize("text", ["models: []", "", "models: [{model: a}]\nslices: [{sources: []}]", "modules: {}"])
def test_one_of_models_slices_modules(tmp_path, text):  # C10
    with pytest.raises(RecipeError, match="one of `models`, `slices` and `modules`"):
        read(tmp_path, f"merge_method: linear\n{text}")


def test_unknown_keys_can_be_let_pass(tmp_path):  # C11
    text = """
merge_method: linear
paramaters: 1
models: [{model: a, parameters: {weight: 1, wieght: 2}, revision: main}]
"""
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    assert len(lines_of(caught.value)) == 3
    config = read(tmp_path, text, allow_unknown_keys=True)
    assert len(config.warnings) == 3 and all(w.endswith("It has no effect.") for w in config.warnings)


@pytest.mark.parametrize(("text", "says"), [
    ("a: [", "not valid YAML"), ("- 1", "a list of 1"), ("3", "holds 3"), ("", "holds nothing"), ("a: 1\na: 2", "stands twice"),
    ("\x00", "not valid YAML"), ("x: " + "1" * 5000, "not valid YAML"), ("[" * 5000, "not valid YAML"),
    ("? [a]\n: 1", "cannot be a key"), ("a: 2001-13-01", "not valid YAML"), ("a: !!python/name:os.system", "not valid YAML")])
def test_bad_yaml(tmp_path, text, says):
    with pytest.raises(RecipeError, match=re.escape(says)):
        read(tmp_path, text)


def test_unreadable_files(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(RecipeError, match="not text in UTF-8"):
        load_config(tmp_path / "latin.yaml")


# ----------------------------------------------------------------------------------------------- who is merged with whom


def test_the_base_is_listed_last_and_never_a_branch(models):  # C14
    result = plan(models, f"merge_method: task_arithmetic\nbase_model: base\nmodels: {weighted(a=0.5, b=1)}")
    up = by_name(result)[UP.format(0)]
    assert up.branches == (Source(0, UP.format(0)), Source(1, UP.format(0)))
    assert (up.base, result.donor) == (Source(2, UP.format(0)), 2)
    first = by_name(plan(models, f"merge_method: task_arithmetic\nbase_model: base\nmodels: {weighted(base=9, a=0.5)}"))
    assert first[UP.format(0)].base == Source(0, UP.format(0)) and first[UP.format(0)].weights == (0.5,)


def test_slices_get_the_base_with_the_range_of_their_first_model(models):  # C14
    found = by_name(plan(models, """
merge_method: ties
base_model: base
slices:
  - sources:
      - {model: a, layer_range: [1, 2], parameters: {weight: 1}}
      - {model: b, layer_range: [0, 1], parameters: {weight: 1}}
"""))
    up = found[UP.format(0)]
    assert (up.branches, up.base) == ((Source(0, UP.format(1)), Source(1, UP.format(0))), Source(2, UP.format(1)))
    listed = by_name(plan(models, """
merge_method: slerp
base_model: base
parameters: {t: 0.5}
slices:
  - sources: [{model: a, layer_range: [1, 2]}, {model: base, layer_range: [0, 1]}]
"""))
    assert listed[UP.format(0)].base == Source(1, UP.format(0))


def test_a_slice_may_have_a_base_of_its_own(models):
    found = by_name(plan(models, """
merge_method: slerp
base_model: base
parameters: {t: 0.5}
slices:
  - sources: [{model: a, layer_range: [0, 1]}]
  - sources: [{model: a, layer_range: [1, 2]}]
    base_model: b
"""))
    assert found[UP.format(0)].base == Source(2, UP.format(0)) and found[UP.format(1)].base == Source(1, UP.format(1))


def test_linear_and_karcher_merge_the_base_too(models):  # C15
    karcher = by_name(plan(models, "merge_method: karcher\nbase_model: base\nmodels: [{model: a}, {model: b}]"))[UP.format(0)]
    assert [s.input for s in karcher.branches] == [0, 1, 2] and karcher.weights == pytest.approx((1 / 3,) * 3)
    linear = plan(models, f"merge_method: linear\nbase_model: base\nmodels: {weighted(a=1)}\nparameters: {{weight: 2}}")
    assert by_name(linear)[UP.format(0)].weights == (1, 2)
    native = plan(models, f"dialect: native\nmerge_method: linear\nbase_model: base\nmodels: {weighted(a=1, b=1)}")
    assert len(by_name(native)[UP.format(0)].branches) == 2 and native.donor == 2
    assert any("only lends its config.json" in w for w in native.warnings)
    sliced = plan(models, """
merge_method: linear
base_model: base
slices: [{sources: [{model: a, layer_range: [0, 2], parameters: {weight: 1}}]}]
""")
    assert len(by_name(sliced)[UP.format(0)].branches) == 1  # the peer adds it to `models` only


def test_passthrough_zeroes_what_a_filter_names(models):  # C16
    found = by_name(plan(models, """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2], parameters: {scale: [{filter: q_proj, value: 0}, {value: 1}]}}]
"""))
    assert {n for n, w in found.items() if dict(w.arguments).get("scale") == 0} == {Q.format(0), Q.format(1)}
    assert {w.method for n, w in found.items() if "q_proj" not in n} == {COPY}


@pytest.mark.parametrize(("method", "text", "says"), [
    ("linear", weighted(a=1, b=-1), "the weights sum to 0"),  # C17
    ("linear", weighted(a=[1, 0], b=[-1, 1]), "the weights sum to 0"),
    ("multislerp", weighted(a=1, b=-1), "the weights sum to 0"),
    ("della", '[{"model": "a", "parameters": {"weight": 1, "density": 0.9}}]', "epsilon < 0.1"),  # C49
    ("della_linear", '[{"model": "a", "parameters": {"weight": 1, "density": [0.5, 0.9]}}]', "epsilon < 0.1"),
    ("nearswap", "[{model: a}]\nparameters: {t: -1}", "wanted at least 0"),
    ("slerp", "[{model: a}, {model: b}]\nparameters: {t: 0.5}", "slerp merges 1 model beside the base base, got 2"),  # C25
    ("nuslerp", weighted(a=1, base=1), "nuslerp subtracts the base"),  # C27
    ("model_stock", "[{model: a}]", "at least 2 models beside the base base, got 1"),  # C58
    ("model_stock", "[{model: a}, {model: b}]\nparameters: {filter_wise: 0.3}", "wanted true or false"),
    ("karcher", "[{model: a}, {model: b}]\nparameters: {max_iter: 5.5}", "wanted a whole number"),
    ("ties", "[{model: base}]", "The base is not merged with itself"),
])
def test_refused_before_a_number_is_read(models, method, text, says):
    base = "" if method == "linear" else "base_model: base\n"
    with pytest.raises(RecipeError, match=re.escape(says)):
        plan(models, f"merge_method: {method}\n{base}models: {text}")


def test_a_gradient_that_comes_to_half_a_flag_is_refused(tmp_path):
    for name in ("base", "a"):
        write(tmp_path, name, layers=4)
    with pytest.raises(RecipeError, match=r"parameters.normalize: got 0.333333, wanted true or false, as a gradient"):
        plan(tmp_path, f"merge_method: ties\nbase_model: base\nmodels: {weighted(a=1)}\nparameters: {{normalize: [0, 1]}}")


def test_weights_worth_a_word(models):  # C27, C39
    def warned(text):
        return " ".join(plan(models, text).warnings)

    assert "taken as equal" in warned(f"merge_method: nuslerp\nmodels: {weighted(a=1, b=-1)}")
    family = "merge_method: task_arithmetic\nbase_model: base\nparameters: {normalize: true}\n"
    assert "divides by 1 instead" in warned(f"{family}models: {weighted(a=1, b=-1)}")
    assert "negative weight" in warned(f"{family}models: {weighted(a=1, b=-0.5)}")
    assert warned(f"merge_method: task_arithmetic\nbase_model: base\nmodels: {weighted(a=1, b=-1)}") == ""


# ------------------------------------------------------------------------------------------------------------ dialects


@pytest.mark.parametrize(("method", "mergekit", "native"), [
    ("ties", {"normalize": True, "rescale": False, "density": 1.0, "scale": 1.0}, {}),  # C43
    ("dare_ties", {"normalize": False, "rescale": "l1", "density": 1.0, "scale": 1.0}, {"rescale": "inverse_density"}),
    ("dare_linear", {"normalize": False, "rescale": "l1", "density": 1.0, "scale": 1.0}, {"rescale": "inverse_density"}),
    ("della", {"normalize": True, "rescale": "l1", "density": 1.0, "epsilon": 0.15, "scale": 1.0},
     {"rescale": "inverse_probability"}),
    ("della_linear", {"normalize": False, "rescale": "l1", "density": 1.0, "epsilon": 0.15, "scale": 1.0},
     {"rescale": "inverse_probability"}),
    ("breadcrumbs", {"normalize": False, "rescale": False, "density": 1.0, "gamma": 0.01, "scale": 1.0}, {}),
    ("breadcrumbs_ties", {"normalize": False, "rescale": False, "density": 1.0, "gamma": 0.01, "scale": 1.0}, {}),
    ("task_arithmetic", {"normalize": False, "scale": 1.0}, {}),
    ("sce", {"select_topk": 1.0, "floor": 1e-6}, {"floor": 0.0}),  # C55
    ("model_stock", {"filter_wise": False, "floor": 1e-6, "clamp": False}, {"floor": 1e-20, "clamp": True}),  # C57
    ("ram", {"epsilon": 1e-5}, {}),
    ("ramplus_tl", {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}, {}),
    ("multislerp", {"normalize": True, "eps": 1e-8}, {}),
])
def test_defaults_of_both_dialects(models, method, mergekit, native):
    text = f"merge_method: {method}\nbase_model: base\nmodels: {weighted(a=1, b=1)}"
    for dialect, wanted in (("mergekit", mergekit), ("native", mergekit | native)):
        found = by_name(plan(models, f"dialect: {dialect}\n{text}"))
        assert dict(found[UP.format(0)].arguments) == wanted, dialect


@pytest.mark.parametrize(("dialect", "said", "means"), [
    ("mergekit", "true", "l1"), ("mergekit", "false", "none"), ("native", "true", "inverse_density"), ("native", "l1", "l1"),
    ("mergekit", "inverse_density", "inverse_density")])
def test_rescale_is_a_flag_or_a_word(models, dialect, said, means):
    found = by_name(plan(models, f"dialect: {dialect}\nmerge_method: dare_ties\nbase_model: base\nmodels: {weighted(a=1)}\n"
                                 f"parameters: {{rescale: {said}}}"))
    assert dict(found[UP.format(0)].arguments)["rescale"] == means


@pytest.mark.parametrize(("method", "said", "ours"), [  # C40
    ("ties", {"lambda": 0.7}, {"scale": 0.7}), ("ties", {"scale": 0.7}, {"scale": 0.7}),
    ("nuslerp", {"nuslerp_row_wise": True, "nuslerp_flatten": False}, {"row_wise": True, "flatten": False}),
    ("multislerp", {"normalize_weights": False}, {"normalize": False})])
def test_names_of_the_peer(models, method, said, ours):
    found = by_name(plan(models, f"merge_method: {method}\nbase_model: base\nmodels: {weighted(a=1, b=1)}\n"
                                 f"parameters: {json.dumps(said)}"))
    assert ours.items() <= dict(found[UP.format(0)].arguments).items()


def test_one_parameter_under_two_names_is_refused(models):
    with pytest.raises(RecipeError, match=r"parameters.scale: says the same as `lambda` beside it"):
        read(models, f"merge_method: ties\nbase_model: base\nmodels: {weighted(a=1)}\nparameters: {{lambda: 1, scale: 1}}")


def test_int8_mask_changes_nothing(models):  # C51
    text = f"merge_method: ties\nbase_model: base\nmodels: {weighted(a=1)}\n"
    masked = plan(models, f"{text}parameters: {{int8_mask: true}}")
    assert masked.wanted == plan(models, text).wanted and len(masked.warnings) == 1


def test_shares_are_divided_by_their_sum(models):
    found = by_name(plan(models, f"merge_method: token_weighted\nbase_model: base\nmodels: {weighted(a=300, b=100)}"))
    assert found[UP.format(0)].weights == (0.75, 0.25)


def test_matrix_methods_hand_over_what_is_no_matrix(models):
    text = "merge_method: tsv_m\nbase_model: base\nmodels: [{model: a}, {model: b}]\nparameters: {scale: 2}"
    found = by_name(plan(models, text))
    assert found[Q.format(0)].method == "tsv_m"
    for name in ("model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"):
        assert found[name].method == "task_vector_mean" and dict(found[name].arguments) == {"scale": 2.0}


# ---------------------------------------------------------------------------------------------------------------- layers


def test_stacking_renumbers_and_maps_layers(models):  # C70
    result = plan(models, """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 2]}]
  - sources: [{model: a, layer_range: [0, 2]}]
""")
    found = by_name(result)
    assert [found[UP.format(i)].branches[0] for i in range(5)] == [
        Source(0, UP.format(0)), Source(0, UP.format(1)), Source(1, UP.format(1)), Source(0, UP.format(0)),
        Source(0, UP.format(1))]
    assert result.layers == {"default": (0, 1, 1, 0, 1)}
    assert [found[UP.format(i)].depth for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert UP.format(5) not in found


def test_loose_tensors_come_from_the_first_and_the_last_slice(models):  # C71
    found = by_name(plan(models, """
merge_method: linear
parameters: {weight: 1}
slices:
  - sources: [{model: a, layer_range: [0, 1]}]
  - sources: [{model: b, layer_range: [1, 2]}, {model: c, layer_range: [1, 2]}]
"""))
    assert [s.input for s in found["model.embed_tokens.weight"].branches] == [0]
    assert [s.input for s in found["model.norm.weight"].branches] == [1, 2]
    assert [s.input for s in found["lm_head.weight"].branches] == [1, 2]


def test_ranges_beyond_the_model_are_refused(models):  # C12
    with pytest.raises(RecipeError) as caught:
        plan(models, """
merge_method: ties
base_model: base
slices:
  - sources: [{model: a, layer_range: [0, 2], parameters: {weight: 1}}]
  - sources: [{model: a, layer_range: [2, 4], parameters: {weight: 1}}]
""")
    assert "slices[1].sources[0]: layer_range [2, 4] of a, which has 2 layers. Wanted: an end of at most 2" in str(caught.value)
    assert "slices[1], base_model: layer_range [2, 4] of base" in str(caught.value)


@pytest.mark.parametrize("said", ["[-1, 1]", "[1, 1]", "[2, 1]", "[0.5, 2]", "[0, true]", "[0, 1, 2]", "[]", "'0:2'",
                                  "2", "[0, .inf]"])
def test_ranges_that_are_none(tmp_path, said):  # C12
    with pytest.raises(RecipeError, match=r"slices\[0\].sources\[0\].layer_range: "):
        read(tmp_path, f"merge_method: passthrough\nslices: [{{sources: [{{model: a, layer_range: {said}}}]}}]")


def test_models_of_different_depth(models):
    write(models, "deep", layers=3)
    with pytest.raises(ModelError, match=r"a has 2 layers, deep has 3 layers\. Take layers apart with `slices`"):
        plan(models, f"merge_method: linear\nmodels: {weighted(a=1, deep=1)}")
    result = plan(models, """
merge_method: passthrough
slices: [{sources: [{model: a, layer_range: [0, 2]}]}, {sources: [{model: deep, layer_range: [1, 3]}]}]
""")
    assert result.layers == {"default": (0, 1, 1, 1)} and "beyond the 2 layers of a" in " ".join(result.warnings)


def two_stacks() -> dict[str, torch.Tensor]:
    vision = {f"vision_tower.layers.{i}.mlp.fc1.weight": torch.zeros(4, 4) for i in range(3)}
    text = {f"language_model.layers.{i}.mlp.up_proj.weight": torch.zeros(8, 4) for i in range(2)}
    return vision | text | {"language_model.embed_tokens.weight": torch.zeros(8, 4), "lm_head.weight": torch.zeros(8, 4),
                            "multi_modal_projector.weight": torch.zeros(4, 4)}


@pytest.fixture
def pair(tmp_path):
    for name in ("a", "b"):
        write(tmp_path, name, two_stacks(), architectures=["LlavaForConditionalGeneration"], model_type="llava",
              num_hidden_layers=None, vision_config={"num_hidden_layers": 3},
              text_config={"num_hidden_layers": 2, "vocab_size": 8})
    return tmp_path


def test_models_of_several_modules(pair):
    assert by_name(plan(pair, f"merge_method: linear\nmodels: {weighted(a=1, b=1)}")).keys() == two_stacks().keys()
    with pytest.raises(RecipeError, match=r"have 3 modules.*does not say which"):
        plan(pair, "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}]")
    layers, tower = "language_model.layers", "vision_tower.layers"
    with pytest.raises(RecipeError) as caught:
        plan(pair, "merge_method: passthrough\nmodules: " + json.dumps(
            {name: {"models": [{"model": "a"}]} for name in (layers, "vision_towers")}))
    assert f"modules.vision_towers: these models have no such module. Did you mean `{tower}`?" in str(caught.value)
    assert "nothing is said about `vision_tower.layers` (3 layers), `default` (what is in no layer)" in str(caught.value)
    result = plan(pair, f"""
merge_method: passthrough
modules:
  default: {{models: [{{model: a}}]}}
  {tower}: {{models: [{{model: b}}]}}
  {layers}: {{slices: [{{sources: [{{model: a, layer_range: [1, 2]}}]}}, {{sources: [{{model: b, layer_range: [0, 2]}}]}}]}}
""")
    found = by_name(result)
    assert found["language_model.layers.2.mlp.up_proj.weight"].branches[0].name == "language_model.layers.1.mlp.up_proj.weight"
    assert result.layers == {layers: (1, 0, 1)}


# ------------------------------------------------------------------------------------ tensors that not all models have


def test_rows_that_differ_are_refused_with_a_remedy(models):
    write(models, "wide", rows=10)
    text = f"merge_method: ties\nbase_model: base\nmodels: {weighted(a=1, wide=1)}"
    with pytest.raises(ShapeMismatch, match=r"wide has 10 rows, base has 8\..*Add `tokenizer: \{source: base\}`") as caught:
        plan(models, text)
    assert len(lines_of(caught.value)) == 2  # embedding and head
    found = by_name(plan(models, text, rows=9))
    assert found["lm_head.weight"].shape == found["model.embed_tokens.weight"].shape == (9, 4)
    assert found[UP.format(0)].shape == (8, 4)


def test_other_shapes(models):  # C21
    write(models, "odd", tensors_of() | {UP.format(1): torch.zeros(6, 4), Q.format(0): torch.zeros(4, 3)})
    with pytest.raises(ShapeMismatch) as caught:
        plan(models, f"merge_method: linear\nmodels: {weighted(a=1, odd=1)}")
    assert f"tensor '{UP.format(1)}': odd has shape (6, 4), a has (8, 4)." in str(caught.value)
    assert len(lines_of(caught.value)) == 2
    family = f"merge_method: ties\nbase_model: base\nmodels: {weighted(a=1, odd=2)}"
    result = plan(models, family)
    assert [len(by_name(result)[name].branches) for name in (UP.format(1), UP.format(0))] == [1, 2]
    assert by_name(result)[UP.format(1)].weights == (1,)
    assert "odd is left out" in " ".join(result.warnings)
    with pytest.raises(ShapeMismatch):
        plan(models, "dialect: native\n" + family)


def test_buffers_of_integers_are_copied(models):  # C22
    for name in ("x", "y"):
        write(models, name, tensors_of() | {"model.position_ids": torch.arange(4)})
    result = by_name(plan(models, f"merge_method: linear\nmodels: {weighted(x=1, y=1)}\nout_dtype: bfloat16"))
    ids = result["model.position_ids"]
    assert (ids.method, ids.dtype, len(ids.branches)) == (COPY, "I64", 2)
    write(models, "z", tensors_of() | {"model.position_ids": torch.zeros(4)})
    with pytest.raises(ShapeMismatch, match=r"a buffer of I64 \[4\] in x, of F32 \[4\] in z"):
        plan(models, f"merge_method: linear\nmodels: {weighted(x=1, z=1)}")


def test_a_tensor_that_only_the_base_has_is_copied(models):  # C52
    bias = "model.layers.0.self_attn.q_proj.bias"
    write(models, "biased", tensors_of() | {bias: torch.zeros(4)})
    result = plan(models, f"merge_method: ties\nbase_model: biased\nmodels: {weighted(a=1, b=1)}")
    assert by_name(result)[bias].method == COPY and by_name(result)[bias].branches == (Source(2, bias),)
    assert "copied from the base" in " ".join(result.warnings)
    with pytest.raises(ShapeMismatch, match="biased has it and the base base has not"):
        plan(models, f"merge_method: ties\nbase_model: base\nmodels: {weighted(a=1, biased=1)}")


def test_a_tensor_that_some_have(models):  # C59
    bias = "model.layers.0.self_attn.q_proj.bias"
    write(models, "biased", tensors_of() | {bias: torch.zeros(4)})
    write(models, "biased_base", tensors_of() | {bias: torch.zeros(4)})
    linear = f"merge_method: linear\nmodels: {weighted(a=1, biased=3)}"
    result = plan(models, linear)
    assert by_name(result)[bias].weights == (3,) and "a lacks it" in " ".join(result.warnings)
    with pytest.raises(ShapeMismatch, match="a fraction of it"):
        plan(models, linear + "\nparameters: {normalize: false}")
    with pytest.raises(ShapeMismatch, match="a lacks it, and other models have it"):
        plan(models, "dialect: native\n" + linear)
    stock = plan(models, "merge_method: model_stock\nbase_model: biased_base\nmodels: [{model: a}, {model: biased}]")
    assert by_name(stock)[bias].method == COPY and by_name(stock)[bias].branches == (Source(2, bias),)
    slerp = plan(models, "merge_method: slerp\nbase_model: biased_base\nmodels: [{model: a}]\nparameters: {t: 0.5}")
    assert by_name(slerp)[bias].method == COPY


def test_a_buffer_that_loaders_compute_is_left_out(models):
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write(models, "old", tensors_of() | {old: torch.zeros(2)})
    result = plan(models, f"merge_method: ties\nbase_model: base\nmodels: {weighted(old=1)}")
    assert old not in by_name(result) and "left out: base, the base, has no such buffer" in " ".join(result.warnings)


def test_a_tied_base_and_an_untied_model(models):  # C64
    write(models, "tied", tied=True)
    result = plan(models, f"merge_method: ties\nbase_model: tied\nmodels: {weighted(a=1)}")
    head = by_name(result)["lm_head.weight"]
    assert result.untied and head.branches == (Source(0, "lm_head.weight"),)
    assert head.base == Source(1, "model.embed_tokens.weight")
    other = by_name(plan(models, f"merge_method: linear\nmodels: {weighted(tied=[1, 2], a={'filter': 'lm_head', 'value': 5})}\n"
                                 "parameters: {weight: 1}"))["lm_head.weight"]
    assert other.weights == (1, 5)  # a filter sees the head's own name


def test_models_that_are_all_tied_get_no_head(models):
    write(models, "t1", tied=True)
    write(models, "t2", tensors_of() | {"lm_head.weight": torch.zeros(8, 4)}, tied=True)  # a copy of the embedding
    result = plan(models, f"merge_method: linear\nmodels: {weighted(t1=1, t2=1)}")
    assert "lm_head.weight" not in by_name(result) and not result.untied
    write(models, "t3", tensors_of() | {"lm_head.weight": torch.ones(8, 4)}, tied=True)
    result = plan(models, f"merge_method: linear\nmodels: {weighted(t1=1, t3=1)}")
    head = by_name(result)["lm_head.weight"]
    assert head.branches == (Source(0, "model.embed_tokens.weight"), Source(1, "lm_head.weight"))
    assert result.untied


@pytest.mark.parametrize(("dtypes", "said", "wanted"), [  # C63
    (("bfloat16", "bfloat16"), "", "BF16"), (("bfloat16", "float32"), "", "F32"), (("bfloat16", "float16"), "", "F32"),
    (("bfloat16", "bfloat16"), "dtype: float32", "F32"),
    (("float32", "float32"), "dtype: float32\nout_dtype: bfloat16", "BF16")])
def test_dtype_of_the_result(tmp_path, dtypes, said, wanted):
    for name, dtype in zip(("a", "b"), dtypes, strict=True):
        write(tmp_path, name, {k: v.to(getattr(torch, dtype)) for k, v in tensors_of().items()})
    result = plan(tmp_path, f"merge_method: linear\nmodels: {weighted(a=1, b=1)}\n{said}")
    assert {w.dtype for w in result.wanted} == {wanted}


def test_a_copy_that_changes_its_dtype_is_a_merge_of_one(models):
    result = plan(models, "merge_method: passthrough\nmodels: [{model: a}]\nout_dtype: bfloat16")
    assert {(w.method, w.arguments, w.dtype) for w in result.wanted} == {("passthrough", (("scale", 1.0),), "BF16")}


def test_other_architectures_and_packed_weights(models):
    write(models, "gpt", architectures=["GPT2LMHeadModel"])
    write(models, "packed", quantization_config={"quant_method": "gptq", "bits": 4})
    text = f"merge_method: linear\nmodels: {weighted(a=1, gpt=1, packed=1)}"
    with pytest.raises(ModelError) as caught:
        plan(models, text)
    assert "packed: quantised (gptq 4-bit" in str(caught.value)
    assert "a is LlamaForCausalLM, gpt is GPT2LMHeadModel" in str(caught.value)
    mixed = plan(models, f"merge_method: linear\nmodels: {weighted(a=1, gpt=1)}", allow_mixed=True)
    assert "different architectures" in " ".join(mixed.warnings)
    same = {"model": "gpt", "override_architecture": "LlamaForCausalLM"}
    renamed = json.dumps([{"model": m, "parameters": {"weight": 1}} for m in ("a", same)])
    assert plan(models, f"merge_method: linear\nmodels: {renamed}").warnings == ()


def test_a_filter_without_a_tensor_is_remarked(models):
    result = plan(models, f"merge_method: linear\nmodels: {weighted(a=[{'filter': 'att.*', 'value': 2}, {'value': 1}])}")
    assert result.warnings == ("models[0].parameters.weight: no tensor has `att.*` in its name. A filter is a plain piece of a "
                               "name, no pattern.",)


def test_fisher_sidecars_are_held_to_their_models(models):
    full = tensors_of()
    save_file(full, models / "a.safetensors")
    save_file({k: v[:1] if k == Q.format(0) else v for k, v in full.items() if k != UP.format(1)}, models / "b.safetensors")
    entry = [{"model": m, "fisher": f"{m}.safetensors"} for m in ("a", "b")]
    with pytest.raises(RecipeError) as caught:
        plan(models, f"merge_method: fisher\nmodels: {json.dumps(entry)}")
    assert f"(fisher of b): has no '{UP.format(1)}'" in str(caught.value)
    assert f"another shape than the model's has '{Q.format(0)}'" in str(caught.value)
    odd = {Q.format(0): full[Q.format(0)].double(), UP.format(1): full[UP.format(1)].int()}
    save_file(full | odd, models / "b.safetensors")
    with pytest.raises(RecipeError) as caught:
        plan(models, f"merge_method: fisher\nmodels: {json.dumps(entry)}")
    message = str(caught.value)
    assert f"(fisher of b): holds F64, I32 in '{Q.format(0)}', '{UP.format(1)}'; wanted" in message
    assert ">= 0, as F32, F16, BF16" in message
    result = plan(models, f"merge_method: fisher\nmodels: {json.dumps(entry[:1])}")
    assert result.fisher == {0: models.resolve() / "a.safetensors"} and by_name(result)[UP.format(0)].weights == (1.0,)


def test_all_problems_come_at_once(models):
    write(models, "wide", tensors_of(rows=10) | {UP.format(0): torch.zeros(3, 4)}, rows=10)
    with pytest.raises(RecipeError) as caught:
        plan(models, f"merge_method: linear\nmodels: {weighted(a=[1, -1], wide=[1, 1])}")
    assert len(lines_of(caught.value)) == 4  # two row counts, a shape, and the sum of the last layer's weights
    assert caught.type is RecipeError  # of two kinds, so of neither


# ----------------------------------------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_block(models):
    config = read(models, f"""
merge_method: linear
models: {weighted(a=1, b=1)}
tokenizer:
  source: org/elsewhere
  pad_to_multiple_of: 16
  tokens:
    "<x>": {{source: a, force: true}}
    "<y>": {{source: {{kind: model_token, model: b, token_id: 3}}}}
    "<z>": {{source: {{kind: zero}}}}
    "<w>":
""")
    a, b = config.models
    assert [str(r) for r in config.tokenizers_only] == ["org/elsewhere"]
    assert (config.tokenizer.source, config.tokenizer.pad_to_multiple_of) == (config.tokenizers_only[0], 16)
    assert config.tokenizer.tokens == {"<x>": TokenSetting(TokenRow(a), True), "<y>": TokenSetting(TokenRow(b, None, 3)),
                                       "<z>": TokenSetting("zero"), "<w>": TokenSetting()}
    assert read(models, f"merge_method: linear\nmodels: {weighted(a=1)}").tokenizer is None


@pytest.mark.parametrize(("block", "says"), [
    ("{source: 3}", "tokenizer.source: got 3"), ("union", "`tokenizer: {source: union}`"), ("{pad: 4}", "unknown key `pad`"),
    ("{pad_to_multiple_of: 0}", "wanted a whole number of at least 1"), ("{tokens: [a]}", "wanted a mapping"),
    ("{tokens: {1: {}}}", "got 1 as a token"), ("{tokens: {x: {force: maybe}}}", "wanted true or false"),
    ("{tokens: {x: {source: {kind: one}}}}", "got 'one'. Known: model_token, zero."),
    ("{tokens: {x: {source: {kind: model_token, model: a}}}}", "one of `token` and `token_id` must be given"),
    ("{tokens: {x: {source: {kind: model_token, model: a, token_id: -1}}}}", "wanted a whole number of at least 0")])
def test_bad_tokenizer_blocks(models, block, says):
    with pytest.raises(RecipeError, match=re.escape(says)):
        read(models, f"merge_method: linear\nmodels: {weighted(a=1)}\ntokenizer: {block}")


# ------------------------------------------------------------------------------------------------- the peer's own cases


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden cases of MergeKit are not beside the repository")
@pytest.mark.parametrize("case", sorted(p.name for p in (GOLDEN / "cases").glob("*")) if GOLDEN.is_dir() else [])
def test_golden_configs_name_the_peers_tensors(case):
    text = (GOLDEN / "cases" / case / "config.yaml").read_text()
    if case == "bad-embedding-sizes":
        with pytest.raises(ShapeMismatch, match=r"tokenizer: \{source: base\}"):
            plan(GOLDEN / "models", text)
        return
    with safe_open(GOLDEN / "cases" / case / "expected.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    rows = shapes["model.embed_tokens.weight"][0] if case.startswith("tokenizer") else None
    assert {w.name: w.shape for w in plan(GOLDEN / "models", text, rows=rows).wanted} == shapes
