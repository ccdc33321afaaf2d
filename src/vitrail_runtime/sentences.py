"""Turn an exception into one sentence for the user: vitrail's messages unchanged, all others shortened to a line."""

import difflib
import re
import shlex

from hydra.errors import HydraException

from vitrail_runtime.errors import ArgumentError
from vitrail_runtime.project import CONF
from vitrail_runtime.renames import RENAMED_CHOICES, RENAMED_KEYS

_OURS = ("ArgumentError", "ConfigError", "ImageError", "TrainingError")  # errors whose message is written for the user


SHARED_MEMORY = (
    "data.num_workers: the loader workers have no shared memory left (/dev/shm is full); give the container more"
    " (docker run --shm-size=8g), or set data.num_workers=0."
)


def sentence(error: BaseException) -> str:
    """Return the message of an exception for the user: unchanged for vitrail's errors, otherwise one line."""
    text = str(error).strip()
    if ("shared memory" in text or "/dev/shm" in text) and "No space left" in text:
        return SHARED_MEMORY
    if "Original Traceback (most recent call last)" in text:  # raised in a data loader worker, with its traceback
        last = text.splitlines()[-1]
        name, _, message = last.partition(": ")
        return message if name.rsplit(".", 1)[-1] in _OURS else last
    if type(error).__name__ in _OURS:
        return text
    if text.startswith("Config group override must be a string"):
        return "null: cannot be one of a sweep's values for a config group; use a file, such as mixing=none."
    if type(error).__module__.startswith(("hydra.", "omegaconf.")):
        return _composition(error, text)
    if isinstance(error, OSError):
        return f"{error.filename or type(error).__name__}: {error.strerror or text}"
    first = text.splitlines()[0] if text else ""
    if type(error).__name__ == "MisconfigurationException":  # Lightning's, about the trainer's settings
        return f"trainer: {first}"
    return f"{type(error).__name__}: {first} (debug=default shows where)"


def _composition(error: BaseException, text: str) -> str:
    """Shorten Hydra's and OmegaConf's messages to the requested name and the available ones."""
    if (override := getattr(error, "override", None)) is not None:
        return _unreadable(str(override), text.splitlines()[0])
    if match := re.search(r"Missing mandatory value: ([\w.]+)", text):
        return f"{match[1]}: not set; write {match[1]}=..., --help describes it."
    if match := re.search(r"Ambiguous value for argument '(.+?)=(.*)'", text):
        key, value = match[1], match[2]
        return (
            f"{key}={value}: a comma separates values; to sweep over them add -m, for a list write {key}=[{value}], for"
            f" text {_quoted(key, value)}."
        )
    if match := re.search(r"An item is already at '([^']+)'", text):
        return f"{match[1]}: this config has it already; write {match[1]}=... without a plus sign."
    if match := re.search(r"Multiple values for ([\w/]+)\. To override", text):
        return f"{match[1]}: this config has it already; write {match[1]}=... without a plus sign."
    if match := re.search(r"Could not override '([^']+)'", text):
        if match[1] == "hydra/launcher":
            return "hydra/launcher: use launcher=... instead."
        if "No match in the defaults list" in text:
            return f"{match[1]}: no such config group{_hint(match[1], _groups())}."
        if match[1] in RENAMED_KEYS:
            return f"{match[1]}: renamed to {RENAMED_KEYS[match[1]]}."
        keys = _keys()
        if match[1] in keys:  # of a group that is not chosen, as when a run brings its own data
            return f"{match[1]}: this config does not have it yet; write +{match[1]}=..."
        return f"{match[1]}: no such config key{_hint(match[1], keys)}; to add it anyway, write +{match[1]}=..."
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, name = match[1].rpartition("/")
        if name in RENAMED_CHOICES.get(group, {}):
            return f"{group}={name}: renamed; write {RENAMED_CHOICES[group][name]}."
        if group.startswith("hydra/"):
            ours = {"hydra/launcher": "launcher", "hydra/sweeper": "sweep"}.get(group)
            known = ", ".join(sorted(path.stem for path in (CONF / ours).glob("*.yaml"))) if ours else ""
            return f"{group}={name}: not available{f'; choose {ours}= one of {known}' if ours else ''}."
        names = sorted(path.stem for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_"))
        near = difflib.get_close_matches(name, names, n=3)
        known = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(names)}."
        return f"{group}={name}: no such file in conf/{group}/; {known}"
    if match := re.match(r"\w+ raised while resolving interpolation: (.*)", text):  # by one of vitrail's resolvers
        return match[1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    cause = error.__cause__
    if isinstance(cause, ArgumentError):
        key = next((line.removeprefix("full_key: ") for line in lines if line.startswith("full_key: ")), "")
        return str(cause.with_key(key))
    for raised in (error, cause):
        if type(raised) is HydraException:  # raised by vitrail, with a message for the user
            return str(raised)
    if cause is not None and str(cause).strip() not in text:
        lines.append(sentence(cause))
    return " ".join(line for line in lines if "HYDRA_FULL_ERROR" not in line) or type(error).__name__


def _unreadable(override: str, reason: str) -> str:
    """Return the message for an override that Hydra cannot parse, usually because its value needs quotes."""
    key, found, value = override.partition("=")
    if found and re.fullmatch(r"[+~]*[\w./@]+", key) and value[:1] not in ("'", '"', "[", "{"):
        return f"{override}: contains characters that are special in Hydra; write {_quoted(key, value)}."
    return f"{override}: cannot be read as key=value ({reason})."


def _quoted(key: str, value: str) -> str:
    """Return an override with its value quoted for Hydra, and all of it for the shell."""
    return shlex.quote(f'{key}="{value}"') if "'" in value else f"\"{key}='{value}'\""


def _hint(wrong: str, known: list[str]) -> str:
    near = difflib.get_close_matches(wrong, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def full_key(name: str) -> str:
    """Return the dotted key of the configs that ends with `name`; `name` itself if there is none, or several."""
    found = [key for key in _keys() if key == name or key.endswith(f".{name}")]
    return found[0] if len(found) == 1 or name in found else min(found, key=len, default=name)


def _groups() -> list[str]:
    return [path.name for path in CONF.iterdir() if path.is_dir()]


def _keys() -> list[str]:
    """Return all dotted keys in the config files, by a simple parser that is good enough for hints."""
    keys = set()
    for path in CONF.rglob("*.yaml"):
        group = path.parent.relative_to(CONF).as_posix().replace("/", ".")
        stack: list[tuple[int, str]] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"^(\s*)([A-Za-z_]\w*):", line):
                while stack and stack[-1][0] >= len(match[1]):
                    stack.pop()
                stack.append((len(match[1]), match[2]))
                parts = [name for _, name in stack]
                keys.add(".".join(parts if group == "." else [group, *parts]))
    return sorted(keys)
