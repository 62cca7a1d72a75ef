"""Checks that settings have known keys, the types of their dataclass's fields, and values in range.

No dependency has these rules, which settings files need: an int is a valid float, true is not 1, a list is a valid
tuple, NaN and infinity are refused, and the error names the innermost wrong value.
"""

from __future__ import annotations

import difflib
import enum
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lavender.errors import ConfigError, nearest
from lavender.files import expanded, shown

T = TypeVar("T")

_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "a mapping",
    NoneType: "null",
    list: "a list",
    tuple: "a list",
}


@lru_cache(maxsize=64)
def hints_of(cls: type) -> dict[str, Any]:
    """Names and resolved types of a dataclass's fields."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}  # ty: ignore[invalid-argument-type]


def check_fields(settings: Any) -> None:
    """Check the types of all fields of a dataclass instance.

    Raises:
        ConfigError: a field is of another type; the message names the field and the innermost wrong value.
    """
    for field in fields(settings):
        check_type(field.name, getattr(settings, field.name), hints_of(type(settings))[field.name], field.default)


def check_type(name: str, value: object, hint: Any, default: object = MISSING) -> None:
    """Check the type of one setting. If the value is None, the advice names `default`.

    Raises:
        ConfigError: the value is of another type.
    """
    if not fits(value, hint):
        name, inner, expected = _innermost(name, value, hint)
        raise ConfigError(f"{name}={shown(inner)}", named(expected), _advice(name, inner, expected, default))


def fits(value: object, hint: Any) -> bool:
    """Whether a value has a type, by the rules of this module."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, member) for member in args)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if hint in (None, NoneType):
        return value is None
    if hint is float:
        return _is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str) and not isinstance(value, enum.Enum)
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Mapping):
        key, item = args or (Any, Any)
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if _is_listing(kind):
        return (
            isinstance(value, list | tuple)
            and _length_fits(value, args)
            and all(fits(item, _item_hint(args, index)) for index, item in enumerate(value))
        )
    return isinstance(value, kind)


def named(hint: Any) -> str:
    """A type in words, for messages."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(named(member) for member in args))
    if origin is Literal:
        return f"one of {args}" if len(args) > 1 else shown(args[0])
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a mapping" + (f" of {_plural(args[1])}" if args and args[1] is not Any else "")
    if _is_listing(kind):
        if len(args) > 1 and args[-1] is not Ellipsis:
            return f"a list of {len(args)} {_plural(args[0])}"
        return "a list" + (f" of {_plural(args[0])}" if args and args[0] is not Any else "")
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f"one of {tuple(member.value for member in kind)}"
    return _NAMES.get(kind, f"a {getattr(kind, '__name__', kind)}")


def _plural(hint: Any) -> str:
    plurals = {str: "texts", int: "whole numbers", float: "numbers", bool: "true or false"}
    return plurals.get(hint, named(hint))


def _is_number(value: object) -> bool:
    """Whether a value is a finite number within the range of a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _is_listing(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Sequence) and not issubclass(kind, str | bytes)


def _item_hint(args: tuple, index: int) -> Any:
    if not args:
        return Any
    return args[index] if len(args) > 1 and args[-1] is not Ellipsis else args[0]


def _length_fits(value: Sequence, args: tuple) -> bool:
    return len(args) < 2 or args[-1] is Ellipsis or len(value) == len(args)


def _innermost(name: str, value: object, hint: Any) -> tuple[str, object, Any]:
    """Name, value and type of the wrong item in a list or mapping; otherwise of the whole value."""
    for member in get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,):
        kind, args = get_origin(member) or member, get_args(member)
        if isinstance(value, list | tuple) and _is_listing(kind) and _length_fits(value, args):
            parts = [(name, item, _item_hint(args, index)) for index, item in enumerate(value)]
        elif isinstance(value, Mapping) and isinstance(kind, type) and issubclass(kind, Mapping) and args:
            parts = [(f"a key of {name}", key, args[0]) for key in value]
            parts += [(f"{name}.{key}", item, args[1]) for key, item in value.items()]
        else:
            continue
        for part in parts:
            if not fits(part[1], part[2]):
                return _innermost(*part)
    return name, value, hint


