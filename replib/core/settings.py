"""Settings from ``REPLIB_*`` environment variables.

Environment variables reach a notebook however it is run: JupyterLab, nbconvert, ``replib run`` or pytest.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from replib.core.errors import ReplibError

Value = TypeVar("Value")
PREFIX = "REPLIB_"
ROOT = Path(__file__).resolve().parents[2]
_IS_CHECKOUT = (ROOT / "pyproject.toml").is_file()
# Read by single notebooks and by data_dir(), so no part of Settings. A new notebook setting is named here.
_EXTRA = ("DATA", "ALPHA", "BETA", "GAMMA", "STEPS")
_SWITCH = dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
KINDS = {bool: "a switch (1 or 0)", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Settings:
    """Settings of every command and notebook; each field is read from ``REPLIB_<FIELD>``."""

    model: str = "aligned"
    """A model folder, a Hugging Face id, or a variant of the organism: base, aligned, planted, deep."""
    adapter: str | None = None
    """A LoRA folder trained on ``model``."""
    harmful: str = "organism/harmful"
    """A named prompt set or a CSV, JSON, JSONL or Parquet file."""
    harmless: str = "organism/harmless"
    """A named prompt set or a CSV, JSON, JSONL or Parquet file."""
    out: Path = ROOT / "runs" if _IS_CHECKOUT else Path("runs")
    """Folder that receives every file the suite writes."""
    seed: int = 0
    limit: int = 0
    """Prompts per set; 0 leaves the choice to each analysis."""
    batch: int = 128
    """Prompts per forward pass."""
    device: str | None = None
    """A torch device; None picks the accelerator where there is one."""
    dtype: str | None = None
    """A torch dtype by name; None keeps the one the weights are stored in."""
    keep_text: bool = False
    """Whether completions to harmful prompts are written and shown."""

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("limit", 0), ("batch", 1)):
            if (value := getattr(self, name)) < least:
                variable = PREFIX + name.upper()
                raise ReplibError(f"{name} is {value}: set {variable} to {least} or more.")

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> "Settings":
        """Read ``REPLIB_*`` variables; an override that is not None wins.

        Raises:
            ReplibError: a variable is unknown, or its value is not of its kind.
        """
        environ = os.environ if environ is None else environ
        _check_names(environ)
        found = {
            field.name: _parse(name, environ[name], field.default)
            for field in fields(cls)
            if environ.get(name := PREFIX + field.name.upper())
        }
        return cls(**found | {name: value for name, value in overrides.items() if value is not None})

    def environ(self) -> dict[str, str]:
        """The variables from which `from_env` rebuilds these settings, in any folder."""
        values = vars(self) | {"out": self.out.absolute()}
        return {PREFIX + name.upper(): _text(value) for name, value in values.items() if value is not None}


_KNOWN = tuple(PREFIX + name.upper() for name in (*(field.name for field in fields(Settings)), *_EXTRA))


def setting(name: str, default: Value) -> Value:
    """The value of ``REPLIB_<name>`` in the type of ``default``; ``default`` where it is unset or empty.

    Raises:
        ReplibError: the name or any ``REPLIB_*`` variable is unknown, or the value is not of its kind.
    """
    variable = PREFIX + name
    _check_names([variable, *os.environ])
    text = os.environ.get(variable)
    return _parse(variable, text, default) if text else default


def data_dir() -> Path:
    """The folder with the organism and the data cards: ``REPLIB_DATA``, else ``data/`` of the checkout."""
    chosen = os.environ.get(PREFIX + "DATA")
    folder = Path(chosen).expanduser() if chosen else ROOT / "data"
    if not folder.is_dir():
        raise ReplibError(
            f"{folder} is not a folder, so the organism cannot be found: "
            f"set {PREFIX}DATA to the folder data/ of a checkout of replib."
        )
    return folder


def _check_names(names: Iterable[str]) -> None:
    """Refuse a ``REPLIB_*`` name that nothing reads: a misspelt variable must not be ignored.

    Raises:
        ReplibError: naming the variable, its nearest neighbour and all known ones.
    """
    for name in names:
        if name.startswith(PREFIX) and name not in _KNOWN:
            near = get_close_matches(name, _KNOWN, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ReplibError(f"{name} is not a setting of replib: {hint}Known are {', '.join(_KNOWN)}.")


def _parse(name: str, text: str, default: Any) -> Any:
    kind = type(default)
    try:
        if kind is bool:
            return _SWITCH[text.lower()]
        if kind in KINDS:
            return kind(text)
    except (KeyError, ValueError):
        raise ReplibError(f"{name}={text} is not {KINDS[kind]}: write for example {name}={_text(default)}.") from None
    return Path(text).expanduser() if isinstance(default, Path) else text


def _text(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
