"""Thin shells that move events over SSE, WebSocket and gRPC. Each implements `Listener`."""
