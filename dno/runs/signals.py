"""Signals that wait until what must not be cut in two is whole."""

import contextlib
import signal
import threading


@contextlib.contextmanager
def signals_wait():
    """Ctrl-C and SIGTERM take effect at the end of the block. In threads, which get no signals, it does nothing."""
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
