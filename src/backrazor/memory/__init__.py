"""Memory by its names: what is predicted, what is saved, what the peak is, and what lies beside the peak.

- predicted: bytes from shapes alone (``predict``)
- saved: bytes autograd holds at the end of forward (``ledger``)
- peak: the highest allocation during a full step above what is resident (``measure_step``)
- four parts: weights, gradients, optimizer state and peak, all that a step holds (both); gradients can be given back
  while backward runs (``GradientRelease``)
"""

from .ledger import Ledger, LedgerRow, ledger
from .peak import Measurement, Step, measure_step, measure_steps
from .predict import Prediction, predict, weight_bytes
from .release import GradientRelease, state_bytes

__all__ = [
    "GradientRelease",
    "Ledger",
    "LedgerRow",
    "Measurement",
    "Prediction",
    "Step",
    "ledger",
    "measure_step",
    "measure_steps",
    "predict",
    "state_bytes",
    "weight_bytes",
]
