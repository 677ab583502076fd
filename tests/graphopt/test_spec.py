"""Pipelines as text and recipe files, both lossless."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, make_dataclass
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.base import Context, Effect, Pass, PassResult, option
from graphopt.errors import UsageError
from graphopt.pipeline.describe import describe, help_text, json_schema
from graphopt.pipeline.recipe import Recipe, parse_recipe, read_recipe, write_recipe
from graphopt.spec import parse, to_spec


@dataclass(frozen=True)
class Sample(Pass):
    """Do nothing, with options.

    Algebra: x = x.
    """

    name: ClassVar[str] = "sample"
    effect: ClassVar[Effect] = Effect.LOSSY
    count: int = option(1, "how many", low=0, high=9)
    share: float | None = option(0.5, "how much")
    text: str | None = None
    words: tuple[str, ...] = ()
    mode: Literal["l1", "l2"] = "l1"
    deep: bool = False
    either: int | Literal["auto"] = "auto"
    pair: tuple[int, float] = (1, 2.0)

    def run(self, model: Any, ctx: Context) -> PassResult:
        return PassResult(changed=False)


@dataclass(frozen=True)
class Picky(Pass):
    """Refuse odd numbers."""

    name: ClassVar[str] = "picky"
    effect: ClassVar[Effect] = Effect.EXACT
    size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % 2:
            raise ValueError("size is odd")

    def run(self, model: Any, ctx: Context) -> PassResult:
        return PassResult(changed=False)


def resolve(name: str) -> type[Pass]:
    known = {"sample": Sample, "picky": Picky}
    if name not in known:
        raise UsageError(f"unknown pass {name!r}")
    return known[name]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("  ", ()),
        ("sample", (Sample(),)),
        ("sample{}", (Sample(),)),
        (" sample { count = 3 , } , picky{size=2}", (Sample(count=3), Picky(size=2))),
        ("sample{share=none,text=none}", (Sample(share=None),)),
        ("sample{text='none'}", (Sample(text="none"),)),
        ("sample{share=1}", (Sample(share=1.0),)),
        ("sample{share=1e-3}", (Sample(share=1e-3),)),
        ("sample{share=inf}", (Sample(share=math.inf),)),
        ("sample{words=(a,'b, }',\"c\\n\")}", (Sample(words=("a", "b, }", "c\n")),)),
        ("sample{words=(/layer1/Conv.weight,)}", (Sample(words=("/layer1/Conv.weight",)),)),
        ("sample{words=()}", (Sample(),)),
        ("sample{text='it\\'s \"so\"'}", (Sample(text='it\'s "so"'),)),
        ("sample{deep=true,mode=l2,either=3}", (Sample(deep=True, mode="l2", either=3),)),
        ("sample{pair=(2,3)}", (Sample(pair=(2, 3.0)),)),
    ],
)
def test_parse(text: str, expected: tuple[Pass, ...]) -> None:
    assert parse(text, resolve) == expected
    assert parse(to_spec(expected), resolve) == expected


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("sampel", 1, "unknown pass 'sampel'"),
        ("sample,", 8, "missing after the comma"),
        (",sample", 1, "expected a pass name"),
        ("sample sample", 8, "expected a comma"),
        ("sample{count=1", 15, "expected ',' or '}'"),
        ("sample{words=(a=b,)}", 16, "expected ',' or ')'; quote a value that holds '='"),
        ("sample{words=(a", 16, "expected ',' or ')'"),
        ("sample{count}", 13, "expected '=' and a value for 'count' (int)"),
        ("sample{cuont=1}", 8, "did you mean 'count'?"),
        ("sample{count=1,count=2}", 16, "given twice"),
        ("sample{count=1.5}", 14, "sample.count: 1.5 is not int"),
        ("sample{count='1'}", 14, "sample.count: '1' is not int"),
        ("sample{count=10}", 14, "outside [0, 9]"),
        ("sample{share=nan}", 14, "sample.share: nan is not float or none"),
        ("sample{mode=l3}", 13, "l3 is not l1 | l2"),
        ("sample{deep=1}", 13, "1 is not bool"),
        ("sample{words=a}", 14, "write (a)"),
        ("sample{words=(a,(b))}", 17, "a tuple is not str"),
        ("sample{pair=(1,2,3)}", 13, "3 members do not fit"),
        ("sample{pair=(1,x)}", 16, "x is not float"),
        ("sample{text='abc}", 13, "not closed"),
        ("sample{text='\\q'}", 13, "wrong escape"),
        ("sample,picky", 8, "option 'size' must be given"),
        ("picky{size=3}", 1, "size is odd"),
    ],
)
def test_errors_show_the_place(text: str, column: int, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, resolve)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"in the pass list, column {column}:"
    assert lines[2].index("^") - 2 == column - 1
    assert lines[1][2:] == text
    assert message in lines[-1]


def test_the_caret_of_a_long_pipeline_points_into_the_line_shown() -> None:
    text = "sample," * 30 + "sample{count=x},sample"
    with pytest.raises(UsageError) as caught:
        parse(text, resolve)
    _, shown, caret, _ = str(caught.value).splitlines()
    assert shown[caret.index("^")] == "x"
    assert len(shown) < 120


@pytest.mark.parametrize("value", [True, 1.0, "1", None, (1,)])
def test_a_value_of_the_wrong_type_has_no_text(value: Any) -> None:
    with pytest.raises(UsageError, match=r"sample\.count"):
        to_spec((Sample(count=value) if not isinstance(value, tuple) else _unchecked(count=value),))


def test_numpy_scalars_are_written_as_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert to_spec((Sample(share=numpy.float64(0.25)),)) == "sample{share=0.25}"


def test_a_type_without_written_form_is_refused() -> None:
    kind = make_dataclass("Odd", [("table", dict, field(default_factory=dict))], bases=(Sample,), frozen=True)
    with pytest.raises(UsageError, match="no written form"):
        to_spec((kind(),))


# --- any pass, any values ---------------------------------------------------------------------------------------------

WORDS = st.text(max_size=12) | st.sampled_from(
    ["none", "true", "1", "0.5", "inf", "", "'", '"', "a,b}", "(x)", "\\", "l1"]
)
SCALARS: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    str: WORDS,
    Literal["l1", "none", "a b"]: st.sampled_from(["l1", "none", "a b"]),
    Literal["1", 1, 2]: st.sampled_from(["1", 1, 2]),
}


def _tuples(base: Any, values: st.SearchStrategy[Any]) -> list[tuple[Any, st.SearchStrategy[Any]]]:
    return [
        (tuple[base, ...], st.lists(values, max_size=3).map(tuple)),
        (tuple[base, int], st.tuples(values, st.integers())),
        (tuple[tuple[base, ...], ...], st.lists(st.lists(values, max_size=2).map(tuple), max_size=2).map(tuple)),
    ]


SHAPES = [
    shape
    for base, values in SCALARS.items()
    for shape in (
        (base, values),
        (base | None, values | st.none()),
        *_tuples(base, values),
        *_tuples(base | None, values | st.none()),
    )
]
SHAPES += [
    (int | str, st.integers() | WORDS),
    (float | str | None, st.floats(allow_nan=False) | WORDS | st.none()),
    (int | bool | Literal["auto"], st.integers() | st.booleans() | st.just("auto")),
    (Literal["true", "none"] | bool | None, st.sampled_from(["true", "none", True, False, None])),
    (float | int, st.floats(allow_nan=False) | st.integers()),
    (tuple[int, ...] | str, st.lists(st.integers(), max_size=3).map(tuple) | WORDS),
]


@st.composite
def passes(draw: st.DrawFn) -> Pass:
    """An instance of a freshly made pass class with up to four options of any type, with or without defaults."""
    chosen = draw(st.lists(st.sampled_from(SHAPES), max_size=4))
    required = draw(st.integers(0, len(chosen)))
    members: list[Any] = []
    for i, (annotation, values) in enumerate(chosen):
        name = f"option_{i}"
        members.append((name, annotation) if i < required else (name, annotation, field(default=draw(values))))
    kind = make_dataclass("Generated", members, bases=(Pass,), frozen=True, namespace={
        "name": "generated", "effect": Effect.EXACT, "run": lambda self, model, ctx: PassResult(changed=False),
    })  # fmt: skip
    return kind(*(draw(values) for _, values in chosen))


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(_identical, a, b))
    return type(a) is type(b) and a == b


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=300)
@given(passes())
def test_any_pass_survives_text_and_recipe(original: Pass) -> None:
    def found(name: str) -> type[Pass]:
        return type(original)

    (from_text,) = parse(to_spec((original,)), found)
    recipe = Recipe((original,), target="cpu", seed=3)
    (from_recipe,) = parse_recipe(recipe.to_toml(), "recipe", found).passes
    for name, value in original.option_values().items():
        assert _identical(getattr(from_text, name), value), to_spec((original,))
        assert _identical(getattr(from_recipe, name), value), recipe.to_toml()


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_keeps_everything(tmp_path: Any) -> None:
    recipe = Recipe(
        (Sample(share=None, words=("a b",)), Sample()),
        target="cpu",
        calib="a\\b.npz",
        evaluate="module:function",
        metric="top1",
        max_drop=math.inf,
        max_latency=0.5,
        seed=0,
        dim=(("batch size", 1), ("time", 7)),
        input_shape=(("x:0", (1, 3, 224, 224)), ("ids", (1, 7))),
    )
    write_recipe(recipe, tmp_path / "r.toml")
    assert read_recipe(tmp_path / "r.toml", resolve) == recipe


def test_an_empty_recipe_survives() -> None:
    assert parse_recipe(Recipe(()).to_toml()) == Recipe(())


def test_a_recipe_holds_options_that_equal_their_default() -> None:
    assert "count = 1" in Recipe((Sample(),)).to_toml()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not say its schema"),
        ("schema = 2\npasses = []", "has schema 2.*--save-recipe"),
        ("schema = 2\ngraphopt = '9.1'\npasses = []", "with graphopt 9.1 that wrote it"),
        ("schema = true\npasses = []", "has schema True"),
        ("schema = 1", r"lacks \[\[passes\]\]"),
        ("schema = 1\npasses = 3", r"lacks \[\[passes\]\]"),
        ("schema = 1\npasses = []\ntaregt = 'cpu'", "did you mean 'target'"),
        ("schema = 1\npasses = []\nseed = '3'", "'3' is not int"),
        ("schema = 1\npasses = []\ndim = {batch = 0}", "positive integers"),
        ("schema = 1\n[[passes]]\ncount = 1", "pass 1: has no name"),
        ("schema = 1\n[[passes]]\nname = 'x'", "pass 1: unknown pass 'x'"),
        ("schema = 1\n[[passes]]\nname = 'sample'\ncount = '1'", "pass 1, sample.count: '1' is not int"),
        ("schema = 1\n[[passes]]\nname = 'sample'\ncount = 1.0", "sample.count: 1.0 is not int"),
        ("schema = 1\n[[passes]]\nname = 'sample'\ntext = 1", "sample.text: 1 is not str or none"),
        ("schema = 1\n[[passes]]\nname = 'sample'\ncount = 11", "sample.count: 11 is outside"),
        ("schema = 1\n[[passes]]\nname = 'sample'\nfoo = 1", "no option 'foo'"),
        ("schema = 1\n[[passes]]\nname = 'sample'\ntext = 1979-05-27", "sample.text: a date is no option value"),
        ("schema = 1\n[[passes]]\nname = 'picky'", "option 'size' must be given"),
        ("schema = = 1", "is not TOML"),
    ],
)
def test_wrong_recipes_name_file_pass_and_option(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_recipe(text, "r.toml", resolve)
    assert "r.toml" in str(caught.value)


def test_a_missing_recipe_file(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path / "none.toml")


# --- generated help ---------------------------------------------------------------------------------------------------


def test_help_is_made_from_the_class() -> None:
    found = describe(Sample)
    assert (found.summary, found.effect) == ("Do nothing, with options.", "lossy")
    assert [o.name for o in found.options] == ["count", "share", "text", "words", "mode", "deep", "either", "pair"]
    text = help_text(Sample)
    for line in (
        "Algebra: x = x.",
        "  count = int; default 1; 0 to 9",
        "      how many",
        "  share = float or none; default 0.5",
        "  mode = l1 | l2; default l1",
        "  words = (str, ...); default ()",
        "  pair = (int, float); default (1,2.0)",
    ):
        assert line in text.splitlines()
    assert "  size = int; must be given" in help_text(Picky).splitlines()


def test_json_schema_lists_options() -> None:
    schema = json_schema(Sample)
    assert schema["properties"]["count"] == {"type": "integer", "description": "how many", "minimum": 0, "maximum": 9}
    assert schema["properties"]["mode"]["enum"] == ["l1", "l2"]
    assert schema["required"] == ["name"]
    assert json_schema(Picky)["required"] == ["name", "size"]


def _unchecked(**values: Any) -> Sample:
    made = Sample()
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made
