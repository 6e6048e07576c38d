"""The recorder of one run: all that is written, shown, tracked, saved and stopped by happens here."""

import copy
import math
import statistics
import time
import warnings

import numpy as np
import torch

from dno.errors import UserError
from dno.memory import PeakMemory
from dno.noise import SAMPLER
from dno.objectives import describe
from dno.runs.checkpoints import save_checkpoint
from dno.runs.folder import Run, versions
from dno.runs.signals import Signals
from dno.runs.stop_rules import Best, StopRules
from dno.runs.trackers import Trackers


class Recorder:
    """`open`, then `begin`, then `record` for each iteration, then `finish`; `close` always.

    screen: a `dno.runs.screen.Screen`, or None. callback: called with each line of metrics.jsonl as a dict; True stops
    the run, which keeps its result. draw: folder -> None, draws what `settings.draw` asks for.

    metrics: one dict per iteration. best: a `Best` per image. done: whether the callback ended the run.
    """

    def __init__(self, settings, method, checkpoint=None, screen=None, callback=None, draw=None):
        self.settings, self.method_class, self.checkpoint = settings, method, checkpoint
        self.screen, self.callback, self.draw = screen, callback, draw
        self.rules, self.trackers, self.signals = StopRules.of(settings), Trackers(), Signals()
        self.metrics, self.done, self.folder, self.state = [], False, None, None
        self.saved = checkpoint and checkpoint.step
        self.best, self.last = [Best() for _ in range(settings.batch_size)], [{}] * settings.batch_size

    # Start

    def open(self, folder, prefix):
        """Make the run's folder, or take that of the checkpoint, before anything expensive starts."""
        if self.checkpoint is not None:
            self.folder = Run(folder=folder, resume=True)
            self.metrics = self.folder.cut(self.checkpoint.step)
        elif folder is not None or self.settings.output is not None:
            self.folder = Run(self.settings.output, prefix, folder)

    def begin(self, method, asked):
        """Say what will be done. asked: the settings as the user gave them, for args.json."""
        self.task, self.method = method.task, method
        self.about = self._describe(asked)
        if self.folder is not None:
            self.folder.write_args(self.about, done=len(self.metrics))
            settings = self.settings
            self.trackers = Trackers(
                settings.report_to, self.folder.folder / "trackers", self.about, settings.report_images_every
            )
        if self.screen:
            self.screen.begin(self.about, method.describe(), len(self.metrics))

    def follow(self, state):
        """The state to save; a checkpoint's contents are put into it."""
        self.state = state
        state.guard = self.signals.held
        if self.checkpoint is not None:
            self._unpack()
            self._restore_best()
        self.peak = PeakMemory(self.task.device)
        self.peak.reset()
        self.began, self.before = time.perf_counter(), sum(metrics["seconds"] for metrics in self.metrics)
        self.mark = self.began

    # Each iteration

    def record(self, found):
        """Take down what an iteration found. A signal waits until all of it is on disk."""
        seconds = time.perf_counter() - self.mark
        self.signals.hold()  # if the method has not done so when it began to change its state
        try:
            metrics = self._take_down(found, seconds)
        finally:
            self.signals.release()
        if self.callback:
            answer = self.callback(copy.deepcopy(metrics))
            self.done = isinstance(answer, bool | np.bool_) and bool(answer)
        self.mark = time.perf_counter()

    def _take_down(self, found, seconds):
        step = len(self.metrics)
        better = self._observe(step, found)
        metrics = self._line(step, seconds)
        if self.folder is not None:
            self._save(step, found, better, metrics)
        self.metrics.append(metrics)
        self.peak.reset()
        self.trackers.log(metrics, found.images)
        if self.screen:
            best = [best.reward for best in self.best]
            self.screen.iteration(metrics, sum(best) / len(best))
        over = time.perf_counter() - self.began + self.before
        if self.rules.max_seconds is not None and over >= self.rules.max_seconds:
            for b in self.state.active:
                self.state.stop(b, f"{self.rules.max_seconds:g} seconds are over")
        if len(self.metrics) % self.settings.checkpointing_steps == 0:
            self.save()
        return metrics

    def _observe(self, step, found):
        """Keep each image's metrics and its best; apply the rules. Returns the rows that are a new best."""
        rewards = (-found.losses).tolist()
        columns, named, watched = (
            {name: values.tolist() for name, values in table.items()}
            for table in (found.metrics, found.rewards, found.evaluations)
        )
        better = []
        for row, b in enumerate(found.rows):
            own, objectives, others = ({k: v[row] for k, v in table.items()} for table in (columns, named, watched))
            self.last[b] = {"reward": rewards[row], **own, **objectives, **others}
            is_best, why = self.best[b].observe(step, rewards[row], own.get("probability"), self.rules)
            if is_best:
                self.best[b] = Best(rewards[row], step, found.images[row].clone())
                better.append(row)
            if found.noise is not None and (is_best or self.best[b].step is None):
                # An image without a finite reward so far has its newest.
                self.best[b].noise = found.noise[:, row].detach().clone()
            if why:
                self.state.stop(b, why)
        return better

    def _line(self, step, seconds):
        """The line of metrics.jsonl: means over the images (of `..._min` the minimum), and the images one by one."""
        images = [dict(last) for last in self.last]  # of an image that was not measured yet, an empty one
        names = dict.fromkeys(name for image in images for name in image)
        means = {name: _reduce(name, [image.get(name, math.nan) for image in images]) for name in names}
        return {
            "step": step,
            "reward": means.pop("reward"),
            "rewards": [image.get("reward", math.nan) for image in images],
            **means,
            "seconds": seconds,
            "peak_memory_gb": self.peak.read(),
            "images": images,
        }

    def _save(self, step, found, better, metrics):
        for row, b in enumerate(found.rows):
            image, reward = found.images[row], metrics["rewards"][b]
            if step % self.settings.save_every == 0:
                self._save_image(f"images/{step:03d}", image, b, step, reward)
            if step == 0:
                self._save_image("initial", image, b, step, reward)
            if row in better:
                self._save_image("best", image, b, step, reward)
        if better and found.noise is not None:
            self._save_noise()
        self.folder.log(metrics)

    def _save_image(self, name, image, b, step, reward):
        text = {"prompt": self.task.prompts[b], "seed": self.settings.seed + b, "step": step, "reward": reward}
        self.folder.save_image(name, image, b, **text)

    def _save_noise(self):
        names = ("model", "prompt", "seed", "num_steps", "eta", "guidance_scale")
        noise = self.best_noise()
        if noise is not None:
            about = {name: getattr(self.settings, name) for name in names}
            self.folder.save_noise(noise, sampler=SAMPLER, **about)

    # Checkpoints

    def save(self):
        """The state after the last whole iteration, unless it is on disk already."""
        step = len(self.metrics)
        if self.folder is None or step in (0, self.saved):
            return
        tensors, values = self.state.pack()
        tensors = {f"state.{name}": tensor for name, tensor in tensors.items()}
        bests = []
        for b, best in enumerate(self.best):
            own, plain = best.pack()
            tensors |= {f"best.{b}.{name}": tensor for name, tensor in own.items()}
            bests.append(plain)
        contents = {
            "method": self.method_class.name, "settings": self.about["settings"], "resume": self._resumable(),
            "state": values, "best": bests, "last": self.last, "versions": versions(),
        }  # fmt: skip
        self.folder.sync()
        save_checkpoint(self.folder.folder, step, tensors, contents, self.settings.checkpoints_total_limit)
        self.saved = step

    def _resumable(self):
        """The settings to resume by: not "auto" and None, since the run may go to another machine."""
        height, width = self.task.size
        return {**vars(self.settings), "precision": self.task.precision, "height": height, "width": width}

    def save_what_there_is(self):
        """After a failure or a stop: a checkpoint, if the state is whole and belongs to the metrics on disk."""
        state = self.state
        if state is not None and state.whole and state.step == len(self.metrics):
            try:
                self.save()
            except UserError as error:  # a full disk may be what ended the run
                warnings.warn(str(error), stacklevel=2)

    def _unpack(self):
        tensors, contents = self.checkpoint.tensors, self.checkpoint.state

        def under(prefix):
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.state.unpack(under("state."), contents["state"])
        if contents.get("retry"):
            self.state.retry()
        self.best = [Best.unpack(under(f"best.{b}."), values) for b, values in enumerate(contents["best"])]
        self.last = contents["last"]

    def _restore_best(self):
        """best.png and best_noise.safetensors as they were at the checkpoint, if later ones took their place."""
        later = [b for b, best in enumerate(self.best) if self.folder.picture_step("best", b) != best.step]
        for b in later:
            best = self.best[b]
            if best.step is not None:
                self._save_image("best", best.image, b, best.step, best.reward)
        if later:
            self._save_noise()

    # End

    def finish(self, result):
        """Write that the run came to its end."""
        self.save()
        if self.folder is not None:
            self.folder.write_result(result)

    def close(self):
        """Leave whole files behind, whatever happened."""
        self.signals.release()
        if self.screen:
            self.screen.close()
        self.trackers.finish()
        if self.folder is not None:
            if self.metrics:
                for b, entries in (self.state.gallery() if self.state else {}).items():
                    self.folder.save_gallery(entries, b)
                if self.draw and self.settings.draw:
                    self.draw(self.folder.folder)
            elif self.checkpoint is None:
                self.folder.discard()
            self.folder.close()

    def best_noise(self):
        """The noise of each image's best, (T + 1 or 1, B, C, h, w) on the CPU, or None if the method has none.

        An image without a finite reward has its newest.
        """
        noises = [best.noise for best in self.best]
        return None if any(noise is None for noise in noises) else torch.stack([noise.cpu() for noise in noises], dim=1)

    def best_images(self):
        """(B, 3, H, W) on the CPU; NaN for an image without a finite reward."""
        nothing = torch.full((3, *self.task.size), torch.nan)
        return torch.stack([nothing if best.image is None else best.image.cpu() for best in self.best])

    def _describe(self, asked):
        """What args.json holds, and the banner shows."""
        task, settings, method = self.task, self.settings, self.method
        return {
            "method": method.name,
            "settings": asked,
            "resolved": {
                **vars(settings),
                "title": method.title, "result": method.result, "columns": method.columns,
                "iterations": method.num_iterations,
                "model_source": task.model.spec.source,
                "height": task.size[0], "width": task.size[1],
                "device": str(task.device), "precision": str(task.dtype).removeprefix("torch."),
                "processes": task.team.size,
                "checkpointing": task.plan.describe(),
                "prediction_type": task.model.prediction_type,
                "folder": None if self.folder is None else str(self.folder.folder),
                "climbs": describe(task.objectives),
                "weights": {objective.name: objective.weight for objective in task.objectives},
                "watched": [evaluation.name for evaluation in task.evaluations],
            },
            "reward_files": _once([*task.loss.files, *(task.evaluation.files if task.evaluation else ())]),
        }  # fmt: skip


def _reduce(name, values):
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return math.nan
    return min(finite) if name.endswith("_min") else statistics.fmean(finite)


def _once(entries):
    """The entries, dicts, without those that stand there already."""
    return [entry for i, entry in enumerate(entries) if entry not in entries[:i]]
