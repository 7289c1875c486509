"""Measures Degas from the outside: load scenarios, their client and their report. Imports no other package of ours."""
