"""Frozen dataclasses from nested dicts, as config files and JSON have them, with every wrong setting named."""

import dataclasses
import math
import types
import typing
from typing import Any

from refusion_jax.errors import UserError


def build(cls: type, value: Any, where: str) -> Any:
    """A nested dict as a dataclass.

    Args:
      cls: a dataclass whose fields have types that JSON knows, tuples, dataclasses, or one of several dataclasses, of
        which each has a field `kind` with another default.
      value: the dict; lists stand for tuples, also within values of any type, and whole numbers for floats.
      where: what it is called, in messages.

    Raises:
      UserError: an unknown key, a missing key or a value of the wrong type, by name; or what `cls` itself refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r}; expected a group of settings ({', '.join(fields)}).")
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise UserError(f"Unknown setting {where}.{unknown[0]}; {where} has {', '.join(sorted(fields))}.")
    missing = [
        n
        for n, f in fields.items()
        if n not in value and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where} lacks the setting {missing[0]}.")
    return cls(**{name: _convert(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def positive(where: str, config: Any, *names: str) -> None:
    """Raises a UserError unless these fields of a group of settings are greater than 0, and finite."""
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"{where}.{name} is {getattr(config, name)}; it must be greater than 0, and finite.")


def not_negative(where: str, config: Any, *names: str) -> None:
    """Raises a UserError where one of these fields of a group of settings is less than 0, or not finite."""
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise UserError(f"{where}.{name} is {getattr(config, name)}; it must be finite and must not be negative.")


def choice(where: str, config: Any, name: str, allowed: tuple[str, ...]) -> None:
    """Raises a UserError unless the field is one of the allowed values."""
    if getattr(config, name) not in allowed:
        raise UserError(f"{where}.{name} is {getattr(config, name)!r}; choose one of {', '.join(allowed)}.")


def of_kind(classes: tuple[type, ...], value: Any, where: str) -> Any:
    """A group of settings whose `kind` says which of the dataclasses it is; the first one if it does not say.

    Raises:
      UserError: another kind, or what `build` raises.
    """
    kinds = {cls.kind: cls for cls in classes}
    kind = value.get("kind", classes[0].kind) if isinstance(value, dict) else classes[0].kind
    if kind not in kinds:
        raise UserError(f"{where}.kind is {kind!r}; choose one of {', '.join(kinds)}.")
    return build(kinds[kind], value, where)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if all(map(dataclasses.is_dataclass, typing.get_args(hint) or [None])):
        return of_kind(typing.get_args(hint), value, where)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, dict):  # options of a task
            value = list(value.items())
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where} is {value!r}; expected a list.")
        inner = typing.get_args(hint)
        if inner[-1] is Ellipsis:
            return tuple(_convert(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(value) != len(inner):
            raise UserError(f"{where} is {value!r}; expected a list of {len(inner)}.")
        return tuple(_convert(each, item, f"{where}[{i}]") for i, (each, item) in enumerate(zip(inner, value)))
    if hint is Any:
        return _hashable(value, where)
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{where} is {value}; give a smaller number.") from None
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join("none" if a is type(None) else a.__name__ for a in allowed)
        raise UserError(f"{where} is {value!r} ({type(value).__name__}); expected {names}.")
    return value


def _hashable(value: Any, where: str) -> Any:
    """A value that JSON knows, its lists as tuples: a config, whose options may have any, is a key of caches."""
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item, f"{where}[{i}]") for i, item in enumerate(value))
    if value is not None and not isinstance(value, (str, int, float)):
        raise UserError(
            f"{where} is {value!r} ({type(value).__name__}); expected text, a number, true, false, none or a list."
        )
    return value
