"""The test suites; a package, so that suites can share ``tests.oracles``."""
