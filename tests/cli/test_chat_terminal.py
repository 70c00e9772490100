"""``chat`` on a real terminal: a pseudo-terminal in which the test types, completes, interrupts and leaves."""

from __future__ import annotations

import os
import re
import select
import stat
import subprocess
import sys
import time

import pytest

from mlx_lora.tiny_base import PATH

pty = pytest.importorskip("pty", reason="no pseudo-terminals on this system")
PATIENCE = 180  # seconds; a guard against hanging only
ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[()].|[=>78])")


class Terminal:
    """A program in a pseudo-terminal of 100 columns and 30 lines."""

    def __init__(self, args: list[str], **env: str):
        self.ours, theirs = pty.openpty()
        import fcntl
        import struct
        import termios

        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))

        def lead() -> None:  # Ctrl-C reaches the process whose controlling terminal this is
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            args, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=lead, env={**os.environ, **env}
        )
        os.close(theirs)
        self.seen = self.new = ""

    def type(self, text: str) -> None:
        self.new = ""
        os.write(self.ours, text.encode())

    def expect(self, text: str) -> None:
        """Wait until ``text`` is shown, after what was expected before."""
        until = time.monotonic() + PATIENCE
        while text not in self.new:
            running = self.read()
            assert text in self.new or (running and time.monotonic() < until), f"no {text!r} in {self.new!r}"
        self.new = self.new.partition(text)[2]

    def read(self) -> bool:
        """Read what there is, for a second at most. Returns whether the program may show more."""
        if not select.select([self.ours], [], [], 1)[0]:
            return True
        try:
            data = os.read(self.ours, 65536)
        except OSError:  # Linux: the other side is closed
            data = b""
        for _ in range(data.count(b"\x1b[6n")):  # where is the cursor? In line 20.
            os.write(self.ours, b"\x1b[20;1R")
        self.seen += data.decode(errors="replace")
        self.new += ESCAPES.sub("", data.decode(errors="replace"))
        return bool(data)

    def leave(self) -> int:
        """The exit status, once the program has ended."""
        until = time.monotonic() + PATIENCE
        while self.read():
            assert time.monotonic() < until, f"still running: {self.new!r}"
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ours)


@pytest.fixture
def terminal(tmp_path):
    command = [sys.executable, "-m", "mlx_lora", "chat", "--model", str(PATH), "--max-tokens", "100000"]
    command += ["--logit-bias", '{"2": -1000}']  # answers never end by themselves
    env = {"TERM": "xterm-256color", "MLX_LORA_HISTORY": str(tmp_path / "new" / "history")}
    made = Terminal(command, **env)
    yield made
    made.close()


def test_a_session(terminal, tmp_path):
    terminal.expect("adapter: none")  # the toolbar: the line editor is ready
    terminal.type("/sta")
    terminal.expect("tokens, speed and memory")  # the menu of completions
    terminal.type("\t\r\r")  # chooses the first one, takes it, and sends it
    terminal.expect("there is no answer yet")
    terminal.expect("adapter: none")
    terminal.type("never sent\x03")
    terminal.expect("/quit leaves")
    terminal.expect("adapter: none")
    terminal.type("Who left the kite?\r")
    terminal.expect("supports 512")
    terminal.expect("Robin")  # the answer has begun
    terminal.type("\x03")
    terminal.expect("Stopped: the answer so far is kept")
    terminal.expect("tokens/s")
    terminal.type("/set max_tokens 4\r")
    terminal.expect("max_tokens: 4")
    terminal.expect("tokens/s")
    terminal.type("/retry\r")
    terminal.expect("tokens/s")
    terminal.type("/undo\r")
    terminal.expect("Removed: Who left the kite?")
    terminal.expect("tokens/s")
    terminal.type("\x04")
    assert terminal.leave() == 0
    assert "Traceback" not in terminal.seen
    kept = tmp_path / "new" / "history"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and "+/undo" in kept.read_text()
    assert "never sent" not in kept.read_text()
