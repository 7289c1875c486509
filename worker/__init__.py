"""The worker process: one per device. Sockets on I/O threads, torch on the decode thread alone."""
