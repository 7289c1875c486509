"""Owns how an unexpected exception is put into a log line: its type and its place in the code, never its message."""

from shared.logs import fault_fields as fault_fields
