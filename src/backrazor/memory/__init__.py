"""Memory by its three names: what is predicted, what is saved, what the peak is.

predicted  bytes from shapes alone (``predict``)
saved      bytes autograd holds at the end of forward (``ledger``)
peak       the highest allocation during a full step above what is resident (``measure_step``)
"""

from .ledger import Ledger, LedgerRow, ledger
from .peak import Measurement, Step, measure_step, measure_steps
from .predict import Prediction, predict

__all__ = [
    "Ledger",
    "LedgerRow",
    "Measurement",
    "Prediction",
    "Step",
    "ledger",
    "measure_step",
    "measure_steps",
    "predict",
]
