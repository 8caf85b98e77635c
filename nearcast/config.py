"""Layered configuration: struct defaults, then a TOML file, then the environment, then `--set`.

A configuration is a frozen msgspec struct whose fields all have defaults; a field that is itself such a struct is a
section. Each value remembers where it came from. Secrets are never values here, only paths of files that hold them.
"""

from __future__ import annotations

import os
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from nearcast.errors import Code, MeshError

T = TypeVar("T", bound=msgspec.Struct)

ENVIRONMENT_PREFIX = "NEARCAST_"
ENVIRONMENT_RESERVED = frozenset({"NEARCAST_HOME"})
"""Variables with our prefix that are no setting: the operator's own folder, which commands read."""
FILE_SIZE_BYTES_MAX = 1024 * 1024
DEFAULT_ORIGIN = "default"
_STRUCTURES = (tuple, list, dict, set, frozenset, Mapping, msgspec.Struct)


class ConfigError(MeshError):
    """A configuration that cannot be used. Its code is INVALID_REQUEST; a process ends with exit code 78."""

    def __init__(self, message: str) -> None:
        super().__init__(Code.INVALID_REQUEST, message)


class Row(msgspec.Struct, frozen=True):
    """One effective setting: dotted `key`, its `value` and the `origin` of that value, in words."""

    key: str
    value: object
    origin: str


class Loaded(msgspec.Struct, Generic[T], frozen=True):
    """A configuration and where each of its values came from."""

    value: T
    origins: Mapping[str, str] = msgspec.field(default_factory=dict)

    def origin(self, dotted: str) -> str:
        """Where the value of `section.key` came from: "default", a file, an environment variable or "--set"."""
        return self.origins.get(dotted, DEFAULT_ORIGIN)

    def rows(self) -> list[Row]:
        """All effective settings in the order of the struct."""
        return [Row(key, value, self.origin(key)) for key, value in _leaves(self.value, "")]


class _Setting(msgspec.Struct, frozen=True):
    """One raw value and where it was written. `is_text`: it came as a string and is read by its target's type."""

    value: object
    origin: str
    is_text: bool


