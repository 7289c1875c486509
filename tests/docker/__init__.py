"""Real containers: `make test-docker`, with a Docker engine and Compose 2.24 at hand."""
