"""Methods: each finds the noise, or the weights, that a reward prefers. One file and one row per method.

A method is a subclass of `dno.methods.base.Method`, which says what it must have; `docs/extending.md` shows one whole.
"""

import importlib

# By the name on the command line: the module and the class.
METHODS = {
    "dno": ("dno.methods.noise_optimization", "NoiseOptimization"),
    "best_of_n": ("dno.methods.best_of_n", "BestOfN"),
}


def method_class(name):
    """The class of a method by its name. Raises UserError for an unknown one."""
    if not isinstance(name, str) or name not in METHODS:
        from dno.errors import UserError

        raise UserError(f"no method is called {name!r}; expected one of {', '.join(METHODS)}")
    module, cls = METHODS[name]
    return getattr(importlib.import_module(module), cls)
