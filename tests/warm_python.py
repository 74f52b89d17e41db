"""A stand-in for `python` that has imported everything already: a server that forks a child per command.

A process that trains imports for six seconds what it uses for one. Where a test is about what many such processes do, and
not about their imports, it starts the script that `warm_python` yields in the place of sys.executable; so do the processes
that it becomes. `SCRIPT -m anabranch ..` runs that command as a process of its own, with the caller's environment, folder
and streams. The script's exit code is the command's; signals to the script go on to the command, and its end, or that of
whoever started it, is the command's (SIGTERM, as by processes.end_with_parent).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# Imports nothing that is slow. Exit codes come as text, signals go as single bytes.
CLIENT = """#!{python} -IS
import ctypes, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
for number in {signals}:
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
parent = os.getppid()
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
told = json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(told).to_bytes(8, "big")], [0, 1, 2])
server.sendall(told)
if os.getppid() != parent:
    server.send(bytes([signal.SIGTERM]))
code = int(server.recv(16) or 70)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if code != -9 else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextlib.contextmanager
def warm_python(folder: Path) -> Iterator[Path]:
    """The script. `folder`: a new one with a short path, since it holds a socket."""
    address, script = folder / "socket", folder / "python"
    script.write_text(CLIENT.format(python=os.path.realpath(sys.executable), address=str(address),
                                    signals=list(map(int, SIGNALS))))
    script.chmod(0o755)
    with open(folder / "log.txt", "wb") as log:
        server = subprocess.Popen([sys.executable, __file__, str(address), str(script)], stdin=subprocess.PIPE, stdout=log,
                                  stderr=log, start_new_session=True)
    try:
        end = time.monotonic() + 240
        while not address.exists():
            assert server.poll() is None and time.monotonic() < end, (folder / "log.txt").read_text()
            time.sleep(0.1)
        yield script
    finally:
        server.terminate()
        server.communicate()


def serve(address: str, script: str) -> None:
    import torch
    from transformers import Qwen2ForCausalLM  # noqa: F401 - so that children need not
    from trl import SFTTrainer  # noqa: F401

    import anabranch.cli
    import anabranch.perform
    import anabranch.run  # noqa: F401
    from anabranch import worker  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # children share what is never looked at again
    sys.executable = script
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address + ".new")
    listening.listen(16)
    os.rename(address + ".new", address)
    while True:
        asked = listening.accept()[0]
        if os.fork() == 0:
            listening.close()
            attend(asked)
        asked.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # of those that have ended
                pass


def attend(asked: socket.socket) -> None:
    """Fork the command, pass signals on to it and tell its end; whoever asked is gone: so is the command."""
    length, streams, *_ = socket.recv_fds(asked, 8, 3)
    text = b""
    while len(text) < int.from_bytes(length, "big"):
        text += asked.recv(1 << 16)
    child = os.fork()
    if child == 0:
        asked.close()
        command(json.loads(text), streams)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            with contextlib.suppress(OSError):
                asked.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        if select.select([asked], [], [], 0.05)[0]:
            numbers = asked.recv(16)
            for number in numbers or [signal.SIGKILL]:
                os.kill(child, number)
            if not numbers:
                os._exit(0)


def command(told: tuple[list[str], str, dict[str, str]], streams: list[int]) -> None:
    arguments, folder, environment = told
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    if "ANABRANCH_LAUNCHER_PID" in environment:  # which a training looks at, to end with its parent
        environment["ANABRANCH_LAUNCHER_PID"] = str(os.getppid())
    os.environ.clear()
    os.environ.update(environment)
    assert arguments[1:3] == ["-m", "anabranch"], arguments
    sys.argv = ["anabranch", *arguments[3:]]
    code = 70
    try:
        from anabranch.cli import main

        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(*sys.argv[1:])
