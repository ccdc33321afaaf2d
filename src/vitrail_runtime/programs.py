"""vitrail's programs: `python src/train.py ...` in a checkout, `vitrail train ...` once installed.

Each composes conf/<config_name>.yaml from the command line and hands it to one function of `vitrail.commands`.
"""

import codecs
import gc
import getpass
import importlib
import logging
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from dotenv import dotenv_values
from hydra.errors import HydraException
from omegaconf import DictConfig

from vitrail_runtime import invocation, resolvers
from vitrail_runtime.allowed_targets import allow, guarded
from vitrail_runtime.deferred import defer_imports
from vitrail_runtime.null_groups import without_null_groups
from vitrail_runtime.project import CONF, home
from vitrail_runtime.renames import check_overrides
from vitrail_runtime.secrets import redacted
from vitrail_runtime.sentences import full_key, sentence

log = logging.getLogger("vitrail")


class Program(NamedTuple):
    """One program: its config, the function that runs it, and one line of help."""

    config_name: str
    command: Callable[[DictConfig], str]
    """Maps a config to `module:function` below `vitrail.commands`."""
    help: str
    variants: Mapping[str, str] = {}
    """Other configs by the argument that selects them."""

    def config_for(self, arguments: Iterable[str]) -> str:
        """Return the name of the config for the arguments of a command line."""
        given = {argument.lower() for argument in arguments}
        return next((config for argument, config in self.variants.items() if argument in given), self.config_name)


def _measured(config: DictConfig) -> str:
    """Return the function of the benchmark."""
    if config.get("tune"):
        return "tune:tune"
    return "training_speed:measure" if config.get("train") else "benchmark:benchmark"


PROGRAMS = {
    "train": Program("train", lambda config: "plan:plan" if config.plan else "train:train", "train a backbone"),
    "eval": Program("eval", lambda _: "eval:evaluate", "evaluate a run, an export, or other weights"),
    "annotate": Program("annotate", lambda _: "annotate:annotate", "make or import label maps"),
    "pack": Program("pack", lambda _: "pack:pack", "pack a data set into a few large files"),
    "doctor": Program("doctor", lambda _: "doctor:examine", "look for problems in data and label maps"),
    "export": Program("export", lambda _: "export:export", "export a run's network"),
    "predict": Program("predict", lambda _: "predict:predict", "predict the classes, or the masks, of images"),
    "report": Program(
        "report",
        lambda config: "wandb_report:wandb_report" if config.wandb else "report:report",
        "write a page that compares runs",
    ),
    "benchmark": Program(
        "benchmark",
        _measured,
        "measure speed and memory of a backbone or a training step",
        {"train=true": "benchmark_train", "tune=true": "benchmark_train"},
    ),
    "list_models": Program("list_models", lambda _: "list_models:show", "list the backbones and what they cost"),
}


def main() -> None:
    """Run the program that the first argument of `vitrail` names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in PROGRAMS:
        invocation.subcommand[:] = [name]
        run_program(name)
        return
    known = "\n".join(f"  vitrail {name:<12} {program.help}" for name, program in PROGRAMS.items())
    print(f"vitrail trains vision transformers.\n\n{known}\n\nvitrail <program> --help shows its keys.")
    if name not in ("--help", "-h", "help"):
        print(f"error: vitrail {name}: no such program.", file=sys.stderr)
        sys.exit(1)


def run_program(name: str) -> None:
    """Compose the program's config from the command line, run its command, and exit.

    The exit status is 0 on success, 1 after an error (reported in one sentence) or if the command returns False, and
    130 after Ctrl-C. The full traceback goes to the run's log file; `debug=...` shows it on the terminal.
    """
    program = PROGRAMS[name]
    full = list(sys.argv)

    def job(config: DictConfig) -> Any:
        sys.argv = full  # Lightning starts the other ranks with these arguments
        try:
            module, _, function = program.command(config).partition(":")
            command = importlib.import_module(f"vitrail.commands.{module}")
            _resume_collection()
            result = getattr(command, function)(config)
        except Exception as error:
            if _is_debugging():
                raise
            log.debug("failed", exc_info=error)
            _fail(error)
        if result is False:
            sys.exit(1)
        return None

    gc.disable()  # until everything is imported: what modules create stays, and searching it takes a second
    try:
        _check_folder()
        _provide_home()
        _load_dotenv(home() / ".env")
        sys.argv = [full[0], *_arranged(full[1 + len(invocation.subcommand) :])]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise; `_fail` prints the error
        _check_launcher()
        check_overrides(sys.argv[1:], name)
        config_name = program.config_for(sys.argv[1:])
        sys.argv[1:] = without_null_groups(sys.argv[1:], config_name)
        resolvers.register()
        defer_imports()
        with guarded():
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if _is_debugging():
            raise
        _fail(error)
    finally:
        gc.freeze()  # otherwise Python searches everything again when it exits, which takes a second or two


def _resume_collection() -> None:
    """Turn on garbage collection, without what exists so far; later jobs of a sweep must free the earlier ones."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


