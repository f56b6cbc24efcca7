"""One module per command of ``python -m razorlab``; each has ``main(arguments) -> exit code``."""
