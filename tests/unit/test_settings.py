"""Recipes: every fault of a file is named at once, with what was meant."""

from __future__ import annotations

import msgspec
import pytest

from nascompile import settings
from nascompile.errors import RecipeError
from nascompile.settings import Budgets, Recipe

BUDGET = "[budgets]\nmax_drop = 1.0\n"


def faults(text, tmp_path, given=None):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        settings.from_toml(tmp_path / "recipe.toml", given)
    return caught.value


def test_a_recipe_sets_what_it_names_and_leaves_the_rest(tmp_path):
    text = 'model = "here"\nthreads = 2\n[data]\ndata = "a.csv"\ntext_columns = ["a", "b"]\n[finetune]\nepochs = 7\n' + BUDGET
    (tmp_path / "recipe.toml").write_text(text)
    recipe = settings.from_toml(tmp_path / "recipe.toml")
    assert (recipe.model, recipe.threads, recipe.data.data, recipe.data.text_columns) == ("here", 2, "a.csv", ("a", "b"))
    assert recipe.finetune == msgspec.structs.replace(Recipe().finetune, epochs=7)
    assert recipe.search == Recipe().search


def test_given_settings_override_the_file(tmp_path):
    (tmp_path / "recipe.toml").write_text('model = "here"\n[finetune]\nepochs = 7\npatience = 2\n' + BUDGET)
    given = {"model": "there", "finetune.epochs": 3, "budgets.latency_ms": 2.0, "search.evaluations": 5}
    recipe = settings.from_toml(tmp_path / "recipe.toml", given)
    assert (recipe.model, recipe.finetune.epochs, recipe.finetune.patience, recipe.search.evaluations) == ("there", 3, 2, 5)
    assert recipe.budgets == Budgets(max_drop=1.0, latency_ms=2.0)


def test_a_given_budget_is_enough(tmp_path):
    (tmp_path / "recipe.toml").write_text('model = "here"')
    assert settings.from_toml(tmp_path / "recipe.toml", {"budgets.size_mb": 3.0}).budgets == Budgets(size_mb=3.0)


def test_every_unknown_key_is_named_with_the_nearest_known(tmp_path):
    error = faults('modle = "x"\n[finetune]\nepoch = 3\n[budgets]\nqqq = 1\n', tmp_path)
    assert "unknown settings" in error.message
    assert error.message.endswith("recipe.toml: 3")
    lines = error.detail.splitlines()
    assert lines[0] == "modle: did you mean model?"
    assert lines[1] == "finetune.epoch: did you mean finetune.epochs?"
    assert lines[2].startswith("budgets.qqq: known are latency_ms")


def test_every_wrong_value_is_named_at_once(tmp_path):
    finetune, search = "batch_size = 0\nce_weight = 1.5", 'objectives = []\nsearcher = "luck"'
    detail = faults(f'threads = 0\ntask = "poetry"\n[finetune]\n{finetune}\n[search]\n{search}\n', tmp_path).detail
    for part in ("threads = 0: at least 1", "finetune.batch_size = 0", "finetune.ce_weight = 1.5", "search.objectives", "budget"):
        assert part in detail
    assert "task = poetry: one of classification, regression" in detail
    assert "searcher = luck: one of ehvi, linas, linas_table, mip, nsga2, nsga3, random" in detail


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BUDGET + '[finetune]\nepochs = "many"', "$.finetune.epochs"),
        (BUDGET + "[finetune]\nepochs = 2.5", "$.finetune.epochs"),
        ("budgets = 3", "$.budgets"),
        ("[data]\ntext_columns = 'text'\n" + BUDGET, "$.data.text_columns"),
    ],
)
def test_a_value_of_the_wrong_type_is_placed(text, says, tmp_path):
    assert says in faults(text, tmp_path).detail


def test_a_section_that_is_no_section_is_an_error_even_with_a_flag(tmp_path):
    assert "$.budgets" in faults("budgets = 3", tmp_path, {"budgets.max_drop": 1.0}).detail


