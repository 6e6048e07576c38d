"""Reports: figures and pages of runs, made from their folders alone."""
