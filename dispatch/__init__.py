"""What serving code needs: vocabulary, kernel pool, lookup and runtime. Imports torch alone."""

from dks.dispatch.bins import Bins
from dks.dispatch.choice import Choice
from dks.dispatch.environment import Environment
from dks.dispatch.problem import Candidate, Precision, Problem

__all__ = ["Bins", "Candidate", "Choice", "Environment", "Precision", "Problem"]
