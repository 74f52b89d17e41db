"""`anabranch merge` in processes that can be harmed: killed, starved of disk or of permissions, at any moment.

One process imports the libraries once and forks a child per command, so that a hundred kills take seconds. A child runs
`anabranch.cli.main`, as the command does; what can be done to it is in `JOB`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer.main
from safetensors.torch import load_file, save_file

# Calls that leave a trace on the disk, where a crash may fall.
CALLS = ("mkdir", "pwrite", "ftruncate", "fsync", "replace", "rename", "rmdir", "unlink")


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], shards: int = 1,
                     backwards: bool = False) -> Path:
    """A model folder, cut into so many files: by name, or from the last name to the first."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors, reverse=backwards)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    files = {name: f"model-{1 + i * shards // len(names):05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass(frozen=True)
class Ended:
    code: int
    text: str
    calls: int

    @property
    def clean(self) -> bool:
        """One message and no traceback."""
        return "Traceback" not in self.text and "Exception" not in self.text


class Jobs:
    """The process that forks. Leave it with `close`."""

    def __init__(self, folder: Path) -> None:
        self.log, self.count = folder, 0
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def begin(self, *arguments: object, **harm: Any) -> tuple[int, Path]:
        """A command on its way: (process id, where its output goes). `harm`: see `_child`."""
        self.count += 1
        log = self.log / f"job-{self.count}.log"
        job = {"arguments": [str(a) for a in arguments], "log": str(log), **harm}
        return int(self._ask(job)), log

    def end(self, begun: tuple[int, Path]) -> Ended:
        code = int(self._ask({"wait": begun[0]}))
        counted = Path(f"{begun[1]}.calls")
        return Ended(code, begun[1].read_text(), int(counted.read_text()) if counted.exists() else 0)

    def run(self, *arguments: object, **harm: Any) -> Ended:
        return self.end(self.begin(*arguments, **harm))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=20)

    def _ask(self, job: dict[str, Any]) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()


def _serve() -> None:
    """Jobs from stdin, one line each: start one and tell its process id, or wait for one and tell its exit code."""
    import numpy  # noqa: F401 - so that children need not
    import yaml  # noqa: F401

    import anabranch.cli
    import anabranch.engine.merging

    torch.set_num_threads(1)
    typer.main.get_command = functools.cache(typer.main.get_command)  # it takes longer than a small merge
    typer.main.get_command(anabranch.cli.app)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            status = os.waitpid(job["wait"], 0)[1]
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                _child(**job)
        print(answer, flush=True)


def _child(arguments: list[str], log: str, crash_at: int | None = None, largest_file: int | None = None,
           powerless: bool = False, folder: str | None = None, ballast: str | None = None) -> None:
    """Run a command and end.

    crash_at       SIGKILL just before the call of this number, of those in CALLS
    largest_file   no file may grow beyond so many bytes
    powerless      root, but bound by permissions like anyone
    folder         where to run it
    ballast        once space has been checked, somebody fills the disk with this file
    """
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDONLY) if stream == 0 else output, stream)
    code = 70
    try:
        if folder:
            os.chdir(folder)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        if powerless:
            _drop_powers()
        if crash_at is not None:
            _count_calls(Path(f"{log}.calls"), crash_at)
        if ballast is not None:
            _fill_after_check(Path(ballast))
        sys.argv = ["anabranch", *arguments]
        from anabranch.cli import main

        main()
        code = 0
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _count_calls(into: Path, crash_at: int) -> None:
    """Count the calls of the main thread and of workers alike; crash_at 0: only count."""
    count = [0]

    def counted(real: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            count[0] += 1
            if count[0] == crash_at:
                os.kill(os.getpid(), signal.SIGKILL)
            into.write_text(str(count[0])) if not crash_at else None
            return real(*arguments, **more)
        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def _fill_after_check(ballast: Path) -> None:
    from anabranch.engine.output import OutputFolder

    check = OutputFolder._check_space

    def then_fill(self: OutputFolder) -> None:
        check(self)
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            for _ in range(900):
                file.write(bytes(1000))

    OutputFolder._check_space = then_fill  # type: ignore[method-assign]


def _drop_powers() -> None:
    """Root without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH (bits 1 and 2), by capset(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    if libc.capget(header, data) or not data[0]:
        return
    for i in (0, 1, 2):  # effective, permitted, inheritable
        data[i] &= ~0b110
    assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())


if __name__ == "__main__":
    _serve()
