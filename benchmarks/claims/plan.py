"""What is measured: one row per measurement, and which claim needs which of them."""

from dataclasses import asdict, dataclass

PROMPTS = (
    "white duck", "red car", "blue fish", "green tree", "yellow house", "black cat", "orange star", "purple ball",
)  # fmt: skip
GAMMAS = (0.1, 1.0, 10.0)
OBJECTIVES = ("black", "white", "sprites", "jpeg")
LR = 0.02  # of every run that does not say otherwise
# In guided denoiser calls: backward through a call costs two calls, by convention.
BACKWARD = 2


@dataclass(frozen=True)
class Size:
    """How much is measured.

    iterations: of a run with the true gradient or with `hybrid_image`; estimates: of one whose samples are rendered.
    draws: N of best-of-N. block: iterations from one random restart to the next.
    step_sizes: of claim (f), `LR` among them.
    samples: q of the estimators that render theirs; image_samples: q of `hybrid_image`.
    """

    prompts: tuple = PROMPTS
    seeds: int = 3
    first_seed: int = 0
    model: str = "sprites"
    num_steps: int = 8
    iterations: int = 16
    estimates: int = 6
    draws: int = 48
    block: int = 4
    step_sizes: tuple = (LR, 0.05, 0.1)
    samples: int = 8
    image_samples: int = 16

    @property
    def common(self):
        """The settings of `align` that all runs share."""
        return {"model": self.model, "num_steps": self.num_steps, "batch_size": self.seeds, "seed": self.first_seed}


FAST = Size(prompts=PROMPTS[:3], seeds=2, num_steps=6, iterations=8, estimates=4, draws=24, samples=4)


@dataclass(frozen=True)
class Measurement:
    """One row, measured once per prompt.

    kind: "run" (`align`), "restarts" (`align` from a fresh noise every `block` iterations), "start" (`align` that moves
        x_T alone), or "draws" (no optimization).
    settings: those of `align` that are its own. length: iterations, or draws.
    """

    name: str
    kind: str
    length: int
    settings: dict

    def key(self, size):
        """All that the numbers depend on but the prompt, for the name of the file."""
        block = {"block": size.block} if self.kind == "restarts" else {}
        return {"kind": self.kind, "length": self.length, **self.settings, **size.common, **block}

    @property
    def cost(self):
        """Of the settings, what the time of an iteration depends on: rows that agree in it are timed once."""
        same = {name: value for name, value in self.settings.items() if name not in ("lr", "antithetic")}
        return {"draws": self.kind == "draws"} | same | ({"gamma": 1.0} if "gamma" in same else {})

    def calls(self, size):
        """Guided denoiser calls of one iteration (or draw) on one image."""
        steps, settings = size.num_steps, self.settings
        if self.kind == "draws":
            return steps
        if settings.get("gradient") == "skip_unet":
            return steps  # backward passes the network by
        estimator, samples = settings.get("estimator", "backprop"), settings.get("num_samples", 0)
        if estimator == "zo":
            return (1 + samples) * steps
        # With K < T backward ends at the step whose noise is the first that moves.
        differentiated = min(settings.get("opt_time", steps), steps)
        with_gradient = steps + BACKWARD * differentiated
        # hybrid renders its reference once more, in the same batches as the samples.
        return with_gradient + ((1 + samples) * steps if estimator == "hybrid" else 0)


def plan(size):
    """{claim: [Measurement]}, in the order in which they are measured. Several claims may need the same one."""
    rows = {}

    def row(name, kind="run", length=None, **settings):
        if name not in rows:
            objective = {} if kind == "draws" else {"objective": settings.pop("objective", name.split()[0]), "lr": LR}
            rows[name] = Measurement(name, kind, length or size.iterations, {**objective, **settings})
        return rows[name]

    def estimated(name, estimator, length, samples, **settings):
        return row(name, length=length, estimator=estimator, num_samples=samples, batch_per_device=8, **settings)

    def tuned(objective, lr, precondition="none", gamma=0.0):
        """The row of one step size, which for AdamW and `LR` is the objective's plain row."""
        name = objective if precondition == "none" else f"{objective} {precondition}"
        own = {"lr": lr} if precondition == "none" else {"lr": lr, "precondition": precondition}
        name += f" lr {lr:g}" if precondition != "none" or lr != LR else ""
        if gamma:
            name, own = f"{name} gamma {gamma:g}", own | {"gamma": gamma}
        if objective == "jpeg":
            return estimated(name, "hybrid_image", size.iterations, size.image_samples, **own)
        return row(name, **own)

    draws = row("draws", "draws", size.draws)
    last = sorted({max(1, size.num_steps // 2), max(1, size.num_steps // 5)}, reverse=True)
    table = {
        "a": [
            tuned("black", LR), draws, row("black restarts", "restarts"),
            tuned("sprites", LR), row("sprites restarts", "restarts"),
        ],
        "b": [tuned("black", LR), *(tuned("black", LR, gamma=gamma) for gamma in GAMMAS)],
        "e": [
            tuned("black", LR), row("black skip_unet", length=2 * size.iterations, gradient="skip_unet"),
            tuned("sprites", LR), row("sprites skip_unet", length=2 * size.iterations, gradient="skip_unet"),
        ],
        "c": [
            tuned("black", LR), row("black eta 0", eta=0.0), row("black eta 0.5", eta=0.5),
            row("black x_T only", "start"), *(row(f"black last {k}", opt_time=k) for k in last),
            row("black eta 0 lr 0.05", eta=0.0, lr=0.05),
        ],
        "d": [
            tuned("jpeg", LR), draws,
            estimated("jpeg hybrid", "hybrid", size.estimates, size.samples),
            estimated("jpeg hybrid antithetic", "hybrid", size.estimates, size.samples, antithetic=True),
            estimated("jpeg zo", "zo", size.estimates, size.samples),
        ],
        "f": [
            one
            for objective in OBJECTIVES
            for one in (
                *(tuned(objective, lr) for lr in size.step_sizes),
                *(tuned(objective, lr, "spectral") for lr in size.step_sizes),
                tuned(objective, LR, "spectral", GAMMAS[-1]),
            )
        ],
    }  # fmt: skip
    return table


def describe(size):
    return asdict(size)
