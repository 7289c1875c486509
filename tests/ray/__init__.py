"""Workers on a real Ray cluster of this machine: `make test-ray`. Skipped where Ray is not installed."""
