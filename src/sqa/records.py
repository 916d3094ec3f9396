"""Reading of JSON and TOML values into dataclasses, checked against their annotations, for plans and results."""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from sqa.errors import InputError, shown

T = TypeVar("T")

_WORDS: dict[Any, str] = {
    int: "a whole number", float: "a finite number", str: "text", bool: "true or false", NoneType: "null",
}  # fmt: skip


def read_value(kind: Any, value: Any, name: str) -> Any:
    """Convert `value` to the annotation `kind`: lists become tuples, whole numbers floats, tables dataclasses.

    Raises InputError, `NAME must be WANTED, got VALUE`, for anything else. Floats must be finite, whole numbers below
    2**63.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    hint = ""
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        kinds = [each for each in arguments if value is None or each is not NoneType]
        if value is None and NoneType in arguments:
            return None
        if len(kinds) == 1:
            return read_value(kinds[0], value, name)
        for each in kinds:
            if type(value) is each or (get_origin(each) is tuple and isinstance(value, list | tuple)):
                return read_value(each, value, name)
            if isinstance(each, type) and is_dataclass(each) and isinstance(value, Mapping):
                return read_value(each, value, name)
    elif origin is tuple and isinstance(value, list | tuple):
        return tuple(read_value(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    elif origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: read_value(arguments[1], item, f"{name}.{shown(key)}") for key, item in value.items()}
    elif origin is Literal:
        if value in arguments:
            return value
        hint = nearest(str(value), list(map(str, arguments)))
    elif isinstance(kind, type) and is_dataclass(kind) and isinstance(value, Mapping):
        return read_record(kind, value, name)
    elif kind is float and type(value) in (int, float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    elif type(value) is kind:
        if kind is int and abs(value) >= 2**63:
            raise InputError(f"{name} must be below 2**63, got {shown(repr(value))}")
        return value
    raise InputError(f"{name} must be {_wanted(kind)}, got {shown(repr(value))}{hint}")


def check_least(record: Any, least: int, *names: str) -> None:
    """Raise InputError for the first of these fields that is below `least`; None passes."""
    for name in names:
        if (value := getattr(record, name)) is not None and value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")


def at_least_one(where: str, **values: int) -> None:
    """Raise InputError for the first of these values that is below 1."""
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{where}: {name} must be at least 1, got {value}")


def nearest(name: object, known: list[str]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, or nothing: the end of an error about an unknown name."""
    close = difflib.get_close_matches(str(name)[:100].lower(), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _wanted(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_wanted(each) for each in arguments)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if origin is tuple:
        return "a list"
    return _WORDS.get(kind, "a table")


_annotations: Callable[[type], dict[str, Any]] = cache(get_type_hints)


def read_record(kind: type[T], values: Mapping[str, Any], name: str) -> T:
    """A dataclass from a table, by its `from_dict` if it has one, else by `read_fields`. Raises InputError."""
    if (from_dict := getattr(kind, "from_dict", None)) is None:
        return read_fields(kind, values, name)
    try:
        made: T = from_dict(values)
        return made
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


def read_fields(kind: type[T], values: Mapping[str, Any], name: str) -> T:
    """A dataclass, and those inside it, from a table of its fields; other keys are ignored.

    Raises InputError that names a field which is missing or of another type.
    """
    found = {}
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name in values:
            found[item.name] = read_value(_annotations(kind)[item.name], values[item.name], f"{name}.{item.name}")
        elif item.default is MISSING and item.default_factory is MISSING:
            raise InputError(f"{name} lacks {item.name}")
    try:
        return kind(**found)
    except InputError as error:
        raise InputError(f"{name}.{error}") from None


def reject_unknown(given: Iterable[str], known: list[str], where: str) -> None:
    """Raise InputError for the first name that is not in `known`, with the nearest real one."""
    for name in given:
        if name not in known:
            raise InputError(
                f"{where} has no field {shown(repr(name))}{nearest(name, known)} (fields: {', '.join(known)})"
            )


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A record that converts and checks each field by its annotation, as `read_value` does.

    `_where` names it in errors. Raises InputError that says what a field must be.
    """

    _where: ClassVar[str]

    def __post_init__(self) -> None:
        kinds = _annotations(type(self))
        for item in fields(self):
            value = read_value(kinds[item.name], getattr(self, item.name), f"{self._where}: {item.name}")
            object.__setattr__(self, item.name, value)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back equal."""
        return asdict(self, dict_factory=_with_lists)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read `to_dict`'s output. Raises InputError for fields that are unknown or missing."""
        if not isinstance(values, Mapping):
            raise InputError(f"{cls._where} must be a table of fields, got {shown(repr(values))}")
        reject_unknown(values, [item.name for item in fields(cls)], cls._where)
        needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
        if missing := [name for name in needed if name not in values]:
            raise InputError(f"{cls._where} lacks {', '.join(missing)}")
        return cls(**values)


def _with_lists(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of a record's fields, with lists for tuples, as in JSON."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in items}


def to_json(record: Any) -> dict[str, Any]:
    """The `default` of json.dumps for records: `to_dict` if there is one, else the fields."""
    to_dict = getattr(record, "to_dict", None)
    return {item.name: getattr(record, item.name) for item in fields(record)} if to_dict is None else to_dict()


def differences(held: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """`field: VALUE there, VALUE now` for each field of `given` that has another value in `held`."""
    changed = {name: value for name, value in given.items() if held.get(name) != value}
    return [f"{name}: {held.get(name)!r} there, {value!r} now" for name, value in changed.items()]


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises InputError, naming the file, for anything else, such as NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        value = json.loads(path.read_bytes(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: it is not JSON: {shown(str(error))}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, got {shown(repr(value))}")
    return value


def read_lines(kind: type[T], path: Path, advice: str) -> list[T]:
    """The records of a file with one on each line; none without a file. A last line torn by a crash is ignored.

    Raises InputError, which ends with `advice`, for anything but a regular file and for a damaged line.
    """
    if not path.exists():
        return []
    if not path.is_file():  # a pipe would be waited for
        raise InputError(f"{path} must be a regular file; {advice}")
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        where = f"line {number} of {path}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{where} is damaged; {advice}") from None
        try:
            records.append(read_value(kind, values, where))
        except InputError as error:
            raise InputError(f"{error}; {advice}") from None
    return records
