"""Claims (b), (e) and (f): what of the picture is left when a reward has been raised."""

import numpy as np

from claims.intervals import first_at_least
from claims.plan import GAMMAS, LR, OBJECTIVES
from claims.section import BAR, P_FLOOR, Claim, Section, at_equal, compare, ending, held, log_p, say, tuned_rows

START = "before optimization"


# --- (b) -----------------------------------------------------------------------------------------------------


def section_b(results):
    def end(name, key):
        return lambda prompts: ending(results, name, key, prompts)

    def change(key, sign):
        def difference(prompts):
            curve = results.curve("black", key, prompts)
            return sign * (curve[..., -1] - curve[..., 0])

        return difference

    hacked = [
        compare(results, ["black"], "the reward rises", change("black", 1)),
        compare(results, ["black"], "the second judge's agreement falls", change("judge", -1)),
        compare(results, ["black"], "the held-out reward sprites falls", change("sprites", -1)),
    ]
    probable, same_time, same_reward = [], [], []
    for gamma in GAMMAS:
        name = f"black gamma {gamma:g}"
        both = ["black", name]

        def gain(key, name=name):
            return lambda prompts: end(name, key)(prompts) - end("black", key)(prompts)

        def at_equal_reward(key, name=name):
            return lambda prompts: _at_equal_reward(results, name, "black", "black", key, prompts)

        probable.append(compare(results, both, f"log10 P(z), gamma {gamma:g}", gain("probability")))
        same_time += [compare(results, both, f"{key}, gamma {gamma:g}", gain(key)) for key in ("judge", "sprites")]
        same_reward += [
            compare(results, both, f"{key}, gamma {gamma:g}", at_equal_reward(key)) for key in ("judge", "sprites")
        ]
    rows = []
    for name, gamma in (("black", 0), *((f"black gamma {g:g}", g) for g in GAMMAS)):
        prompts = results.prompts(name)
        keys = ("black", "probability", "judge", "sprites", "jpeg")
        if prompts and not rows:
            starts = [results.curve(name, key, prompts)[..., 0] for key in keys]
            rows.append([START, say(starts[0]), say(log_p(starts[1])), *map(say, starts[2:])])
        cells = [say(end(name, key)(prompts)) for key in keys] if prompts else ["not measured"] + [""] * 4
        rows.append([f"gamma {gamma:g}", *cells])
    return Section(
        "b", "Darkness with and without the probability regularizer",
        f"The end of {results.size.iterations} iterations. P(z) is that of all noise together, cut at {P_FLOOR:g}. "
        "sprites (the embedded CLIP's agreement) and jpeg (minus kilobytes) are held-out rewards. At equal reward "
        "means: for each image, the first iteration of either run with the lower of their two highest rewards.",
        [
            Claim("Without the regularizer the reward is hacked: it rises while what is held out falls.", hacked),
            Claim("The regularizer keeps the noise probable (against gamma 0, same iterations).", probable),
            Claim("The regularizer keeps the prompt in the picture (against gamma 0, same iterations).", same_time),
            Claim("The regularizer keeps the prompt in the picture at equal reward.", same_reward),
        ],
        [("", ["run", "reward", "log10 P(z)", "judge", "sprites", "jpeg"], rows)],
    )  # fmt: skip


def _at_equal_reward(results, name, other, objective, key, prompts):
    """key of `name` minus that of `other` where both have the same reward: (P, S)."""
    level = np.minimum(*(results.best(row, objective, prompts)[..., -1] for row in (name, other)))
    found = []
    for row in (name, other):
        where = first_at_least(results.curve(row, objective, prompts), level)[..., None]
        found.append(np.take_along_axis(results.curve(row, key, prompts), where, axis=-1)[..., 0])
    return found[0] - found[1]


# --- (e) -----------------------------------------------------------------------------------------------------


def section_e(results):
    iterations, cost, kept, rows = [], [], [], []
    length = results.size.iterations
    for objective in ("black", "sprites"):
        full, skip = objective, f"{objective} skip_unet"

        def same_iterations(prompts, full=full, skip=skip, objective=objective):
            mine, other = (results.best(name, objective, prompts)[..., length - 1] for name in (full, skip))
            return mine - other

        def highest(prompts, full=full, skip=skip, objective=objective):
            return held(results, full, objective, prompts) - held(results, skip, objective, prompts)

        iterations.append(compare(results, [full, skip], f"{objective}, {length} iterations", same_iterations))
        cost += [
            at_equal(results, objective, full, skip, axis, 1.0, objective, least=True) for axis in ("calls", "seconds")
        ]
        kept.append(compare(results, [full, skip], f"{objective}, highest with the judge at {BAR} or more", highest))
        for name, words in ((full, "full"), (skip, "skip_unet")):
            prompts, cells = results.prompts(name), ["not measured"] + [""] * 4
            if prompts:
                best = results.best(name, objective, prompts)
                cells = [best[..., 0], best[..., length - 1], best[..., -1], held(results, name, objective, prompts),
                         ending(results, name, "judge", prompts)]  # fmt: skip
                cells = list(map(say, cells))
            rows.append([objective, words, results.rows[name].length, results.calls(name), *cells])
    return Section(
        "e", "The full gradient, and one that bypasses the UNet",
        "skip_unet holds the UNet's output constant, so its backward pass costs no denoiser call; it gets twice the "
        "iterations.",
        [
            Claim("The full gradient climbs further in the same number of iterations.", iterations),
            Claim("The full gradient climbs further at equal cost.", cost),
            Claim("The full gradient reaches a higher reward while the picture still shows its prompt.", kept),
        ],
        [("", ["reward", "gradient", "iterations", "calls per iteration", "start", f"iteration {length}", "at its end",
               f"highest, judge >= {BAR}", "judge at the end"], rows)],
    )  # fmt: skip