def load_config(
    type_: type[T],
    *,
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    overrides: Sequence[str] = (),
) -> Loaded[T]:
    """Read a configuration.

    Args:
        type_: a frozen struct whose fields all have defaults.
        path: a TOML file, if there is one.
        environ: the environment; None = that of this process. `NEARCAST_SECTION__KEY` sets `section.key`.
        overrides: `section.key=value` texts, the strongest layer.

    Raises:
        ConfigError: for an unknown key or a value that does not fit; it names the key, the place and the nearest key.
    """
    settings: dict[str, _Setting] = {}
    if path is not None:
        settings.update(_from_table(type_, read_toml(path), str(path), ""))
    settings.update(_from_environment(type_, os.environ if environ is None else environ))
    settings.update(_from_overrides(type_, overrides))
    value = _build(type_(), type_, settings, "")
    return Loaded(value, {key: setting.origin for key, setting in settings.items()})


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file of at most `FILE_SIZE_BYTES_MAX` bytes.

    Raises:
        ConfigError: if it cannot be read or parsed.
    """
    try:
        with path.open("rb") as file:
            data = file.read(FILE_SIZE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"Cannot read the configuration {path}: {error.strerror}.") from error
    if len(data) > FILE_SIZE_BYTES_MAX:
        raise ConfigError(f"The configuration {path} is larger than {FILE_SIZE_BYTES_MAX} bytes.")
    import tomllib  # a node that is told nothing never needs it

    try:
        return tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"The configuration {path} is not valid TOML: {error}.") from error


def _from_table(type_: type[msgspec.Struct], table: Mapping[str, Any], place: str, prefix: str) -> dict[str, _Setting]:
    settings: dict[str, _Setting] = {}
    for name, value in table.items():
        dotted = prefix + name
        target = _field_type(type_, name, dotted, place)
        section = _section_of(target)
        if section is None or value is None:
            settings[dotted] = _Setting(value, place, is_text=False)
        elif isinstance(value, Mapping):
            settings.update(_from_table(section, value, place, dotted + "."))
        else:
            raise ConfigError(f"{place}: `{dotted}` is a section, not a value; write it as [{dotted}].")
    return settings


def _from_environment(type_: type[msgspec.Struct], environ: Mapping[str, str]) -> dict[str, _Setting]:
    settings: dict[str, _Setting] = {}
    for variable in sorted(environ):
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in ENVIRONMENT_RESERVED:
            dotted = variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            origin = f"environment {variable}"
            _require_leaf(type_, dotted, origin)
            settings[dotted] = _Setting(environ[variable], origin, is_text=True)
    return settings


def _from_overrides(type_: type[msgspec.Struct], overrides: Sequence[str]) -> dict[str, _Setting]:
    settings: dict[str, _Setting] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"--set {override}: write it as section.key=value.")
        dotted = dotted.strip()
        _require_leaf(type_, dotted, "--set")
        settings[dotted] = _Setting(text, "--set", is_text=True)
    return settings


def _require_leaf(type_: type[msgspec.Struct], dotted: str, place: str) -> None:
    section: type[msgspec.Struct] | None = type_
    walked = ""
    for name in dotted.split("."):
        if section is None:
            raise ConfigError(f"{place}: unknown key `{dotted}`: `{walked}` is a value, not a section.")
        walked = f"{walked}.{name}" if walked else name
        section = _section_of(_field_type(section, name, dotted, place, type_))
    if section is not None:
        example = _first_key(type_, dotted)
        raise ConfigError(f"{place}: `{dotted}` is a section; set one of its keys, such as `{example}`.")


def _field_type(
    type_: type[msgspec.Struct], name: str, dotted: str, place: str, root: type[msgspec.Struct] | None = None
) -> object:
    for entry in msgspec.structs.fields(type_):
        if entry.encode_name == name:
            return entry.type
    prefix = dotted.rpartition(".")[0]
    known = [key for key, _ in _leaves(root(), "")] if root else [e.encode_name for e in msgspec.structs.fields(type_)]
    asked = dotted if root else name
    import difflib  # a node that starts well never needs it

    near = difflib.get_close_matches(asked, known, n=1, cutoff=0.6)
    hint = "" if not near else f" Did you mean `{near[0] if root or not prefix else f'{prefix}.{near[0]}'}`?"
    raise ConfigError(f"{place}: unknown key `{dotted}`.{hint}")


def _first_key(type_: type[msgspec.Struct], dotted: str) -> str:
    return next((key for key, _ in _leaves(type_(), "") if key.startswith(dotted + ".")), f"{dotted}.key")


def _section_of(type_: object) -> type[msgspec.Struct] | None:
    """The struct behind a field that is a section (also `Section | None`), None for a plain value."""
    if get_origin(type_) is Annotated:
        return _section_of(get_args(type_)[0])
    if get_origin(type_) in (Union, types.UnionType):
        members = [member for member in get_args(type_) if member is not type(None)]
        return _section_of(members[0]) if len(members) == 1 else None
    return type_ if isinstance(type_, type) and issubclass(type_, msgspec.Struct) else None


def _build(default: Any, type_: type[Any], settings: Mapping[str, _Setting], prefix: str) -> Any:
    """The struct with all settings below `prefix` applied to its default; the very default if there are none."""
    changes: dict[str, object] = {}
    for entry in msgspec.structs.fields(type_):
        dotted = prefix + entry.encode_name
        section = _section_of(entry.type)
        if dotted in settings:
            changes[entry.name] = _convert(settings[dotted], entry.type, dotted)
        elif section is not None and any(key.startswith(dotted + ".") for key in settings):
            present = getattr(default, entry.name)
            base = section() if present is None else present
            changes[entry.name] = _build(base, section, settings, dotted + ".")
    if not changes:
        return default
    try:
        return msgspec.structs.replace(default, **changes)
    except (ValueError, TypeError) as error:  # what a struct's own __post_init__ refuses
        where = ", ".join(f"`{prefix}{name}`" for name in changes)
        raise ConfigError(f"{where}: {error}.") from error


def _convert(setting: _Setting, type_: object, dotted: str) -> object:
    value = setting.value
    if setting.is_text and _takes_structure(type_):
        value = _parse_text(str(value))
    try:
        return msgspec.convert(value, type_, strict=not setting.is_text, dec_hook=_decode_path)
    except msgspec.ValidationError as error:
        allowed = f" Use one of: {', '.join(map(str, get_args(type_)))}." if get_origin(type_) is Literal else ""
        raise ConfigError(f"{setting.origin}: `{dotted}` has a bad value: {error}.{allowed}") from error


def _takes_structure(type_: object) -> bool:
    """Whether a text for this type is a TOML literal (a list or a table) and not the value itself."""
    origin = get_origin(type_)
    if origin is Annotated:
        return _takes_structure(get_args(type_)[0])
    if origin in (Union, types.UnionType):
        return any(_takes_structure(member) for member in get_args(type_))
    plain = origin or type_
    return isinstance(plain, type) and issubclass(plain, _STRUCTURES)


def _parse_text(text: str) -> object:
    import tomllib

    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _decode_path(type_: type[Any], value: object) -> object:
    if isinstance(type_, type) and issubclass(type_, Path):
        if not isinstance(value, str):
            raise TypeError(f"Expected a path, got `{type(value).__name__}`")
        return Path(value)
    raise NotImplementedError(f"configuration fields of type {type_} are not supported")


def _leaves(value: msgspec.Struct, prefix: str) -> Iterator[tuple[str, object]]:
    for entry in msgspec.structs.fields(value):
        current = getattr(value, entry.name)
        if isinstance(current, msgspec.Struct):
            yield from _leaves(current, f"{prefix}{entry.encode_name}.")
        else:
            yield prefix + entry.encode_name, current
