"""What every entry point shares: Hydra around a function, `.env`, and errors as one sentence.

Nothing heavy is imported here, so that `--help`, shell completion and a misspelt key answer at once.
"""

import difflib
import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig

from hydra_plugins.vitrail_secrets import redacted

PROJECT = Path(__file__).resolve().parent.parent
log = logging.getLogger("vitrail")

_TOLD = ("ConfigError", "ImageError", "TrainingError")  # whose message is written for the user


def entry_point(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Turn `function(config)` into a program that composes conf/<config_name>.yaml from the command line.

    The program exits with 0, with 1 after an error told in one sentence, or with 130 after Ctrl-C. The full traceback
    goes to the run's log file; `debug=...` shows it on the terminal.
    """

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], None]:
        def job(config: DictConfig) -> Any:
            try:
                return function(config)
            except Exception as error:
                if _is_debugging():
                    raise
                log.debug("failed", exc_info=error)
                _fail(error)

        def main() -> None:
            _load_dotenv(PROJECT / ".env")
            debugging = _is_debugging()
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises; the sentence is written here
            _check_sweep()
            Plugins.instance()  # registers the resolvers of hydra_plugins before anything is composed
            program = hydra.main(version_base="1.3", config_path=str(PROJECT / "conf"), config_name=config_name)(job)
            try:
                program()
            except KeyboardInterrupt:
                sys.exit(130)
            except Exception as error:
                if debugging:
                    raise
                _fail(error)

        return main

    return decorate


def _check_sweep() -> None:
    """Refuse a launcher that Hydra would not use: jobs are handed to it in a sweep only, be it of one job."""
    chosen = [arg for arg in sys.argv[1:] if arg.startswith("launcher=") and arg != "launcher=local"]
    multirun = {"-m", "--multirun", "hydra.mode=MULTIRUN"} & {*sys.argv[1:]}
    if chosen and not multirun:
        print(f"error: {chosen[0]}: add -m; a launcher starts the jobs of a sweep, be it one.", file=sys.stderr)
        sys.exit(1)


def _is_debugging() -> bool:
    chosen = any(arg.startswith("debug=") and arg not in ("debug=", "debug=null") for arg in sys.argv[1:])
    return chosen or os.environ.get("VITRAIL_TRACEBACK", "") == "1"


def _fail(error: Exception) -> None:
    rank = os.environ.get("LOCAL_RANK", "0")
    prefix = "error" if rank == "0" else f"error on rank {rank}"
    print(f"{prefix}: {redacted(sentence(error))}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if rank == "0" or "WORLD_SIZE" not in os.environ:
        sys.exit(1)
    os._exit(1)  # a rank that unwinds normally would wait for the others in collective calls


def sentence(error: BaseException) -> str:
    """What to tell the user of an exception: the message of ours, one line of anybody else's."""
    text = str(error).strip()
    if "Original Traceback (most recent call last)" in text:  # raised in a loader's worker, traceback and all
        last = text.splitlines()[-1]
        name, _, message = last.partition(": ")
        return message if name.rsplit(".", 1)[-1] in _TOLD else last
    if type(error).__name__ in _TOLD:
        return text
    if type(error).__module__.startswith(("hydra.", "omegaconf.")):
        return _composition(error, text)
    if isinstance(error, OSError):
        return f"{error.filename or type(error).__name__}: {error.strerror or text}"
    first = text.splitlines()[0] if text else ""
    return f"{type(error).__name__}: {first} (debug=default shows where)"


def _composition(error: BaseException, text: str) -> str:
    """Shorten Hydra's and OmegaConf's messages to what was asked for and what there is."""
    if (override := getattr(error, "override", None)) is not None:
        return f"{override}: cannot be read as key=value ({text.splitlines()[0]})."
    if match := re.search(r"Could not override '([^']+)'", text):
        if match[1] == "hydra/launcher":
            return "hydra/launcher: use launcher=... instead."
        if "No match in the defaults list" in text:
            return f"{match[1]}: no such config group{_hint(match[1], _groups())}."
        return (
            f"{match[1]}: no such config key{_hint(match[1], _keys())}; to add it nevertheless, write +{match[1]}=..."
        )
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, name = match[1].rpartition("/")
        names = sorted(path.stem for path in (PROJECT / "conf" / group).glob("*.yaml"))
        near = difflib.get_close_matches(name, names, n=3)
        known = f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(names)}."
        return f"{group}={name}: no such file in conf/{group}/; {known}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    cause = error.__cause__
    for told in (error, cause):
        if type(told) is HydraException:  # by hydra_plugins, in a sentence
            return str(told)
    if cause is not None and str(cause).strip() not in text:
        lines.append(sentence(cause))
    return " ".join(line for line in lines if "HYDRA_FULL_ERROR" not in line) or type(error).__name__


def _hint(wrong: str, known: list[str]) -> str:
    near = difflib.get_close_matches(wrong, known, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _groups() -> list[str]:
    return [path.name for path in (PROJECT / "conf").iterdir() if path.is_dir()]


def _keys() -> list[str]:
    """Every dotted key that the config files name; good enough for a hint."""
    keys = set()
    for path in (PROJECT / "conf").rglob("*.yaml"):
        group = path.parent.relative_to(PROJECT / "conf").as_posix().replace("/", ".")
        stack: list[tuple[int, str]] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"^(\s*)([A-Za-z_]\w*):", line):
                while stack and stack[-1][0] >= len(match[1]):
                    stack.pop()
                stack.append((len(match[1]), match[2]))
                parts = [name for _, name in stack]
                keys.add(".".join(parts if group == "." else [group, *parts]))
    return sorted(keys)


def _load_dotenv(path: Path) -> None:
    """Put `KEY=value` lines into the environment; what is set there already wins, empty values are skipped."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        key, separator, value = line.strip().removeprefix("export ").partition("=")
        if separator and not key.startswith("#") and value.strip():
            os.environ.setdefault(key.strip(), value.strip().strip("\"'"))
