"""Compiled code of the gateway: one inner loop, which writes a step's tokens to their clients."""