_HYDRA_FLAGS = {
    *("--cfg", "-c", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--experimental-rerun"),
    *("--info", "-i", "--package", "-p", "--shell-completion", "-sc"),
}
_FLAGS_WITH_VALUE = ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn")


def _arranged(arguments: list[str]) -> list[str]:
    """Return the arguments for Hydra: its flags first, which it does not find between overrides, and no `--allow`.

    `--allow names` allows configs to build what lies below these names; the user's code is also looked for in the
    current folder.
    """
    flags: list[str] = []
    overrides: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if any(
            "\ud800" <= character <= "\udfff" for character in argument
        ):  # surrogates, which Python decodes invalid bytes to
            shown = os.fsencode(argument).decode("utf-8", "backslashreplace")
            raise HydraException(f"{shown}: is not UTF-8, as config files are; rename it, or make a link to it.")
        if argument == "--allow" or argument.startswith("--allow="):
            names = next(waiting, "") if argument == "--allow" else argument.removeprefix("--allow=")
            if not names or "=" in names or names.startswith("-"):
                raise HydraException(
                    f"--allow {names}".rstrip() + ": must be followed by the name of a package or module."
                )
            allow(names)
        elif argument in _FLAGS_WITH_VALUE:
            flags += [argument, *([value] if (value := next(waiting, None)) is not None else [])]
        elif argument.startswith("-") and "=" in argument and argument.partition("=")[0] not in _HYDRA_FLAGS:
            key, _, value = argument.lstrip("-").partition("=")
            raise HydraException(f"{argument}: no such option; keys have no dashes: {full_key(key)}={value}.")
        else:
            (overrides if "=" in argument and not argument.startswith("-") else flags).append(argument)
    if os.environ.get("VITRAIL_TARGETS"):
        sys.path.append(str(Path.cwd()))
    return [*flags, *overrides]


def _check_folder() -> None:
    """Exit with an error if the working directory has been removed; Python and Hydra fail in many places then."""
    try:
        Path.cwd()
    except FileNotFoundError:
        print("error: the current folder no longer exists; change to another one.", file=sys.stderr)
        sys.exit(1)


def _check_launcher() -> None:
    """Exit with an error if a launcher is set without a multirun: Hydra would silently ignore it."""
    chosen = [arg for arg in sys.argv[1:] if arg.startswith("launcher=") and arg != "launcher=local"]
    multirun = {"-m", "--multirun", "hydra.mode=MULTIRUN"} & {*sys.argv[1:]}
    if chosen and not multirun:
        print(f"error: {chosen[0]}: launchers need a multirun: add -m, even for one job.", file=sys.stderr)
        sys.exit(1)


def _is_debugging() -> bool:
    chosen = any(arg.startswith("debug=") and arg not in ("debug=", "debug=null") for arg in sys.argv[1:])
    return chosen or os.environ.get("VITRAIL_TRACEBACK", "") == "1"


def _fail(error: Exception) -> None:
    rank = os.environ.get("LOCAL_RANK", "0")
    prefix = "error" if rank == "0" else f"error on rank {rank}"
    sys.stderr.write(f"{prefix}: {redacted(sentence(error))}\n")  # print writes the line's end separately
    sys.stderr.flush()
    sys.stdout.flush()
    # A worker that was killed may hold the lock of the queue that the others wait for; they would end a minute later.
    for worker in multiprocessing.active_children():
        worker.kill()
    if rank == "0" or "WORLD_SIZE" not in os.environ:
        sys.exit(1)
    os._exit(1)  # a rank that exits normally would wait for the others in collective calls


def _load_dotenv(path: Path) -> None:
    """Put the variables of a `.env` file into the environment; set ones win, empty values are skipped."""
    if not path.is_file():
        return
    for name, value in dotenv_values(stream=StringIO(_decoded(path.read_bytes()))).items():
        if value:
            os.environ.setdefault(name, value)


def _decoded(content: bytes) -> str:
    """Decode a text file by its byte order mark, else as UTF-8, else as Windows-1252."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if content.startswith(mark):
            return content.decode(encoding)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def _provide_home() -> None:
    """Set HOME and USER if the user id has no account, as in containers that run with a foreign user id.

    Python and PyTorch look for the home folder and the user name, and raise errors if there are none.
    """
    try:
        Path.home()
    except RuntimeError:
        folder = Path(tempfile.gettempdir()) / f"vitrail-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():  # another user's
            folder = Path(tempfile.mkdtemp(prefix="vitrail-"))
        os.environ["HOME"] = str(folder)
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())
