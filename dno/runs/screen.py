"""What a run shows on the terminal: a banner, a progress bar, the outcome."""

import sys

from tqdm import tqdm


class Screen:
    """Banner, bar and outcome of one run, on standard output but for the bar, which goes to standard error."""

    folder = picture = bar = None

    def begin(self, about, rows, done=0):
        """about: what args.json holds. rows: the method's own, by name. done: iterations before this start."""
        run = about["resolved"]
        self.folder, self.picture = run["folder"], "evolution.png" if run["draw"] else "best.png"
        size = f"{run['height']} x {run['width']} px"
        images = "1 image" if run["batch_size"] == 1 else f"{run['batch_size']} images"
        prompts = run["prompt"] if isinstance(run["prompt"], tuple) else (run["prompt"],)
        others = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
        rows = {
            "model": f"{run['model']} ({run['prediction_type']}), {size}, {run['precision']} on {run['device']}",
            "prompt": f"{prompts[0]!r}{others}"
            + (f", not {run['negative_prompt']!r}" if run["negative_prompt"] else ""),
            "reward": run["climbs"] + (f"; watching {', '.join(run['watched'])}" if run["watched"] else ""),
            "sampling": f"{run['num_steps']} steps, eta {run['eta']:g}, guidance {run['guidance_scale']:g}, "
            f"seed {run['seed']}, {images}",
            **rows,
            "folder": (run["folder"] or "none") + (f", resumed at iteration {done}" if done else ""),
        }
        for name, value in rows.items():
            print(f"{name:>11}  {value}")
        sys.stdout.flush()
        self.bar = tqdm(total=run["iterations"], initial=done, unit="it", dynamic_ncols=True)

    def iteration(self, metrics, best):
        """metrics: a line of metrics.jsonl. best: the best reward so far, a mean over the images."""
        probability = f", P(z) {metrics['probability']:.2g}" if "probability" in metrics else ""
        self.bar.set_postfix_str(
            f"reward {metrics['reward']:.4f}, best {best:.4f}{probability}, {metrics['seconds']:.2f} s/it",
            refresh=False,
        )
        self.bar.update()

    def close(self):
        if self.bar is not None:
            self.bar.close()

    def end(self, result):
        first = result.metrics[0]["rewards"]
        for b, (reward, step, stopped) in enumerate(zip(result.rewards, result.steps, result.stopped, strict=True)):
            image = f"image {b}: " if len(result.steps) > 1 else ""
            why = f" (stopped: {stopped})" if stopped else ""
            best = "no finite reward" if step is None else f"best reward {reward:.4f} at iteration {step}"
            print(f"{image}{best}, {first[b]:.4f} at iteration 0{why}")
        if result.folder is not None:
            print(f"images: {result.folder / self.picture}")
