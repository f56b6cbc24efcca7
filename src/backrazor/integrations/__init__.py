"""Callbacks for the training loops of other libraries. Each module imports its own, and ``backrazor`` imports none.

    from backrazor.integrations.transformers import RazorCallback    # pip install backrazor[transformers]
    from backrazor.integrations.lightning import RazorCallback       # pip install backrazor[lightning]

A callback razors the model before training, stops on bad numbers before every step of the optimizer, and logs what
autograd saves and how much of the activations survives at the steps that are logged.
"""
