"""Images of a report page as data URLs, within a limit on their size."""

import base64
import io
import statistics

from PIL import Image

from dno.report.reading import choose_steps, open_image

LOSSLESS = 128  # px; images up to this size are kept as they are, since every pixel is visible
# Longest side and JPEG quality of larger images. Smaller if a run's frames would not fit otherwise.
SIZES = ((512, 90), (384, 88), (256, 85))
GALLERY_SIZES = ((1280, 85), (640, 80))  # of contact sheets, which have words on them
RUN_BYTES, PAGE_BYTES = 9e6, 30e6  # of frames, in base64: of one run, of all runs
SAMPLE = 6  # frames that the size of all is judged by


class Pool:
    """The images of the page as data URLs, each once. A file that cannot be read as an image has no place in it."""

    def __init__(self):
        self.urls, self.places = [], {}

    def add(self, path, size):
        """The place of an image in `urls`, or None."""
        return self._place(encode(path, *size))

    def _place(self, url):
        if url is not None and url not in self.places:
            self.places[url] = len(self.urls)
            self.urls.append(url)
        return self.places.get(url)

    def add_run(self, run, limit):
        """([[step, place], ...] for each image, [place of its gallery, or None]), in at most about `limit` characters
        of base64; the galleries take a quarter at most.
        """
        galleries = self._add_galleries([image.gallery for image in run.images], limit / 4)
        limit -= sum(len(self.urls[place]) for place in galleries if place is not None)
        paths = [path for image in run.images for path in image.frames_and_best.values()]
        sample = paths[:: max(1, len(paths) // SAMPLE)]
        for size in SIZES:
            typical = statistics.fmean([len(encode(path, *size) or "") for path in sample] or [0])
            if typical * len(paths) <= limit:
                break
        kept = max(2, int(limit / typical / len(run.images))) if typical else 0
        frames = []
        for image in run.images:
            files = image.frames_and_best
            places = [[step, self.add(files[step], size)] for step in choose_steps(list(files), kept, image.best)]
            frames.append([[step, place] for step, place in places if place is not None])
        return frames, galleries

    def _add_galleries(self, paths, limit):
        for size in GALLERY_SIZES:
            urls = [encode(path, *size, flat=True) if path else None for path in paths]
            if sum(len(url or "") for url in urls) <= limit:
                break
        places, taken = [], 0
        for url in urls:  # what does not fit at all is left out
            taken += len(url or "")
            places.append(self._place(url) if taken <= limit else None)
        return places


def encode(path, side, quality, flat=False):
    """An image file as a data URL: PNG up to LOSSLESS px, else JPEG of at most `side` px; None if it is no image.

    flat: the image may have words and plain areas; it is a PNG too if that is smaller.
    """
    image = open_image(path)
    if image is None:
        return None
    lossless = max(image.size) <= LOSSLESS
    if not lossless:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    files = {}
    if lossless or flat:
        files["png"] = _saved(image, format="PNG", optimize=True)
    if not lossless:
        # Not with `optimize`: it fails for images that hardly compress.
        files["jpeg"] = _saved(image, format="JPEG", quality=quality, subsampling=0 if flat else "4:2:0")
    kind = min(files, key=lambda kind: len(files[kind]))
    return f"data:image/{kind};base64,{base64.b64encode(files[kind]).decode()}"


def _saved(image, **options):
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()
