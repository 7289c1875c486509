"""`degas top`: what gateways and workers do right now, from their metrics, for a terminal. Imports neither side."""
