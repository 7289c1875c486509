"""Commands that torment a real service on this machine: a soak, and the table of faults."""
