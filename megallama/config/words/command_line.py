"""The command line of a run, for every command that takes one: its words, the flags among them, the runs they name.

Hydra is imported where it is needed: commands that have no run need not wait for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megallama.config.names import GROUPS
from megallama.host.errors import UserError
from megallama.host.utf8 import REMEDY, is_text, not_text

if TYPE_CHECKING:
    from megallama.config.schema import RunConfig
    from megallama.config.words.overrides import HydraUse
    from megallama.config.words.sweep import Sweep


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """What a command line says of runs."""

    overrides: Sequence[str]
    """Words, e.g. ["+exp=llama2_7b", "parallel.tp=4,8"]."""
    is_multirun: bool = False
    """Whether a word may list several values."""
    config_dir: Path | None = None
    """A user's own folder with model/ or exp/ files."""
    shows: Sequence[str] = ()
    """Flags for Hydra, where it is only to show something."""

    @classmethod
    def of(cls, options: argparse.Namespace) -> CommandLine:
        """From the options of a parser that `add_run_words` was called with.

        Raises:
            UserError: a word is no text.
        """
        for word in options.overrides:
            if not is_text(word):
                raise UserError(f"word {word!a} {not_text()}: {REMEDY}")
        shows = [*options.shows, *options.hydra] if getattr(options, "shows", ()) else []
        return cls(options.overrides, options.multirun, options.config_dir, shows)

    @property
    def words(self) -> list[str]:
        """The same for another process, but for what only shows something."""
        flags = ["--multirun"] if self.is_multirun else []
        flags += ["--config-dir", str(self.config_dir)] if self.config_dir else []
        return [*self.overrides, *flags]

    def load_runs(self) -> list[RunConfig]:
        """The configuration of every run; those of a multirun go one after another on the same ranks.

        Raises:
            ConfigError: as `load_config` and `load_sweep`.
            UserError: `config_dir` is no such folder.
        """
        from megallama.config.load import load_config
        from megallama.config.words.overrides import HydraUse

        if self.is_multirun:
            return self.load_sweep(HydraUse.jobs)[1]
        _check_folder(self.config_dir)
        return [load_config(self.overrides, extra_conf_dir=self.config_dir)]

    def load_sweep(self, use: HydraUse | None = None) -> tuple[Sweep, list[RunConfig]]:
        """The sweep of a multirun (default: of Hydra's own plugins), and those of its runs that are known before.

        Raises:
            ConfigError, UserError: as `load_runs`.
        """
        from megallama.config.load import load_config
        from megallama.config.words.overrides import HydraUse
        from megallama.config.words.sweep import load_sweep

        _check_folder(self.config_dir)
        use = use or HydraUse.sweep
        sweep = load_sweep(self.overrides, use=use, extra_conf_dir=self.config_dir)
        return sweep, [
            load_config(words, extra_conf_dir=self.config_dir, use=use, job=number)
            for number, words in enumerate(sweep.jobs)
        ]

    def show(self) -> None:
        """Let Hydra print what `shows` asks for.

        Raises:
            ConfigError: words that cannot be understood.
            UserError: a sweep, which is more than one run.
        """
        if self.is_multirun:
            raise UserError(
                f"{self.shows[0]} shows one run: leave out --multirun, and give one value for each setting"
            )
        import hydra

        from megallama.config.load import CONF_DIR, ROOT
        from megallama.config.words.sweep import hydra_words

        words = hydra_words(self.overrides, extra_conf_dir=self.config_dir)
        flags = dataclasses.replace(self, overrides=()).words
        sys.argv = [sys.argv[0], *words, *flags, *self.shows]

        @hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=ROOT)
        def nothing(config: object) -> None:
            """Hydra prints; there is nothing to run."""

        nothing()


def add_run_words(parser: argparse.ArgumentParser) -> None:
    """Add the words of a run, and the flags that say how they are meant."""
    parser.add_argument(
        "overrides", nargs="*", metavar="WORD", help="the run: +exp=..., model=..., section.setting=value"
    )
    parser.add_argument(
        "--multirun", "-m", action="store_true", help="every combination of the values that words list"
    )
    parser.add_argument(
        "--config-dir",
        "-cd",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="a folder with model/ or exp/ of your own, beside those that are shipped",
    )


def add_shows(parser: argparse.ArgumentParser, *, settings: Sequence[str] = ("--settings",)) -> None:
    """Add the flags with which a run is only shown.

    Args:
        parser: Gets them.
        settings: Names of the flag that lists all settings, which Hydra knows as --help.
    """
    shows = parser.add_argument_group("instead of a run")
    shows.add_argument(
        *settings, action=_ForHydra, nargs=0, flag="--help", help="show every setting with its default"
    )
    shows.add_argument(
        "--cfg",
        "-c",
        action=_ForHydra,
        choices=["job", "hydra", "all"],
        help="show the settings that the words give: --cfg job",
    )
    shows.add_argument(
        "--info",
        "-i",
        action=_ForHydra,
        nargs="?",
        const="all",
        metavar="WHAT",
        help="show which file and which word each setting comes from",
    )
    shows.add_argument(
        "--resolve", action=_ForHydra, nargs=0, is_detail=True, help="with --cfg: references resolved"
    )
    shows.add_argument(
        "--package",
        "-p",
        action=_ForHydra,
        metavar="SECTION",
        is_detail=True,
        help="with --cfg: only this section",
    )
    for name in ("--hydra-help", "--version", "--shell-completion"):
        short = ["-sc"] if name == "--shell-completion" else []
        shows.add_argument(name, *short, action=_ForHydra, nargs=0, help=argparse.SUPPRESS)


class _ForHydra(argparse.Action):
    """Keeps a flag as Hydra takes it: in `shows`, or in `hydra` where it means nothing without one of those."""

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        *,
        flag: str | None = None,
        is_detail: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(option_strings, dest="hydra" if is_detail else "shows", default=[], **kwargs)  # type: ignore[arg-type]
        self._flag = flag or option_strings[0]

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        given = [self._flag] if values in ([], None) else [self._flag, str(values)]
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), *given])


def _check_folder(path: Path | None) -> None:
    if path is None or any((path / group).is_dir() for group in GROUPS):
        return
    fault = "has neither model/ nor exp/" if path.is_dir() else "is not a folder"
    raise UserError(f"--config-dir ({path}) {fault}: give the folder in which your model/ or exp/ lies")
