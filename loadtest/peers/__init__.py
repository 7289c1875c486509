"""Owns Degas's peers: one small file an engine, each run in a process (and maybe an environment) of its own."""
