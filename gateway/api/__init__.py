"""Each module turns one interface's request into a `GenerateRequest` and events back; no sockets here."""
