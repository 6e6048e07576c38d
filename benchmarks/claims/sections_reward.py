"""Claims (a), (c) and (d): what raises a reward how fast."""

from claims.intervals import at_budget
from claims.section import Claim, Section, at_equal, compare, ending, say

# --- (a) -----------------------------------------------------------------------------------------------------


def section_a(results):
    against_draws, against_restarts, rows = [], [], []
    for objective in ("black", "sprites"):
        restarts = f"{objective} restarts"
        for share, words in ((0.25, "a quarter of the budget"), (1.0, "the whole budget")):
            against_draws += [
                at_equal(results, objective, objective, "draws", axis, share, f"{objective}, {words}")
                for axis in ("calls", "seconds")
            ]
        for share, words in ((0.5, "half of the budget"), (1.0, "the whole budget")):
            against_restarts.append(
                at_equal(results, objective, objective, restarts, "calls", share, f"{objective}, {words}")
            )
        for name, words in ((objective, "DNO"), ("draws", "best-of-N"), (restarts, "DNO, random restarts")):
            rows.append([objective, words, *_row_a(results, name, objective)])
    return Section(
        "a", "Reward against time: DNO, best-of-N, random restarts",
        "Best-of-N keeps the best of N independent draws. Random restarts are DNO restarted from a fresh noise every "
        f"{results.size.block} iterations, keeping the best. The reward is the best so far. The budget is that of "
        f"{results.size.iterations} iterations of DNO.",
        [
            Claim("DNO reaches a higher reward than best-of-N at equal cost.", against_draws),
            Claim("DNO reaches a higher reward than random restarts of DNO at equal cost.", against_restarts),
        ],
        [("Best reward so far, and the second judge's agreement with that image:",
          ["reward", "method", "start", "a quarter", "half", "all calls", "judge"], rows)],
    )  # fmt: skip


