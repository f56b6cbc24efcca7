"""The step benchmark: rivals beside Back Razor on every backbone, each figure from a fresh process, all in turn."""