def _advice(name: str, value: object, expected: Any, default: object) -> str:
    if value is None:
        known = default is not MISSING and default is not None
        return f"leave {name} out" + (f" for its default, {shown(default)}" if known else "")
    if isinstance(value, str) and (number := _quoted(value, expected)):
        return f"write {number} without quotes"
    if isinstance(value, str) and (near := _near_choice(value, expected)):
        return f"write {near!r} instead"
    if fits([value], expected) and len(shown(value)) < 80:
        return f"write {name}: [{value}]"
    return f"change {name}"


def _near_choice(text: str, expected: Any) -> str | None:
    """The most similar of the texts that the setting may be, if one is similar."""
    members = get_args(expected) if get_origin(expected) in (Union, UnionType) else (expected,)
    choices: list[str] = []
    for member in members:
        if get_origin(member) is Literal:
            choices += [choice for choice in get_args(member) if isinstance(choice, str)]
        elif isinstance(member, type) and issubclass(member, enum.Enum):
            choices += [str(choice.value) for choice in member]
    return nearest(text, choices)


def _quoted(text: str, expected: Any) -> str:
    """The number in a text, as YAML writes it, if the setting expects one; otherwise an empty text."""
    members = get_args(expected) or (expected,)
    for kind in (int, float):
        try:
            number = kind(text)
        except (ValueError, OverflowError):
            continue
        if kind in members or (kind is int and float in members):
            return str(number) if math.isfinite(number) else ""
    return ""


def check_path(name: str, path: str) -> str:
    """A path as text with `~` expanded. The file or folder need not exist.

    Raises:
        ConfigError: the path is empty, or not valid on any file system.
    """
    try:
        inside = [len(os.fsencode(part)) for part in Path(path).parts]
    except UnicodeEncodeError:
        inside = [256]
    if not path.strip() or "\0" in path or max(inside, default=0) > 255 or sum(inside) > 4000:
        raise ConfigError(f"{name}={shown(path)}", "a path", f"write the path of a file or folder for {name}")
    return str(expanded(path)) if path.startswith("~") else path


