"""What gateway and worker agree on: messages, error codes, log set-up. Runs in every process."""
