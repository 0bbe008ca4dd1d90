"""Code that a model wrote, run where it can do no harm: limits on time, memory, files and output, and no network."""

from fastpost.sandbox.limits import Limits, Outcome
from fastpost.sandbox.run import Tested, check, run, run_tests

__all__ = ["Limits", "Outcome", "Tested", "check", "run", "run_tests"]
