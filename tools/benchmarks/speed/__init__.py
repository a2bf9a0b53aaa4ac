"""Parts of engine_speed.py: networks, what runs them, timing in turns, and the machine's own limits."""
