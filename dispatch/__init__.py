"""What serving code needs: the vocabulary, the kernel pool, the lookup and the runtime. Imports torch alone."""

from dks.dispatch.bins import Bins
from dks.dispatch.choice import Choice
from dks.dispatch.environment import Environment
from dks.dispatch.problem import Candidate, Precision, Problem

__all__ = ["Bins", "Candidate", "Choice", "Environment", "Precision", "Problem"]
