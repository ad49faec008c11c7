"""Classes by name: those of a registry, and a user's own, named ``module:Class``."""

from __future__ import annotations

import os
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any, Mapping

from .spec import option_type


def look_up(what: str, name: str, registry: Mapping[str, type], protocol: type) -> Any:
    """The class of that name: an entry of ``registry``, or a user's own from ``module:Class``.

    The module may lie in the current folder. ``what`` is how errors call the class: ``"task"``, ``"model"``.

    Raises ValueError or TypeError, in one line, where there is no such class, or where it is not what ``protocol``
    asks for: a dataclass whose fields are options, with every public name of ``protocol``.
    """
    if name in registry:
        return registry[name]
    module_name, colon, class_name = name.partition(":")
    if not (colon and module_name and class_name):
        raise ValueError(f"{what}: got {name!r}, expected one of {', '.join(map(repr, registry))} or 'module:Class'")
    module = _import(what, name, module_name)
    found = getattr(module, class_name, None)
    if found is None:
        raise ValueError(f"{what}: got {name!r}, but {module.__file__ or module_name} has no {class_name}")
    _check(what, name, found, protocol)
    return found


def _import(what: str, name: str, module_name: str) -> Any:
    if not {"", os.getcwd()} & set(sys.path):  # an installed command starts without the current folder
        sys.path.insert(0, os.getcwd())
    try:
        return import_module(module_name)
    except Exception as error:  # the module is the user's: anything may happen while it runs
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{what}: got {name!r}, but there is no module {error.name} in {os.getcwd()} or among the installed"
            ) from error
        raise ValueError(
            f"{what}: got {name!r}, but importing {module_name} raised {type(error).__name__}: {error}"
        ) from error


def _check(what: str, name: str, found: Any, protocol: type) -> None:
    if not (isinstance(found, type) and is_dataclass(found)):
        raise TypeError(f"{what}: got {name!r}, which is not a dataclass; expected one whose fields are its options")
    options = {option.name: option for option in fields(found)}
    for option in options.values():
        if option_type(option) not in (int, float, str, bool):
            raise TypeError(
                f"{what}: got {name!r}, whose field {option.name} is no option: expected a default that is an int, a "
                f"float, a str or a bool, or ntm_fast.spec.option(None, ..., optional=its type)"
            )
    asked = [member for member in (*protocol.__annotations__, *vars(protocol)) if not member.startswith("_")]
    lacking = [member for member in asked if member not in options and not hasattr(found, member)]
    if lacking:
        raise TypeError(f"{what}: got {name!r}, which lacks {', '.join(lacking)}; {protocol.__name__} says what it is")
