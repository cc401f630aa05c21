"""`python -m mimir_core.train --config run.json`: trains, or continues where it stopped.

To use several GPUs or machines start it through `accelerate launch` or `torchrun`; nothing else changes.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

from .config import TrainConfig
from .loop import Progress, train


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        config = TrainConfig.from_file(options.config, **_changes(options.set))
        if options.dry_run:
            print(json.dumps(config.to_dict(), indent=1))
            return 0
        folder = train(config, _line, cpu=options.cpu)
    except (ValueError, FloatingPointError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command continues from the last checkpoint.", file=sys.stderr)
        return 130
    print(f"Done: {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="settings as JSON; see TrainConfig")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="replace one setting; repeatable"
    )
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    return parser


def _changes(pairs: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE, the value as JSON where it is JSON, else as text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair}: expected NAME=VALUE")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def _line(progress: Progress) -> None:
    if progress.step % 25 == 0 or progress.step == progress.steps:
        print(
            f"{progress.step}/{progress.steps} loss {progress.loss:.4f} rate {progress.rate:.3f}", flush=True
        )


if __name__ == "__main__":
    sys.exit(main())
