"""What the launchers' tests start in a worker's place: it counts up, saves, and ends with code 85 when it is told to stop.

    python stand_in.py FOLDER NAME TENTHS       leaves NAME.done after so many tenths of a second, over all its attempts
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

PREEMPTED = 85


def needs_engine(lacking: str) -> None:
    """Skip the module where an engine cannot be had; CI sets ANABRANCH_ENGINES=required, and there it is a failure."""
    if lacking and os.environ.get("ANABRANCH_ENGINES") == "required":
        raise RuntimeError(f"ANABRANCH_ENGINES=required, but {lacking}")
    if lacking:
        pytest.skip(lacking, allow_module_level=True)


def stand_in(folder: Path, name: str, tenths: int) -> list[str]:
    return [sys.executable, __file__, str(folder), name, str(tenths)]


def main(folder: Path, name: str, tenths: int) -> None:
    saved, attempts = folder / f"{name}.saved", folder / f"{name}.attempts"
    here = int(saved.read_text()) if saved.exists() else 0

    def stop(number: int, frame: object) -> None:
        time.sleep(0.5)  # saving takes a while
        saved.write_text(str(here))
        with open(attempts, "a") as log:
            log.write(f"told at {here}\n")
        sys.exit(PREEMPTED)

    signal.signal(signal.SIGTERM, stop)
    with open(attempts, "a") as log:
        log.write(f"from {here} pid {os.getpid()} parent {os.getppid()}\n")
    print(f"{name} from {here}", flush=True)
    for step in range(here, tenths):
        time.sleep(0.1)
        here = step + 1
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    (folder / f"{name}.done").write_text(f"{time.time()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