# --- (f) -----------------------------------------------------------------------------------------------------


def section_f(results):
    fewer, quicker, higher, truer, regularized, rows = [], [], [], [], [], []
    for objective in OBJECTIVES:
        adamw, spectral, gamma = tuned_rows(results.size, objective)
        names, alone = [*adamw, *spectral], f"{objective} spectral lr {LR:g}"

        def iterations(prompts, objective=objective, adamw=adamw, spectral=spectral):
            return _fewest(results, adamw, objective, prompts) - _fewest(results, spectral, objective, prompts)

        def seconds(prompts, objective=objective, adamw=adamw, spectral=spectral):
            if None in (results.seconds(adamw[0]), results.seconds(spectral[0])):
                return None
            theirs = _fewest(results, adamw, objective, prompts) * results.seconds(adamw[0])
            return theirs - _fewest(results, spectral, objective, prompts) * results.seconds(spectral[0])

        def reward(prompts, objective=objective, adamw=adamw, spectral=spectral):
            return _highest(results, spectral, objective, prompts) - _highest(results, adamw, objective, prompts)

        def with_gamma(prompts, objective=objective, gamma=gamma, alone=alone):
            return held(results, gamma, objective, prompts) - held(results, alone, objective, prompts)

        fewer.append(compare(results, names, f"{objective}, iterations saved", iterations))
        quicker.append(compare(results, names, f"{objective}, seconds saved", seconds))
        higher.append(compare(results, names, f"{objective}, reward", reward))
        for lr, one, other in zip(results.size.step_sizes, spectral, adamw):

            def judge(prompts, objective=objective, one=one, other=other):
                return _at_equal_reward(results, one, other, objective, "judge", prompts)

            truer.append(compare(results, [one, other], f"{objective}, step size {lr:g}, judge", judge))
        regularized.append(compare(results, [gamma, alone], f"{objective}, reward", with_gamma))
        for name in (*names, gamma):
            rows.append(_row_f(results, name, objective))
    return Section(
        "f", "The spectral step against AdamW",
        f"Step sizes {', '.join(f'{lr:g}' for lr in results.size.step_sizes)}. The frontier is the highest reward of a "
        f"run among the iterations in which the second judge gives its prompt {BAR} or more; a run that ends before "
        "its picture is lost counts with what it has, to the disadvantage of the slow ones. The level is half of the "
        f"way from an image's start to the highest reward of its AdamW run at {LR:g}; it is reached at the first "
        f"iteration that has it with the judge at {BAR} or more, and a run that never has is counted with "
        f"{results.size.iterations} iterations. Each method is taken at the step size that is best for it on average. "
        "jpeg is climbed with the estimator hybrid_image. In the picture, left, a point is one iteration of one step "
        "size, a mean over all images, and a line the frontier of these points; right the best reward so far.",
        [
            Claim("The spectral step reaches the level in fewer iterations than AdamW.", fewer),
            Claim("The spectral step reaches the level in less time than AdamW.", quicker),
            Claim("The spectral step reaches a higher reward on the frontier than AdamW.", higher),
            Claim("At equal reward the spectral step's picture agrees better with its prompt than AdamW's.", truer),
            Claim(f"With gamma {GAMMAS[-1]:g} the spectral step reaches a higher reward on the frontier.", regularized),
        ],
        [("", ["reward", "run", "start", "at its end", "judge at the end", f"highest, judge >= {BAR}",
               "level reached by", "iterations to it"], rows)],
    )  # fmt: skip


def _to_level(results, name, objective, prompts):
    """Iterations to the level with the judge at the bar, (P, S); all of them where it was not reached."""
    plain = results.curve(objective, objective, prompts)
    level = (plain[..., 0] + np.nanmax(plain, axis=-1)) / 2
    rewards, judged = results.curve(name, objective, prompts), results.curve(name, "judge", prompts)
    found = first_at_least(np.where(judged >= BAR, rewards, -np.inf), level)
    return np.where(found < rewards.shape[-1], found, results.size.iterations)


def _fewest(results, names, objective, prompts):
    return min((_to_level(results, name, objective, prompts) for name in names), key=np.mean)


def _highest(results, names, objective, prompts):
    return max((held(results, name, objective, prompts) for name in names), key=np.mean)


def _row_f(results, name, objective):
    words = name.removeprefix(objective).strip() or f"lr {LR:g}"
    words = words if words.startswith("spectral") else f"AdamW {words}"
    prompts = results.prompts(name, objective)
    if not prompts:
        return [objective, words, "not measured"] + [""] * 5
    curve, to_level = results.curve(name, objective, prompts), _to_level(results, name, objective, prompts)
    reached = to_level < results.size.iterations
    return [
        objective, words, say(curve[..., 0]), say(curve[..., -1]), say(ending(results, name, "judge", prompts)),
        say(held(results, name, objective, prompts)), f"{reached.sum()} of {reached.size}", say(to_level),
    ]  # fmt: skip
