"""The gateway process: one asyncio loop, no torch, no locks. Sockets in front, ZeroMQ to the workers behind."""
