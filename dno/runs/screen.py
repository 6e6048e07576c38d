"""What a run shows on the terminal: a banner, a progress bar, the outcome."""

import sys

from tqdm import tqdm


class Screen:
    """Banner, bar and outcome of one run, on standard output but for the bar, which goes to standard error."""

    folder = bar = None

    def begin(self, run, done=0):
        """run: the resolved settings of the run (what args.json holds); done: iterations before this start."""
        self.folder = run["folder"]
        size = f"{run['height']} x {run['width']} px"
        images = "1 image" if run["batch_size"] == 1 else f"{run['batch_size']} images"
        noises = f"noises 0..{run['opt_time']}" if run["opt_time"] < run["num_steps"] else "all noises"
        step = run["optimizer"] if run["precondition"] == "none" else run["precondition"]
        rows = {
            "model": f"{run['model']} ({run['prediction_type']}), {size}, {run['precision']} on {run['device']}",
            "prompt": f"{run['prompt']!r}" + (f", not {run['negative_prompt']!r}" if run["negative_prompt"] else ""),
            "reward": run["climbs"] + (f"; watching {', '.join(run['watched'])}" if run["watched"] else ""),
            "sampling": f"{run['num_steps']} steps, eta {run['eta']:g}, guidance {run['guidance_scale']:g}, "
            f"seed {run['seed']}, {images}",
            "optimizing": f"{'x_T' if run['eta'] == 0 else noises}, {run['opt_steps']} iterations, {step}, "
            f"lr {run['lr']:g}, gamma {run['gamma']:g}, checkpointing {run['checkpointing']}",
            "gradient": _gradient(run),
            "folder": (run["folder"] or "none") + (f", going on at iteration {done}" if done else ""),
        }
        for name, value in rows.items():
            if value is not None:
                print(f"{name:>11}  {value}")
        sys.stdout.flush()
        self.bar = tqdm(total=run["opt_steps"], initial=done, unit="it", dynamic_ncols=True)

    def iteration(self, metrics, states):
        best = [state.best_reward for state in states]
        self.bar.set_postfix_str(
            f"reward {metrics['reward']:.4f}, best {sum(best) / len(best):.4f}, P(z) {metrics['probability']:.2g}, "
            f"{metrics['seconds']:.2f} s/it",
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
            print(f"{image}best reward {reward:.4f} at iteration {step}, {first[b]:.4f} at iteration 0{why}")
        if result.folder is not None:
            print(f"pictures: {result.folder / 'evolution.png'}")


def _gradient(run):
    """Where the gradient comes from; nothing to say of the reward's own."""
    if run["estimator"] == "backprop":
        return None
    pairs = " in pairs" if run["antithetic"] else ""
    processes = f", {run['processes']} processes" if run["processes"] > 1 else ""
    return f"{run['estimator']}, {run['num_samples']} samples{pairs}, mu {run['mu']:g}{processes}"
