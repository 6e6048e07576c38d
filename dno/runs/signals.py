"""Deferred signals: Ctrl-C and SIGTERM wait until a block that must not be interrupted has finished."""

import contextlib
import signal
import threading


@contextlib.contextmanager
def signals_wait():
    """Ctrl-C and SIGTERM take effect at the end of the block. Does nothing in threads, which get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *signal_and_frame: received.append(signal_and_frame)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
        for number, frame in received[:1]:
            handler = dict(zip(numbers, before))[number]
            if callable(handler):
                handler(number, frame)
            elif handler == signal.SIG_DFL:
                signal.raise_signal(number)