def _row_a(results, name, objective):
    prompts = results.prompts(name)
    if not prompts:
        return ["not measured"] + [""] * 4
    budget = results.calls(objective) * results.size.iterations
    best, unit = results.best(name, objective, prompts), results.calls(name)
    judge = results.at_best(name, objective, "judge", prompts, max(1, int(budget // unit)))
    return [say(best[..., 0]), *(say(at_budget(best, unit, s * budget)) for s in (0.25, 0.5, 1.0)), say(judge)]


# --- (c) -----------------------------------------------------------------------------------------------------


def section_c(results):
    last = [name for name in results.rows if name.startswith("black last ")]
    faster = "black eta 0 lr 0.05"
    less = [("black eta 0.5", "0.5"), ("black eta 0", "0"), (faster, "0 with step size 0.05")]

    def ends(other, label, gained=False):
        """What the plain run has reached at the end, or gained since its start, minus the same of another."""

        def difference(prompts):
            mine, theirs = (results.best(name, "black", prompts) for name in ("black", other))
            reached = mine[..., -1] - theirs[..., -1]
            return reached - (mine[..., 0] - theirs[..., 0]) if gained else reached

        return compare(results, ["black", other], label, difference)

    names = [("black", "eta 1, all noises"), ("black eta 0.5", "eta 0.5, all noises"), ("black eta 0", "eta 0"),
             (faster, "eta 0, step size 0.05"), ("black x_T only", "eta 1, x_T alone"),
             *((name, f"eta 1, --opt_time {name.split()[-1]}") for name in last)]  # fmt: skip
    rows = []
    for name, words in names:
        prompts = results.prompts(name)
        cells = ["not measured"] + [""] * 3
        if prompts:
            best = results.best(name, "black", prompts)
            budget = min(results.calls(row) * results.rows[row].length for row, _ in names)
            at = at_budget(best, results.calls(name), budget)
            cells = [say(best[..., 0]), say(at), say(best[..., -1]), say(ending(results, name, "judge", prompts))]
        rows.append([words, f"{results.calls(name)}", *cells])
    return Section(
        "c", "eta, and which noises are optimized",
        "Darkness, best reward so far. Where a run starts depends on eta, so both are compared: reward reached, and "
        "that gained since the start. At eta 0 the starting noise alone reaches the image, so a second, larger step "
        "size is measured there. x_T alone at eta 1 leaves each step's noise as it was drawn; --opt_time K moves the "
        "noises of the last K + 1 steps and ends the backward pass there.",
        [
            Claim(
                "The more noise the sampler adds (eta), the faster the reward rises.",
                [ends(name, f"eta 1 against {words}, {gain}", gained=gain == "gained")
                 for name, words in less for gain in ("reached", "gained")],
            ),
            Claim("Optimizing all noises raises the reward faster than x_T alone.",
                  [ends("black x_T only", "eta 1, equal iterations and calls")]),
            Claim(
                "Optimizing all noises raises the reward faster than those of the last steps.",
                [one for name in last for one in (
                    ends(name, f"against --opt_time {name.split()[-1]}, equal iterations"),
                    at_equal(results, "black", "black", name, "calls", 1.0,
                              f"against --opt_time {name.split()[-1]}", least=True))],
            ),
        ],
        [("", ["run", "calls per iteration", "start", "at equal calls", "last iteration", "judge at the end"], rows)],
    )  # fmt: skip


# --- (d) -----------------------------------------------------------------------------------------------------


def section_d(results):
    image, noise, pairs, zeroth = "jpeg", "jpeg hybrid", "jpeg hybrid antithetic", "jpeg zo"

    def equal(name, other, label, axes=("calls", "seconds")):
        return [at_equal(results, "jpeg", name, other, axis, 1.0, label, least=True) for axis in axes]

    names = [(image, "hybrid_image"), (noise, "hybrid"), (pairs, "hybrid, antithetic"), (zeroth, "zo"),
             ("draws", "best-of-N")]  # fmt: skip
    budget = min(results.calls(name) * results.rows[name].length for name, _ in names)
    rows = []
    for name, words in names:
        prompts, row = results.prompts(name), results.rows[name]
        cells = ["not measured"] + [""] * 3
        if prompts:
            best = results.best(name, "jpeg", prompts)
            at, judge = at_budget(best, results.calls(name), budget), results.at_best(name, "jpeg", "judge", prompts)
            cells = [say(best[..., 0]), say(at), say(best[..., -1]), say(judge)]
        seconds = results.seconds(name)
        samples = row.settings.get("num_samples", "")
        rows.append([words, samples, row.length, results.calls(name), f"{seconds:.2f}" if seconds else "", *cells])
    return Section(
        "d", "Estimated gradients: JPEG size, a reward without a gradient",
        "The reward is minus the size in kilobytes at JPEG quality 95, the best so far. hybrid perturbs the noise and "
        "samples again, hybrid_image perturbs the image, zo does not use the model's Jacobian; mu 0.01.",
        [
            Claim(
                "The hybrid gradient climbs faster than zeroth order at equal cost.",
                equal(noise, zeroth, "hybrid against zo") + equal(image, zeroth, "hybrid_image against zo"),
            ),
            Claim(
                "The hybrid gradient climbs faster than best-of-N at equal cost.",
                equal(noise, "draws", "hybrid against best-of-N")
                + equal(image, "draws", "hybrid_image against best-of-N"),
            ),
            Claim("Antithetic pairs climb faster than independent samples.",
                  equal(pairs, noise, "hybrid, equal number of samples", ("calls",))),
            Claim("Perturbing the noise climbs faster than perturbing the image at equal cost.",
                  equal(noise, image, "hybrid against hybrid_image")),
        ],
        [("", ["estimator", "q", "iterations", "calls per iteration", "seconds per iteration", "start",
               "at equal calls", "at its end", "judge at its best"], rows)],
    )  # fmt: skip
