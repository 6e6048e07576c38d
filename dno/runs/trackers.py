"""Experiment trackers, through accelerate; one that fails is a warning and no more."""

import math
import warnings


class Trackers:
    """Sends a run's metrics and images to trackers by name.

    names: of accelerate's trackers, such as "tensorboard"; folder: the run's; config: its resolved settings.
    images_every: images go with every n-th iteration.
    """

    def __init__(self, names=(), folder=None, config=None, images_every=10):
        self.trackers, self.images_every = {}, images_every
        for name in names:
            with self._harmless(name):
                self.trackers[name] = _start(name, folder, config)

    def log(self, metrics, images):
        """metrics: a line of metrics.jsonl. images: (B, 3, H, W) in [-1, 1]."""
        step = metrics["step"]
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v) and k != "step"}
        for name, tracker in list(self.trackers.items()):
            with self._harmless(name):
                tracker.log(numbers, step=step)
                if step % self.images_every == 0:
                    _send_images(tracker, images, step)

    def finish(self):
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

    PartialState()  # where the trackers look for the process they are in
    kind = LOGGER_TYPE_TO_CLASS[name]
    tracker = kind("dno", logging_dir=str(folder)) if kind.requires_logging_directory else kind("dno")
    tracker.main_process_only = False  # a process that is not the main one may have a run of its own
    tracker.start()
    plain = {k: v if isinstance(v, str | int | float | bool) else str(v) for k, v in config.items()}
    tracker.store_init_configuration(plain)
    return tracker


def _send_images(tracker, images, step):
    pixels = ((images.detach().float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()
    pixels = pixels.permute(0, 2, 3, 1).cpu().numpy()
    if tracker.name == "tensorboard":
        tracker.log_images({"images": pixels}, step=step, dataformats="NHWC")
    elif tracker.name == "trackio":  # accelerate has no log_images for it
        import trackio

        tracker.log({f"image {b}": trackio.Image(image) for b, image in enumerate(pixels)}, step=step)
    else:
        tracker.log_images({"images": list(pixels)}, step=step)
