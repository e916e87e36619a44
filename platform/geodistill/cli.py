"""What every job shares: its command line, its Ray, and how it ends. The settings are checked before torch or ray is imported."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from geodistill.config import Config, ConfigError, absolute, load
from geodistill.manual import describe, record


class JobFailed(RuntimeError):
    """A job stopped on an error that its message explains to the user."""


class JobStopped(JobFailed):
    """A job ended before its work was done because it was told to; the same command goes on."""


@contextmanager
def sigterm_interrupts() -> Iterator[threading.Event]:
    """Inside, SIGTERM raises KeyboardInterrupt, which Ray lets through as no other exception, and sets the event."""
    told = threading.Event()

    def stop(*_: Any) -> None:
        told.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: not Python's


def settings(job: str, argv: list[str] | None = None) -> Config:
    """Parse `--config FILE [key=value ...]`; print help or the error and leave (0 or 2) where nothing can be run.

    Without --config the defaults hold, where a file of predictions is to be scored: no run's settings play a part in that.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    usage = f"usage: python jobs/{job}.py --config FILE [key=value ...]"
    if "--help" in arguments or "-h" in arguments:
        print(f"{usage}\n\nkeys that this job reads, with type, default, meaning and [unit]:\n{describe(job)}")
        raise SystemExit(0)
    try:
        if any(argument.startswith("predictions=") for argument in arguments) and "--config" not in arguments:
            return absolute(load(None, arguments))
        if "--config" not in arguments[:-1]:
            raise ConfigError(f"--config FILE is missing; {usage}")
        at = arguments.index("--config")
        file = arguments[at + 1]
        return absolute(load(file, arguments[:at] + arguments[at + 2 :]))
    except ConfigError as error:
        print(f"{job}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def main(
    job: str,
    work: Callable[[Config], None],
    needs_ray: Callable[[Config], bool] = lambda config: True,
    check: Callable[[Config], None] = lambda config: None,
) -> None:
    """Run `check`, then `work`, with the settings of the command line, the latter in the cluster of this process or a local Ray.

    Exit codes: 0 done; 1 data or training failed, with the reason on stderr; 2 wrong settings, before Ray starts; 3 stopped by
    SIGTERM, 130 by Ctrl-C: the same command goes on.
    """
    config, begun, code, said = settings(job), time.time(), 1, "it broke off"
    told = threading.Event()
    try:
        check(config)
        if needs_ray(config):
            from geodistill.cluster import connect

            connect()
        with sigterm_interrupts() as told:  # behind `connect`: Ray has a handler of its own, which exits with 15
            work(config)
        if told.is_set():
            raise JobStopped("stopped by SIGTERM; the same command goes on")
        code, said = 0, "done"
    except (ValueError, OSError, JobFailed) as error:
        code, said = 3 if isinstance(error, JobStopped) else 2 if isinstance(error, ConfigError) else 1, str(error)
        print(f"{job}: {error}", file=sys.stderr)
        raise SystemExit(code) from error
    except KeyboardInterrupt as error:
        code, by = (3, "SIGTERM") if told.is_set() else (130, "Ctrl-C")
        said = f"stopped by {by}; the same command goes on"
        print(f"{job}: {said}", file=sys.stderr)
        raise SystemExit(code) from error
    except BaseException as error:
        said = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise
    finally:
        record(config.run, job, sys.argv[1:], begun, code, said)
