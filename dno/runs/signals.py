"""Signals that wait until what must not be cut in two is whole."""

import contextlib
import signal
import threading

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Ctrl-C and SIGTERM, held from `hold` to `release`, where the first one that came takes effect.

    Threads get no signals: in one, both do nothing.
    """

    def __init__(self):
        self.before, self.received = None, []

    def hold(self):
        if self.before is None and threading.current_thread() is threading.main_thread():
            self.received.clear()
            # One whose handler is not Python's (None) could not be given back.
            known = [number for number in NUMBERS if signal.getsignal(number) is not None]
            self.before = {number: signal.signal(number, self._receive) for number in known}

    def _receive(self, number, frame):
        self.received.append((number, frame))

    def release(self):
        if self.before is None:
            return
        handlers, self.before = self.before, None
        with contextlib.ExitStack() as stack:  # all of them, even if a signal comes in between
            for number, handler in handlers.items():
                stack.callback(signal.signal, number, handler)
        for number, frame in self.received[:1]:
            if callable(handlers[number]):
                handlers[number](number, frame)
            elif handlers[number] == signal.SIG_DFL:
                signal.raise_signal(number)

    @contextlib.contextmanager
    def held(self):
        """`hold` at the start of a block; whoever ends the work calls `release`."""
        self.hold()
        yield
