"""Odd inputs, many of them, for every parser of what comes from outside: `python -m tests.fuzz --inputs 1000000`."""
