"""Records made of tables, the sentences where one does not fit, and the published schemas."""

from __future__ import annotations

import json
import re
import runpy
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from wsi_pipeline.bundle import ModelToml
from wsi_pipeline.files.schema import Count, Positive, Record, as_toml, converted, schema_of

ROOT = Path(__file__).parents[1]
MODELS = sorted((ROOT / "models").glob("*/model.toml"))


class Inner(Record, frozen=True, kw_only=True):
    pair: Annotated[tuple[int, int], Meta(description="[low, high]")] = (0, 1)
    many: tuple[Positive, ...] = ()

    def __post_init__(self) -> None:
        if self.pair[0] > self.pair[1]:
            raise ValueError(f"pair is {as_toml(self.pair)}; expected it rising")


class Outer(Record, frozen=True, kw_only=True):
    count: Count
    kind: Literal["a", "b"] | Inner = "a"
    inner: Inner = Inner()
    lists: dict[str, tuple[Count, ...]] = msgspec.field(default_factory=dict)
    rows: tuple[Inner, ...] = ()


def test_what_is_not_said_is_as_usual() -> None:
    found = converted({"count": 2, "rows": [{"many": [1, 0.5]}]}, Outer)
    assert found == Outer(count=2, rows=(Inner(many=(1.0, 0.5)),))


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({}, "lacks count"),
        ({"count": True}, "count is true; expected a whole number above 0"),
        ({"count": 1.0}, "count is 1.0; expected a whole number above 0"),
        ({"count": "1"}, 'count is "1"; expected a whole number above 0'),
        ({"count": 1, "kind": "c"}, 'kind is "c"; expected one of "a", "b", or a table'),
        ({"count": 1, "kind": {"pairs": 1}}, "unknown kind.pairs (did you mean pair?)"),
        ({"count": 1, "kind": {"many": [0]}}, "kind.many[0] is 0; expected a number above 0"),
        ({"count": 1, "inner": 3}, "inner is 3; expected a table"),
        ({"count": 1, "inner": {"pair": [1]}}, "inner.pair is [1]; expected [low, high]"),
        (
            {"count": 1, "inner": {"pair": [1, "x"]}},
            'inner.pair[1] is "x"; expected a whole number',
        ),
        ({"count": 1, "inner": {"pair": [2, 1]}}, "inner: pair is [2, 1]; expected it rising"),
        ({"count": 1, "rows": [{}, {"many": [1, float("inf")]}]}, "rows[1].many[1] is inf;"),
        ({"count": 1, "rows": [{}, {"pair": [2, 1]}]}, "rows[1]: pair is [2, 1]"),
        ({"count": 1, "lists": {"a": [0]}}, "lists is { a = [0] }; expected a table"),
        ({"count": "x" * 99}, f'count is "{"x" * 56}...; expected'),
        ({"a - at `$.b`\n": 1, "count": 1}, "unknown a - at `$.b`\n; there are count"),
        ({"a` - at `$.b[1]": 1, "count": 1}, "unknown b[1].a; there are count"),
        ({"zzz": 1, "count": 1}, "unknown zzz; there are count, kind, inner, lists, rows"),
    ],
)
def test_what_does_not_fit_is_told_where_and_what_is_expected(
    table: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(told)}"):
        converted(table, Outer)


TEXT = st.text(st.characters(codec="utf-8"), max_size=9)
# to JSON Schema 1.0 is a whole number
FRACTIONS = st.floats(allow_nan=False).filter(lambda value: not value.is_integer())
PLAIN = st.recursive(
    st.booleans() | st.integers(-9, 99) | FRACTIONS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("key"), inner),
    max_leaves=6,
)


@given(PLAIN)
def test_values_are_written_as_toml_reads_them(value: Any) -> None:
    assert tomllib.loads(f"x = {as_toml(value)}") == {"x": value}


@given(st.dictionaries(st.sampled_from(["count", "kind", "inner", "lists", "rows"]), PLAIN))
def test_whatever_a_table_holds_is_made_or_refused_as_its_schema_says(table: Any) -> None:
    try:
        converted(table, Outer)
    except ValueError as error:
        is_rising = "expected it rising" not in str(error)  # of which a schema knows nothing
        assert jsonschema.Draft202012Validator(schema_of(Outer)).is_valid(table) != is_rising
    else:
        jsonschema.validate(table, schema_of(Outer))


def test_the_published_schemas_are_what_the_code_makes() -> None:
    made = runpy.run_path(str(ROOT / ".ci" / "write_schemas.py"))["written"]()
    found = {path.name: path.read_text("utf-8") for path in (ROOT / "docs/schemas").iterdir()}
    assert found == made, "run: make docs"


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.parent.name)
def test_each_model_fits_the_published_schema(path: Path) -> None:
    schema = json.loads((ROOT / "docs" / "schemas" / "model.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    table = tomllib.loads(path.read_text("utf-8"))
    jsonschema.validate(table, schema)
    converted(table, ModelToml)
    table["input"]["patchsize"] = [8, 8]
    with pytest.raises(jsonschema.ValidationError, match="patchsize"):
        jsonschema.validate(table, schema)
