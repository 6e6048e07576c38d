"""Silence for what the libraries say; whatever matters of it is said by this project, in one line."""

import contextlib
import warnings


@contextlib.contextmanager
def quiet():
    """No progress bars of diffusers, transformers and the hub, and no advice, such as on a missing safety checker."""
    import diffusers.utils.logging
    import huggingface_hub.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    hub = huggingface_hub.utils.logging.get_verbosity()
    huggingface_hub.utils.logging.set_verbosity_error()
    for library in libraries:
        library.set_verbosity(library.CRITICAL)  # an error is raised too
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        huggingface_hub.utils.logging.set_verbosity(hub)
        for library, (verbosity, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()
