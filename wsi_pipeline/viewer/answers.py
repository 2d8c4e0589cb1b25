"""What is asked of a run that is looked at, and the answer to it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from http import HTTPStatus

import orjson
from tornado.web import HTTPError

from wsi_pipeline.viewer.cut import Thresholds
from wsi_pipeline.viewer.run_view import Shown
from wsi_pipeline.viewer.volume import ShownVolume

WHOLE, SIZE, NUMBER = r"-?[0-9]{1,9}", r"[1-9][0-9]{0,8}", r"(?=.*[1-9])[0-9]{1,6}(\.[0-9]{1,6})?"
COUNT = r"[0-9]{1,9}"
SHARES = r"((0(\.[0-9]{1,9})?|1(\.0{1,9})?)?,)*(0(\.[0-9]{1,9})?|1(\.0{1,9})?)?"
LIST = r"[0-9]{1,4}(,[0-9]{1,4}){0,999}"
"""Patterns of what a query may say."""
MOST_LISTED = 100
"""Regions in an answer."""
BY = "area|class|probability"


class RequestError(HTTPError):
    """A request that names what is not there, or says it wrongly."""

    def __init__(self, status: HTTPStatus, sentence: str) -> None:
        super().__init__(status)
        self.sentence = sentence


Answer = tuple[str, bytes]
"""Media type and content."""
Query = Mapping[str, list[str]]
NO_PART = (HTTPStatus.NOT_FOUND, "there is no such part of a run")


def answer_of(shown: Shown, parts: list[str], query: Query) -> Answer:
    """Return the answer to what is asked of a run."""
    if parts == ["areas"]:
        thresholds = _thresholds(shown, query)
        assert shown.cut is not None
        return as_json(shown.cut.areas(thresholds, is_exact="exact" in query))
    if isinstance(shown, ShownVolume):
        what: int | Thresholds = ()
        match parts:
            case ["probability", channel, *rest]:
                (what,), parts = whole_numbers([channel], 1), ["cut", *rest]
            case ["cut", *_]:
                what = _thresholds(shown, query)
        if len(parts) != 3:
            raise RequestError(*NO_PART)
        (index,) = whole_numbers(parts[2:], 1)
        pixels = shown.slice_of(parts[0], parts[1], index, what)
        return "application/octet-stream", pixels.tobytes()
    match parts:
        case ["thumbnail"]:
            return "image/jpeg", shown.thumbnail_jpeg()
        case ["slide", *place]:
            return "image/jpeg", shown.slide_tile(*whole_numbers(place, 3))
        case ["mask", *place]:
            return "image/png", shown.mask_tile(*whole_numbers(place, 3), hidden=_hidden(query))
        case ["quality", *place]:
            return "image/png", shown.quality_tile(*whole_numbers(place, 3))
        case ["probability", channel, *place]:
            which, level, column, row = whole_numbers([channel, *place], 4)
            return "image/png", shown.cut_tile(level, column, row, what=which, hidden=frozenset())
        case ["cut", *place]:
            thresholds, hidden = _thresholds(shown, query), _hidden(query)
            tile = shown.cut_tile(*whole_numbers(place, 3), what=thresholds, hidden=hidden)
            return "image/png", tile
        case ["polygons"]:
            x, y = (int(_asked(query, name)) for name in "xy")
            width, height = (int(_asked(query, name, SIZE, "1 or more")) for name in "wh")
            downsample = float(_asked(query, "downsample", NUMBER, "a number above 0"))
            box, hidden = (x, y, width, height), _hidden(query)
            if "t" in query:
                thresholds = _thresholds(shown, query)
                assert shown.cut is not None
                is_exact = "exact" in query
                return as_json(
                    shown.cut.within(box, downsample, hidden, thresholds, is_exact=is_exact)
                )
            polygons = shown.polygons()
            found = polygons.within(box, downsample, hidden)
            return as_json(
                {**found, "left_out": polygons.left_out, "classes": shown.legend(polygons.classes)}
            )
        case ["regions"]:
            by = _asked(query, "by", BY, BY.replace("|", " or "))
            first = int(_asked(query, "first", COUNT, "0 or more"))
            hidden = _hidden(query)
            return as_json(shown.polygons().listed(by, "up" in query, first, MOST_LISTED, hidden))
        case ["at"]:
            x, y = (int(_asked(query, name)) for name in "xy")
            return as_json(shown.polygons().at(x, y, _hidden(query)))
    raise RequestError(*NO_PART)


def whole_numbers(parts: list[str], count: int) -> list[int]:
    """Return what names a tile (level, column and row) or a slice."""
    if len(parts) != count or not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts):
        raise RequestError(
            HTTPStatus.BAD_REQUEST,
            "a tile is named by level, column and row, a slice by layer, plane and its number",
        )
    return list(map(int, parts))


def _asked(query: Query, name: str, pattern: str = WHOLE, what: str = "a whole number") -> str:
    values = query.get(name, [])
    if len(values) != 1 or not re.fullmatch(pattern, values[0]):
        raise RequestError(HTTPStatus.BAD_REQUEST, f"{name} is {what}, given once")
    return values[0]


def _hidden(query: Query) -> frozenset[int]:
    """Return the classes that are not to be shown."""
    if "hide" not in query:
        return frozenset()
    return frozenset(map(int, _asked(query, "hide", LIST, "whole numbers with commas").split(",")))


def _thresholds(shown: Shown, query: Query) -> Thresholds:
    """Return the threshold of each class that has probabilities, None where it is not cut."""
    told = _asked(query, "t", SHARES, "numbers from 0 to 1 with commas, or nothing")
    thresholds = [float(share) if share else None for share in told.split(",")]
    if shown.cut is None or len(thresholds) != len(shown.cut.values):
        raise RequestError(HTTPStatus.NOT_FOUND, "there are no probabilities of so many classes")
    return thresholds


def as_json(value: object) -> Answer:
    """Return an answer in JSON, arrays of numpy included."""
    try:
        body = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:  # names of folders that are no UTF-8
        body = json.dumps(value).encode()
    return "application/json", body
