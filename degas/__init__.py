"""The command line and the supervisor: the only place that knows both gateway and worker, and of them imports the settings."""
