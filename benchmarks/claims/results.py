"""The measurements as arrays over prompts, seeds and iterations."""

import json

import numpy as np

from claims.intervals import best_so_far
from claims.measure import Job
from claims.plan import plan


class Results:
    """What the work folder has of a plan.

    Arrays are (P, S, N): prompts, seeds, iterations (or draws).
    """

    def __init__(self, size, folder):
        self.size = size
        self.plan = plan(size)
        self.rows = {row.name: row for rows in self.plan.values() for row in rows}
        self._found, self._seconds, self.dates, self.took = {}, {}, set(), 0.0
        for name, row in self.rows.items():
            found = {prompt: self._read(Job(row, size, prompt, folder)) for prompt in size.prompts}
            self._found[name] = {prompt: entry["images"] for prompt, entry in found.items() if entry}
            timed = self._read(Job(row, size, None, folder))
            self._seconds[name] = timed and timed["seconds"]

    def _read(self, job):
        if not job.path.is_file():
            return None
        entry = json.loads(job.path.read_text(encoding="utf-8"))
        self.dates.add(entry["date"])
        self.took += entry["took"]
        return entry

    def prompts(self, *names):
        """All of them, or none if one of these rows lacks any: some of the prompts are not a measurement."""
        whole = all(len(self._found[name]) == len(self.size.prompts) for name in names)
        return list(self.size.prompts) if whole else []

    def curve(self, name, key, prompts):
        """(P, S, N). key: a reward, "judge" or "probability"."""
        return np.array([[image[key] for image in self._found[name][prompt]] for prompt in prompts], dtype=float)

    def best(self, name, objective, prompts):
        """The best reward so far, (P, S, N)."""
        return best_so_far(self.curve(name, objective, prompts))

    def at_best(self, name, objective, key, prompts, length=None):
        """Another metric at the iteration of the best reward among the first `length`: (P, S)."""
        rewards = self.curve(name, objective, prompts)[..., :length]
        where = np.nanargmax(rewards, axis=-1)[..., None]
        return np.take_along_axis(self.curve(name, key, prompts), where, axis=-1)[..., 0]

    def calls(self, name):
        """Guided denoiser calls per iteration."""
        return self.rows[name].calls(self.size)

    def seconds(self, name):
        """Processor seconds per iteration on one image, or None if it was not timed."""
        return self._seconds[name]

    def complete(self):
        """(measured, planned) files of prompts."""
        done = sum(len(found) for found in self._found.values())
        return done, len(self.rows) * len(self.size.prompts)
