"""Owns the description of this gateway's HTTP interface: `/openapi.json`."""
