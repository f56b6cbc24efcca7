"""Fine-tune any network with the activations kept for backward pruned: the forward pass stays dense and exact, only
what is saved is small.

    import backrazor as br
    report = br.razor_(model, br.RazorConfig(sparsity=0.9))   # in place; parameters and state_dict stay as they are
    br.unrazor_(model)                                        # the way back

``backrazor.nn`` and ``backrazor.functional`` are for layers of one's own: see ``register``.
"""

from . import memory
from .config import RazorConfig
from .convert import check_finite, razor_, unrazor_
from .energy import kept_energy
from .gradients import compare_gradients
from .nn import DROP_INS, register
from .report import Report

__all__ = [
    "DROP_INS",
    "RazorConfig",
    "Report",
    "check_finite",
    "compare_gradients",
    "kept_energy",
    "memory",
    "razor_",
    "register",
    "unrazor_",
]