def write_paths_as_texts(settings: Any, names: Sequence[str]) -> None:
    """Replace path objects in these fields of a frozen dataclass instance by text."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, os.PathLike):
            object.__setattr__(settings, name, os.fspath(value))


def without_repeats(name: str, value: Sequence) -> tuple:
    if not value or len({*value}) < len(value):
        raise ConfigError(
            f"{name}={shown(value)}", "one or more, none twice", f"change {name}, or leave it out for all"
        )
    return tuple(value)


def from_mapping(cls: type[T], settings: Mapping[str, Any], where: str) -> T:
    """Build a config dataclass from a mapping.

    Args:
        where: the source of the settings, for the message, such as a file's name.

    Raises:
        ConfigError: an unknown key, with the most similar known one; a setting that `cls` refuses.
    """
    check_keys(settings, [field.name for field in fields(cls)], where)  # ty: ignore[invalid-argument-type]
    return cls(**settings)


def check_keys(settings: Mapping[str, Any], allowed: list[str], where: str) -> None:
    """Raise ConfigError for a key that is not in `allowed`, with the most similar one that is."""
    for key in settings:
        if key not in allowed:
            near = difflib.get_close_matches(key[:100], allowed, n=3) if isinstance(key, str) else []
            hint = f"write {near[0]!r} instead" if near else "remove it, or look it up in the documentation"
            known = sorted(set(near if near and len(allowed) > 20 else allowed))
            raise ConfigError(f"the key {shown(key)} in {where}", f"a known key, such as {', '.join(known)}", hint)


def check_ranges(settings: Any, *ranges: tuple[str, float, float]) -> None:
    """Check that each named field, or each item of a tuple in it, is None or from `low` to `high`."""
    for name, low, high in ranges:
        value, hint = getattr(settings, name), hints_of(type(settings))[name]
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not low <= number <= high:
                kind = "a number" if fits(0.5, hint) else "a whole number"
                raise ConfigError(f"{name}={shown(number)}", f"{kind} from {low} to {high}", f"change {name}")


def check_extraction(settings: Any) -> None:
    """Check what the settings of an `ExtractionConfig` say together, and its grid and layer weights.

    Raises:
        ConfigError: a value is out of range, or settings contradict each other.
    """
    if settings.inversion_steps is not None and settings.num_steps % settings.inversion_steps:
        raise ConfigError(
            f"inversion_steps={settings.inversion_steps} with num_steps={settings.num_steps}",
            "a divisor of num_steps",
            "change one of them, such as 5 and 10",
        )
    if not 2 <= min(settings.grid) <= max(settings.grid) <= 256:
        raise ConfigError(f"grid={settings.grid}", "(rows, cols), each from 2 to 256", "use the paper's (32, 32)")
    _check_layers(settings)
    _check_mode(settings)


_READ_BY_MODE = {
    "noise": ("timesteps", "num_noises", "seed"),
    "ddim": ("num_steps",),
    "null-text": ("num_steps", "inversion_steps", "null_text_iterations", "guidance"),
}


def unread_by(mode: Any) -> set[str]:
    """The settings of extraction that a mode does not read; none for what is no mode."""
    every = {name for names in _READ_BY_MODE.values() for name in names}
    return every.difference(_READ_BY_MODE.get(str(mode), every))


def _check_mode(settings: Any) -> None:
    """Refuse settings that the mode does not read."""
    for name in sorted(unread_by(settings.mode)):
        value = getattr(settings, name)
        if value != getattr(type(settings), name):
            modes = " or ".join(mode for mode, names in _READ_BY_MODE.items() if name in names)
            do = f"leave {name} out, or set another mode"
            raise ConfigError(f"{name}={shown(value)} with mode={settings.mode!r}", f"it with mode {modes}", do)


def _check_layers(settings: Any) -> None:
    weights = settings.layer_weights or {}
    lists = [list(weight) if isinstance(weight, Sequence) else [weight] for weight in weights.values()]
    if any(not numbers or not 0 <= min(numbers) <= max(numbers) < 1e9 for numbers in lists):
        raise ConfigError(
            f"layer_weights={shown(weights)}",
            "numbers of 0 or more by prefixes of layer names: one number, or a list with one number per head",
            "write them like {up_blocks.1: 1.0, down_blocks: 0.5}",
        )
    if settings.expert_layer is not None and settings.layer_weights is not None:
        raise ConfigError(
            f"expert_layer={settings.expert_layer} with layer_weights", "one of them", "leave out one of them"
        )
    if settings.space == "output":
        per_head = any(isinstance(weight, Sequence) for weight in weights.values())
        for name, wrong in (
            ("refine", settings.refine),
            ("head_share", settings.head_share < 1),
            ("layer_weights per head", per_head),
        ):
            if wrong:
                raise ConfigError(
                    f"{name} with space='output'",
                    "settings of whole layers: heads are joined there",
                    f"leave out {name}",
                )


def check_used(settings: Any) -> None:
    """Check an `AlignmentConfig` for settings that do nothing without another one.

    Raises:
        ConfigError: there is one.
    """
    chosen = settings.layers in ("first", "middle", "last")
    for name, is_used, needed in (
        ("layer_share", chosen, "layers: first, middle or last"),
        ("parallel_init", settings.pooling == "learn", "pooling: learn"),
        ("forcing_share", bool(settings.attention_forcing), "attention_forcing"),
    ):
        value = getattr(settings, name)
        if not is_used and value != getattr(type(settings), name):
            do = f"set {needed}, or leave {name} out"
            raise ConfigError(f"{name}={shown(value)} without {needed}", "a setting that does something", do)