@pytest.mark.parametrize("text", ["model = ", "\xff", "[finetune", 'model = "a"\nmodel = "b"'])
def test_what_is_no_toml_is_refused(text, tmp_path):
    (tmp_path / "recipe.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError, match="not a TOML file"):
        settings.from_toml(tmp_path / "recipe.toml")


def test_a_missing_recipe_and_a_folder_are_errors(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        settings.from_toml(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        settings.from_toml(tmp_path)


def test_no_budget_is_refused_and_the_flags_are_named():
    with pytest.raises(RecipeError) as caught:
        settings.check(Recipe(model="mine"))
    for flag in ("--max-drop", "--latency-ms", "--size-mb", "--macs-m", "--memory-mb"):
        assert flag in caught.value.detail


OBJECTIVES = [
    (("error",), True), (("error", "latency_ms", "macs_m", "memory_mb"), True), (("latency_ms", "size_mb"), True), ((), False),
    (("error", "error"), False), (("error", "latency_ms", "size_mb", "macs_m", "memory_mb"), False), (("error", "energy"), False),
]  # fmt: skip


@pytest.mark.parametrize(("names", "fine"), OBJECTIVES)
def test_one_to_four_objectives(names, fine):
    recipe = Recipe(budgets=Budgets(max_drop=1.0), search=settings.SearchSettings(objectives=names, searcher="nsga2"))
    if fine:
        assert settings.check(recipe) == recipe
    else:
        with pytest.raises(RecipeError) as caught:
            settings.check(recipe)
        assert "one to four of error, latency_ms, size_mb, macs_m, memory_mb, worst_ratio" in caught.value.detail


@pytest.mark.parametrize(
    ("budgets", "searcher", "says"),
    [
        (Budgets(size_mb=1.0), "nsga2", "without error nothing keeps a network from being useless"),
        (Budgets(max_drop=1.0), "ehvi", "ehvi: predicts the error, which is not among search.objectives"),
        (Budgets(max_drop=1.0), "mip", "mip: predicts the error, which is not among search.objectives"),
        (Budgets(max_drop=1.0), "linas-table", "linas-table: predicts the error, which is not among search.objectives"),
        (Budgets(max_drop=1.0), "linas_table", "linas_table: predicts the error, which is not among search.objectives"),
    ],
)
def test_what_a_search_without_the_error_needs(budgets, searcher, says):
    with pytest.raises(RecipeError) as caught:
        settings.check(Recipe(budgets=budgets, search=settings.SearchSettings(objectives=("latency_ms",), searcher=searcher)))
    assert says in caught.value.detail


def test_the_latency_on_each_device_is_an_objective_of_its_own():
    three = settings.SearchSettings(objectives=("error", "latency_ms", "size_mb"))
    assert settings.check(Recipe(budgets=Budgets(max_drop=1.0), search=three, also=("pi4:onnxruntime",)))
    with pytest.raises(RecipeError) as caught:
        settings.check(Recipe(budgets=Budgets(max_drop=1.0), search=three, also=("pi4:onnxruntime", "pi5:onnxruntime")))
    assert "search.objectives: 5, a latency for each of 3 devices; at most four" in caught.value.detail


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("search", "validation_samples", -5), ("measure", "agreement", -1), ("measure", "safety", -0.5), ("finetune", "patience", 0),
        ("finetune", "warmup", 1.5), ("finetune", "weight_decay", -0.1),
    ],
)  # fmt: skip
def test_numbers_out_of_their_range_are_named(section, name, value, tmp_path):
    assert f"{section}.{name} = {value}: " in faults(f"{BUDGET}[{section}]\n{name} = {value}\n", tmp_path).detail


@pytest.mark.parametrize(("name", "bound", "fine"), [("max_drop", 0.0, True), ("latency_ms", 0.0, False), ("size_mb", -1.0, False)])
def test_which_budgets_can_be_meant(name, bound, fine):
    recipe = Recipe(budgets=Budgets(**{name: bound}))
    if fine:
        assert settings.check(recipe) == recipe
    else:
        with pytest.raises(RecipeError, match="cannot be run") as caught:
            settings.check(recipe)
        assert f"budgets.{name}" in caught.value.detail


def test_a_metric_of_another_task_is_refused():
    with pytest.raises(RecipeError) as caught:
        settings.check(Recipe(task="regression", metric="accuracy", budgets=Budgets(max_drop=1.0)))
    assert "metric = accuracy: one of" in caught.value.detail


def test_bounds_become_budgets_of_the_target():
    bounds = {(b.metric, b.bound, b.target) for b in Budgets(latency_ms=2.0, max_drop=1.0).bounds("cpu-x")}
    assert bounds == {("latency_ms", 2.0, "cpu-x"), ("drop", 1.0, "")}


@pytest.mark.parametrize("make", [settings.demo_recipe, settings.toy_recipe])
def test_embedded_recipes_are_sound(make):
    assert settings.check(make()) == make()


def test_unknown_precisions_are_refused_and_the_known_are_named():
    demo = settings.demo_recipe()
    search = msgspec.structs.replace(demo.search, precisions=("int8", "int3"))
    with pytest.raises(RecipeError) as caught:
        settings.check(msgspec.structs.replace(demo, search=search))
    assert "search.precisions = ('int8', 'int3'): some of int8, int8-dynamic" in caught.value.detail


def test_a_microcontroller_bounds_what_nobody_bounded():
    assert settings.check(settings.Recipe(device="stm32f746")).budgets == settings.Budgets()
    assert settings.check(settings.Recipe(device="toaster")), "that there is no such device is said where it is looked for"
    with pytest.raises(RecipeError) as caught:
        settings.check(settings.Recipe(device="cpu"))
    assert "no budget" in caught.value.detail
