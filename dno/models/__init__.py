"""Text-to-image models: a base class, one file per family, one row per model."""
