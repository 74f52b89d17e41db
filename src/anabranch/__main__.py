"""The `anabranch` command."""

import signal


def main() -> None:
    """Load the command line and run it. Ctrl-C while it is loading simply ends the process: there is nothing to tell yet."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a shell's background job ignores Ctrl-C, and shall go on doing so
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from anabranch.cli import main as command

    signal.signal(signal.SIGINT, before)
    command()


if __name__ == "__main__":
    main()
