"""Runs: what a run writes, shows, tracks and stops by; nothing mathematical lives here."""
