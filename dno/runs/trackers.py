"""Experiment trackers, through accelerate. One that fails is dropped with a warning; the run continues."""

import math
import warnings

from rewards import to_uint8


class Trackers:
    """Sends the metrics and images of a run to experiment trackers.

    names: accelerate's names, such as "tensorboard".
    folder: the run folder; None if no tracker writes files.
    config: what args.json says, sent once as hyperparameters: the dicts `settings` and `resolved` are merged into one.
    images_every: images are sent with every n-th iteration.
    """

    def __init__(self, names=(), folder=None, config=None, images_every=10):
        self.trackers, self.images_every = {}, images_every
        for name in names:
            with self._harmless(name):
                self.trackers[name] = _start(name, folder, config)

    def log(self, metrics, images):
        """Send the finite numbers of an iteration, and its images if it is their turn.

        metrics: a line of metrics.jsonl, as a dict. images: (B, 3, H, W) in [-1, 1].
        """
        step = metrics["step"]
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v) and k != "step"}
        for name, tracker in list(self.trackers.items()):
            with self._harmless(name):
                tracker.log(numbers, step=step)
                if step % self.images_every == 0:
                    _send_images(tracker, images, step)

    def finish(self):
        """Close all trackers, so that what they hold back is sent."""
        for name, tracker in list(self.trackers.items()):
            with self._harmless(name):
                tracker.finish()
        self.trackers = {}

    def _harmless(self, name):
        return _Harmless(self, name)


class _Harmless:
    def __init__(self, trackers, name):
        self.trackers, self.name = trackers, name

    def __enter__(self):
        pass

    def __exit__(self, kind, error, trace):
        if not isinstance(error, Exception):
            return False
        warnings.warn(f"the tracker {self.name} failed and is left out: {kind.__name__}: {error}", stacklevel=3)
        self.trackers.trackers.pop(self.name, None)
        return True


def _start(name, folder, config):
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the trackers ask it which process they are in
    kind = LOGGER_TYPE_TO_CLASS[name]
    tracker = kind("dno", logging_dir=str(folder)) if kind.requires_logging_directory else kind("dno")
    tracker.main_process_only = False  # in a sweep, each process has its own run
    tracker.start()
    tracker.store_init_configuration(_flat(config))
    return tracker


def _flat(config):
    """One dict of texts and numbers. What was resolved is shown where it differs from what was asked for."""
    nested = ("settings", "resolved")
    flat = {name: value for name, value in config.items() if name not in nested}
    for name in nested:
        flat |= config.get(name, {})
    return {name: value if isinstance(value, str | int | float | bool) else str(value) for name, value in flat.items()}


def _send_images(tracker, images, step):
    pixels = to_uint8(images)  # (B, H, W, 3)
    if tracker.name == "tensorboard":
        tracker.log_images({"images": pixels}, step=step, dataformats="NHWC")
    elif tracker.name == "trackio":  # accelerate has no log_images for it
        import trackio

        tracker.log({f"image {b}": trackio.Image(image) for b, image in enumerate(pixels)}, step=step)
    else:
        tracker.log_images({"images": list(pixels)}, step=step)
