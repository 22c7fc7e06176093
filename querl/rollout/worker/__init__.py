"""What runs inside a server's processes; this folder alone is on their search path."""
